"""Grading with the scorers of reasoning_gym's tasks, since many problems have several correct answers.

[`encode_problem_reference`] encodes the task, its options and the index of a problem. The worker process creates the problem
again,
since its metadata (sets, tuples, integer keys) cannot be written as JSON.
"""

import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SCORED_BY_COLUMN = "scored_by"  # dataset column with references of problems whose task has a scorer

# expressions that a scorer may pass to sympy's parser, which evaluates Python
_EXPRESSION = re.compile(r"[\w\s+\-*/^().,=!]*")
_NAME = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "pi", "Abs", "abs", "oo",
}  # fmt: skip
_MIN_FULL_SCORE = 0.9  # a scorer that gives less than this to the task's own answer is not used
_EVAL_MODULES = ("reasoning_gym.algorithmic.", "reasoning_gym.games.")  # their scorers call `eval` on the answer
ANY_SOLUTION = "(any solution)"  # gold answer of problems without one


def encode_problem_reference(task: str, size: int, seed: int, index: int, options: Mapping[str, Any]) -> str:
    """Return a JSON string with everything that is needed to create a problem again."""
    return json.dumps(
        {"task": task, "size": size, "seed": seed, "index": index, "options": dict(options)}, sort_keys=True
    )


def has_scorer(dataset: Any) -> bool:
    """Return whether a task overrides the default scorer, which compares texts."""
    from reasoning_gym.dataset import ProceduralDataset

    return type(dataset).score_answer is not ProceduralDataset.score_answer


def is_correct(problem: str, gold: str, answer: str) -> bool | None:
    """Return whether an answer gets the full score of its task's scorer, or None if the scorer is unreliable.

    Partial scores count as wrong. The full score is that of the task's own answer, since some scorers never return 1. A scorer
    is unreliable if it gives the task's own answer a low score or the question itself a full one. The result is also None if
    the problem's answer differs from `gold` (another version of reasoning_gym).

    Args:
        problem (`str`): a reference by [`encode_problem_reference`].
        gold (`str`): the problem's answer.
        answer (`str`): the text of the final answer.
    """
    dataset, entry = _load_problem(problem)
    if get_gold_answer(entry) != gold:
        return None
    full = 1.0 if entry["answer"] is None else min(1.0, _compute_score(dataset, entry, gold))
    if full < _MIN_FULL_SCORE or _compute_score(dataset, entry, entry["question"]) >= full:
        return None
    condition = _EXTRA_CONDITIONS.get(entry["metadata"].get("source_dataset"), lambda entry, text: True)
    return any(
        _compute_score(dataset, entry, text) >= full and condition(entry, text) for text in _get_spellings(answer)
    )


def get_gold_answer(entry: Mapping[str, Any]) -> str:
    """Return the gold answer of a problem, or `ANY_SOLUTION`."""
    return ANY_SOLUTION if entry["answer"] is None else entry["answer"]


def _uses_all_numbers(entry: Mapping[str, Any], answer: str) -> bool:
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])


# conditions of the question that the scorer does not check
_EXTRA_CONDITIONS: dict[str, Callable[[Mapping[str, Any], str], bool]] = {"puzzle24": _uses_all_numbers}


def _get_spellings(answer: str) -> Iterator[str]:
    """Yield an answer unchanged, and without LaTeX around plain text and numbers."""
    yield answer
    plain = re.sub(r"\\(?:text|mathrm|texttt|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", answer)
    plain = re.sub(r"\\[,;:! ]|\{,\}|\\(?=[_%$#&{}])|\$", "", plain)
    plain = plain.replace("\\\\", "\n").replace("\\times", "*").replace("\\cdot", "*").strip()
    if plain != answer:
        yield plain


def _compute_score(dataset: Any, entry: dict[str, Any], answer: str) -> float:
    with _disabled_eval():
        try:
            return float(dataset.score_answer(answer, entry))
        except (Exception, RecursionError, MemoryError):  # the answer has a form that the scorer does not expect
            return 0.0


@functools.lru_cache(maxsize=256)
def _load_problem(problem: str) -> tuple[Any, dict[str, Any]]:
    reference = json.loads(problem)
    options = json.dumps(reference["options"], sort_keys=True)
    dataset = _load_dataset(reference["task"], reference["size"], reference["seed"], options)
    return dataset, dataset[reference["index"]]


@functools.lru_cache(maxsize=8)
def _load_dataset(task: str, size: int, seed: int, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(options))


def warm_up_problem(problem: str) -> None:
    """Create a problem, to load imports and word lists that are slow the first time."""
    _load_problem(problem)


@contextmanager
def _disabled_eval() -> Iterator[None]:
    """Replace `eval` and sympy's `parse_expr`, which several scorers call on an answer, by parsers of literals and formulas."""
    import sympy
    from sympy.parsing import sympy_parser

    parse = sympy_parser.parse_expr

    def parse_formula(text: str, *args: Any, **kwargs: Any) -> Any:
        names = _NAME.findall(text)
        are_known = all(len(name) == 1 or name in _FUNCTIONS for name in names)
        if not are_known or not _EXPRESSION.fullmatch(text) or "__" in text or re.search(r"\.\s*[^\W\d]", text):
            raise ValueError(f"{text[:80]!r} is not a plain formula")
        return parse(text, *args, **kwargs)

    replaced: list[tuple[Any, str, Any, bool]] = []

    def replace(module: Any, name: str, value: Callable) -> None:
        replaced.append((module, name, getattr(module, name, None), name in vars(module)))
        setattr(module, name, value)

    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym.") and module is not None:
            if name.startswith(_EVAL_MODULES):
                replace(module, "eval", ast.literal_eval)
            if getattr(module, "parse_expr", None) is parse:
                replace(module, "parse_expr", parse_formula)
    replace(sympy, "parse_expr", parse_formula)
    try:
        yield
    finally:
        for module, name, value, existed in reversed(replaced):
            setattr(module, name, value) if existed else delattr(module, name)
