"""Accuracy of a model on problems: sampled answers, graded, with a confidence interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.evaluation.metrics import wilson
from bupo.rewards.grader import MathGrader, Verdict

Z95 = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """One sampled answer to each problem.

    Attributes:
        correct (`tuple[bool, ...]`): by problem.
        mean_length (`float`): tokens of an answer, its end included.
        verdicts (`dict[str, int]`): how many answers were correct, wrong, unparsable, timed out.
    """

    correct: tuple[bool, ...]
    mean_length: float
    verdicts: dict[str, int]

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval over problems (Wilson's score interval)."""
        return wilson(self.value, len(self.correct))


def paired_gain(before: Accuracy, after: Accuracy) -> tuple[float, tuple[float, float]]:
    """Mean difference by problem and its 95 % interval (normal, over problems).

    Raises:
        ValueError: if the two are not of the same problems.
    """
    if len(before.correct) != len(after.correct):
        raise ValueError("a paired gain needs the same problems before and after")
    gains = [int(b) - int(a) for a, b in zip(before.correct, after.correct, strict=True)]
    n = len(gains)
    mean = sum(gains) / n
    deviation = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / max(1, n - 1))
    half = Z95 * deviation / math.sqrt(n)
    return mean, (mean - half, mean + half)


@torch.no_grad()
def sampled_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 128,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Accuracy:
    """Sample one answer to each problem and grade it.

    Args:
        model, tokenizer: of the policy; the tokenizer pads on the left and has a chat template.
        problems (`Dataset`): with `prompt` (messages) and `answer`.
        max_new_tokens (`int`): longest answer.
        temperature (`float`, *optional*, defaults to `1.0`): of the sampling, from the whole vocabulary.
        batch_size (`int`, *optional*, defaults to `128`): answers sampled at once.
        seed (`int`, *optional*, defaults to `0`): of the sampling. The global random state is left as it was.
        on_batch (`Callable`, *optional*): called with the number of problems just done.
    """
    texts, lengths = [], []
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(problems), batch_size):
            prompts = problems[start : start + batch_size]["prompt"]
            inputs = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = out[:, inputs["input_ids"].size(1) :]
            lengths += (answers != tokenizer.pad_token_id).sum(1).tolist()
            texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
            on_batch(len(prompts))
    model.train(training)
    grader = MathGrader()
    try:
        verdicts = grader.grade(texts, problems["answer"])
    finally:
        grader.close()
    return Accuracy(
        correct=tuple(verdict == Verdict.CORRECT for verdict in verdicts),
        mean_length=sum(lengths) / len(lengths),
        verdicts={str(v): verdicts.count(v) for v in Verdict},
    )
