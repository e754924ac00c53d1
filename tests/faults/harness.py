"""Starts, kills and resumes runs through the command line's own code, and tells in what a run differs from another."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.checkpoints.integrity import list_checkpoints

ROOT = Path(__file__).parents[2]
KILLED = -9
SHORT = os.environ.get("BUPO_FAULTS") == "short"
TIMES = ("runtime", "per_second", "time", "seconds")  # ends of names


COMMON = {
    **{"model": "embedded", "dataset": "arithmetic", "size": 24, "output": "run", "max_new_tokens": 12},
    **{"reward_funcs": "tests.faults.rewards.digits", "internal_layer": 5, "internal_steps": 3, "num_generations": 4},
    **{"per_device_train_batch_size": 8, "steps_per_generation": 3, "max_steps": 18, "learning_rate": 1e-3, "seed": 0},
    **{"save_strategy": "steps", "save_steps": 4, "save_total_limit": 3, "probe_every": 2, "report_to": "none"},
}


def words(**changes) -> list[str]:
    """The options of a small run as a command line."""
    return [word for name, value in {**COMMON, **changes}.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Ended:
    """A run that ended: its status, negative for a signal, and what it printed."""

    status: int
    output: str


class Zygote:
    """One process that has imported all, and forks a child for each run."""

    def __init__(self) -> None:
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "TOKENIZERS_PARALLELISM": "false",
        }
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.faults.zygote"]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env)

    def run(self, *argv: Any, folder: Path, kill: dict | None = None, **more: Any) -> Ended:
        """Run a command line in a folder, to its end or its kill ([`~tests.faults.zygote.arm`]).

        `more`: `env`; `before`, a dotted path of a function that is called first; `seconds` it may take.
        """
        out = folder / "printed.txt"
        order = {"argv": list(map(str, argv)), "folder": str(folder), "out": str(out), "kill": kill, **more}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the zygote has ended"}')
        printed = out.read_text(errors="replace") if out.exists() else ""
        assert "error" not in answer, f"{answer['error']}\n{printed}"
        return Ended(answer["status"], printed)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)


# -- what must be equal ----------------------------------------------------------------------------------------------


def timeless(row: dict) -> dict:
    """A row of logs without what took how long."""
    return {name: value for name, value in row.items() if not name.endswith(TIMES)}


def differences(whole: Path, other: Path) -> list[str]:
    """In what two runs' folders differ: files, weights, states of the last checkpoint, logs, series, figures."""
    found = []
    names = [names_in(folder) for folder in (whole, other)]
    if names[0] != names[1]:
        found.append(f"files: {sorted(names[0] ^ names[1])}")
    rows = [[timeless(row) for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, other)]
    what = unequal(rows[0], rows[1], "rows")
    found += [f"metrics.jsonl: {what}"] if what else []
    for name in sorted(names[0] & names[1]):
        paths = (whole / name, other / name)
        if name.endswith((".safetensors", ".png", "probes.jsonl", "boundary.json", "finished.json", "config.json")):
            different = paths[0].read_bytes() != paths[1].read_bytes()
        elif name.endswith(".parquet"):
            different = not pd.read_parquet(paths[0]).equals(pd.read_parquet(paths[1]))
        elif name.endswith((".pt", ".pth")):
            states = [torch.load(path, map_location="cpu", weights_only=not name.endswith(".pth")) for path in paths]
            different = bool(what := unequal(*states))
            name += f": {what}" if different else ""
        elif name.endswith("trainer_state.json"):
            what = unequal(*[json.loads(path.read_text()) for path in paths])
            different, name = bool(what), f"{name}: {what}"
        elif name.endswith(("options.json", "summary.json")):
            different = bool(unequal(*[json.loads(path.read_text()) for path in paths]))
        else:
            continue
        found += [name] if different else []
    return found


def names_in(folder: Path) -> set[str]:
    """The files of a run that must be there; trackers name theirs by the time."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {path for path in paths if not path.startswith("runs/") and path != "printed.txt"}


def unequal(one: Any, other: Any, where: str = "", within: float = 0.0) -> str:
    """The first place where two nested values differ, times left out; empty where none does. Floats may `within` a distance."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return "" if torch.equal(one, other) else f"{where} differs"
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return "" if np.array_equal(one, other) else f"{where} differs"
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = timeless_names(one), timeless_names(other)
        if one.keys() != other.keys():
            return f"{where} has {sorted(map(str, one.keys() ^ other.keys()))} once"
        pairs = [(f"{where}.{name}", one[name], other[name]) for name in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where} has {len(one)} and {len(other)} entries"
        pairs = [(f"{where}[{place}]", *pair) for place, pair in enumerate(zip(one, other, strict=True))]
    else:
        if isinstance(one, str) and one[:1] in "{[":
            return unequal_json(one, other, where)
        same = one == other or (one != one and other != other)  # a NaN is itself
        if isinstance(one, float) and isinstance(other, float) and within:
            same = same or abs(one - other) <= within
        return "" if same else f"{where}: {one!r} and {other!r}"
    return next((what for name, a, b in pairs if (what := unequal(a, b, name, within))), "")


def unequal_json(one: str, other: str, where: str) -> str:
    try:
        return unequal(json.loads(one), json.loads(other), where)
    except (ValueError, TypeError):
        return "" if one == other else f"{where} differs"


def timeless_names(values: dict) -> dict:
    return {name: value for name, value in values.items() if not (isinstance(name, str) and name.endswith(TIMES))}


def last_checkpoint(folder: Path) -> Path:
    return list_checkpoints(folder)[-1]
