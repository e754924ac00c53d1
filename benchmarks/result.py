"""What a benchmark of speed says: tables of ratios, and targets that are met or missed; printed, and written as JSON."""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl

from bupo.utils.sanitize import format_markdown_table
from bupo.version import VERSION


def options(about: str) -> argparse.ArgumentParser:
    """What every benchmark of speed takes.

    Args:
        about (`str`): its module's docstring.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m.gguf", help="folder, .gguf file or hub id")
    parser.add_argument("--layer", type=int, default=10, help="that phase 1 optimises")
    parser.add_argument("--json", type=Path, help="where the result goes")
    return parser


@dataclass
class Table:
    """Rows of one set of columns, as text."""

    title: str
    rows: list[dict[str, str]]


@dataclass
class Target:
    """What a measured number should be at most."""

    what: str
    measured: float
    most: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.measured <= self.most

    def line(self) -> dict[str, str]:
        """A row of a table."""
        numbers = [
            f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}" for value in (self.measured, self.most)
        ]
        return {"target": self.what, "at most": numbers[1], "measured": numbers[0], "": "met" if self.met else "missed"}


@dataclass
class Result:
    """Of one run of a benchmark.

    Attributes:
        command (`str`): that gives it.
        setting (`str`): what was measured.
        tables, targets (`list`): of it.
        profiles (`dict[str, str]`): what took the time, by variant.
        raw (`dict`): each single measurement.
        machine (`str`): where, and with which versions.
    """

    command: str
    setting: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    profiles: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    machine: str = field(default_factory=lambda: machine())

    def show(self) -> None:
        """Print it."""
        print(self.setting, self.machine, sep="\n", end="\n\n")
        for table in self.tables:
            print(f"{table.title}\n\n{format_markdown_table(table.rows)}")
        if self.targets:
            print(format_markdown_table([target.line() for target in self.targets]))
        for name, text in self.profiles.items():
            print(f"{name}\n\n{text}\n")
        sys.stdout.flush()

    def write(self, path: Path | None) -> None:
        """As JSON, if somewhere."""
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = asdict(self) | {"targets": [target.line() for target in self.targets]}
            path.write_text(json.dumps(found, indent=1) + "\n")


def machine() -> str:
    """The processor, its cores and the versions."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = (
        f"bupo {VERSION}, TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, fp32; {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def middle(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """The median and what it lies between."""
    median = f"{statistics.median(values):.{digits}f}{unit}"
    return median if len(values) < 2 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Round by round: what the machine does to a round, it does to both."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]
