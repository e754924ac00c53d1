"""Benchmarks by name: where their problems are on the hub. A local file of the same columns, any `reasoning_gym` task and the
embedded task are benchmarks too. Behind a name, `:16` is how many answers each of its problems is given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from bupo.data.columns import replace_columns
from bupo.data.problems import ARITHMETIC, FILE_FORMATS, REASONING_GYM, is_procedural, load_problems
from bupo.evaluation.lm_eval_tasks import HARNESS_PREFIX, is_harness_task
from bupo.options.ranges import POSITIVE_INTEGER, check_number
from bupo.rewards.grader import check_gold_answers
from bupo.run_files.result_cache import get_label_folder
from bupo.utils.errors import UserError, wrap_library_errors


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the hub, at one revision, so that its numbers mean the same next year."""

    hub: str
    revision: str | None
    prompt_column: str | None = None
    answer_column: str | None = None
    config: str | None = None
    answer_delimiter: str | None = None  # what the gold answer stands behind, in a worked solution


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "problem", "answer"),
    "amc23": Benchmark("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", "question", "answer"),
    "aime24": Benchmark("math-ai/aime24", "83a7f387baaa524a8bda0022eac0541582297103", "problem", "solution"),
    "aime25": Benchmark("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", "problem", "answer"),
    "olympiadbench": Benchmark(
        "math-ai/olympiadbench", "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84", "question", "final_answer"
    ),
    "minerva": Benchmark("math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", "question", "answer"),
    "gsm8k": Benchmark(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        "question",
        "answer",
        "main",
        answer_delimiter="####",
    ),
}


def load_benchmark(
    name: str,
    *,
    size: int | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> tuple[str, Dataset]:
    """A benchmark's label and problems.

    Args:
        name (`str`): of `BENCHMARKS`, such as `math500`; `LABEL=FILE` or a `.parquet` or `.jsonl` file of the same columns;
            `reasoning_gym:NAME`; `arithmetic`; or a hub id, if need be with `@REVISION`. A `:16` behind it says nothing here.
        size (`int`, *optional*): the first so many problems.
        system_prompt (`str`, *optional*): put before problems that have no system message.
        seed (`int`, *optional*, defaults to `0`): of procedural tasks.
        prompt_column, answer_column (`str`, *optional*): of a file or a hub id that is given, not of a name.

    Raises:
        UserError: if there is no such benchmark, or it cannot be loaded.
    """
    label, known = _resolve_benchmark(split_k(name)[0], prompt_column, answer_column)
    problems = load_problems(
        known.hub,
        "test",
        config=known.config,
        prompt_column=known.prompt_column,
        answer_column=known.answer_column,
        system_prompt=system_prompt,
        size=size,
        revision=known.revision,
        seed=seed,
    )
    if known.answer_delimiter:
        answers = [answer.rpartition(known.answer_delimiter)[2].strip() for answer in problems["answer"]]
        problems = replace_columns(problems, {"answer": answers})
    return label, problems


def _resolve_benchmark(name: str, prompt_column: str | None, answer_column: str | None) -> tuple[str, Benchmark]:
    """A benchmark's label, and where its problems are."""
    label, _, where = name.partition("=")
    known = BENCHMARKS.get(label)
    source, _, revision = (where or label).partition("@")
    made = is_procedural(source)
    if not (known or made or "/" in source or source.endswith(tuple(FILE_FORMATS))):
        raise UserError(
            f"unknown benchmark {label!r}: choose {', '.join(BENCHMARKS)}, {ARITHMETIC}, {REASONING_GYM}NAME, a hub id, or a "
            "local file"
        )
    if known and not where:
        return label, known
    columns = (None, None) if made else (prompt_column, answer_column)
    own = Benchmark(source, revision or None, *columns, answer_delimiter=known.answer_delimiter if known else None)
    return (label if where else _shorten_source(source)), own


def split_names(names: str | Sequence[str]) -> list[str]:
    """Benchmarks' names, given as several words or with commas between them."""
    words = [names] if isinstance(names, str) else names
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def is_benchmark(name: str) -> bool:
    """Whether a dataset's name is a benchmark's: one of `BENCHMARKS`, or `LABEL=FILE` and no file itself."""
    with wrap_library_errors(
        f"dataset {name!r:.200} cannot be looked for", OSError, ValueError
    ):  # too long a name, or none
        return name in BENCHMARKS or ("=" in name and "/" not in name.partition("=")[0] and not Path(name).exists())


def split_k(name: str) -> tuple[str, int | None]:
    """A benchmark's name and the number of answers behind it, if there is one: `aime24:32` is `aime24` and 32.

    The number stands behind the last colon, alone: in `reasoning_gym:chain_sum`, `harness:TASK` and `C:/problems.parquet` there
    is none.

    Raises:
        UserError: if it is none that can be given, or the benchmark is one of lm-eval-harness, which answers once.
    """
    found = re.fullmatch(r"(.+):([0-9]{1,12})", name, re.DOTALL)
    if found is None or f"{found[1]}:" in (REASONING_GYM, HARNESS_PREFIX):
        return name, None
    check_number(f"the number of answers in benchmark {name!r}", int(found[2]), POSITIVE_INTEGER)
    if is_harness_task(found[1]):
        raise UserError(f"benchmark {name!r} is lm-eval-harness', which answers once: leave out :{found[2]}")
    return found[1], int(found[2])


def get_k_by_label(
    names: str | Sequence[str], k: int | None, usual: Mapping[str, int] | None = None, otherwise: int = 16
) -> dict[str, int]:
    """How many answers each problem of a benchmark is given, by label: the number behind its name, else `k`, else what is usual
    for its label, else `otherwise`. Benchmarks of lm-eval-harness have none."""
    found = {}
    for name in split_names(names):
        if not is_harness_task(name):
            bare, own = split_k(name)
            label = _resolve_benchmark(bare, None, None)[0]
            found[label] = own or k or (usual or {}).get(label, otherwise)
    return found


def load_benchmarks(
    names: Sequence[str],
    size: int | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    **columns: str | None,
) -> dict[str, Dataset]:
    """Problems by label. Gold answers that cannot be graded against are refused before anything is sampled.

    Args:
        names, size, system_prompt, seed, columns: of `load_benchmark`; a name may be several, with commas between them.

    Raises:
        UserError: if a benchmark cannot be loaded, or two have one label.
    """
    names = split_names(names)
    loaded = [load_benchmark(name, size=size, system_prompt=system_prompt, seed=seed, **columns) for name in names]
    benchmarks = dict(loaded)
    if len(benchmarks) < len(names):
        raise UserError(f"benchmarks {', '.join(names)} have one label twice: write LABEL=FILE for one of them")
    for label, problems in benchmarks.items():
        get_label_folder("the run", label)
        check_gold_answers(problems["answer"], label)
    return benchmarks


def _shorten_source(source: str) -> str:
    """A label of a file or hub id."""
    return (
        source.removeprefix(REASONING_GYM)
        .rstrip("/")
        .split("/")[-1]
        .removesuffix(".parquet")
        .removesuffix(".jsonl")
        .removesuffix(".json")
    )
