"""The strict verdict: the final answer of a completion, its class, and equality within the class."""

import json
import random
import re
import sys
import threading

import pytest

from bupo import MathGrader, math_reward
from bupo.rewards import grader_worker
from bupo.rewards.answers.equality import get_strict_verdict
from bupo.rewards.answers.extraction import extract_final_answer
from bupo.rewards.answers.notation import normalize_notation
from bupo.rewards.answers.parsing import UnreadableAnswer, parse_expression, parse_value
from bupo.rewards.grader import _grade_integers, check_gold_answers
from tests.helpers.grading_pairs import PAIRS, REFUSED, rows


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(deadline=60.0, processes=2)
    yield grader
    grader.close()


# -- through the grading processes: answers that earlier rules graded wrongly

WERE_PAID = [
    ("1.6\\times10^{-19}", "9.1\\times10^{-31}"), ("\\frac{1}{2^{61}}", "1/2^{60}"),
    ("olleh", "hello"), ("2024-05-12", "2024-12-05"), ("10:30", "1:3"), ("3:4:5", "3:5:4"),
    ("3", "n=3k, k\\in\\mathbb{Z}"), ("4", "\\geq 4"), ("6", "2x=6"), ("9", "x^2=9"), ("12 \\text{ hours}", "12\\text{ min}"),
    ("4, 4, 9", "4, 9, 9"), ("A B D C", "A\\ B\\ C\\ D"), ("\\$3 \\text{ million}", "\\$3"),
]  # fmt: skip
WERE_REFUSED = [
    ("1+2i", "2i+1"), ("n=m", "m=n"), ("45", "45°"), ("6.02\\times10^{23}", "6.02×10²³"), ("-5", "–5"),
    ("1234567", "1\u2009234\u2009567"), ("\\frac{11}{4}", "2 3/4"), ("\\frac13", "0.\\dot3"), ("12", "12元"),
    ("(1,2,3)", "\\langle1,2,3\\rangle"), ("12.5", "12.5\\%"), ("x \\ne 3", "3 \\neq x"),
    ("\\text{DNE}", "\\text{does not exist}"), ("July 4, 1776", "\\text{4 July 1776}"), ("5:2", "5\\colon 2"),
]  # fmt: skip


def test_earlier_mistakes_are_corrected(grader):
    for pairs, expected in ((WERE_PAID, False), (WERE_REFUSED, True)):
        golds, answers = zip(*pairs, strict=True)
        verdicts = grader.grade([f"So it is $\\boxed{{{answer}}}$." for answer in answers], golds)
        paid = [verdict == "correct" for verdict in verdicts]
        assert [pair for pair, pays in zip(pairs, paid, strict=True) if pays != expected] == []


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("An upper bound is \\boxed{15}. Hence the maximum is \\boxed{1", "15"),
        ("<think>It is \\boxed{36}.</think> The answer is 12.", "36"),
        ("<think>So \\boxed{7}. But wait", "7"),
        ("So the answer is not \\boxed{12}.", "12"),
        ("\\boxed{12} cannot be the answer.", "12"),
    ],
)
def test_a_box_that_is_not_an_answer_gets_no_reward(completion, gold):
    assert math_reward([completion], answer=[gold]) == [0.0]


def test_texts_are_gold_answers():
    """Only an empty gold answer gives no reward."""
    assert math_reward(["\\boxed{\\text{hello}}", "\\boxed{1}"], answer=["hello", ""]) == [1.0, None]
    check_gold_answers(["hello", "2024-12-05", "+"], "mine")


# -- the table of pairs


def judged(gold: str, answer: str) -> str:
    return get_strict_verdict(f"So it is $\\boxed{{{answer}}}$.", gold).verdict


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_pairs(part):
    table = rows(PAIRS)[part::8]
    assert len(table) > 70 and 0.3 < sum(right for *_, right in table) / len(table) < 0.7
    assert [
        (gold, answer, right) for gold, answer, right in table if (judged(gold, answer) == "correct") != right
    ] == []


def test_correct_answers_that_are_known_to_be_refused():
    assert {judged(gold, answer) for gold, answer, _ in rows(REFUSED)} == {"wrong"}


def test_every_gold_answer_equals_itself():
    golds = {gold for gold, *_ in rows(PAIRS)}
    assert [gold for gold in golds if judged(gold, gold) != "correct"] == []


@pytest.mark.slow
def test_another_digit_is_another_answer():
    """Each digit of each gold answer, raised by one."""
    draw, paid = random.Random(0), []
    for gold in sorted({gold for gold, _, right in rows(PAIRS) if right}):
        places = [match.start() for match in re.finditer(r"\d", gold)]
        for place in draw.sample(places, min(2, len(places))):
            other = f"{gold[:place]}{(int(gold[place]) + 1) % 10}{gold[place + 1 :]}"
            if judged(gold, other) == "correct":
                paid.append((gold, other))
    assert paid == []


@pytest.mark.parametrize(
    "word", ["listen", "triangle", "abc", "red green", "A B C D", "x-ray", "cat, dog", "NaCl", "p4ssw0rd"]
)
def test_letters_in_another_order_are_never_paid(word):
    draw = random.Random(word)
    for _ in range(30):
        letters = draw.sample(word, len(word))
        other = "".join(letters).strip()
        if normalize_notation(other).casefold().split() != word.casefold().split() and sorted(other) == sorted(word):
            assert judged(word, other) != "correct", other


# -- parsing


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "x.__class__",
        "eval(1)",
        "lambda: 1",
        "[].append(1)",
        "print(1)",
        "\\input{/etc/passwd}",
        "x;y",
        "a@b",
    ],
)
def test_code_is_not_parsed(text):
    with pytest.raises(UnreadableAnswer):
        parse_expression(text)


def test_nothing_is_evaluated_as_python(monkeypatch):
    """No answer of the table reaches sympy's Python parser, `eval` or `exec`."""
    import sympy
    from sympy.parsing import sympy_parser

    def refused(*args, **kwargs):
        raise AssertionError("a text was evaluated")

    for name in ("parse_expr", "eval_expr", "stringify_expr"):
        monkeypatch.setattr(sympy_parser, name, refused)
    monkeypatch.setattr(sympy, "parse_expr", refused)
    monkeypatch.setattr("builtins.eval", refused)
    for gold, answer, _ in rows(PAIRS)[::7]:
        judged(gold, answer)


def test_texts_are_parsed_completely():
    for text in (
        "3 foo bar baz qux five",
        "x^2 +",
        "3 4",
        "5 ++",
        "12 (",
        "1..2",
        "2^",
        "\\frac{1}{0}",
        "5 \\text{or so}",
        "\\geq 4",
        "= 4",
        "7 \\quad 8 9",
    ):
        with pytest.raises(UnreadableAnswer):
            parse_value(normalize_notation(text))


# -- the final answer

FINAL = [
    ('so \\boxed{5}', '5'),
    ('<think>\\boxed{3}</think> The answer is \\boxed{5}', '5'),
    ('<think>\\boxed{3}</think> The answer is 5.', '5'),
    ('<think>\\boxed{3}</think>', None),
    ('<think>\\boxed{3}', None),
    ('thinking \\boxed{3}</think>\n\\boxed{4}', '4'),
    ('\\boxed{4} <think> hmm \\boxed{3}', '4'),
    ('the answer is not \\boxed{12}', None),
    ("The answer isn't \\boxed{12}.", None),
    ('The answer cannot be \\boxed{12}.', None),
    ('The answer is \\boxed{12}, not \\boxed{13}.', '12'),
    ('It is not \\boxed{12} but \\boxed{13}.', '13'),
    ('\\boxed{12} is not the answer.', None),
    ('\\boxed{12} is wrong.', None),
    ('Is it \\boxed{12}? No.', None),
    ('\\boxed{12} would be incorrect', None),
    ('This is not hard: \\boxed{12}', '12'),
    ("I'm not sure, but \\boxed{12}", '12'),
    ('\\boxed{3} and \\boxed{4}', '3, 4'),
    ('\\boxed{3} or $\\boxed{4}$', '3, 4'),
    ('\\boxed{3}. Then \\boxed{4}', '4'),
    ('\\boxed{3} \\boxed{', None),
    ('\\boxed{3} then \\boxed{4', None),
    ('\\boxed{}', None),
    ('\\boxed 7', '7'),
    ('\\boxed7', '7'),
    ('\\fbox{7}', '7'),
    ('\\boxed{\\frac{1}{2}}', '\\frac{1}{2}'),
    ('\\boxed{\\{1,2\\}}', '\\{1,2\\}'),
    ('\\boxed{\\left\\{1,2\\right\\}}', '\\left\\{1,2\\right\\}'),
    ('#### 72', '72'),
    ('blah\n#### 1,234\n', '1,234'),
    ('<answer>42</answer>', '42'),
    ('<think>a</think><answer>\\boxed{42}</answer>', '42'),
    ('<answer>The result is not known</answer>', 'The result is not known'),
    ('The final answer is $\\frac{1}{2}$.', '\\frac{1}{2}'),
    ('**Answer:** 42', '42'),
    ('**Answer: 42**', '42'),
    ('Answer: B', 'B'),
    ('The answer is (B).', '(B)'),
    ('The correct answer is **C**.', 'C'),
    ('The answer is 3.5 meters.', '3.5 meters'),
    ('the answer is not 12', None),
    ('The answer is 12. Wait, actually the answer is 13.', '13'),
    ('\\boxed{12}. Wait, that is wrong, the answer is 13.', None),
    ('\\boxed{12}. Hmm. The final answer is \\boxed{13}', '13'),
    ('42', '42'),
    ('x = 5', 'x = 5'),
    ('We get $x=5$.', 'x=5'),
    ('So the area is $12$.', '12'),
    ('a line\nanother\nThe total is $12$.', '12'),
    ('I do not know', None),
    ('\\boxed{5}\n\nThe other number 7 is not relevant', '5'),
    ('\\boxed{5}<|im_end|>', '5'),
    ('Final Answer: The final answer is $\\boxed{8}$. I hope it is correct.', '8'),
    ('Answer is: 7', '7'),
    ('The answer is: $7$', '7'),
    ('the answer is 7 because 3+4=7', '7'),
    ('The answer is \\(7\\).', '7'),
    ('The answer is\n\\[\n7\n\\]', '7'),
    ('<|channel|>analysis<|message|>\\boxed{3}<|end|><|start|>assistant<|channel|>final<|message|>\\boxed{4}', '4'),
    ('[THINK]\\boxed{3}[/THINK]\\boxed{4}', '4'),
    ('<think></think>\\boxed{4}', '4'),
    ('<think>a</think><think>\\boxed{3}</think>\\boxed{4}', '4'),
    ('the answer is neither \\boxed{3} nor \\boxed{4}', None),
    ('\\boxed{3 \\text{ or } 4}', '3 \\text{ or } 4'),
    ('My answer: \\boxed{3} (not \\boxed{4})', '3'),
    ('$\\boxed{A}$ or $\\boxed{B}$', 'A, B'),
    ('\\boxed{12} is incorrect, the answer is \\boxed{13}', '13'),
    ('\\boxed{12}? Let me check: yes.', '12'),
    ('It is \\boxed{\\frac12} if the coin is fair and \\boxed{\\frac13} otherwise.', None),
    ('I would say \\boxed{6}, perhaps \\boxed{7}', None),
    ('either \\boxed{6} or maybe \\boxed{7}', None),
    ('Both ways agree: $\\boxed{0.5}$, or equivalently $\\boxed{\\frac12}$.', '\\frac12'),
    ('\\boxed{7} or 8', None),
    ('\\boxed{7} or maybe 8.', None),
    ('First \\boxed{3}, no: \\boxed{4}', '4'),
    ('\\boxed{8}. If you have 3 more', '8'),
    ('For n even it is \\boxed{1}. So the total is \\boxed{2}', '2'),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "expected"), FINAL)
def test_the_final_answer(completion, expected):
    text, reason = extract_final_answer(completion)
    assert (text is None) == (expected is None) and (text is None) == (reason is not None)
    assert expected is None or normalize_notation(text) == normalize_notation(expected)


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "empty"),
        ("I do not know", "no box or final answer"),
        ("so \\boxed{1", "unclosed box"),
        ("so \\boxed{ }", "empty box"),
        ("<think>so \\boxed{1}", "unfinished thinking"),
        ("not \\boxed{1}", "the answer is taken back"),
        ("\\boxed{1} or 2", "several answers"),
        ("\\boxed{@}", "not readable"),
    ],
)
def test_a_grade_has_the_reason_for_a_missing_answer(grader, completion, reason):
    (grade,) = grader.get_grades([completion], ["1"])
    assert (grade.strict, grade.reason) == ("unparsable", reason)
    assert grade.value == ("@" if reason == "not readable" else None)


def test_the_value_is_the_text_of_the_final_answer(grader):
    grades = grader.get_grades(["so \\boxed{x = \\frac12}", "\\boxed{007}", "the answer is 12 cm."], ["0.5", "7", "12"])
    assert [(grade.value, grade.strict) for grade in grades] == [
        ("x = \\frac12", "correct"),
        ("007", "correct"),
        ("12 cm", "correct"),
    ]


def test_integers_without_a_process_follow_the_same_extraction():
    for answer in (
        "<think>\\boxed{3}</think> The answer is 12.",
        "not \\boxed{3}",
        "so \\boxed{3}",
        "\\boxed{3} or 4",
        "<think>\\boxed{3}",
    ):
        grade = _grade_integers(answer, "3")
        assert grade is None or grade._asdict() == grader_worker.grade_answer(answer, "3"), answer
    assert _grade_integers("not \\boxed{3}", "3") == ("correct", None, "unparsable", "the answer is taken back")
    assert _grade_integers("\\boxed{101}", "0101") is None  # digits with a leading zero are a code


# -- long and hostile texts


@pytest.mark.parametrize(
    "text",
    [
        "no, " * 12_000,
        "<answer>" * 6_000,
        "answer is " * 5_000,
        "\\boxed{1}, " * 4_000,
        "$" * 40_000,
        "x = " * 10_000,
        "{" * 40_000,
        "1 2 " * 10_000,
        "the answer is $" + "1+" * 20_000,
    ],
    ids=lambda text: text[:12],
)
def test_extraction_of_long_texts_is_quick(text):
    """Extraction runs in this process, where it cannot be killed."""
    done = threading.Event()

    def work():
        extract_final_answer(text[:50_000] + "\\boxed{1}")
        extract_final_answer("\\boxed{1}" + text[:50_000])
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(20)


def test_the_worker_imports_only_the_grading_modules_of_bupo(tmp_path):
    import subprocess

    program = (
        "import json, runpy, sys\n"
        f"module = runpy.run_path({grader_worker.__file__!r})\n"
        "module['_install_package_stubs']()\n"
        "import bupo.rewards.answers.equality\n"
        "try:\n    import bupo.utils.errors\n    raise SystemExit('bupo.utils.errors was imported')\nexcept ImportError:\n    pass\n"
        "print(json.dumps(sorted(name for name in sys.modules if name.split('.')[0] == 'bupo')))\n"
    )
    run = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    modules = ("classes", "equality", "extraction", "notation", "parsing", "scalar_equality", "units")
    assert json.loads(run.stdout) == [
        "bupo", "bupo.rewards", "bupo.rewards.answers", *(f"bupo.rewards.answers.{name}" for name in modules),
    ]  # fmt: skip
