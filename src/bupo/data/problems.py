"""Loading of problems: from the Hugging Face hub, a file, reasoning_gym or the embedded task.

The result is a dataset with `prompt` (messages), `answer` (text) and all other columns of the source, unchanged. TRL passes the
columns to the reward functions by name.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.table import InMemoryTable
from pyarrow.parquet import read_table

from bupo.data.arithmetic import make_arithmetic_problem
from bupo.data.columns import make_dataset, replace_columns
from bupo.data.prompts import check_not_serialized, normalize_messages
from bupo.rewards.task_scorers import SCORED_BY_COLUMN, encode_problem_reference, get_gold_answer, has_scorer
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model.ground_truth", "ground_truth", "solution")
ARITHMETIC = "arithmetic"
REASONING_GYM = "reasoning_gym:"
FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_ARITHMETIC_NAME = re.compile(ARITHMETIC + "(?:-([2-9]))?")  # `arithmetic-5` has five numbers
_PROCEDURAL_SIZES = {"train": 10_000, "test": 512}
_MAX_GENERATED_PROBLEMS = 10_000_000  # all problems of a procedural task are in memory
_ROWS_PER_READ = 1000
# arguments that TRL passes to every reward function: a column with such a name cannot be passed, or would be overwritten
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
_IMAGE_COLUMNS = ("image", "images")  # TRL treats a row with one of these as a problem with images

logger = logging.getLogger(__name__)


def load_problems(
    name: str,
    split: str = "train",
    *,
    config: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    size: int | None = None,
    revision: str | None = None,
    seed: int = 0,
    shuffle_seed: int | None = None,
    needs_answers: bool = True,
) -> Dataset:
    """Load problems as a dataset of `prompt` (list of messages), `answer` (`str`) and all other columns of the source.

    If the values come from another column, an existing column `prompt` or `answer` is renamed to `original_prompt` or
    `original_answer`. Columns of images, and those with the name of an argument that TRL passes to reward functions, are left
    out with a warning.

    Args:
        name (`str`): a local `.parquet`, `.jsonl` or `.json` file; `reasoning_gym:NAME`; `arithmetic`, the embedded model's
            task, or `arithmetic-5`, with five numbers; or a dataset's id on the Hugging Face hub.
        split (`str`, *optional*, defaults to `"train"`): split of a hub dataset or a procedural task. A file has one split.
        config (`str`, *optional*): configuration of a hub dataset, or options of a `reasoning_gym` task as JSON.
        prompt_column, answer_column (`str`, *optional*): by default the first of `PROMPT_COLUMNS` and of `ANSWER_COLUMNS`. A
            dot reaches into a nested column.
        system_prompt (`str`, *optional*): system message for problems without one.
        size (`int`, *optional*): number of problems to take from the beginning, or to generate for a procedural task.
        revision (`str`, *optional*): revision of a hub dataset.
        seed (`int`, *optional*, defaults to `0`): seed of a procedural task. Its train and test splits never share a seed.
        shuffle_seed (`int`, *optional*): shuffle the problems of a file or hub dataset by [`shuffle_indices`] before taking
            `size` of them.
        needs_answers (`bool`, *optional*, defaults to `True`): refuse problems without gold answers. If `False`, the column
            `answer` exists only if `answer_column` is given, or one of `ANSWER_COLUMNS` holds an answer in every row.

    Raises:
        UserError: if the problems do not exist, cannot be read, are empty, or lack a column.
    """
    rows = _load_rows(name, split, config, size, revision, seed, shuffle_seed)
    prompt_source, prompts = _find_column(rows, name, "prompt", prompt_column, PROMPT_COLUMNS)
    has_padding = Path(name).suffix not in (".json", ".jsonl")  # Arrow gives all messages of a column the same fields
    columns: dict[str, list] = {
        "prompt": [normalize_messages(p, system_prompt, name, i, has_padding) for i, p in enumerate(prompts)]
    }
    sources = {"prompt": prompt_source}
    try:
        sources["answer"], answers = _find_column(rows, name, "answer", answer_column, ANSWER_COLUMNS)
        columns["answer"] = [_format_answer(a, name, i) for i, a in enumerate(answers)]
    except UserError:
        if needs_answers or answer_column:
            raise
        sources.pop("answer", None)
    return replace_columns(_drop_unsupported_columns(_rename_original_columns(rows, name, sources), name), columns)


def _rename_original_columns(rows: Dataset, name: str, sources: Mapping[str, str]) -> Dataset:
    """Rename the columns `prompt` and `answer` if the values of these names come from other columns."""
    for column, source in sources.items():
        if column in rows.column_names and source != column:
            new_name = f"original_{column}"
            while new_name in rows.column_names:
                new_name = f"_{new_name}"
            logger.warning(
                f"{name}: {column} is taken from {source}; the existing column {column} is renamed {new_name}"
            )
            rows = rows.rename_column(column, new_name)
    return rows


def _drop_unsupported_columns(rows: Dataset, name: str) -> Dataset:
    """Remove the columns that TRL cannot pass to a reward function, or would read as images."""
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    images = [
        column for column, kind in kinds.items() if column in _IMAGE_COLUMNS or kind in ("Image", "Audio", "Video")
    ]
    reserved = [column for column in rows.column_names if column in REWARD_ARGUMENTS]
    if images:
        logger.warning(
            f"{name}: {', '.join(images)} left out: BuPO trains text models, on problems without images or sound"
        )
    if reserved:
        logger.warning(
            f"{name}: {', '.join(reserved)} left out: TRL passes an argument of this name to reward functions; "
            "rename the column"
        )
    return rows.remove_columns([*images, *reserved])


def _load_rows(
    name: str,
    split: str,
    config: str | None,
    size: int | None,
    revision: str | None,
    seed: int,
    shuffle_seed: int | None,
) -> Dataset:
    """Load the rows of a source with its columns."""
    if size is not None and size < 1:
        raise UserError(f"the number of problems must be positive, got {size}")
    if is_procedural(name):
        if (size or 0) > _MAX_GENERATED_PROBLEMS:
            raise UserError(
                f"size must be at most {_MAX_GENERATED_PROBLEMS} for {name}, whose problems are made, got {size}"
            )
        if shuffle_seed is not None:
            raise UserError(
                f"shuffle_seed is {shuffle_seed}, but the problems of {name} are made at random, by seed: leave it out"
            )
    if numbers := _ARITHMETIC_NAME.fullmatch(name):
        rows = _generate_arithmetic(_check_split(name, split), size, seed, int(numbers[1] or 3))
    elif name.startswith(REASONING_GYM):
        rows = _generate_reasoning_gym(name, _check_split(name, split), size, seed, config)
    else:
        rows = _load_from_file(Path(name)) if _is_file(name) else _load_from_hub(name, config, split, revision)
        if shuffle_seed is not None:
            table = rows.with_format("arrow")[shuffle_indices(len(rows), shuffle_seed)[:size]]
            rows = Dataset(InMemoryTable(table), info=rows.info)
        elif size is not None:
            rows = rows.select(range(min(size, len(rows))))
    if len(rows) == 0:
        raise UserError(f"{name} holds no problems")
    return rows


def is_procedural(name: str) -> bool:
    """Return whether the problems of a name are generated instead of loaded."""
    return name.startswith(REASONING_GYM) or _ARITHMETIC_NAME.fullmatch(name) is not None


def shuffle_indices(count: int, seed: int) -> list[int]:
    """Return the indices from 0 in a random order that is the same on any machine and with any version of a library.

    Index i is sorted by the SHA-256 of the text `SEED i`.
    """
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed} {index}".encode()).digest())


def compute_problems_sha256(problems: Dataset) -> str:
    """Return the SHA-256 of problems in their order, each as a line of JSON with sorted keys (`json.dumps`)."""
    digest = hashlib.sha256()
    for start in range(0, len(problems), _ROWS_PER_READ):
        columns = problems[start : start + _ROWS_PER_READ]
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            digest.update(json.dumps(row, sort_keys=True, default=_to_json_value).encode() + b"\n")
    return digest.hexdigest()


def _to_json_value(value: Any) -> Any:
    """Return a value with the types of JSON: arrays as lists, and images as digests of their pixels."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else str(value)


def check_problems(problems: Dataset, name: str, columns: Sequence[str]) -> None:
    """Refuse problems from Python that are not a `Dataset`, lack a column, are empty, or hold messages as text.

    Raises:
        UserError: with the remedy.
    """
    if not isinstance(problems, Dataset):
        raise UserError(
            f"{name} must be a Dataset, got {type(problems).__name__}: take one split; a stream is trained on by BuPOTrainer"
        )
    for column in columns:
        if column not in problems.column_names:
            raise UserError(
                f"{name} has no column {column}, but {', '.join(problems.column_names) or 'none at all'}: rename one, or add it"
            )
    if not len(problems):
        raise UserError(f"{name} is empty: give some, or leave it out")
    check_prompt_texts(problems, name)


def check_prompt_texts(problems: Dataset, name: str) -> None:
    """Refuse prompts that are messages written as text.

    Raises:
        UserError: with the first such row.
    """
    if "prompt" in problems.column_names:
        for row, prompt in enumerate(problems["prompt"]):
            check_not_serialized(prompt, name, row)


def compute_prompt_digests(problems: Dataset) -> list[str]:
    """Return a digest of each problem's messages."""
    return [hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:12] for messages in problems["prompt"]]


def _check_split(name: str, split: str) -> str:
    if split not in _PROCEDURAL_SIZES:
        raise UserError(f"{name} has the splits train and test, not {split!r}")
    return split


def _generate_arithmetic(split: str, size: int | None, seed: int, numbers: int) -> Dataset:
    problems = [make_arithmetic_problem(split, seed, i, numbers) for i in range(size or _PROCEDURAL_SIZES[split])]
    return Dataset.from_dict({"prompt": [p.question for p in problems], "answer": [p.answer for p in problems]})


def _generate_reasoning_gym(name: str, split: str, size: int | None, seed: int, config: str | None) -> Dataset:
    import reasoning_gym

    # a task draws problem i from seed + i, so the seeds of the splits must be far from each other
    first_seed = seed * 1_000_003 + (500_000_000 if split == "test" else 0)
    # assertions of a task, unknown options, malformed JSON
    with wrap_library_errors(f"{name} cannot be made{f' with {config}' if config else ''}"):
        options = json.loads(config) if config else {}
        task_name, count = name.removeprefix(REASONING_GYM), size or _PROCEDURAL_SIZES[split]
        task = reasoning_gym.create_dataset(task_name, size=count, seed=first_seed, **options)
        entries = list(task)
    columns = {
        "prompt": [entry["question"] for entry in entries],
        "answer": [get_gold_answer(entry) for entry in entries],
    }
    if has_scorer(task):
        columns[SCORED_BY_COLUMN] = [
            encode_problem_reference(task_name, count, first_seed, index, options) for index in range(len(entries))
        ]
    return Dataset.from_dict(columns)


def _is_file(name: str) -> bool:
    with wrap_library_errors(f"dataset {name!r:.200} cannot be found", OSError, ValueError):  # name too long or invalid
        return Path(name).suffix in FILE_FORMATS or Path(name).exists()


def _load_from_file(path: Path) -> Dataset:
    with wrap_library_errors(f"{path} cannot be read", OSError):  # the folder may belong to another user
        is_file = path.is_file()
    if not is_file:
        raise UserError(f"{path} is no file: give a .parquet, .jsonl or .json file, a hub id or {REASONING_GYM}NAME")
    if path.suffix not in FILE_FORMATS:
        raise UserError(f"{path} is no {', '.join(FILE_FORMATS)} file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} cannot be read: you have no read permission")
    # `load_dataset` would save a copy in the home folder and log tracebacks
    with wrap_library_errors(f"{path} cannot be read as {path.suffix[1:]}"):
        if path.suffix == ".parquet":
            return Dataset(InMemoryTable(read_table(path, partitioning=None)))
        columns = _transpose_rows(_read_json_rows(path))
        return make_dataset(columns) if columns else Dataset.from_dict({})


def _transpose_rows(rows: list[dict]) -> dict[str, list]:
    """Return rows as columns, with None for missing values."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_json_rows(path: Path) -> list[dict]:
    """Return the rows of a JSON file, which holds one row per line or a list of rows.

    Raises:
        UserError: with the first line that is not a row.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        with suppress(ValueError):  # JSON lines are not one JSON value
            value = json.loads(text)
            rows = value if isinstance(value, list) else [value]
            if all(isinstance(row, dict) for row in rows):
                return rows
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} cannot be read as {path.suffix[1:]}: {error}") from error
        if row is not None and not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} cannot be read as {path.suffix[1:]}: a row is a mapping, got {row!r:.80}"
            )
        rows += [row] if row is not None else []
    return rows


def _load_from_hub(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
    def describe_error(error: Exception) -> str:
        return (
            f"dataset {name!r} (split {split!r}) cannot be loaded: {summarize_error(error)}; give a hub id you can reach, a "
            f"local .parquet or .jsonl file, {REASONING_GYM}NAME or {ARITHMETIC}"
        )

    with wrap_library_errors(describe_error):
        return load_dataset(name, config, split=split, revision=revision)


def _find_column(
    rows: Dataset, name: str, kind: str, given_path: str | None, default_paths: tuple[str, ...]
) -> tuple[str, list]:
    """Return the dotted path of the column with the prompts or the answers (`kind`), and its values."""
    for path in (given_path,) if given_path else default_paths:
        top, *rest = path.split(".")
        if top not in rows.column_names:
            continue
        values = list(rows[top])
        for key in rest:
            if not all(isinstance(value, Mapping) and key in value for value in values):
                break
            values = [value[key] for value in values]
        else:
            return path, values
    raise UserError(
        f"{name} has no {kind} column {given_path or ' or '.join(default_paths)}; its columns are "
        f"{', '.join(rows.column_names)}: name one with {kind}_column"
    )


def _format_answer(answer, name: str, row: int) -> str:
    if isinstance(answer, list):  # several values, as in OlympiadBench
        answer = ", ".join(map(str, answer))
    if answer is None or not str(answer).strip():
        raise UserError(f"{name}, row {row}: the answer is empty")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UserError(f"{name}, row {row}: the answer is {answer}, which is no value")
    if isinstance(answer, Mapping | bytes):
        raise UserError(f"{name}, row {row}: the answer is no text and no number: {answer!r:.80}")
    return str(answer)
