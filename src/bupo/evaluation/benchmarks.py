"""Benchmarks by name: where their problems are on the hub. A local file of the same columns, any `reasoning_gym` task and the
embedded task are benchmarks too.
"""

from dataclasses import dataclass

from datasets import Dataset

from bupo.data.problems import ARITHMETIC, FILE_KINDS, REASONING_GYM, load_problems
from bupo.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """A benchmark on the hub. Columns are found by their usual names where they are not given."""

    hub: str
    split: str = "test"
    config: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    answer_after: str | None = None  # what the gold answer stands behind, in a worked solution


BENCHMARKS = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", prompt_column="problem", answer_column="answer"),
    "amc23": Benchmark("math-ai/amc23"),
    "aime24": Benchmark("math-ai/aime24"),
    "aime25": Benchmark("math-ai/aime25"),
    "olympiadbench": Benchmark("math-ai/olympiadbench"),
    "minerva": Benchmark("math-ai/minervamath"),
    "gsm8k": Benchmark("openai/gsm8k", config="main", answer_after="####"),
}


def load_benchmark(
    name: str, *, size: int | None = None, system_prompt: str | None = None, revision: str | None = None, seed: int = 0
) -> tuple[str, Dataset]:
    """A benchmark's label and problems.

    Args:
        name (`str`): of `BENCHMARKS`, such as `math500`; `LABEL=FILE` or a `.parquet` or `.jsonl` file of the same columns;
            `reasoning_gym:NAME`; `arithmetic`; or a hub id.
        size (`int`, *optional*): the first so many problems.
        system_prompt (`str`, *optional*): put before problems that have no system message.
        revision (`str`, *optional*): of the hub dataset.
        seed (`int`, *optional*, defaults to `0`): of procedural tasks.

    Raises:
        UserError: if there is no such benchmark, or it cannot be loaded.
    """
    label, _, where = name.partition("=")
    known = BENCHMARKS.get(label)
    source = where or (known.hub if known else label)
    elsewhere = "/" in source or source == ARITHMETIC or source.startswith(REASONING_GYM)
    if not (known or elsewhere or source.endswith(tuple(FILE_KINDS))):
        raise UserError(
            f"unknown benchmark {label!r}: choose {', '.join(BENCHMARKS)}, {ARITHMETIC}, {REASONING_GYM}NAME, a hub id, or a "
            "local file"
        )
    if where or known is None:
        known = Benchmark(
            source, config=known.config if known else None, answer_after=known.answer_after if known else None
        )
    problems = load_problems(
        source,
        known.split,
        config=known.config if not where else None,
        prompt_column=known.prompt_column,
        answer_column=known.answer_column,
        system_prompt=system_prompt,
        size=size,
        revision=revision,
        seed=seed,
    )
    mark = known.answer_after
    if mark:
        problems = problems.map(lambda row: {"answer": row["answer"].rpartition(mark)[2].strip()})
    return (label if where or label in BENCHMARKS else _short(label)), problems


def _short(source: str) -> str:
    """A label of a file or hub id."""
    return source.rstrip("/").split("/")[-1].removesuffix(".parquet").removesuffix(".jsonl").removesuffix(".json")
