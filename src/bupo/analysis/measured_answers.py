"""Rollouts measured into a store: nothing is measured twice, and measuring stops when told or when settled."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from bupo.analysis.measures import MEASURES, CompletionMeasures, measure_completions
from bupo.analysis.rollouts import Rollout
from bupo.analysis.tables import CompletionSums, has_significant_signs
from bupo.models.internal_policy import InternalPolicies
from bupo.run_files.result_cache import ResultCache
from bupo.utils.files import check_guarded_folder, remove_existing_file

ANSWERS_FILE, TOKENS_FILE = "answers.jsonl", "tokens.parquet"


@dataclass(frozen=True)
class MeasuredRollouts:
    """Answers that were measured.

    Attributes:
        answers (`list[AnswerSums]`): by answer.
        stopped_early (`bool`): whether the sign of `dH_FFN` was settled before the rollouts ended.
        seconds (`float`): of measuring, this time.
    """

    completions: list[CompletionSums]
    stopped_early: bool
    seconds: float


def measure_with_cache(
    policies: InternalPolicies,
    rollouts: Sequence[Rollout],
    store: ResultCache[int, CompletionSums],
    *,
    until_settled: bool = False,
    max_tokens: int | None = None,
    per_token: bool = False,
    pairs: bool = False,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> MeasuredRollouts:
    """Measure rollouts. Answers that the store holds are not measured again, but for `per_token`.

    Args:
        policies ([`~bupo.InternalPolicies`]): the model, its lens and temperature.
        rollouts (`list[Rollout]`): the answers.
        store ([`~bupo.run_files.result_cache.ResultCache`]): where measures are kept, by the answer's place.
        until_settled (`bool`, *optional*): stop as soon as the sign of `dH_FFN` is settled in every layer.
        max_tokens (`int`, *optional*): start no further answer after so many tokens.
        per_token (`bool`, *optional*): also write every token's values, `tokens.parquet`, beside the store.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's.
        on_tokens (`Callable`, *optional*): called with the number of tokens just done.
    """
    started, answers = time.perf_counter(), list[CompletionSums]()
    writer = _TokenTableWriter(store.folder / TOKENS_FILE) if per_token else None
    early = False
    try:
        for found in _iterate_sums(policies, rollouts, store, writer, pairs):
            answers.append(found)
            on_tokens(found.tokens)
            early = until_settled and has_significant_signs(answers)
            if early or (max_tokens is not None and sum(a.tokens for a in answers) >= max_tokens):
                break
        if writer:
            writer.commit()
    finally:
        if writer:
            writer.close()
    return MeasuredRollouts(answers, early and len(answers) < len(rollouts), time.perf_counter() - started)


def _iterate_sums(
    policies: InternalPolicies,
    rollouts: Sequence[Rollout],
    store: ResultCache[int, CompletionSums],
    writer: "_TokenTableWriter | None",
    pairs: bool,
) -> Iterator[CompletionSums]:
    """The answers' sums, in order: first those that the store holds, then the others as they are measured."""
    held = 0
    while held < len(rollouts) and held in store.rows and writer is None:
        yield store.rows[held]
        held += 1
    rest = ((r.prompt_ids, r.completion_ids) for r in rollouts[held:])
    for found in measure_completions(policies.stream, rest, policies.lens, policies.temperature, pairs):
        found.index += held
        if writer:
            writer.add(found)
        if found.index not in store.rows:
            store.add(found.index, CompletionSums.from_measures(found))
        yield store.rows[found.index]


class _TokenTableWriter:
    """Every token's values, answer by answer, so that memory does not grow. Moved into place when whole."""

    def __init__(self, path: Path):
        self.path, self.partial_path = path, path.with_name(path.name + ".part")
        self.writer: pq.ParquetWriter | None = None

    def add(self, answer: CompletionMeasures) -> None:
        layers, tokens = answer.values[MEASURES[0]].shape
        columns = {
            "answer": np.full(layers * tokens, answer.index),
            "token": np.tile(np.arange(tokens), layers),
            "layer": np.repeat(np.arange(1, layers + 1), tokens),
            **{name: answer.values[name].ravel() for name in MEASURES},
        }
        table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
        if self.writer is None:
            check_guarded_folder(self.path)
            remove_existing_file(self.partial_path)
            self.writer = pq.ParquetWriter(self.partial_path, table.schema)
        self.writer.write_table(table)

    def commit(self) -> None:
        self.close()
        check_guarded_folder(self.path)
        self.partial_path.replace(self.path)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
