"""Rollouts: prompts and answers as token ids, sampled from a model or read from a file.

Prompt and answer are told apart by length, never by searching for a marker.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bupo.data.templates import prompt_ids
from bupo.errors import UserError
from bupo.files import whole_rows
from bupo.sampling import Request, TransformersEngine, seed_of


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

    An answer depends on `seed` and the problem's place only, so an interrupted sampling ends like a whole one.

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
    done = whole_rows(path, lambda line: Rollout(**json.loads(line)))[: len(problems)]
    on_done(len(done))
    prompts = [tuple(prompt_ids(tokenizer, problem["prompt"])) for problem in problems]
    requests = [Request(i, 0, prompt, seed_of(seed, i, 0)) for i, prompt in enumerate(prompts)]
    engine = TransformersEngine(model, tokenizer, max_new_tokens, temperature, batch_size=batch_size)
    with path.open("a") as file:
        for start in range(len(done), len(requests), batch_size):
            batch = dict(engine.token_ids(requests[start : start + batch_size]))
            for request in requests[start : start + batch_size]:  # in the file, problems keep their order
                prompt, answer = list(request.prompt_ids), batch[request]
                rollout = Rollout(prompt, answer, tokenizer.decode(prompt), tokenizer.decode(answer))
                done.append(rollout)
                file.write(json.dumps(asdict(rollout)) + "\n")
            file.flush()
            on_done(len(batch))
    return done
