"""Answers to one benchmark: sampling with a cache, grading, and summary."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import tokenize_prompt
from bupo.data.problems import compute_prompt_digests
from bupo.data.prompts import get_message_text
from bupo.evaluation.metrics import avg_at_k, majority_at_k, pass_at_k_curve
from bupo.generation.seeded_sampling import CompletionRequest, Engine, SampledCompletion, derive_seed
from bupo.rewards.grader import Grade, MathGrader, Verdict
from bupo.rewards.task_scorers import SCORED_BY_COLUMN
from bupo.run_files.reading import DamagedFileError, KeyTypes, check_keys, read_parquet
from bupo.run_files.result_cache import ResultCache
from bupo.utils.errors import UserError

SAMPLES_FILE, GRADED_FILE = "samples.jsonl", "graded.parquet"
REGRADE_HINT = "run its bupo eval once more with --engine cached, which grades the answers that it holds"
GRADING_DEADLINE = 5.0  # seconds per answer
GRADING_BATCH_SIZE = 256

SAMPLE_FIELDS: KeyTypes = {"problem": int, "sample": int, "text": str, "tokens": int, "truncated": bool}
GRADED_COLUMNS = {
    "problem": "number",
    "sample": "number",
    "question": "text",
    "verdict": "text",
    "strict": "text",
    "reason": "any",
    "answer_class": "any",
}

SampleKey = tuple[int, int]  # problem, sample


def open_sample_cache(
    folder: Path,
    settings: Mapping[str, Any],
    problems: Dataset,
    prompts: Sequence[tuple[int, ...]] = (),
    **options,
) -> ResultCache[SampleKey, SampledCompletion]:
    """Open the cache of a benchmark's answers, by problem and sample.

    A line also holds the token ids of prompt and answer, so that an analysis can read it as a rollout. They are not kept in
    memory.

    Args:
        folder (`Path`): folder of the benchmark.
        settings (`dict`): settings that every answer depends on.
        problems (`Dataset`): problems with `prompt` (messages).
        prompts (`list[tuple[int, ...]]`, *optional*): token ids by problem; needed for sampling.
        options: further arguments of [`~bupo.run_files.result_cache.ResultCache`].
    """

    def write(key: SampleKey, answer: SampledCompletion) -> str:
        row = {"problem": key[0], "sample": key[1], **_get_text_fields(answer)}
        tokens = (
            {"prompt_ids": prompts[key[0]], "completion_ids": answer.token_ids} if answer.token_ids and prompts else {}
        )
        return json.dumps(row | tokens)

    return ResultCache(
        folder, SAMPLES_FILE, "answers", _parse_sample, write, settings, compute_prompt_digests(problems), **options
    )


def _parse_sample(line: str) -> tuple[SampleKey, SampledCompletion]:
    row = check_keys(json.loads(line), SAMPLE_FIELDS)
    for name in ("prompt_ids", "completion_ids"):  # read by an analysis only
        row.pop(name, None)
    key = row.pop("problem"), row.pop("sample")
    return key, SampledCompletion(length=row.pop("tokens"), **row)


def _get_text_fields(answer: SampledCompletion) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.length, "truncated": answer.truncated}


def tokenize_prompts(problems: Dataset, tokenizer: PreTrainedTokenizerBase, **options) -> list[tuple[int, ...]]:
    """Return the token ids of each problem's prompt; options are arguments of the chat template."""
    return [tuple(tokenize_prompt(tokenizer, messages, **options)) for messages in problems["prompt"]]


def sample_completions(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    k: int,
    seed: int = 0,
    cache: ResultCache[SampleKey, SampledCompletion] | None = None,
    on_answer: Callable[[int], None] = lambda done: None,
) -> list[list[SampledCompletion]]:
    """Sample k answers to each prompt.

    Args:
        engine (`Engine`): engine that samples.
        prompts (`list[tuple[int, ...]]`): token ids by problem.
        k (`int`): answers per problem.
        seed (`int`, *optional*, defaults to `0`): seed of the sampling.
        cache ([`~bupo.run_files.result_cache.ResultCache`], *optional*): finished answers, which are not sampled again;
            new ones are added.
        on_answer (`Callable`, *optional*): called with the number of answers just finished.

    Returns:
        `list[list[SampledCompletion]]`: by problem and sample.
    """
    answers = {} if cache is None else cache.rows
    keys = [(problem, number) for problem in range(len(prompts)) for number in range(k)]
    missing = [CompletionRequest(p, n, prompts[p], derive_seed(seed, p, n)) for p, n in keys if (p, n) not in answers]
    on_answer(len(keys) - len(missing))
    for request, answer in engine(missing):
        key = request.problem, request.sample
        if cache is not None:
            cache.add(key, answer)
        answers[key] = replace(answer, token_ids=())  # token ids of all answers would fill the memory
        on_answer(1)
    return [[answers[problem, number] for number in range(k)] for problem in range(len(prompts))]


def grade_completions(
    problems: Dataset,
    answers: list[list[SampledCompletion]],
    deadline: float = GRADING_DEADLINE,
    on_graded: Callable[[int], None] = lambda done: None,
) -> pd.DataFrame:
    """Return one row per answer: problem, sample, question, gold, text, tokens, truncated, and its grade.

    The grade is `verdict`, `value`, `strict`, `reason` (why there is no answer) and `answer_class`, which numbers the classes
    of equal answers to a problem, for majority votes.

    Args:
        problems (`Dataset`): problems with `prompt`, `answer` and, if their task scores answers, `scored_by`.
        answers (`list[list[SampledCompletion]]`): by problem and sample.
        deadline (`float`, *optional*, defaults to `5.0`): seconds that grading an answer may take.
        on_graded (`Callable`, *optional*): called with the number of answers just graded.
    """
    rows = [
        {
            "problem": p,
            "sample": n,
            "question": get_message_text(problems[p]["prompt"][-1]),
            "gold": problems[p]["answer"],
            **_get_text_fields(a),
        }
        for p, samples in enumerate(answers)
        for n, a in enumerate(samples)
    ]
    table = pd.DataFrame(rows)
    for column in ("question", "gold", "text"):  # a server may send unpaired surrogates, which cannot be encoded
        table[column] = [text.encode(errors="replace").decode() for text in table[column]]
    scored_by = problems[SCORED_BY_COLUMN] if SCORED_BY_COLUMN in problems.column_names else [None] * len(problems)
    grader, grades = MathGrader(deadline=deadline), []
    try:
        for start in range(0, len(table), GRADING_BATCH_SIZE):
            part = table[start : start + GRADING_BATCH_SIZE]
            names = [scored_by[problem] for problem in part["problem"]]
            grades += grader.get_grades(list(part["text"]), list(part["gold"]), names)
            on_graded(len(part))
        values = np.array([g.value for g in grades], dtype=object).reshape(len(answers), -1).tolist()
        classes = [number for numbers in grader.group_equal_answers(values) for number in numbers]
    finally:
        grader.close()
    table["verdict"], table["value"] = [str(g.verdict) for g in grades], [g.value for g in grades]
    table["strict"] = [str(g.strict) for g in grades]
    table["reason"] = [_get_no_answer_reason(*row) for row in zip(grades, table["truncated"], strict=True)]
    table["answer_class"] = pd.array(classes, dtype="Int64")
    return table


def _get_no_answer_reason(grade: Grade, truncated: bool) -> str | None:
    """Return why no final answer was found or parsed; None if there is one."""
    if Verdict.UNPARSABLE not in (grade.verdict, grade.strict):
        return None
    return "cut at the limit" if truncated else grade.reason or "not readable"


def summarize(table: pd.DataFrame) -> dict:
    """Return avg@k with its interval, pass@K, majority@k, mean length, and the number of answers by verdict.

    `strict_avg@k`, its interval and `strict_verdicts` use the strict verdict, everything else math-verify's.
    """
    correct = get_correct(table)
    problems, k = correct.shape
    classes = table["answer_class"].astype(object).to_numpy().reshape(problems, k)
    mean, interval = avg_at_k(correct)
    strict_mean, strict_interval = avg_at_k(get_correct(table, "strict"))
    return {
        "problems": problems,
        "k": k,
        "avg@k": mean,
        "avg@k_interval": interval,
        "strict_avg@k": strict_mean,
        "strict_avg@k_interval": strict_interval,
        "pass@k": {str(size): share for size, share in pass_at_k_curve(correct).items()},
        "majority@k": majority_at_k([[None if pd.isna(c) else c for c in row] for row in classes], correct),
        "mean_tokens": float(table["tokens"].mean()),
        "truncated": int(table["truncated"].sum()),
        "verdicts": _count_verdicts(table["verdict"]),
        "strict_verdicts": _count_verdicts(table["strict"]),
        "no_answer_reasons": table.loc[table["verdict"] == Verdict.UNPARSABLE, "reason"].value_counts().to_dict(),
        "graded_by": f"math-verify {version('math-verify')}",
    }


def _count_verdicts(verdicts: pd.Series) -> dict[str, int]:
    return {str(verdict): int((verdicts == verdict).sum()) for verdict in Verdict}


def get_correct(table: pd.DataFrame, by: str = "verdict") -> np.ndarray:
    """Return `correct_PN` of a graded table, by `verdict` or by `strict`."""
    correct = (table[by] == Verdict.CORRECT).to_numpy()
    return correct.reshape(table["problem"].nunique(), -1)


def read_graded_table(folder: Path, base: Path | None = None) -> pd.DataFrame:
    """Read the graded table of a finished benchmark.

    Args:
        folder (`Path`): folder of the benchmark.
        base (`Path`, *optional*): folder of the evaluation, which the path must not leave.

    Raises:
        UserError: if there is no table, or it is damaged.
    """
    path = folder / GRADED_FILE
    if not os.path.lexists(path):
        raise UserError(f"{folder} holds no finished evaluation ({GRADED_FILE} is missing)")
    remedy = f"delete it, and {REGRADE_HINT}"
    table = read_parquet(path, GRADED_COLUMNS, remedy, base)
    counts = table["problem"].value_counts()
    if table.empty or counts.nunique() != 1:
        raise DamagedFileError(path, "its problems have no or unequal numbers of answers", remedy)
    return table
