"""One benchmark: sample what is missing, keep every answer as it finishes, grade, and sum up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bupo.data.templates import prompt_ids
from bupo.errors import UserError
from bupo.evaluation.metrics import avg_at_k, majority_at_k, pass_curve
from bupo.files import whole_rows, write_json
from bupo.rewards.grader import MathGrader, Verdict
from bupo.sampling import Answer, Engine, Request, seed_of

SAMPLES_FILE, SETTINGS_FILE, GRADED_FILE = "samples.jsonl", "settings.json", "graded.parquet"
DEADLINE = 5.0  # seconds, of grading an answer
GRADED_AT_ONCE = 256

Key = tuple[int, int]  # problem, sample


class Samples:
    """The finished answers of a benchmark in a folder, written as they come.

    Args:
        folder (`Path`): where `samples.jsonl` is, or will be.

    Attributes:
        found (`dict[tuple[int, int], Answer]`): by problem and sample.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / SAMPLES_FILE
        self.found: dict[Key, Answer] = dict(whole_rows(self.path, _read_sample))

    def made_with(self, settings: dict, problems: list[str]) -> None:
        """Refuse to mix answers that depend on different things; note what these depend on.

        Args:
            settings (`dict`): the same for every answer.
            problems (`list[str]`): what tells the problems apart, in their order. A run may know more of them than another.

        Raises:
            UserError: if there are answers, and they were made with other settings or to other problems.
        """
        known = check_settings(self.folder, settings, "answers", bool(self.found)).get("problems", [])
        if any(a != b for a, b in zip(known, problems, strict=False)):
            raise UserError(
                f"{self.folder} holds answers to other problems: choose another output, or remove that folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / SETTINGS_FILE, settings | {"problems": max(known, problems, key=len)})

    def add(self, request: Request, answer: Answer) -> None:
        """Keep an answer that has just finished."""
        self.found[request.problem, request.sample] = answer
        with self.path.open("a") as file:
            file.write(json.dumps({"problem": request.problem, "sample": request.sample, **asdict(answer)}) + "\n")


def check_settings(folder: Path, settings: dict, what: str, held: bool) -> dict:
    """The settings that a folder's answers were made with, which must be these. Nothing where it holds none.

    Raises:
        UserError: with the first that differs.
    """
    path = folder / SETTINGS_FILE
    if not held:
        return {}
    if not path.exists():
        raise UserError(
            f"{folder} holds {what}, but not what they were made with ({SETTINGS_FILE} is missing): choose another output, "
            "or remove that folder"
        )
    before = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} holds {what} made with another {name} ({before.get(name)!r:.60}, now {value!r:.60}): choose "
                "another output, or remove that folder"
            )
    return before


def _read_sample(line: str) -> tuple[Key, Answer]:
    row = json.loads(line)
    return (row.pop("problem"), row.pop("sample")), Answer(**row)


def prompts_of(problems: Dataset, tokenizer: PreTrainedTokenizerBase, **options) -> list[tuple[int, ...]]:
    """Token ids of each problem's prompt. Options are the chat template's."""
    return [tuple(prompt_ids(tokenizer, messages, **options)) for messages in problems["prompt"]]


def sample(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    k: int,
    seed: int = 0,
    kept: Samples | None = None,
    on_answer: Callable[[int], None] = lambda done: None,
) -> list[list[Answer]]:
    """k answers to each prompt.

    Args:
        engine (`Engine`): samples.
        prompts (`list[tuple[int, ...]]`): token ids by problem.
        k (`int`): answers a problem.
        seed (`int`, *optional*, defaults to `0`): of the run.
        kept ([`Samples`], *optional*): finished answers, which are not sampled again; new ones are added as they come.
        on_answer (`Callable`, *optional*): called with the number of answers just finished.

    Returns:
        `list[list[Answer]]`: by problem and sample.
    """
    found = {} if kept is None else kept.found
    wanted = [(problem, number) for problem in range(len(prompts)) for number in range(k)]
    missing = [Request(p, n, prompts[p], seed_of(seed, p, n)) for p, n in wanted if (p, n) not in found]
    on_answer(len(wanted) - len(missing))
    for request, answer in engine(missing):
        if kept is None:
            found[request.problem, request.sample] = answer
        else:
            kept.add(request, answer)
        on_answer(1)
    return [[found[problem, number] for number in range(k)] for problem in range(len(prompts))]


def graded(
    problems: Dataset,
    answers: list[list[Answer]],
    deadline: float = DEADLINE,
    on_graded: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """One row an answer: problem, sample, question, gold, text, verdict, value, tokens, truncated.

    Args:
        problems (`Dataset`): with `prompt` and `answer`.
        answers (`list[list[Answer]]`): by problem and sample.
        deadline (`float`, *optional*, defaults to `5.0`): seconds that grading an answer may take.
        on_graded (`Callable`, *optional*): called with the number of answers just graded.
    """
    rows = [
        {
            "problem": p,
            "sample": n,
            "question": problems[p]["prompt"][-1]["content"],
            "gold": problems[p]["answer"],
            **asdict(a),
        }
        for p, samples in enumerate(answers)
        for n, a in enumerate(samples)
    ]
    table = pd.DataFrame(rows)
    for column in ("question", "gold", "text"):  # half a character, which a server may send, is none for a file
        table[column] = [text.encode(errors="replace").decode() for text in table[column]]
    grader, grades = MathGrader(deadline=deadline), []
    try:
        for start in range(0, len(table), GRADED_AT_ONCE):
            part = table[start : start + GRADED_AT_ONCE]
            grades += grader.examine(list(part["text"]), list(part["gold"]))
            on_graded(len(part))
    finally:
        grader.close()
    table["verdict"], table["value"] = [str(g.verdict) for g in grades], [g.value for g in grades]
    return table


def summarize(table: pd.DataFrame) -> dict:
    """avg@k with its interval, pass@K, majority@k, length, and how many answers came to each verdict."""
    correct = correct_of(table)
    problems, k = correct.shape
    values = table["value"].to_numpy().reshape(problems, k)
    mean, interval = avg_at_k(correct)
    return {
        "problems": problems,
        "k": k,
        "avg@k": mean,
        "avg@k_interval": interval,
        "pass@k": {str(size): share for size, share in pass_curve(correct).items()},
        "majority@k": majority_at_k([[None if pd.isna(v) else v for v in row] for row in values], correct),
        "mean_tokens": float(table["tokens"].mean()),
        "truncated": int(table["truncated"].sum()),
        "verdicts": {str(verdict): int((table["verdict"] == verdict).sum()) for verdict in Verdict},
    }


def correct_of(table: pd.DataFrame) -> np.ndarray:
    """`correct_PN` of a graded table."""
    correct = (table["verdict"] == Verdict.CORRECT).to_numpy()
    return correct.reshape(table["problem"].nunique(), -1)


def finished(folder: Path) -> pd.DataFrame:
    """The graded table of a finished benchmark's folder.

    Raises:
        UserError: if there is none.
    """
    path = folder / GRADED_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no finished evaluation ({GRADED_FILE} is missing)")
    return pd.read_parquet(path)
