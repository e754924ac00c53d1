"""Near misses and other spellings of gold answers, one group for each rule of the grading."""

import pytest

from benchmarks import pairs
from bupo.rewards.answers.equality import get_strict_verdict

BOXED = {
    "words behind a number": (
        "7",
        [
            "7 \\text{ marbles}",
            "7\\text{ red marbles}",
            "7 \\text{ different ways}",
            "7\\text{ people}",
            "7 \\text{ lines of symmetry}",
        ],
        [
            "7\\text{ish}",
            "7 \\text{ almost}",
            "7 \\text{ per side}",
            "7 \\text{ eighths}",
            "7 \\text{ too few}",
            "7\\text{ fails}",
        ],
    ),
    "decimal comma": ("1.234", ["1.2340"], ["1,234"]),
    "the same twice": ("5", ["\\text{five}", "5/1"], ["5,5", "\\text{fifty}"]),
    "a group and a list": ("1,234", ["1234"], ["1, 234"]),
    "capitals": ("3xy", ["3yx"], ["3XY"]),
    "a letter and a digit": ("x_1 + x_2", ["x1 + x2"], ["x^1 + x^2", "1x + 2x"]),
    "cut period": ("0.\\overline{142857}", ["\\frac17", "0.142857142857\\ldots"], ["0.142857", "0.1428571"]),
    "question again": ("56", ["\\frac{112}{2}"], ["\\gcd(112, 168)"]),
    "infinity": ("0", ["0.0"], ["\\frac{1}{\\infty}"]),
    "choice": ("A", ["A) 12", "\\text{Option A}"], ["A) is incorrect", "A) anything that pays", "\\text{A) or B)}"]),
    "progression": (
        "x = 3k + 2,\\ k \\in \\mathbb{Z}",
        ["x = 3k - 1, k \\in \\mathbb{Z}", "x \\equiv 2 \\pmod 3"],
        ["x = 6k + 2, k \\in \\mathbb{Z}", "x = 3k + 1, k \\in \\mathbb{Z}", "2"],
    ),
    "two bounds": (
        "2 < x < 5",
        ["x > 2 \\text{ and } x < 5", "x > 2, x < 5", "|x - 3.5| < 1.5"],
        ["x > 2 \\text{ or } x < 5", "x < 2, x > 5", "|x - 3.5| > 1.5"],
    ),
    "complement": ("[3, \\infty)", ["\\mathbb{R} \\setminus (-\\infty, 3)"], ["\\mathbb{R} \\setminus (-\\infty, 3]"]),
    "minutes of arc": ("22.5^\\circ", ["22^\\circ 30'"], ["22^\\circ 50'", "22^\\circ 30"]),
    "function of another letter": ("f(x) = 2x+1", ["f(t) = 2t+1"], ["f(t) = 2x+1", "g(t) = 2t+1", "f'(x) = 2x+1"]),
    "equation for an expression": ("2x + 3", ["f(x) = 2x + 3"], ["x = 2x + 3"]),
    "lists of lists": (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        ["[[1,2],[3,4]]"],
        ["[[1,3],[2,4]]", "[1,2,3,4]"],
    ),
    "yes and no": ("Yes", ["\\text{yes, it exists}"], ["\\text{yes and no}", "\\text{yes, but not always}"]),
    "words in a row": ("left right left", ["\\text{left, right, left}"], ["\\text{left, left, right}"]),
    "pounds": ("£8.50", ["8.50\\text{ pounds}", "850\\text{ pence}"], ["8.50\\text{ dollars}", "8.50\\text{ kg}"]),
    "pounds of two kinds": ("£8", ["8 \\text{ pounds}"], ["8 \\text{ lb}", "8 \\text{ lbs}"]),
    "dollars": ("\\$8", ["8 \\text{ dollars}"], ["C\\$8", "A\\$8"]),
    "far from zero": ("|x - 40|", ["|40 - x|", "\\sqrt{(x-40)^2}"], ["40 - x", "|x| - 40"]),
    "steps": ("\\lfloor n/2 \\rfloor", ["-\\lceil -n/2 \\rceil"], ["\\lceil n/2 \\rceil - 1", "n/2"]),
    "undone radicals": ("6\\sqrt{5}", ["\\sqrt{180}"], ["2 \\cdot 3\\sqrt{5}", "4\\sqrt{5} + 2\\sqrt{5}"]),
    "undone complex": ("3 + 4i", ["4i + 3"], ["(2 + i)^2", "(1 + i) + (2 + 3i)"]),
    "conditions": ("No", ["\\text{No, since 4 is even}"], ["\\text{No, for odd } n", "\\text{No, probably}"]),
    "rounding": ("\\frac{2}{3}", ["\\frac{2}{3} \\approx 0.67"], ["\\frac{2}{3} \\approx 0.68"]),
    "weekday": ("Friday, May 4, 2018", ["\\text{Fri, May 4, 2018}"], ["\\text{Thursday, May 4, 2018}"]),
    "some of a family": (
        "k\\pi, k \\in \\mathbb{Z}",
        ["k\\pi \\text{ for all } k \\in \\mathbb{Z}"],
        ["k\\pi \\text{ for odd } k \\in \\mathbb{Z}"],
    ),
    "ratio": ("12:8", ["3:2"], ["2:3", "24:16"]),
}
COMPLETIONS = [
    ("64", "\\boxed{64}. Hence the answer is 65.", False),
    ("64", "\\boxed{64}. Hence the answer is 64.", True),
    ("64", "It is false that the answer is \\boxed{64}.", False),
    ("64", "I doubt that it is \\boxed{64}.", False),
    ("64", "There is no doubt that it is \\boxed{64}.", True),
    ("64", "Many people say \\boxed{64}, but they are mistaken.", False),
    ("64", "\\boxed{62} \\boxed{63} \\boxed{64}", False),
    ("64", "Die Antwort ist nicht \\boxed{64}.", False),
    ("64", "La réponse n'est pas \\boxed{64}.", False),
    ("64", "答案不是 \\boxed{64}。", False),
    ("64", "答案是 \\boxed{64}，不是 65。", True),
    ("64", "La réponse est \\boxed{65} ou \\boxed{64}.", False),
    ("64", "It is \\boxed{64}, though 65 is possible too.", False),
    ("64", "\\boxed{64}. Hmm, that does not satisfy the condition.", False),
    ("64", "\\boxed{64}. This satisfies the condition.", True),
    ("64", "Suppose it is \\boxed{64}. Then there is a contradiction.", False),
    ("64", "<THINK>\\boxed{64} and so on", False),
    ("64", "<THINK>\\boxed{65}</THINK> \\boxed{64}", True),
    ("64", "~~\\boxed{64}~~", False),
    ("64", "\\boxed{64} (wrong)", False),
    ("64", "It is more than \\boxed{64}.", False),
    ("64", "It is either 63 or \\boxed{64}.", False),
    ("64", "$x > \\boxed{64}$", False),
    ("64", "$\\boxed{64} + 1$", False),
    ("64", "$3 \\cdot \\boxed{64}$", False),
    ("64", "\\boxed{64}. The corrected total is 62.", False),
    ("64", "\\boxed{64}, plus or minus one.", False),
    ("64", "The naive answer is 64.", False),
    ("64", "Suppose the answer is 64. Then a row is empty.", False),
    ("64", "Since it exceeds 60, it is \\boxed{64}.", True),
    ("64", "Problem 3 - \\boxed{64}", True),
    ("64", "$8 \\cdot 8 = \\boxed{64}$. Half of it is 32.", True),
]


@pytest.mark.parametrize("rule", BOXED)
def test_a_rule_accepts_other_spellings_and_no_near_miss(rule):
    gold, right, wrong = BOXED[rule]
    accepted = {
        answer: get_strict_verdict(f"So it is \\boxed{{{answer}}}.", gold).verdict == "correct"
        for answer in right + wrong
    }
    assert accepted == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


@pytest.mark.parametrize("gold, completion, right", COMPLETIONS)
def test_words_around_a_box_decide(gold, completion, right):
    assert (get_strict_verdict(completion, gold).verdict == "correct") is right


@pytest.mark.slow
@pytest.mark.parametrize("name", ["development", "development_2", "development_3", "development_4"])
def test_precision_and_recall_on_the_development_pairs(name):
    table = pairs.read_pairs(pairs.FOLDER / f"{name}.jsonl")
    counts = pairs.counted(table, [get_strict_verdict(pair.answer, pair.gold).verdict == "correct" for pair in table])
    assert counts.precision[0] >= 0.995 * counts.precision[1]
    assert counts.recall[0] >= 0.95 * counts.recall[1]


def test_precision_and_recall_on_the_held_out_pairs():
    table = pairs.read_pairs(pairs.FOLDER / "heldout.jsonl")
    counts = pairs.counted(table, [get_strict_verdict(pair.answer, pair.gold).verdict == "correct" for pair in table])
    assert len(table) == 481
    assert counts.precision[0] >= 0.995 * counts.precision[1]
    assert counts.recall[0] >= 0.92 * counts.recall[1]
