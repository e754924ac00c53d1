"""Rollouts: prompts and answers as token ids, sampled from a model or read from a file.

Prompt and answer are told apart by length, never by searching for a marker.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt.

    Attributes:
        prompt_ids, completion_ids (`list[int]`): as the model reads and wrote them.
        prompt, completion (`str`): the same as text, for people.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt: str
    completion: str


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> list[int]:
    """Token ids of a prompt: messages through the chat template (or joined where there is none), text as it is."""
    if isinstance(prompt, list) and tokenizer.chat_template is None:
        prompt = "\n\n".join(message["content"] for message in prompt) + "\n"
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))


def read_rollouts(path: str | Path, tokenizer: PreTrainedTokenizerBase, context: int | None = None) -> list[Rollout]:
    """Finished rollouts from a `.jsonl` file.

    A row holds `prompt_ids` and `completion_ids`, or `prompt` (text or messages) and `completion` (text or messages), or
    `messages` whose last is the assistant's.

    Args:
        path (`str`): the file.
        tokenizer (`PreTrainedTokenizerBase`): of the model that will read them.
        context (`int`, *optional*): the model's longest sequence.

    Raises:
        UserError: if the file is missing or malformed, or a row has no prompt, no answer, or is too long.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file of rollouts")
    rollouts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rollout = _from_row(json.loads(line), tokenizer)
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise UserError(
                f"{path}, line {number} is no rollout ({type(error).__name__}: {error}): a row holds messages, or prompt "
                "and completion, or prompt_ids and completion_ids"
            ) from error
        if not rollout.prompt_ids or not rollout.completion_ids:
            missing = "answer" if rollout.prompt_ids else "prompt"
            raise UserError(f"{path}, line {number} has an empty {missing}: remove it or fill it in")
        length = len(rollout.prompt_ids) + len(rollout.completion_ids)
        if context and length > context:
            raise UserError(
                f"{path}, line {number} has {length} tokens, more than the model's context of {context}: shorten or remove it"
            )
        rollouts.append(rollout)
    if not rollouts:
        raise UserError(f"{path} holds no rollouts")
    return rollouts


def _from_row(row: dict, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    if "prompt_ids" in row:
        prompt, answer = list(map(int, row["prompt_ids"])), list(map(int, row["completion_ids"]))
        return Rollout(prompt, answer, row.get("prompt") or tokenizer.decode(prompt), tokenizer.decode(answer))
    if "messages" in row:
        *prompt, last = row["messages"]
        if last["role"] != "assistant":
            raise KeyError("the last message is not the assistant's")
        completion = last["content"]
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, list):
            completion = completion[-1]["content"]
    ids = prompt_ids(tokenizer, prompt)
    answer = list(tokenizer(completion, add_special_tokens=False)["input_ids"]) if completion else []
    if answer and tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)  # the model's own decision to stop is part of its answer
    return Rollout(ids, answer, tokenizer.decode(ids), completion)


@torch.no_grad()
def sample_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset | Sequence[dict],
    path: str | Path,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Sample one answer to each problem, written to a `.jsonl` as batches finish. A file that is there is gone on with.

    Each batch has a seed of its own, made of `seed` and its place, so an interrupted sampling ends like a whole one.

    Args:
        model, tokenizer: the language model policy.
        problems (`Dataset`): with `prompt` (messages).
        path (`str`): the file.
        max_new_tokens (`int`): longest answer.
        temperature (`float`, *optional*, defaults to `1.0`): of the sampling, from the whole vocabulary.
        batch_size (`int`, *optional*, defaults to `8`): prompts answered at once.
        seed (`int`, *optional*, defaults to `0`): of the sampling.
        on_done (`Callable`, *optional*): called with the number of answers just finished.
    """
    path = Path(path)
    done = _finished_rows(path)[: len(problems)]
    on_done(len(done))
    prompts = [prompt_ids(tokenizer, problem["prompt"]) for problem in problems]
    eos = model.generation_config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [eos]) - {None} | {tokenizer.eos_token_id}
    with torch.random.fork_rng(), path.open("a") as file:
        for start in range(len(done), len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            torch.manual_seed(seed * 1_000_003 + start)
            inputs = tokenizer.pad({"input_ids": batch}, padding_side="left", return_tensors="pt").to(model.device)
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )
            for prompt, ids in zip(batch, out[:, inputs["input_ids"].size(1) :].tolist(), strict=True):
                end = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
                rollout = Rollout(prompt, ids[: end + 1], tokenizer.decode(prompt), tokenizer.decode(ids[: end + 1]))
                done.append(rollout)
                file.write(json.dumps(asdict(rollout)) + "\n")
            file.flush()
            on_done(len(batch))
    return done


def _finished_rows(path: Path) -> list[Rollout]:
    """The whole rows of a file that sampling wrote; half a last line is cut off."""
    rows: list[Rollout] = []
    if not path.exists():
        return rows
    lines = path.read_text().splitlines(keepends=True)
    for line in lines:
        try:
            rows.append(Rollout(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    if len(rows) < len(lines):
        path.write_text("".join(lines[: len(rows)]))
    return rows
