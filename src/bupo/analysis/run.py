"""Analyse one model on rollouts: measure, keep every finished answer, stop when told or when settled."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedTokenizerBase

from bupo.analysis.measure import MEASURES, AnswerMeasures, measure
from bupo.analysis.rollouts import Rollout
from bupo.analysis.tables import AnswerSums, read_sums, settled
from bupo.model.policy import InternalPolicies, Lens
from bupo.model.residual import ResidualStream, Site

ANSWERS_FILE = "answers.jsonl"
TOKENS_FILE = "tokens.parquet"
VIEW_ANSWERS, VIEW_TOKENS, VIEW_TOP = 6, 96, 5  # of the token x layer view


@dataclass
class Analysis:
    """One model's finished analysis.

    Attributes:
        answers (`list[AnswerSums]`): by answer.
        stopped_early (`bool`): whether the sign of `dH_FFN` was settled before the rollouts ended.
        seconds (`float`): of measuring, this time.
    """

    answers: list[AnswerSums]
    stopped_early: bool
    seconds: float


def analyze_rollouts(
    policies: InternalPolicies,
    rollouts: list[Rollout],
    folder: str | Path,
    *,
    until_settled: bool = False,
    max_tokens: int | None = None,
    per_token: bool = False,
    pairs: bool = False,
    on_answer: Callable[[AnswerSums], None] = lambda answer: None,
) -> Analysis:
    """Measure rollouts into a folder. Answers that its `answers.jsonl` holds are not measured again.

    Args:
        policies ([`~bupo.InternalPolicies`]): the model, its lens and temperature.
        rollouts (`list[Rollout]`): the answers.
        folder (`str`): where finished answers are kept.
        until_settled (`bool`, *optional*): stop as soon as the sign of `dH_FFN` is settled in every layer.
        max_tokens (`int`, *optional*): start no further answer after so many tokens.
        pairs (`bool`, *optional*): also measure the KL of every layer's policy to every other's.
        per_token (`bool`, *optional*): also write every token's values, `tokens.parquet`; then nothing is resumed.
        on_answer (`Callable`, *optional*): called with each answer as it is finished.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS_FILE
    if per_token:
        path.unlink(missing_ok=True)
    answers = read_sums(path)[: len(rollouts)]
    for answer in answers:
        on_answer(answer)
    started = time.perf_counter()
    writer = _TokenWriter(folder / TOKENS_FILE) if per_token else None

    def enough() -> bool:
        spent = sum(a.tokens for a in answers)
        return (max_tokens is not None and spent >= max_tokens) or (until_settled and settled(answers))

    rest = ((r.prompt_ids, r.completion_ids) for r in rollouts[len(answers) :])
    first = len(answers)
    early = until_settled and settled(answers)
    try:
        if not enough():
            with path.open("a") as file:
                for found in measure(policies.stream, rest, policies.lens, policies.temperature, pairs):
                    found.index += first
                    answers.append(AnswerSums.of(found))
                    file.write(answers[-1].line() + "\n")
                    file.flush()
                    if writer:
                        writer.add(found)
                    on_answer(answers[-1])
                    if enough():
                        early = until_settled and settled(answers) and len(answers) < len(rollouts)
                        break
    finally:
        if writer:
            writer.close()
    return Analysis(answers, early, time.perf_counter() - started)


class _TokenWriter:
    """Every token's values, answer by answer, so that memory does not grow. Moved into place when whole."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_suffix(".part")
        self.writer: pq.ParquetWriter | None = None

    def add(self, answer: AnswerMeasures) -> None:
        layers, tokens = answer.values[MEASURES[0]].shape
        columns = {
            "answer": np.full(layers * tokens, answer.index),
            "token": np.tile(np.arange(tokens), layers),
            "layer": np.repeat(np.arange(1, layers + 1), tokens),
            **{name: answer.values[name].ravel() for name in MEASURES},
        }
        table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.part, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
            self.part.replace(self.path)


@torch.no_grad()
def top_tokens(
    policies: InternalPolicies,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    answer: list[int],
    top: int = VIEW_TOP,
) -> dict:
    """What every layer's policy would say at each answer position.

    Returns:
        `dict`: `tokens` (the answer's, as text, T), and by layer 1..L and token: `entropy` (nats), `chosen` (probability of
        the token that was generated), `top` (pairs of text and probability, most likely first).
    """
    stream = policies.stream
    layers = range(1, stream.num_layers + 1)
    first = len(prompt) - 1
    device = stream.model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    states = stream.run([Site("layer", n) for n in layers], ids, select=lambda x: x[0, first:])
    targets = torch.tensor(answer)[:, None]
    view: dict = {"tokens": [_shown(tokenizer, t) for t in answer], "entropy": [], "chosen": [], "top": []}
    for layer in layers:
        rows: dict[str, list] = {"entropy": [], "chosen": [], "top": []}
        x = stream.lensed(states[Site("layer", layer)], policies.lens)
        for piece, target in zip(x.split(32), targets.split(32), strict=True):
            log_p = stream.logits(piece, policies.temperature).log_softmax(-1).cpu()
            rows["entropy"] += [round(h, 3) for h in (-(log_p.exp() * log_p).sum(-1)).tolist()]
            rows["chosen"] += [round(p, 4) for p in log_p.gather(1, target)[:, 0].exp().tolist()]
            best = log_p.topk(min(top, log_p.size(1)))
            for values, tokens in zip(best.values.exp().tolist(), best.indices.tolist(), strict=True):
                rows["top"].append([[_shown(tokenizer, t), round(p, 4)] for t, p in zip(tokens, values, strict=True)])
        for name, values in rows.items():
            view[name].append(values)
    return view


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥") or f"⟨{token}⟩"


def token_views(policies: InternalPolicies, tokenizer: PreTrainedTokenizerBase, rollouts: list[Rollout]) -> list[dict]:
    """The token x layer views of the first few answers, with their prompts."""
    return [
        {"prompt": r.prompt, **top_tokens(policies, tokenizer, r.prompt_ids, r.completion_ids[:VIEW_TOKENS])}
        for r in rollouts[:VIEW_ANSWERS]
    ]


def model_meta(name: str, stream: ResidualStream, lens: Lens, temperature: float) -> dict:
    """What must stand beside every number."""
    import accelerate
    import transformers

    import bupo

    return {
        "schema_version": 1,
        "model": name,
        "revision": getattr(stream.model.config, "_commit_hash", None),
        "model_type": stream.config.model_type,
        "layers": stream.num_layers,
        "dtype": str(stream.model.dtype).removeprefix("torch."),
        "lens": lens,
        "temperature": temperature,
        "identity_error": stream.identity.worst,
        "identity_error_layers": max(stream.identity.layers),
        "identity_error_head": stream.identity.head,
        "versions": {m.__name__: m.__version__ for m in (bupo, torch, transformers, accelerate)},
    }
