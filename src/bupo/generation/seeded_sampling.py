"""Sampled answers whose every token depends on the run's seed, the problem and the sample's number only.

An engine takes requests and yields answers as they finish: `engine(requests) -> Iterator[tuple[Request, Answer]]`. Here is
transformers', which the analysis samples with too; `bupo.generation.vllm_engines` holds vLLM's, offline and as a server.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bupo.models.cpu_decoding import generate
from bupo.models.generation_settings import get_eos_token_ids, policy_generation_config
from bupo.models.internal_policy import InternalPolicy
from bupo.models.residual_stream import eval_mode, unwrap_causal_lm


@dataclass(frozen=True)
class CompletionRequest:
    """One answer that is wanted.

    Attributes:
        problem, sample (`int`): which, both from 0.
        prompt_ids (`tuple[int, ...]`): the prompt.
        seed (`int`): of this answer alone.
    """

    problem: int
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class SampledCompletion:
    """What was sampled.

    Attributes:
        text (`str`): without special tokens.
        tokens (`int`): its length, the end token included.
        truncated (`bool`): whether it reached the limit without an end.
        ids (`tuple[int, ...]`): its tokens, the end token included; empty where they are not known, or kept on disk only.
    """

    text: str
    length: int
    truncated: bool
    token_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


Engine = Callable[[Sequence[CompletionRequest]], Iterator[tuple[CompletionRequest, SampledCompletion]]]


def derive_seed(run: int, problem: int, sample: int) -> int:
    """A seed of 31 bits for one answer: more samples never change earlier ones."""
    return int.from_bytes(hashlib.sha256(f"{run}/{problem}/{sample}".encode()).digest()[:4], "big") >> 1


class SeededLogitsProcessor(LogitsProcessor):
    """Turns `generate`'s most likely token into one that is sampled with each row's own random numbers.

    Token t of a row is the one where the policy's cumulative probability passes the row's t-th uniform number, whatever else is
    in the batch.

    Args:
        seeds (`list[int]`): by row.
        start (`int`): length of the padded prompt.
        limit (`int`): longest answer.
        temperature, top_p (`float`): of the sampling.
    """

    def __init__(self, seeds: Sequence[int], start: int, limit: int, temperature: float, top_p: float):
        self.start, self.temperature, self.top_p = start, temperature, top_p
        generator = torch.Generator()
        self.uniform = torch.stack([torch.rand(limit, generator=generator.manual_seed(seed)) for seed in seeds])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.sample_tokens(input_ids, torch.arange(len(scores), device=scores.device), scores)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def sample_tokens(self, ids: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The next token `(rows,)` of these rows of the batch, from their ids `(rows, time)` and scores `(rows, V)`."""
        probabilities = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # the first token is always inside
            probabilities = probabilities.masked_fill(outside.gather(-1, places.argsort(-1)), 0.0)
        if probabilities.device.type == "mps":  # which has no float64
            probabilities = probabilities.cpu()
        summed = probabilities.double().cumsum(-1)
        point = self.uniform[rows.to(self.uniform.device), ids.size(1) - self.start, None].to(summed) * summed[:, -1:]
        chosen = torch.searchsorted(summed, point, right=True)[:, 0].clamp(max=scores.size(-1) - 1)
        return chosen.to(scores.device)


class TransformersEngine:
    """Answers by transformers' `generate`, prompts of like length together.

    Args:
        model, tokenizer: the policy; the tokenizer has a padding token.
        max_new_tokens (`int`): longest answer.
        temperature, top_p (`float`, *optional*, default to `1.0`): of the sampling. A temperature of 0 takes the most likely
            token.
        policy ([`~bupo.models.internal_policy.InternalPolicy`], *optional*): samples from this one instead of the language model policy.
        batch_size (`int`, *optional*, defaults to `64`): answers sampled at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        policy: InternalPolicy | None = None,
        batch_size: int = 64,
    ):
        self.model, self.tokenizer, self.policy = unwrap_causal_lm(model), tokenizer, policy
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.batch_size = batch_size
        self.end_token_ids = set(get_eos_token_ids(self.model, tokenizer))

    def __call__(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
        """Answers batch by batch, the shortest prompts first."""
        for request, ids in self.generate_token_ids(requests):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield request, SampledCompletion(text, len(ids), not ids or ids[-1] not in self.end_token_ids, tuple(ids))

    def generate_token_ids(
        self, requests: Sequence[CompletionRequest]
    ) -> Iterator[tuple[CompletionRequest, list[int]]]:
        """Answers as token ids, the end token included."""
        ordered = sorted(requests, key=lambda r: (len(r.prompt_ids), r.problem, r.sample))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            yield from zip(batch, self._generate_batch(batch), strict=True)

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[CompletionRequest]) -> list[list[int]]:
        inputs = self.tokenizer.pad(
            {"input_ids": [list(request.prompt_ids) for request in batch]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        start = inputs["input_ids"].size(1)
        seeded = SeededLogitsProcessor(
            [request.seed for request in batch], start, self.max_new_tokens, self.temperature, self.top_p
        )
        with eval_mode(self.model), self.policy_generation() as settings:
            settings.max_new_tokens = self.max_new_tokens
            out = generate(
                self.model,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=settings,
                seeded=seeded if self.temperature else None,
            )
        return [self._cut_after_end_token(row) for row in out[:, start:].tolist()]

    @contextmanager
    def policy_generation(self) -> Iterator[GenerationConfig]:
        """Inside, the model's `generate` samples the policy: with the yielded settings, and none of the model's own.

        The most likely token of the scores is taken, which [`SeededLogitsProcessor`] has put in the place of the sampled one.
        """
        with (
            policy_generation_config(self.model, self.tokenizer, do_sample=False) as settings,
            self.policy.override_forward() if self.policy else nullcontext(),
        ):
            yield settings

    def _cut_after_end_token(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return ids[: end + 1]
