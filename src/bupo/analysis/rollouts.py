"""Rollouts: prompts and answers as token ids, sampled from a model or read from a file.

Prompt and answer are told apart by length, never by searching for a marker.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import tokenize_prompt
from bupo.evaluation.answers import SAMPLES_FILE
from bupo.generation.seeded_sampling import CompletionRequest, TransformersEngine, derive_seed
from bupo.run_files.reading import check_keys
from bupo.run_files.result_cache import ResultCache
from bupo.utils.errors import UserError, wrap_library_errors


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


def read_rollouts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
    vocabulary: int | None = None,
    **template,
) -> list[Rollout]:
    """Finished rollouts from a `.jsonl` file, or from the folder of a benchmark that `bupo eval` has answered.

    A row holds `prompt_ids` and `completion_ids`, or `prompt` (text or messages) and `completion` (text or messages), or
    `messages` whose last is the assistant's. An evaluation's answers come in the order of their samples: first the first one to
    every problem.

    Args:
        path (`str`): the file or folder.
        tokenizer (`PreTrainedTokenizerBase`): of the model that will read them.
        context, vocabulary (`int`, *optional*): the model's longest sequence, and how many tokens it knows.
        template: arguments of the chat template besides the usual ones.

    Raises:
        UserError: if the file is missing or malformed, or a row has no prompt, no answer, or is too long.
    """
    path = _find_rollouts_file(Path(path))
    with wrap_library_errors(f"{path} cannot be read", OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").split("\n")  # U+2028 ends no line of JSON
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no rollouts")
    if path.name == SAMPLES_FILE:
        numbered.sort(key=lambda numbered: _get_sample_order(numbered[1]))
    read = partial(
        _parse_line, tokenizer=tokenizer, context=context, vocabulary=vocabulary or len(tokenizer), template=template
    )
    return [read(*row) for row in numbered]


def _find_rollouts_file(path: Path) -> Path:
    """The file of rollouts, which a folder may hold."""
    with wrap_library_errors(
        f"rollouts {str(path)!r:.200} cannot be looked for", OSError, ValueError
    ):  # too long a name, or none
        if path.is_file():
            return path
        if (path / SAMPLES_FILE).is_file():
            return path / SAMPLES_FILE
        inner = sorted(found.parent.name for found in path.glob(f"*/{SAMPLES_FILE}")) if path.is_dir() else []
    if inner:
        raise UserError(
            f"rollouts {path} is a whole evaluation: give the folder of a benchmark in it, {', '.join(inner)}"
        )
    raise UserError(
        f"{path} is no file of rollouts, and no folder of a benchmark that bupo eval has answered: "
        f"it has no regular file {SAMPLES_FILE}"
    )


def _get_sample_order(line: str) -> tuple[int, int]:
    """Where an evaluation's answer stands: by sample, then by problem. What is no answer comes first, to be refused."""
    try:
        row = json.loads(line)
        return int(row["sample"]), int(row["problem"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1, -1


def _parse_line(
    where: str, line: str, tokenizer: PreTrainedTokenizerBase, context: int | None, vocabulary: int, template: dict
) -> Rollout:
    try:
        rollout = _build_rollout(json.loads(line), tokenizer, vocabulary, template)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is no rollout ({type(error).__name__}: {error}): a row holds messages, or prompt and completion, or "
            "prompt_ids and completion_ids"
        ) from error
    if not rollout.prompt_ids or not rollout.completion_ids:
        missing = "answer" if rollout.prompt_ids else "prompt"
        raise UserError(f"{where} has an empty {missing}: remove it or fill it in")
    length = len(rollout.prompt_ids) + len(rollout.completion_ids)
    if context and length > context:
        raise UserError(
            f"{where} has {length} tokens, more than the model's context of {context}: shorten or remove it"
        )
    return rollout


def _build_rollout(row: dict, tokenizer: PreTrainedTokenizerBase, vocabulary: int, template: dict) -> Rollout:
    if "prompt_ids" in row:
        prompt, answer = list(row["prompt_ids"]), list(row["completion_ids"])
        for token in (*prompt, *answer):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"token {token!r:.40} is none of the model's, 0 to {vocabulary - 1}")
        return Rollout(prompt, answer, row.get("prompt") or tokenizer.decode(prompt), tokenizer.decode(answer))
    if {"sample", "text", "tokens"} <= row.keys():
        raise ValueError(
            "an evaluation's answer without tokens, by an earlier version or a server, which gives text only"
        )
    if "messages" in row:
        *prompt, last = row["messages"]
        if last["role"] != "assistant":
            raise KeyError("the last message is not the assistant's")
        completion = last["content"]
    else:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, list):
            completion = completion[-1]["content"]
    ids = tokenize_prompt(tokenizer, prompt, **template)
    answer = list(tokenizer(completion, add_special_tokens=False)["input_ids"]) if completion else []
    if answer and tokenizer.eos_token_id is not None:
        answer.append(tokenizer.eos_token_id)  # the model's own decision to stop is part of its answer
    return Rollout(ids, answer, tokenizer.decode(ids), completion)


def sample_rollouts(
    engine: TransformersEngine,
    prompts: Sequence[tuple[int, ...]],
    store: ResultCache[int, Rollout],
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """One answer to each prompt. What the store holds is not sampled again; batches are kept as they finish.

    An answer depends on `seed` and the prompt's place only, so an interrupted sampling ends like a whole one.

    Args:
        engine ([`~bupo.generation.seeded_sampling.TransformersEngine`]): samples.
        prompts (`list[tuple[int, ...]]`): token ids.
        store ([`~bupo.run_files.result_cache.ResultCache`]): of the answers, by their prompt's place.
        seed (`int`, *optional*, defaults to `0`): of the sampling.
        on_done (`Callable`, *optional*): called with the number of answers just finished.
    """
    requests = [
        CompletionRequest(i, 0, ids, derive_seed(seed, i, 0)) for i, ids in enumerate(prompts) if i not in store.rows
    ]
    on_done(len(prompts) - len(requests))
    for start in range(0, len(requests), engine.batch_size):
        batch = requests[start : start + engine.batch_size]
        answers = dict(engine.generate_token_ids(batch))
        for request in batch:  # in the file, problems keep their order
            prompt, answer = list(request.prompt_ids), answers[request]
            texts = engine.tokenizer.decode(prompt), engine.tokenizer.decode(answer)
            store.add(request.problem, Rollout(prompt, answer, *texts))
        on_done(len(batch))
    return [store.rows[i] for i in range(len(prompts))]


def rollout_to_json(problem: int, rollout: Rollout) -> str:
    """As JSON, which `read_rollouts` takes too."""
    return json.dumps({"problem": problem, **asdict(rollout)})


def rollout_from_json(line: str) -> tuple[int, Rollout]:
    """A line back into its problem's place and the rollout."""
    kinds = {"problem": int, "prompt_ids": list, "completion_ids": list, "prompt": str, "completion": str}
    row = check_keys(json.loads(line), kinds)
    for name in ("prompt_ids", "completion_ids"):
        if not row[name] or not all(type(token) is int and 0 <= token < 1 << 31 for token in row[name]):
            raise ValueError(f"{name} holds what is no token")
    return row.pop("problem"), Rollout(**row)


def hash_rollout(rollout: Rollout) -> str:
    """Tells rollouts apart."""
    ids = json.dumps([rollout.prompt_ids, rollout.completion_ids])
    return hashlib.sha256(ids.encode()).hexdigest()[:12]
