"""Procedural multi-step arithmetic, the task of the embedded model.

A problem has three or more two-digit numbers, joined by `+` and `-` (`57+23-41`). Its answer is one integer, given directly
(`\\boxed{39}`) or after worked steps (`57+23=80;80-41=39;\\boxed{39}`).
"""

import random
import zlib
from dataclasses import dataclass

TEST_SPLIT_DIVISOR = 8  # one problem in eight belongs to the test split, whatever the seed


@dataclass(frozen=True)
class ArithmeticProblem:
    """Expression with its value, its answer with worked steps and its direct answer."""

    question: str
    answer: str
    worked_answer: str
    direct_answer: str


def _get_split(question: str) -> str:
    """Return the split of a question. It depends on the text alone, so no seed can leak a test problem into training."""
    return "test" if zlib.crc32(question.encode()) % TEST_SPLIT_DIVISOR == 0 else "train"


def _draw_problem(rng: random.Random, numbers: int) -> ArithmeticProblem:
    first, *rest = [rng.randint(10, 99) for _ in range(numbers)]
    question, total, steps = str(first), first, []
    for number in rest:
        sign = rng.choice("+-")
        result = total + number if sign == "+" else total - number
        question += f"{sign}{number}"
        steps.append(f"{total}{sign}{number}={result};")
        total = result
    boxed = f"\\boxed{{{total}}}"
    return ArithmeticProblem(question, str(total), "".join(steps) + boxed, boxed)


def make_arithmetic_problem(split: str, seed: int, index: int, numbers: int = 3) -> ArithmeticProblem:
    """Return problem number `index` of a seeded stream. It depends on the arguments alone.

    Args:
        split (`str`): `"train"` or `"test"`. The two have no question in common.
        seed (`int`): seed of the stream.
        index (`int`): position in the stream.
        numbers (`int`, *optional*, defaults to `3`): count of numbers in the expression.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    rng = random.Random(f"{split}-{seed}-{index}")
    while True:
        problem = _draw_problem(rng, numbers)
        if _get_split(problem.question) == split:
            return problem
