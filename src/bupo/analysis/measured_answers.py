"""Measurement of rollouts with a cache on disk, and early stopping once all signs are significant."""

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
        completions (`list[CompletionSums]`): sums by answer.
        stopped_early (`bool`): whether the sign of `dH_FFN` was significant in every layer before the last rollout.
        seconds (`float`): time of this measurement.
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
    """Measure rollouts; read cached answers from the store, except with `per_token`.

    Args:
        policies ([`~bupo.InternalPolicies`]): the model, its lens and temperature.
        rollouts (`list[Rollout]`): the answers.
        store ([`~bupo.run_files.result_cache.ResultCache`]): cache of the measures, by the answer's index.
        until_settled (`bool`, *optional*): stop once the sign of `dH_FFN` is significant in every layer.
        max_tokens (`int`, *optional*): stop after the answer that reaches this number of tokens.
        per_token (`bool`, *optional*): also write every token's values to `tokens.parquet` next to the cache.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's.
        on_tokens (`Callable`, *optional*): called with the number of tokens just measured.
    """
    start, completions = time.perf_counter(), list[CompletionSums]()
    writer = _TokenTableWriter(store.folder / TOKENS_FILE) if per_token else None
    significant = False
    try:
        for sums in _iterate_sums(policies, rollouts, store, writer, pairs):
            completions.append(sums)
            on_tokens(sums.tokens)
            significant = until_settled and has_significant_signs(completions)
            if significant or (max_tokens is not None and sum(c.tokens for c in completions) >= max_tokens):
                break
        if writer:
            writer.commit()
    finally:
        if writer:
            writer.close()
    stopped_early = significant and len(completions) < len(rollouts)
    return MeasuredRollouts(completions, stopped_early, time.perf_counter() - start)


def _iterate_sums(
    policies: InternalPolicies,
    rollouts: Sequence[Rollout],
    store: ResultCache[int, CompletionSums],
    writer: "_TokenTableWriter | None",
    pairs: bool,
) -> Iterator[CompletionSums]:
    """Yield the sums of all answers in order: cached ones first, then newly measured ones."""
    num_cached = 0
    while num_cached < len(rollouts) and num_cached in store.rows and writer is None:
        yield store.rows[num_cached]
        num_cached += 1
    rest = ((r.prompt_ids, r.completion_ids) for r in rollouts[num_cached:])
    for measures in measure_completions(policies.stream, rest, policies.lens, policies.temperature, pairs):
        measures.index += num_cached
        if writer:
            writer.add(measures)
        if measures.index not in store.rows:
            store.add(measures.index, CompletionSums.from_measures(measures))
        yield store.rows[measures.index]


class _TokenTableWriter:
    """Writer of every token's values, answer by answer, so that memory does not grow. The complete file is moved into place."""

    def __init__(self, path: Path):
        self.path, self.partial_path = path, path.with_name(path.name + ".part")
        self.writer: pq.ParquetWriter | None = None

    def add(self, completion: CompletionMeasures) -> None:
        layers, tokens = completion.values[MEASURES[0]].shape
        columns = {
            "answer": np.full(layers * tokens, completion.index),
            "token": np.tile(np.arange(tokens), layers),
            "layer": np.repeat(np.arange(1, layers + 1), tokens),
            **{name: completion.values[name].ravel() for name in MEASURES},
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
