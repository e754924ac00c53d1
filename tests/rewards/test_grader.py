"""Grading in killable processes: verdicts, deadlines, hostile input, the reward's contract."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from math_verify import parse, verify

from benchmarks.grading import golds_in, hostile, ordinary
from bupo import MathGrader, UserError, math_reward
from bupo.rewards import grader as grader_module
from bupo.rewards import grader_worker
from bupo.rewards.answers import equality
from tests.data.test_problems import SHARED
from tests.helpers import grading_cases


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(deadline=5.0, processes=2)
    yield grader
    grader.close()


CASES = [
    ("so \\boxed{39}", "39", "correct"),
    ("\\boxed{39}", "40", "wrong"),
    ("\\boxed{-7}", "-7", "correct"),
    ("\\boxed{007}", "7", "correct"),
    ("\\boxed{\\frac{1}{2}}", "0.5", "correct"),
    ("The answer is $\\frac{2}{4}$.", "\\frac{1}{2}", "correct"),
    ("\\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
    ("\\boxed{(1, 2)}", "(1,2)", "correct"),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", "correct"),
    ("\\boxed{50\\%}", "0.5", "correct"),
    ("\\boxed{\\sqrt{2}}", "1.5", "wrong"),
    ("I do not know", "39", "unparsable"),
    ("", "39", "unparsable"),
]


# equal to the gold number, but not worked out: a model learned to repeat the question for full reward
UNEVALUATED = [
    ("State the final answer to the arithmetic problem is 4 + 7 =", "11"),
    ("\\boxed{4 + 7}", "11"),
    ("\\boxed{5 - 9}", "-4"),
    ("\\boxed{-(4 + 7)}", "-11"),
    ("4 + 7 - 3 =", "8"),
    ("\\boxed{2 \\cdot 3}", "6"),
    ("\\boxed{2 \\times 3}", "6"),
]
WORKED_OUT = [
    ("the answer is 4 + 7 = 11", "11"),
    ("\\boxed{4+7=11}", "11"),
    ("\\boxed{x = 11}", "11"),
    ("\\boxed{3 \\times 10^5}", "300000"),
    ("\\boxed{50\\%}", "50\\%"),
    ("\\boxed{2^{10}}", "1024"),
    ("\\boxed{\\sqrt{4}}", "2"),
    ("\\boxed{1\\frac{1}{2}}", "1.5"),
    ("\\boxed{1/2}", "0.5"),
    ("\\boxed{\\frac{8}{2}}", "4"),
    ("\\boxed{8/2}", "4"),
    ("the answer is 8 / 2", "4"),
    ("\\boxed{42.0}", "42"),
    ("\\boxed{2+\\sqrt{3}}", "2+\\sqrt{3}"),
    ("\\boxed{2 + 3i}", "2+3i"),
    ("\\boxed{(3,4)}", "(3,4)"),
    ("\\boxed{3\\sqrt{2}}", "3\\sqrt{2}"),
    ("\\boxed{-\\frac{3}{4}}", "-0.75"),
]


def test_a_sum_that_is_left_to_do_is_no_answer(grader):
    answers, golds = zip(*UNEVALUATED, strict=True)
    assert grader.grade(answers, golds) == ["unevaluated"] * len(answers)
    assert math_reward(list(answers), answer=list(golds)) == [0.0] * len(answers)
    for answer, gold in UNEVALUATED:  # math-verify accepts them
        assert verify(parse(f"\\boxed{{{gold}}}"), parse(answer))
    answers, golds = zip(*WORKED_OUT, strict=True)
    assert grader.grade(answers, golds) == ["correct"] * len(answers)
    assert math_reward(list(answers), answer=list(golds)) == [1.0] * len(answers)


@pytest.mark.parametrize(("answer", "gold", "verdict"), CASES)
def test_verdicts(grader, answer, gold, verdict):
    assert grader.grade([answer], [gold]) == [verdict]


@pytest.fixture(scope="module")
def case_grades(grader):
    answers, golds, _ = zip(*grading_cases.CASES, strict=True)
    return grader.get_grades(answers, golds)


@pytest.mark.slow
def test_verdicts_are_a_mathematicians(case_grades):
    """The table of hand-written answers lists all differences."""
    assert len(grading_cases.CASES) >= 150
    wrong = {
        (answer, gold): str(grade.strict)
        for (answer, gold, expected), grade in zip(grading_cases.CASES, case_grades, strict=True)
        if grade.strict != expected
    }
    assert wrong == grading_cases.DIFFERENT


def test_the_same_as_math_verify_called_directly(grader):
    answers, golds = [a for a, _, _ in CASES] * 3, [g for _, g, _ in CASES] * 3
    direct = []
    for answer, gold in zip(answers, golds, strict=True):
        given = parse(answer)
        direct.append(
            "unparsable" if not given else "correct" if verify(parse(f"\\boxed{{{gold}}}"), given) else "wrong"
        )
    assert grader.grade(answers, golds) == direct  # in the same order


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the problem sets are not here")
def test_every_gold_answer_of_the_papers_sets_equals_itself(grader):
    golds = sorted(set(golds_in(SHARED)))
    verdicts = grader.grade([f"So it is $\\boxed{{{gold}}}$." for gold in golds], golds)
    assert len(golds) > 1500
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict != "correct"] == []


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the problem sets are not here")
def test_varied_answers_get_the_verdicts_of_math_verify_called_directly(grader):
    """In this process, with its own alarms. The worker rewrites some spellings, which changes none of these verdicts."""
    answers, golds = ordinary(golds_in(SHARED), 500)
    direct = [verify(parse(f"\\boxed{{{gold}}}"), parse(answer)) for answer, gold in zip(answers, golds, strict=True)]
    verdicts = grader.grade(answers, golds)
    assert [verdict in ("correct", "unevaluated") for verdict in verdicts] == direct
    assert [grade.verdict == "correct" for grade in grader.get_grades(answers, golds)] == direct
    assert 150 < sum(direct) < 350


FEW = ["1 MB in a box", "100,000 parentheses", "tower", "code", "code without a box", "a line of the protocol"]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [FEW, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"])
def test_hostile_answers_cost_their_deadline_and_nothing_else(tmp_path, monkeypatch, kinds):
    """Each gets a verdict in time and no reward, and the ordinary answers between them keep their verdicts."""
    seconds = []

    def timed(*args):
        started = time.monotonic()
        reply = grade_in_child(*args)
        seconds.append(time.monotonic() - started)
        return reply

    grade_in_child = grader_module._WorkerProcess.grade
    monkeypatch.setattr(grader_module._WorkerProcess, "grade", timed)
    answers = hostile(tmp_path / "touched")
    attacks = [answers[kind] for kind in kinds or answers]
    rows = [row for attack in attacks for row in ((attack, "\\frac{1}{3}"), ("\\boxed{\\frac{1}{2}}", "0.5"))]
    grader = MathGrader(deadline=1.0, processes=2)
    verdicts = grader.grade(*zip(*rows, strict=True))
    assert verdicts[1::2] == ["correct"] * len(attacks)
    assert {"timeout"} <= set(verdicts[::2]) <= {"timeout", "wrong", "unparsable"}
    assert len(seconds) == len(rows) and max(seconds) < 3  # killing takes time on a busy machine
    assert not (tmp_path / "touched").exists()
    grader.close()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " so it is" * 100_000], ids=["short", "more than the pipe holds"])
def test_a_stopped_child_is_killed_and_replaced(text):
    """A worker that hangs (here: stopped by a signal) is a timeout, and the next answer is graded."""
    grader = MathGrader(deadline=1.0, processes=1)
    grader.grade(["\\boxed{x}"], ["x"])
    child = grader._free.get()
    grader._free.put(child)
    os.kill(child.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert grader.grade(["\\boxed{\\frac{1}{2}}" + text], ["0.5"]) == ["timeout"]
    assert time.monotonic() - started < 5
    assert child.process.poll() is not None
    assert grader.grade(["\\boxed{\\frac{1}{2}}"], ["0.5"]) == ["correct"]
    grader.close()


def test_a_child_that_dies_is_replaced():
    grader = MathGrader(deadline=5.0, processes=1)
    grader.grade(["\\boxed{x}"], ["x"])
    child = grader._free.get()
    grader._free.put(child)
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    assert grader.grade(["\\boxed{\\frac{1}{2}}"] * 2, ["0.5"] * 2) == ["timeout", "correct"]
    grader.close()
    assert grader._free.get() is None


def test_integers_need_no_child(monkeypatch):
    monkeypatch.setattr(grader_module, "_WorkerProcess", lambda: pytest.fail("a child was started"))
    assert MathGrader().grade(["\\boxed{39}", "a=1;\\boxed{-4}"], ["39", "4"]) == ["correct", "wrong"]


SOUP = [
    "The final answer is ", "the final answer is 7. I hope it is correct. ", "Final Answer: ", "answer: 12 ", "The answer is $5$ ", "$", "$$", "\\[", "\\]",
    "\\(", "\\)", " [", "] ", "\n", "}", "{", "x_{2} ", "%", " percent", "\\%", "= 4", " and $7$", ", $8$", "\\frac{1}{2}", "$\\frac{3}{4}$", "-", "5", "1,000",
    "**", ".", " is 9", "I hope", "no, ", "Wait, ", "\\text{cm}", "\\fbox{6}", "x = ", "\\cdot 2", "²", "\\left(", "so it is", "  ",
]  # fmt: skip


def test_integers_that_need_no_child_get_the_same_grade_from_one():
    """Boxes among fragments that may lead math-verify elsewhere: grades without a worker are those of a worker."""
    draw, alone = random.Random(0), 0
    for _ in range(1200):
        number = draw.choice(["3", "-3", "0", "-0", "007", "42", "12345678901234567890", "9" * 40])
        gold = draw.choice([number, number, "7", "5", " 3 ", "-3", "300", "1"])
        before, after = ("".join(draw.choices(SOUP, k=draw.randint(0, 5))) for _ in range(2))
        answer = f"{before}\\boxed{{{number}}}{after}"
        grade = grader_module._grade_integers(answer, gold)
        if grade is not None:
            alone += 1
            assert grade._asdict() == grader_worker.grade_answer(answer, gold), (answer, gold)
    assert alone > 400
    for answer, gold in (  # where math-verify extracts something else
        ("\\boxed{3}. So the final answer is 7", "7"),
        ("The final answer is $7$. I hope it is correct. \\boxed{3}", "7"),
        ("$\\boxed{100}$%", "1"),
        ("\\boxed{３}", "3"),
    ):
        assert grader_module._grade_integers(answer, gold) is None
        assert grader_worker.grade_answer(answer, gold)["verdict"] == ("wrong" if "３" in answer else "correct")


def test_a_gold_answer_is_parsed_once_for_answers_in_a_row(monkeypatch):
    grader_worker._parse_gold.cache_clear()
    for answer in ("\\boxed{\\frac{2}{4}}", "\\boxed{0.5}", "\\boxed{0.25}"):
        grader_worker.grade_answer(answer, "\\frac{1}{2}")
    assert grader_worker._parse_gold.cache_info()[:2] == (2, 1)


def test_the_record_is_math_verifys_on_every_case(case_grades):
    """math-verify runs in this process, with its own alarms, on the unchanged text."""
    direct = [verify(parse(f"\\boxed{{{gold}}}"), parse(answer)) for answer, gold, _ in grading_cases.CASES]
    assert [grade.verdict == "correct" for grade in case_grades] == direct
    assert not any(grade.verdict == "unevaluated" for grade in case_grades)


DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_where_the_two_verdicts_differ_stands_in_the_docs(case_grades):
    """Every difference has a reason, and the table counts them."""
    reasons = {answer: reason for reason, found in grading_cases.DIFFERENCES.items() for answer in found}
    lenient, ours = Counter(), Counter()
    for (answer, *_), grade in zip(grading_cases.CASES, case_grades, strict=True):
        if grade.verdict == "correct" != grade.strict:
            lenient[reasons.pop(answer)] += 1
        elif grade.strict == "correct" != grade.verdict:
            ours[reasons.pop(answer)] += 1
    assert not reasons
    for reason in grading_cases.DIFFERENCES:
        assert (
            f"| {reason} | {lenient[reason] or ''} | {ours[reason] or ''} |".replace("|  |", "| |") in DOCS.read_text()
        )
    wanted = [verdict == "correct" for _, _, verdict in grading_cases.CASES]
    right = [[g.verdict == "correct" for g in case_grades], [g.strict == "correct" for g in case_grades]]
    agree = [sum(a == b for a, b in zip(verdicts, wanted, strict=True)) for verdicts in right]
    assert f"{len(wanted)} hand-written answers" in DOCS.read_text()
    assert (
        f"math-verify agrees with the mathematician on {agree[0]} of them, the strict verdict on {agree[1]}"
        in DOCS.read_text()
    )
    assert f"; {len(wanted)} hand-written verdicts" in DOCS.with_name("claims.md").read_text()


def test_a_fault_in_the_strict_grade_leaves_the_record(monkeypatch):
    monkeypatch.setattr(equality, "get_strict_verdict", lambda answer, gold: 1 / 0)
    grade = grader_worker.grade_answer("\\boxed{1/2}", "0.5")
    assert grade == {"verdict": "correct", "value": None, "strict": "unparsable", "reason": "not readable"}


def test_completions_without_text(grader):
    parts = [{"type": "text", "text": "\\boxed"}, {"type": "image"}, {"type": "text", "text": "{1}"}]
    completions = [
        [{"role": "assistant", "content": None}],
        [],
        [{"role": "assistant", "content": parts}],
        [{"role": "assistant", "tool_calls": []}],
    ]
    assert math_reward(completions, answer=["1"] * 4) == [0.0, 0.0, 1.0, 0.0]
    assert math_reward(["\\boxed{1}", "\\boxed{1}"], answer=[None, 1]) == [None, 1.0]


def test_bad_calls(grader):
    assert grader.grade(["\\boxed{1}"], [""]) == ["no_gold"]
    assert math_reward(["\\boxed{1}", "\\boxed{2}"], answer=["", "2"]) == [None, 1.0]
    with pytest.raises(UserError, match="mine, row 1: the gold answer '' is no answer"):
        grader_module.check_gold_answers(["1", ""], "mine")
    with pytest.raises(UserError, match="there are 2 answers and 1 gold answers"):
        grader.grade(["a", "b"], ["c"])
    with pytest.raises(UserError, match="no column 'answer'"):
        math_reward(["a"])


def test_reward_reads_both_forms_and_logs():
    logged = {}
    completions = ["\\boxed{1}", [{"role": "assistant", "content": "\\boxed{\\frac{1}{2}}"}], "none"]
    rewards = math_reward(completions, answer=["1", "0.5", "2"], log_metric=logged.__setitem__)
    assert rewards == [1.0, 1.0, 0.0]
    shares = {name.removeprefix("grading/"): share for name, share in logged.items()}
    assert shares == {"unevaluated": 0.0, "unparsable": pytest.approx(1 / 3), "timeout": 0.0, "no_gold": 0.0}
