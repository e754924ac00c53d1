"""Benchmarks by name, with their datasets on the hub.

Local files with the same columns, `reasoning_gym` tasks and the embedded task are benchmarks, too. A suffix `:16` sets the
number of answers per problem.
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
    """A benchmark on the hub, at a fixed revision, so that numbers stay comparable."""

    hub: str
    revision: str | None
    prompt_column: str | None = None
    answer_column: str | None = None
    config: str | None = None
    answer_delimiter: str | None = None  # text between a worked solution and its gold answer


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
    """Return a benchmark's label and problems.

    Args:
        name (`str`): a name in `BENCHMARKS`, such as `math500`; `LABEL=FILE` or a `.parquet` or `.jsonl` file with the same
            columns; `reasoning_gym:NAME`; `arithmetic`; or a hub id, optionally with `@REVISION`. A suffix `:16` is ignored.
        size (`int`, *optional*): number of problems, from the first.
        system_prompt (`str`, *optional*): added to problems without a system message.
        seed (`int`, *optional*, defaults to `0`): seed of procedural tasks.
        prompt_column, answer_column (`str`, *optional*): columns of a file or hub id; ignored for named benchmarks.

    Raises:
        UserError: if the benchmark does not exist or cannot be loaded.
    """
    label, benchmark = _resolve_benchmark(split_k(name)[0], prompt_column, answer_column)
    problems = load_problems(
        benchmark.hub,
        "test",
        config=benchmark.config,
        prompt_column=benchmark.prompt_column,
        answer_column=benchmark.answer_column,
        system_prompt=system_prompt,
        size=size,
        revision=benchmark.revision,
        seed=seed,
    )
    if benchmark.answer_delimiter:
        answers = [answer.rpartition(benchmark.answer_delimiter)[2].strip() for answer in problems["answer"]]
        problems = replace_columns(problems, {"answer": answers})
    return label, problems


def _resolve_benchmark(name: str, prompt_column: str | None, answer_column: str | None) -> tuple[str, Benchmark]:
    """Return a benchmark's label and its dataset."""
    label, _, file = name.partition("=")
    known = BENCHMARKS.get(label)
    source, _, revision = (file or label).partition("@")
    procedural = is_procedural(source)
    if not (known or procedural or "/" in source or source.endswith(tuple(FILE_FORMATS))):
        raise UserError(
            f"unknown benchmark {label!r}: choose {', '.join(BENCHMARKS)}, {ARITHMETIC}, {REASONING_GYM}NAME, a hub id, or a "
            "local file"
        )
    if known and not file:
        return label, known
    columns = (None, None) if procedural else (prompt_column, answer_column)
    benchmark = Benchmark(
        source, revision or None, *columns, answer_delimiter=known.answer_delimiter if known else None
    )
    return (label if file else _shorten_source(source)), benchmark


def split_names(names: str | Sequence[str]) -> list[str]:
    """Split names of benchmarks at commas."""
    words = [names] if isinstance(names, str) else names
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def is_benchmark(name: str) -> bool:
    """Return whether a name is in `BENCHMARKS`, or is `LABEL=FILE` and not itself a file."""
    # a name may be too long, or hold a null byte
    with wrap_library_errors(f"dataset {name!r:.200} cannot be looked for", OSError, ValueError):
        return name in BENCHMARKS or ("=" in name and "/" not in name.partition("=")[0] and not Path(name).exists())


def split_k(name: str) -> tuple[str, int | None]:
    """Split a benchmark's name from its number of answers: `aime24:32` is `aime24` and 32.

    The number is the digits after the last colon; `reasoning_gym:chain_sum`, `harness:TASK` and `C:/problems.parquet` have
    none.

    Raises:
        UserError: if the number is invalid, or the benchmark is one of lm-eval-harness, which answers once.
    """
    match = re.fullmatch(r"(.+):([0-9]{1,12})", name, re.DOTALL)
    if match is None or f"{match[1]}:" in (REASONING_GYM, HARNESS_PREFIX):
        return name, None
    check_number(f"the number of answers in benchmark {name!r}", int(match[2]), POSITIVE_INTEGER)
    if is_harness_task(match[1]):
        raise UserError(f"benchmark {name!r} is lm-eval-harness', which answers once: leave out :{match[2]}")
    return match[1], int(match[2])


def get_k_by_label(
    names: str | Sequence[str], k: int | None, preset: Mapping[str, int] | None = None, default: int = 16
) -> dict[str, int]:
    """Return the number of answers per problem by label: the name's suffix, else `k`, else the preset's, else the default.

    Benchmarks of lm-eval-harness are left out.
    """
    ks = {}
    for name in split_names(names):
        if not is_harness_task(name):
            base_name, suffix_k = split_k(name)
            label = _resolve_benchmark(base_name, None, None)[0]
            ks[label] = suffix_k or k or (preset or {}).get(label, default)
    return ks


def load_benchmarks(
    names: Sequence[str],
    size: int | None = None,
    system_prompt: str | None = None,
    seed: int = 0,
    **columns: str | None,
) -> dict[str, Dataset]:
    """Return problems by label, with gold answers checked before any sampling.

    Args:
        names, size, system_prompt, seed, columns: as for `load_benchmark`; a name may hold several, separated by commas.

    Raises:
        UserError: if a benchmark cannot be loaded, or two have the same label.
    """
    names = split_names(names)
    loaded = [load_benchmark(name, size=size, system_prompt=system_prompt, seed=seed, **columns) for name in names]
    benchmarks = dict(loaded)
    if len(benchmarks) < len(names):
        raise UserError(f"benchmarks {', '.join(names)} have the same label twice: write LABEL=FILE for one of them")
    for label, problems in benchmarks.items():
        get_label_folder("the run", label)
        check_gold_answers(problems["answer"], label)
    return benchmarks


def _shorten_source(source: str) -> str:
    """Return a label for a file or hub id."""
    return (
        source.removeprefix(REASONING_GYM)
        .rstrip("/")
        .split("/")[-1]
        .removesuffix(".parquet")
        .removesuffix(".jsonl")
        .removesuffix(".json")
    )
