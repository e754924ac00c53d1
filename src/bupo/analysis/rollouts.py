"""Rollouts: prompts and answers as token ids, sampled from a model or read from a file."""

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
        prompt_ids, completion_ids (`list[int]`): token ids of prompt and answer.
        prompt, completion (`str`): their texts, for display.
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
    """Read finished rollouts from a `.jsonl` file, or from the folder of a benchmark written by `bupo eval`.

    A row holds `prompt_ids` and `completion_ids`, or `prompt` (text or messages) and `completion` (text or messages), or
    `messages` that end with the assistant's. Answers of an evaluation are sorted by sample, then by problem.

    Args:
        path (`str`): the file or folder.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the model.
        context, vocabulary (`int`, *optional*): the model's longest sequence and its number of tokens.
        template: additional arguments of the chat template.

    Raises:
        UserError: if the file is missing or malformed, or a row has no prompt, no answer, or is too long.
    """
    path = _find_rollouts_file(Path(path))
    with wrap_library_errors(f"{path} cannot be read", OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may contain U+2028
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no rollouts")
    if path.name == SAMPLES_FILE:
        numbered.sort(key=lambda row: _get_sample_order(row[1]))
    parse = partial(
        _parse_line, tokenizer=tokenizer, context=context, vocabulary=vocabulary or len(tokenizer), template=template
    )
    return [parse(*row) for row in numbered]


def _find_rollouts_file(path: Path) -> Path:
    """Return the file of rollouts, given the file or its folder."""
    # a name may be too long, or hold a null byte
    with wrap_library_errors(f"rollouts {str(path)!r:.200} cannot be looked for", OSError, ValueError):
        if path.is_file():
            return path
        if (path / SAMPLES_FILE).is_file():
            return path / SAMPLES_FILE
        benchmarks = sorted(file.parent.name for file in path.glob(f"*/{SAMPLES_FILE}")) if path.is_dir() else []
    if benchmarks:
        raise UserError(
            f"rollouts {path} is the folder of an evaluation: give the folder of one of its benchmarks, {', '.join(benchmarks)}"
        )
    raise UserError(
        f"{path} is neither a file of rollouts nor a benchmark's folder of bupo eval: it has no regular file {SAMPLES_FILE}"
    )


def _get_sample_order(line: str) -> tuple[int, int]:
    """Return sample and problem of an evaluation's answer. Invalid lines come first, so that they are refused first."""
    try:
        row = json.loads(line)
        return int(row["sample"]), int(row["problem"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1, -1


def _parse_line(
    location: str, line: str, tokenizer: PreTrainedTokenizerBase, context: int | None, vocabulary: int, template: dict
) -> Rollout:
    try:
        rollout = _build_rollout(json.loads(line), tokenizer, vocabulary, template)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{location} is no rollout ({type(error).__name__}: {error}): a row holds messages, or prompt and completion, or "
            "prompt_ids and completion_ids"
        ) from error
    if not rollout.prompt_ids or not rollout.completion_ids:
        missing = "answer" if rollout.prompt_ids else "prompt"
        raise UserError(f"{location} has an empty {missing}: remove it or fill it in")
    length = len(rollout.prompt_ids) + len(rollout.completion_ids)
    if context and length > context:
        raise UserError(
            f"{location} has {length} tokens, more than the model's context of {context}: shorten or remove it"
        )
    return rollout


def _build_rollout(row: dict, tokenizer: PreTrainedTokenizerBase, vocabulary: int, template: dict) -> Rollout:
    if "prompt_ids" in row:
        prompt, answer = list(row["prompt_ids"]), list(row["completion_ids"])
        for token in (*prompt, *answer):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise ValueError(f"token {token!r:.40} is not in the model's vocabulary, 0 to {vocabulary - 1}")
        return Rollout(prompt, answer, row.get("prompt") or tokenizer.decode(prompt), tokenizer.decode(answer))
    if {"sample", "text", "tokens"} <= row.keys():
        raise ValueError("an evaluation's answer without tokens: a server returns text only")
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
        answer.append(tokenizer.eos_token_id)  # ending the answer is the model's decision, too
    return Rollout(ids, answer, tokenizer.decode(ids), completion)


def sample_rollouts(
    engine: TransformersEngine,
    prompts: Sequence[tuple[int, ...]],
    store: ResultCache[int, Rollout],
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Rollout]:
    """Sample one answer to each prompt that is not cached; add each finished batch to the cache.

    An answer depends on `seed` and the prompt's index only, so resumed sampling gives the same answers.

    Args:
        engine ([`~bupo.generation.seeded_sampling.TransformersEngine`]): engine that samples.
        prompts (`list[tuple[int, ...]]`): token ids.
        store ([`~bupo.run_files.result_cache.ResultCache`]): cache of the answers, by the prompt's index.
        seed (`int`, *optional*, defaults to `0`): seed of the sampling.
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
    """Return a JSON line in the format of `read_rollouts`."""
    return json.dumps({"problem": problem, **asdict(rollout)})


def rollout_from_json(line: str) -> tuple[int, Rollout]:
    """Parse a JSON line into the problem's index and the rollout."""
    kinds = {"problem": int, "prompt_ids": list, "completion_ids": list, "prompt": str, "completion": str}
    row = check_keys(json.loads(line), kinds)
    for name in ("prompt_ids", "completion_ids"):
        if not row[name] or not all(type(token) is int and 0 <= token < 1 << 31 for token in row[name]):
            raise ValueError(f"{name} holds an invalid token id")
    return row.pop("problem"), Rollout(**row)


def hash_rollout(rollout: Rollout) -> str:
    """Return a short hash of a rollout's token ids."""
    ids = json.dumps([rollout.prompt_ids, rollout.completion_ids])
    return hashlib.sha256(ids.encode()).hexdigest()[:12]
