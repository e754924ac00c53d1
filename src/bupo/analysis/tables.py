"""Tidy tables from measured answers: means, standard deviations and bootstrap intervals.

An answer's tokens are correlated, so the bootstrap resamples answers; the mean of a resample is over the tokens of the drawn
answers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from bupo.analysis.measures import MEASURES, CompletionMeasures
from bupo.run_files.reading import check_keys

NUM_RESAMPLES = 2000
ARRAY_FIELDS = ("sums", "squared_sums", "similarity", "kl")  # of `CompletionSums`
STOPPING_LEVEL = 0.99  # level of the intervals for `--until settled`
MIN_STOPPING_COMPLETIONS = 8  # smallest number of answers for `--until settled`


@dataclass
class CompletionSums:
    """Sums of an answer's measures over its T tokens.

    Attributes:
        index, tokens (`int`): index of the answer, and T.
        sums, squared_sums (`np.ndarray` of shape `(len(MEASURES), L)`): sums of the values and of their squares.
        similarity (`np.ndarray` of shape `(L, L)`): sum of cos(H^l, H^m).
        kl (`np.ndarray` of shape `(L, L)`, *optional*): sum of KL(pi_Layer^l || pi_Layer^m).
        log_prob, entropy (`float`): sums under the full model.
    """

    index: int
    tokens: int
    sums: np.ndarray
    squared_sums: np.ndarray
    similarity: np.ndarray
    kl: np.ndarray | None
    log_prob: float
    entropy: float

    @classmethod
    def from_measures(cls, answer: CompletionMeasures) -> "CompletionSums":
        values = np.stack([answer.values[name] for name in MEASURES])
        return cls(
            answer.index,
            answer.num_tokens,
            values.sum(-1),
            np.square(values).sum(-1),
            answer.similarity,
            answer.kl,
            float(answer.log_probs.sum()),
            float(answer.entropy.sum()),
        )

    @classmethod
    def merge(cls, answers: Sequence["CompletionSums"]) -> "CompletionSums":
        """Add the sums of several answers that are resampled together, such as those to one prompt."""
        names = [field.name for field in fields(cls) if field.name != "index"]
        sums = {name: sum(getattr(a, name) for a in answers) for name in names if getattr(answers[0], name) is not None}
        return cls(answers[0].index, **{"kl": None, **sums})

    def to_json(self) -> str:
        """Return one JSON line with nine digits."""

        def round_array(array: np.ndarray) -> list:
            return [[float(f"{x:.9g}") for x in row] for row in array]

        arrays = {name: round_array(getattr(self, name)) for name in ARRAY_FIELDS if getattr(self, name) is not None}
        rest = {"log_prob": self.log_prob, "entropy": self.entropy}
        return json.dumps({"index": self.index, "tokens": self.tokens, **rest, **arrays})

    @classmethod
    def from_json(cls, line: str) -> "CompletionSums":
        kinds = {"index": int, "tokens": int, "log_prob": float, "entropy": float}
        row: dict[str, Any] = check_keys(
            json.loads(line), kinds | dict.fromkeys(("sums", "squared_sums", "similarity"), list)
        )
        arrays = {name: np.array(row[name], dtype=float) for name in ARRAY_FIELDS if name in row}
        layers = arrays["similarity"].shape[-1]
        shapes = dict.fromkeys(("sums", "squared_sums"), (len(MEASURES), layers))
        for name, array in arrays.items():
            if array.shape != shapes.get(name, (layers, layers)) or row["tokens"] < 1:
                raise ValueError(f"{name} does not have the shape for {layers} layers")
        return cls(**{"kl": None, **row, **arrays})


class BootstrapMeans:
    """Bootstrap means of every measure and layer.

    Attributes:
        mean, std (`np.ndarray` of shape `(len(MEASURES), L)`): over all tokens.
        draws (`np.ndarray` of shape `(NUM_RESAMPLES, len(MEASURES), L)`): means of the resamples; empty for one answer.
    """

    def __init__(self, answers: Sequence[CompletionSums], seed: int = 0):
        self.num_completions, self.num_tokens = len(answers), sum(a.tokens for a in answers)
        total = np.stack([a.sums for a in answers])
        self.mean = total.sum(0) / self.num_tokens
        variance = np.stack([a.squared_sums for a in answers]).sum(0) / self.num_tokens - self.mean**2
        self.std = np.sqrt(np.maximum(variance, 0) * self.num_tokens / max(1, self.num_tokens - 1))
        n = len(answers)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES if n > 1 else 0)
        counts = drawn @ np.array([a.tokens for a in answers])
        self.draws = (drawn @ total.reshape(n, -1)).reshape(len(drawn), *self.mean.shape) / counts[:, None, None]

    def compute_interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return the percentile interval of each mean; NaN for a single answer, which cannot be resampled."""
        if not len(self.draws):
            return np.full_like(self.mean, np.nan), np.full_like(self.mean, np.nan)
        low, high = np.percentile(self.draws, [50 * (1 - level), 50 * (1 + level)], axis=0)
        return low, high


def build_layer_table(answers: Sequence[CompletionSums], model: str) -> pd.DataFrame:
    """Return one row per measure and layer, with mean, standard deviation over tokens, 95 % interval and counts."""
    resampled = BootstrapMeans(answers)
    low, high = resampled.compute_interval()
    rows = [
        {
            "model": model,
            "measure": name,
            "layer": layer + 1,
            "mean": resampled.mean[m, layer],
            "std": resampled.std[m, layer],
            "low": low[m, layer],
            "high": high[m, layer],
            "tokens": resampled.num_tokens,
            "answers": resampled.num_completions,
        }
        for m, name in enumerate(MEASURES)
        for layer in range(resampled.mean.shape[1])
    ]
    return pd.DataFrame(rows)


def has_significant_signs(answers: Sequence[CompletionSums]) -> bool:
    """Return whether the sign of `dH_FFN` is significant in every layer: at least 8 answers, no 99 % interval with zero."""
    if len(answers) < MIN_STOPPING_COMPLETIONS:
        return False
    low, high = (
        bound[MEASURES.index("d_entropy_ffn")] for bound in BootstrapMeans(answers).compute_interval(STOPPING_LEVEL)
    )
    return bool(((low > 0) | (high < 0)).all())


def compute_similarity(answers: Sequence[CompletionSums]) -> np.ndarray:
    """Return the mean cosine of H^l and H^m, `(L, L)`."""
    return np.stack([a.similarity for a in answers]).sum(0) / sum(a.tokens for a in answers)


def compute_kl(answers: Sequence[CompletionSums]) -> np.ndarray | None:
    """Return the mean KL(pi_Layer^l || pi_Layer^m) in nats, `(L, L)`, or None if it was not measured."""
    sums = [a.kl for a in answers if a.kl is not None]
    return np.stack(sums).sum(0) / sum(a.tokens for a in answers) if len(sums) == len(answers) else None


def compute_perplexity(answers: Sequence[CompletionSums]) -> float:
    """Return the perplexity of the answers under the full model."""
    return float(np.exp(-sum(a.log_prob for a in answers) / sum(a.tokens for a in answers)))
