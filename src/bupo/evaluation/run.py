"""One benchmark: sample what is missing, keep every answer as it finishes, grade, and sum up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from bupo.analysis.run import write_json
from bupo.errors import UserError
from bupo.evaluation.metrics import avg_at_k, majority_at_k, pass_curve
from bupo.evaluation.sampling import Answer, Engine, Request, seed_of
from bupo.rewards.grader import MathGrader, Verdict

SAMPLES_FILE, SETTINGS_FILE, GRADED_FILE = "samples.jsonl", "settings.json", "graded.parquet"


def sample_missing(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    k: int,
    seed: int,
    folder: Path,
    settings: dict,
    on_answer: Callable[[int], None] = lambda done: None,
) -> list[list[Answer]]:
    """k answers to each prompt, of which those that `samples.jsonl` holds are not sampled again.

    Args:
        engine (`Engine`): samples.
        prompts (`list[tuple[int, ...]]`): token ids by problem.
        k (`int`): answers a problem.
        seed (`int`): of the run.
        folder (`Path`): where the answers are kept.
        settings (`dict`): what the answers depend on besides; a folder made with others begins anew.
        on_answer (`Callable`, *optional*): called with the number of answers just finished.

    Returns:
        `list[list[Answer]]`: by problem and sample.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SAMPLES_FILE
    mine = json.loads(json.dumps(settings | {"seed": seed}))
    kept = folder / SETTINGS_FILE
    if not kept.exists() or json.loads(kept.read_text()) != mine:
        path.unlink(missing_ok=True)
        write_json(kept, mine)
    found = _read_samples(path)
    wanted = [(problem, sample) for problem in range(len(prompts)) for sample in range(k)]
    on_answer(sum(key in found for key in wanted))
    missing = [
        Request(problem, sample, prompts[problem], seed_of(seed, problem, sample))
        for problem, sample in wanted
        if (problem, sample) not in found
    ]
    with path.open("a") as file:
        for request, answer in engine(missing):
            found[request.problem, request.sample] = answer
            file.write(json.dumps({"problem": request.problem, "sample": request.sample, **asdict(answer)}) + "\n")
            file.flush()
            on_answer(1)
    return [[found[problem, sample] for sample in range(k)] for problem in range(len(prompts))]


def _read_samples(path: Path) -> dict[tuple[int, int], Answer]:
    """The whole rows of a file; half a last line is cut off."""
    found: dict[tuple[int, int], Answer] = {}
    if not path.exists():
        return found
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            key = (row.pop("problem"), row.pop("sample"))
            found[key] = Answer(**row)
        except (json.JSONDecodeError, KeyError, TypeError):
            path.write_text("".join(lines[:number]))
            break
    return found


def graded(problems: Dataset, answers: list[list[Answer]], deadline: float) -> pd.DataFrame:
    """One row an answer: problem, sample, question, gold, text, verdict, value, tokens, truncated."""
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
    grader = MathGrader(deadline=deadline)
    try:
        grades = grader.examine(list(table["text"]), list(table["gold"]))
    finally:
        grader.close()
    table["verdict"], table["value"] = [str(g.verdict) for g in grades], [g.value for g in grades]
    return table


def summarize(table: pd.DataFrame) -> dict:
    """avg@k with its interval, pass@K, majority@k, length, and how many answers came to each verdict."""
    problems, k = table["problem"].nunique(), table["sample"].nunique()
    correct = (table["verdict"] == Verdict.CORRECT).to_numpy().reshape(problems, k)
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


def correct_by_problem(folder: Path) -> np.ndarray:
    """`correct_PN` of a finished benchmark's folder."""
    path = folder / GRADED_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no finished evaluation ({GRADED_FILE} is missing)")
    table = pd.read_parquet(path)
    return (table["verdict"] == Verdict.CORRECT).to_numpy().reshape(table["problem"].nunique(), -1)
