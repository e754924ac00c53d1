"""Seeded sampling: each token of an answer depends only on the run's seed, the problem and the sample's index.

An [`Engine`] takes requests and yields answers as they finish. The evaluation and the analysis use [`TransformersEngine`];
`bupo.generation.vllm_engines` holds the engines of vLLM, offline and as a server.
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
    """Request for one answer.

    Attributes:
        problem, sample (`int`): index of the problem, and of the answer to it, both from 0.
        prompt_ids (`tuple[int, ...]`): token ids of the prompt.
        seed (`int`): seed of this answer, see [`derive_seed`].
    """

    problem: int
    sample: int
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class SampledCompletion:
    """Sampled answer.

    Attributes:
        text (`str`): text without special tokens.
        length (`int`): number of tokens, with the end token.
        truncated (`bool`): whether the answer reached the limit without an end token.
        token_ids (`tuple[int, ...]`): token ids, with the end token; empty if they are unknown, or only stored on disk.
    """

    text: str
    length: int
    truncated: bool
    token_ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


Engine = Callable[[Sequence[CompletionRequest]], Iterator[tuple[CompletionRequest, SampledCompletion]]]


def derive_seed(run_seed: int, problem: int, sample: int) -> int:
    """Return a 31-bit seed for one answer. Earlier answers do not change when more are sampled."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{problem}/{sample}".encode()).digest()[:4], "big") >> 1


class SeededLogitsProcessor(LogitsProcessor):
    """Logits processor that samples with one random number generator per row, for greedy `generate`.

    Token t of a row is the first one at which the policy's cumulative probability exceeds the row's t-th uniform number, so it
    does not depend on the other rows of the batch. Its score becomes 0, and all others minus infinity.

    Args:
        seeds (`list[int]`): one seed per row.
        prompt_length (`int`): length of the padded prompts.
        max_new_tokens (`int`): maximum length of an answer.
        temperature, top_p (`float`): sampling settings.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, max_new_tokens: int, temperature: float, top_p: float):
        self.prompt_length, self.temperature, self.top_p = prompt_length, temperature, top_p
        generator = torch.Generator()
        self.uniform = torch.stack(
            [torch.rand(max_new_tokens, generator=generator.manual_seed(seed)) for seed in seeds]
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.select_tokens(input_ids, torch.arange(len(scores), device=scores.device), scores)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)

    def select_tokens(self, ids: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the next tokens of some rows of the batch.

        Args:
            ids (`torch.Tensor` of shape `(B, T)`): token ids of the rows so far.
            rows (`torch.Tensor` of shape `(B,)`): indices of the rows in the batch.
            scores (`torch.Tensor` of shape `(B, V)`): logits of the next token.

        Returns:
            `torch.Tensor` of shape `(B,)`: token ids.
        """
        probabilities = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            removed = ordered.cumsum(-1) - ordered >= self.top_p  # the most likely token always stays
            probabilities = probabilities.masked_fill(removed.gather(-1, order.argsort(-1)), 0.0)
        if probabilities.device.type == "mps":  # has no float64
            probabilities = probabilities.cpu()
        cumulative = probabilities.double().cumsum(-1)
        step = ids.size(1) - self.prompt_length
        threshold = self.uniform[rows.to(self.uniform.device), step, None].to(cumulative) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=scores.size(-1) - 1)
        return tokens.to(scores.device)


class TransformersEngine:
    """Engine of transformers' `generate`, with prompts of similar length in one batch.

    Args:
        model, tokenizer: the model, and its tokenizer, with a padding token.
        max_new_tokens (`int`): maximum length of an answer.
        temperature, top_p (`float`, *optional*, default to `1.0`): sampling settings. A temperature of 0 is greedy decoding.
        policy ([`~bupo.models.internal_policy.InternalPolicy`], *optional*): policy to sample from instead of the language
            model policy.
        batch_size (`int`, *optional*, defaults to `64`): answers per batch.
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
        """Yield answers batch by batch, the shortest prompts first."""
        for request, ids in self.generate_token_ids(requests):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield request, SampledCompletion(text, len(ids), not ids or ids[-1] not in self.end_token_ids, tuple(ids))

    def generate_token_ids(
        self, requests: Sequence[CompletionRequest]
    ) -> Iterator[tuple[CompletionRequest, list[int]]]:
        """Yield answers as token ids, with the end token."""
        ordered = sorted(requests, key=lambda request: (len(request.prompt_ids), request.problem, request.sample))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            yield from zip(batch, self._generate_batch(batch), strict=True)

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[CompletionRequest]) -> list[list[int]]:
        inputs = self.tokenizer.pad(
            {"input_ids": [list(request.prompt_ids) for request in batch]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        prompt_length = inputs["input_ids"].size(1)
        processor = SeededLogitsProcessor(
            [request.seed for request in batch], prompt_length, self.max_new_tokens, self.temperature, self.top_p
        )
        with eval_mode(self.model), self.policy_generation() as settings:
            settings.max_new_tokens = self.max_new_tokens
            ids = generate(
                self.model,
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=settings,
                seeded=processor if self.temperature else None,
            )
        return [self._cut_after_end_token(row) for row in ids[:, prompt_length:].tolist()]

    @contextmanager
    def policy_generation(self) -> Iterator[GenerationConfig]:
        """Yield greedy generation settings for the policy, and use its logits in the model's `generate`.

        The model's `generation_config` does not apply. [`SeededLogitsProcessor`] makes the sampled token the most likely one.
        """
        with (
            policy_generation_config(self.model, self.tokenizer, do_sample=False) as settings,
            self.policy.override_forward() if self.policy else nullcontext(),
        ):
            yield settings

    def _cut_after_end_token(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return ids[: end + 1]
