"""Score answers by the scorers of reasoning_gym's tasks. Many of its tasks have several right answers, or compare texts.

A problem is named by [`encode_problem_reference`]: the task, its options and the problem's number. The grading process makes the same problem
again, since a problem's metadata (sets, tuples, keys that are numbers) would not survive being written as JSON.
"""

import ast
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SCORED_BY_COLUMN = "scored_by"  # the column of a data set that names problems whose task has a scorer

# the characters of an expression that a scorer may give to sympy's parser, which evaluates Python
_EXPRESSION = re.compile(r"[\w\s+\-*/^().,=!]*")
_NAME = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = {
    *(
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
    ),
    *("exp", "log", "ln", "sqrt", "pi", "Abs", "abs", "oo"),
}
_MIN_FULL_SCORE = 0.9  # a scorer that gives less than this to the task's own answer is not used
_EVAL_MODULES = (
    "reasoning_gym.algorithmic.",
    "reasoning_gym.games.",
)  # packages whose scorers call `eval` on the answer
ANY_SOLUTION = "(any solution)"  # the gold answer of tasks that name none


def encode_problem_reference(task: str, size: int, seed: int, index: int, options: Mapping[str, Any]) -> str:
    """Return the name of a problem: what is needed to make it again, as JSON."""
    return json.dumps(
        {"task": task, "size": size, "seed": seed, "index": index, "options": dict(options)}, sort_keys=True
    )


def has_scorer(dataset: Any) -> bool:
    """Return whether a task defines how its answers are scored. The default compares texts."""
    from reasoning_gym.dataset import ProceduralDataset

    return type(dataset).score_answer is not ProceduralDataset.score_answer


def is_correct(problem: str, gold: str, answer: str) -> bool | None:
    """Return whether a task's scorer gives an answer the full score; None where it cannot tell.

    Partial scores count as wrong. The full score is the one that the task's own answer gets, since some scorers never give 1.
    None where the scorer gives the task's own answer little or pays for the question itself, and where the problem's answer is
    no longer `gold` (another version of reasoning_gym).

    Args:
        problem (`str`): of [`encode_problem_reference`].
        gold (`str`): the problem's answer.
        answer (`str`): the final answer, as the model writes it.
    """
    dataset, entry = _load_problem(problem)
    if get_gold_answer(entry) != gold:
        return None
    full = 1.0 if entry["answer"] is None else min(1.0, _compute_score(dataset, entry, gold))
    if full < _MIN_FULL_SCORE or _compute_score(dataset, entry, entry["question"]) >= full:
        return None
    also = _EXTRA_CONDITIONS.get(entry["metadata"].get("source_dataset"), lambda entry, text: True)
    return any(_compute_score(dataset, entry, text) >= full and also(entry, text) for text in _get_spellings(answer))


def get_gold_answer(entry: Mapping[str, Any]) -> str:
    """Return the gold answer of a problem; `ANY_SOLUTION` where its task names none."""
    return ANY_SOLUTION if entry["answer"] is None else entry["answer"]


def _is_using_all_numbers(entry: Mapping[str, Any], answer: str) -> bool:
    return sorted(map(int, re.findall(r"\d+", answer))) == sorted(entry["metadata"]["numbers"])


# conditions of the question that a scorer does not check
_EXTRA_CONDITIONS: dict[str, Callable[[Mapping[str, Any], str], bool]] = {"puzzle24": _is_using_all_numbers}


def _get_spellings(answer: str) -> Iterator[str]:
    """Yield an answer as it is written, and without the LaTeX around plain text and numbers."""
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
        except (Exception, RecursionError, MemoryError):  # an answer of another form than a scorer expects
            return 0.0


@functools.lru_cache(maxsize=256)
def _load_problem(problem: str) -> tuple[Any, dict[str, Any]]:
    named = json.loads(problem)
    dataset = _load_dataset(named["task"], named["size"], named["seed"], json.dumps(named["options"], sort_keys=True))
    return dataset, dataset[named["index"]]


@functools.lru_cache(maxsize=8)
def _load_dataset(task: str, size: int, seed: int, options: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(options))


def warm_up_problem(problem: str) -> None:
    """Make a problem, and with it everything that is slow the first time: imports, word lists."""
    _load_problem(problem)


@contextmanager
def _disabled_eval() -> Iterator[None]:
    """Keep scorers from evaluating an answer as Python: they read it as a literal or as a plain formula.

    Several scorers call `eval` or sympy's `parse_expr` on the text of an answer.
    """
    import sympy
    from sympy.parsing import sympy_parser

    parse = sympy_parser.parse_expr

    def parse_formula(text: str, *args: Any, **kwargs: Any) -> Any:
        names = _NAME.findall(text)
        known = all(len(name) == 1 or name in _FUNCTIONS for name in names)
        if not known or not _EXPRESSION.fullmatch(text) or "__" in text or re.search(r"\.\s*[^\W\d]", text):
            raise ValueError(f"{text[:80]!r} is no plain formula")
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
        for module, name, value, there in reversed(replaced):
            setattr(module, name, value) if there else delattr(module, name)
