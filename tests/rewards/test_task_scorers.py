"""Scorers of reasoning_gym's tasks decide the rewards, hostile answers run no code, and equal answers vote together."""

import json

import pytest
import reasoning_gym

from bupo.data.problems import load_problems
from bupo.evaluation.answers import grade_completions, summarize
from bupo.generation.seeded_sampling import SampledCompletion
from bupo.rewards.grader import MathGrader
from bupo.rewards.math_reward import math_reward
from bupo.rewards.task_scorers import ANY_SOLUTION, SCORED_BY_COLUMN, get_gold_answer

SIZE = 6


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(deadline=20.0, processes=1)
    yield grader
    grader.close()


def verdicts(grader, problems, answers):
    texts = [f"I think that it is \\boxed{{{answer}}}" for answer in answers]
    return [str(grade.strict) for grade in grader.get_grades(texts, problems["answer"], problems[SCORED_BY_COLUMN])]


@pytest.mark.parametrize(
    "task", ["spell_backward", "word_sorting", "letter_jumble", "number_sorting", "sentence_reordering", "chain_sum"]
)
def test_a_task_is_graded_by_its_scorer(grader, task):
    """Correct, sorted, reversed and other problems' answers, against reasoning_gym called directly."""
    problems = load_problems(f"reasoning_gym:{task}", size=SIZE)
    own = reasoning_gym.create_dataset(task, size=SIZE, seed=0)
    golds = problems["answer"]
    tries = [golds, [gold[::-1] for gold in golds], golds[1:] + golds[:1], [f"{gold} " for gold in golds]]
    tries += [["".join(sorted(gold)) for gold in golds]]
    for answers in tries:
        scores = [own.score_answer(answer.strip(), own[i]) for i, answer in enumerate(answers)]
        assert verdicts(grader, problems, answers) == ["correct" if score >= 1 else "wrong" for score in scores], (
            answers
        )
    assert verdicts(grader, problems, golds) == ["correct"] * SIZE


def test_a_copied_word_gets_no_reward():
    problems = load_problems("reasoning_gym:spell_backward", size=37)
    words = [row["metadata"]["word"] for row in reasoning_gym.create_dataset("spell_backward", size=37, seed=0)]
    completions = [f"Backwards that is \\boxed{{{word}}}." for word in words]
    rewards = math_reward(completions, **{name: problems[name] for name in ("answer", SCORED_BY_COLUMN)})
    assert rewards == [float(word == word[::-1]) for word in words]


def test_any_solution_of_a_task_gets_the_reward(grader):
    """puzzle24 has many correct answers, which must use the given numbers."""
    own = reasoning_gym.create_dataset("puzzle24", size=SIZE, seed=0)
    problems = load_problems("reasoning_gym:puzzle24", size=SIZE)
    golds = problems["answer"]
    assert verdicts(grader, problems, [f"({gold})" for gold in golds]) == ["correct"] * SIZE
    assert (
        verdicts(
            grader, problems, ["6*4*1*1" if sorted(row["metadata"]["numbers"]) != [1, 1, 4, 6] else "24" for row in own]
        )
        == ["wrong"] * SIZE
    )
    colours = load_problems("reasoning_gym:graph_color", size=2)  # without a gold answer
    assert colours["answer"] == [ANY_SOLUTION] * 2
    own = reasoning_gym.create_dataset("graph_color", size=2, seed=0)
    solved = [
        json.dumps({str(node): colour for node, colour in row["metadata"]["possible_answer"].items()}) for row in own
    ]
    assert [own.score_answer(text, row) for text, row in zip(solved, own, strict=True)] == [1.0, 1.0]
    assert [get_gold_answer(row) for row in own] == [ANY_SOLUTION] * 2
    texts = [f"<answer>{text}</answer>" for text in solved]
    assert grader.grade(texts, colours["answer"], colours[SCORED_BY_COLUMN]) == ["correct"] * 2
    assert (
        grader.grade([f"<answer>{ANY_SOLUTION}</answer>"] * 2, colours["answer"], colours[SCORED_BY_COLUMN])
        == ["wrong"] * 2
    )


@pytest.mark.parametrize(
    "task", ["spiral_matrix", "n_queens", "countdown", "puzzle24", "polynomial_multiplication", "simple_integration"]
)
def test_no_scorer_runs_an_answer(grader, task, tmp_path):
    """Several scorers call `eval` or sympy's parser on the answer."""
    problems = load_problems(f"reasoning_gym:{task}", size=1)
    listed = tmp_path / "here"
    listed.mkdir()
    answers = [
        f"__import__('os').rmdir('{listed}')",
        f"[__import__('os').rmdir('{listed}')]",
        f"open('{listed}/file', 'w')",
        "().__class__.__base__.__subclasses__()",
        "exec(chr(49))",
        "x.subs(x, 1).__class__",
    ]
    for answer in answers:
        text = f"<answer>{answer}</answer>"
        assert grader.grade([text], problems["answer"], problems[SCORED_BY_COLUMN]) != ["correct"]
    assert listed.is_dir() and not list(listed.iterdir())
    assert verdicts(grader, problems, problems["answer"]) == ["correct"]  # the scorer still works


def test_a_scorer_that_accepts_anything_is_not_used(grader):
    problems = load_problems("reasoning_gym:game_of_life_halting", size=SIZE)
    others = ["False" if gold == "True" else "True" for gold in problems["answer"]]
    assert verdicts(grader, problems, problems["answer"]) == ["correct"] * SIZE
    assert verdicts(grader, problems, others) == ["wrong"] * SIZE


def test_equal_answers_vote_together(grader):
    answers = [
        ["39", "39.0", "x=39", "40", "40"],
        ["\\frac{1}{2}", "0.5", None, "\\frac{2}{4}", "1/3"],
        ["2x+1", "1+2x", "2x-1", "hello", "olleh"],
        [],
        [None, None],
    ]
    assert grader.group_equal_answers(answers) == [
        [0, 0, 0, 1, 1],
        [0, 0, None, 0, 1],
        [0, 0, 1, 2, 3],
        [],
        [None, None],
    ]


def test_a_majority_of_spellings_wins():
    problems = load_problems("arithmetic", size=1).remove_columns("answer").add_column("answer", ["39"])
    texts = ["\\boxed{39}", "\\boxed{39.0}", "\\boxed{x=39}", "\\boxed{40}", "\\boxed{40}"]
    table = grade_completions(problems, [[SampledCompletion(text, 5, False) for text in texts]])
    assert summarize(table)["majority@k"] == 1.0
    other = grade_completions(problems, [[SampledCompletion(text.replace("39", "41"), 5, False) for text in texts]])
    assert summarize(other)["majority@k"] == 0.0 and other["answer_class"].nunique() == 2


def test_the_reason_for_a_missing_answer():
    problems = load_problems("arithmetic", size=1)
    texts = ["", "so the box is \\boxed{12", "I do not know.\nThis is hard.\nIt is.", "\\boxed{}", "\\boxed{7}"]
    answers = [SampledCompletion(text, 5, False) for text in texts] + [SampledCompletion("we compute", 5, True)]
    table = grade_completions(problems, [answers])
    assert list(table["reason"][[0, 1, 3, 5]]) == ["empty", "unclosed box", "empty box", "cut at the limit"]
    assert table["reason"].isna().tolist() == [False, False, False, False, True, False]
    reasons = summarize(table)["no_answer_reasons"]
    assert sum(reasons.values()) == summarize(table)["verdicts"]["unparsable"] and reasons["cut at the limit"] == 1
