"""Precision and recall of grading on pairs judged by hand, its speed, and the seconds of hostile answers.

    python -m benchmarks.grading [--data FOLDER] [--show] [--only_pairs]

An ordinary answer is a few hundred characters of worked text with formulas and a box. The box holds the gold answer, the gold
answer with another digit, or the answer of another problem. Gold answers come from the folder's `.parquet` and `.jsonl` files,
or are generated; there are eight answers to each.
"""

import argparse
import random
import re
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks import pairs
from bupo.data.problems import load_problems
from bupo.rewards.grader import MathGrader, _grade_integers

WORKED = [
    "We start from what is given. Let $x = {a}$ and $y = {b}$, so that $x^2 + y^2 = {c}$ and $xy = {d}$.\n\nThen\n\\[\n"
    "(x + y)^2 = x^2 + 2xy + y^2 = {c} + 2 \\cdot {d},\n\\]\nand by the triangle inequality $|x + y| \\le |x| + |y|$. "
    "Dividing by ${a}$ gives $\\frac{{{c}}}{{{a}}}$, which leaves one case only.\n\nHence the answer is {box}.",
    "## Solution\n\n**Step 1.** The series $\\sum_{{n=1}}^{{\\infty}} \\frac{{1}}{{n^{{{a}}}}}$ converges because ${a} > 1$."
    "\n\n**Step 2.** Its terms are bounded by $\\int_{{{b}}}^{{\\infty}} x^{{-{a}}}\\,dx$, so at most {c} of them matter: "
    "$f({b}) = {d}$, and \\(g(x) = {a}x + {b}\\) has no other root.\n\n**Final answer:** {box}",
    "Okay, so first I count the cases. There are {a} ways to choose the first and {b} for the second, {c} in all; {d} of "
    "them were counted twice. Is that right? If $k = {a}$ then $\\binom{{k}}{{2}} = \\frac{{k(k-1)}}{{2}}$, yes. I check "
    "$k = {b}$ as well: $k^2 - k = {c}$ is false, but the other case holds.\n\nThe final answer is {box}",
]
BOXES = ["$\\boxed{%s}$", "\\boxed{%s}", "\\[\n\\boxed{%s}\n\\]", "$$\\boxed{%s}$$"]
FORMS = [
    "{a}", "{a}", "{a}", "-{a}", "\\frac{{{a}}}{{{b}}}", "{a}.{b}", "{a}\\sqrt{{{b}}}", "\\frac{{{a}\\pi}}{{{b}}}",
    "({a}, {b})", "[{a}, {b})", "(-\\infty, {a}) \\cup ({b}, \\infty)", "\\{{{a}, {b}, {c}\\}}", "{a}x^2 - {b}x + {c}",
    "{a}e^{{{b}x}}", "\\frac{{x + {a}}}{{x - {b}}}", "y = {a}x + {b}", "{a} + {b}i", "{a}^{{n}} - {b}", "{a}\\%",
    "\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}", "{a}^\\circ", "{a} \\text{{ cm}}", "Yes", "\\infty",
]  # fmt: skip
EACH = 8  # answers per problem


def numbers(draw: random.Random) -> dict[str, int]:
    return {name: draw.randint(2, 400) for name in "abcd"}


def made_golds(count: int) -> list[str]:
    draw = random.Random(1)
    return [draw.choice(FORMS).format(**numbers(draw)) for _ in range(count)]


def ordinary(golds: list[str], count: int, each: int = 1, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return answers and their gold answers, `each` in a row with the same one. Half of the boxes hold it."""
    draw = random.Random(seed)
    gold_answers = [gold for _ in range(count // each) for gold in [draw.choice(golds)] * each]
    answers = []
    for gold in gold_answers:
        boxed = gold if draw.random() < 0.5 else _other(gold, golds, draw)
        answers.append(draw.choice(WORKED).format(**numbers(draw), box=draw.choice(BOXES) % boxed))
    return answers, gold_answers


def _other(gold: str, golds: list[str], draw: random.Random) -> str:
    """Return the gold answer with another digit, or another problem's."""
    digits = list(re.finditer(r"[0-9]", gold))
    if not digits or draw.random() < 0.3:
        return draw.choice(golds)
    digit = draw.choice(digits)
    return f"{gold[: digit.start()]}{(int(digit[0]) + 1) % 10}{gold[digit.end() :]}"


def hostile(file: Path) -> dict[str, str]:
    """Return answers that would hang, crash or exhaust the memory of a careless grader. Code in them would create `file`."""
    code = f"__import__('os').system('touch {file}')"
    row = "&".join("1" * 300)
    return {
        "1 MB of text": "so it is. " * 100_000,
        "1 MB of numbers": "1 2 " * 250_000,
        "1 MB in a box": "\\boxed{" + "x+" * 500_000 + "1}",
        "1 MB of spaces": "final answer is" + " " * 1_000_000,
        "1 MB of backslashes": "\\" * 1_000_000,
        "a million braces": "{" * 1_000_000,
        "a million braces, closed, in a box": "\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}",
        "100,000 boxes, nested": "\\boxed{" * 100_000,
        "100,000 boxes": "\\boxed{1}," * 100_000,
        "100,000 parentheses": "\\boxed{" + "(" * 100_000 + "1" + ")" * 100_000 + "}",
        "100,000 fractions": "\\boxed{" + "\\frac{" * 100_000 + "}",
        "nested fractions": "\\boxed{" + "\\frac{1}{" * 5_000 + "2" + "}" * 5_000 + "}",
        "a long sum": "1+" * 50_000 + "1",
        "power": "9**9**9",
        "tower": "\\boxed{9^{9^{9^{9}}}}",
        "exponent": "\\boxed{10^{10^{10}}}",
        "negative exponent": "\\boxed{2^{-99999999999}}",
        "factorial": "\\boxed{1000000!}",
        "factorial tower": "\\boxed{((((9!)!)!)!)!}",
        "binomial": "\\boxed{\\binom{10^{9}}{5 \\cdot 10^{8}}}",
        "endless sum": "\\boxed{\\sum_{n=1}^{10^{12}} n^{n}}",
        "100,000 digits": "\\boxed{" + "9" * 100_000 + "}",
        "100,000 decimals": "\\boxed{0." + "3" * 100_000 + "}",
        "matrix of 300 x 300": "\\boxed{\\begin{pmatrix}" + "\\\\".join([row] * 300) + "\\end{pmatrix}}",
        "code": f"\\boxed{{{code}}}",
        "code without a box": f"The answer is {code}",
        "null bytes": "\x00" * 1000 + "\\boxed{\x00",
        "lone surrogates": "\ud800\udfff \\boxed{\ud800}",
        "bytes that are no text": bytes(range(256)).decode("utf-8", "surrogateescape") + "\\boxed{\uffff\U0010ffff}",
        "a line of the protocol": '\\boxed{"}\n{"verdict": "correct", "value": null}\n',
    }


def golds_in(folder: Path) -> list[str]:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".parquet", ".jsonl"))
    return [gold for file in files for gold in load_problems(str(file))["answer"]]


def percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    return "  ".join(
        f"{100 * q:g} %: {1000 * ordered[int(q * (len(ordered) - 1))]:.1f} ms" for q in (0.5, 0.9, 0.99, 1)
    )


def warm(processes: int, deadline: float = 5.0) -> MathGrader:
    """Return a grader whose processes have started."""
    grader = MathGrader(deadline=deadline, processes=processes)
    grader.grade(["\\boxed{x + 1}"] * processes, ["1 + x"] * processes)
    return grader


def timed(grader: MathGrader, answer: str, gold: str) -> tuple[str, float]:
    started = time.perf_counter()
    (verdict,) = grader.grade([answer], [gold])
    return verdict, time.perf_counter() - started


def speed(name: str, answers: list[str], golds: list[str], processes: int) -> None:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    grader = warm(processes)
    started = time.perf_counter()
    verdicts = Counter(grader.grade(answers, golds))
    seconds = time.perf_counter() - started
    grader.close()  # resource usage counts only ended children
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime - spent.ru_utime - spent.ru_stime
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    print(
        f"{name}: {len(answers) / seconds:.0f} answers per second, {1000 * cpu / len(answers):.1f} ms of CPU each ({counts})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of problem sets")
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds per hostile answer")
    parser.add_argument("--pairs", type=Path, default=pairs.FOLDER, help="folder of pairs judged by hand")
    parser.add_argument(
        "--show", action="store_true", help="list wrong answers that are accepted and right answers that are refused"
    )
    parser.add_argument("--only_pairs", action="store_true", help="stop after precision and recall")
    options = parser.parse_args()

    print("\n".join(pairs.measure(options.pairs, options.show, options.processes)), flush=True)
    if options.only_pairs:
        return
    golds = golds_in(options.data) if options.data else made_golds(1000)
    answers, gold_answers = ordinary(golds, options.answers, each=EACH)
    algebra = [pair for pair in zip(answers, gold_answers, strict=True) if _grade_integers(*pair) is None]
    print(
        f"{len(answers)} answers of {sum(map(len, answers)) / len(answers):.0f} characters, {options.processes} processes"
    )
    print(f"integers, graded without a process: {1 - len(algebra) / len(answers):.0%}")
    speed("all", answers, gold_answers, options.processes)
    answers, gold_answers = (list(column) for column in zip(*algebra, strict=True))
    speed("without the integers", answers, gold_answers, options.processes)

    grader = warm(1)
    print("one at a time, without the integers:", percentiles([timed(grader, *pair)[1] for pair in algebra[:1000]]))
    grader.close()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "touched"
        for name, answer in hostile(file).items():
            grader = warm(1, options.deadline)
            verdict, seconds = timed(grader, answer, "\\frac{1}{3}")
            grader.close()
            print(f"{name:36} {verdict:12} {seconds:5.2f} s")
        print(f"code was run: {'yes' if file.exists() else 'no'}")


if __name__ == "__main__":
    main()
