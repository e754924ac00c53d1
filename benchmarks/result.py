"""Results of a speed benchmark: tables of ratios, and targets that are met or missed, printed and written as JSON."""

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
    """Return a parser with the options of every speed benchmark.

    Args:
        about (`str`): docstring of the benchmark's module.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m.gguf", help="folder, .gguf file or hub id")
    parser.add_argument("--layer", type=int, default=10, help="layer that phase 1 optimises")
    parser.add_argument("--json", type=Path, help="file of the result")
    return parser


@dataclass
class Table:
    """Rows with the same columns, as text."""

    title: str
    rows: list[dict[str, str]]


@dataclass
class Target:
    """Upper limit of a measured number."""

    what: str
    measured: float
    most: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        return self.measured <= self.most

    def line(self) -> dict[str, str]:
        """Return the target as a row of a table."""
        numbers = [
            f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}" for value in (self.measured, self.most)
        ]
        return {"target": self.what, "at most": numbers[1], "measured": numbers[0], "": "met" if self.met else "missed"}


@dataclass
class Result:
    """Result of one run of a benchmark.

    Attributes:
        command (`str`): that reproduces the result.
        setting (`str`): description of the measurement.
        tables, targets (`list`): of the result.
        profiles (`dict[str, str]`): torch's profiles, by variant.
        raw (`dict`): all single measurements.
        machine (`str`): processor and versions.
    """

    command: str
    setting: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    profiles: dict[str, str] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    machine: str = field(default_factory=lambda: machine())

    def show(self) -> None:
        """Print the result."""
        print(self.setting, self.machine, sep="\n", end="\n\n")
        for table in self.tables:
            print(f"{table.title}\n\n{format_markdown_table(table.rows)}")
        if self.targets:
            print(format_markdown_table([target.line() for target in self.targets]))
        for name, text in self.profiles.items():
            print(f"{name}\n\n{text}\n")
        sys.stdout.flush()

    def write(self, path: Path | None) -> None:
        """Write the result as JSON if a path is given."""
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = asdict(self) | {"targets": [target.line() for target in self.targets]}
            path.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> str:
    """Return the processor, its threads and the versions."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    versions = (
        f"bupo {VERSION}, TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, fp32; {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def middle(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Format a median with the minimum and maximum."""
    median = f"{statistics.median(values):.{digits}f}{unit}"
    return median if len(values) < 2 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return ratios by round, in which noise of the machine cancels."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
