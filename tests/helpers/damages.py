"""Small finished runs, and the ways in which one of their files is damaged."""

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from bupo.cli.main import main

COMMON = "--model embedded --dataset arithmetic --size 8 --internal_layer 2 --internal_steps 1"
TRAIN = (
    f"train {COMMON} --per_device_train_batch_size 4 --num_generations 4 --max_new_tokens 4 --save_steps 1 --probe_every 1 "
    "--report_to none --output run"
).split()
EVAL = ["eval", "--benchmarks", "arithmetic", "--size", "2", "--k", "2", "--max_new_tokens", "4"]
ANALYZE = ["analyze", "--size", "2", "--max_new_tokens", "4"]
NUMBER = re.compile(rb"(?<=[\s:\[])-?\d+(\.\d+)?(e-?\d+)?(?=[,\s\]}])")
FIRST_VALUE = re.compile(rb'(?<=": )("[^"]*"|-?[\d.]+|\[|\{)')


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def make_runs(folder: Path) -> None:
    """Write a training run, an evaluation and an analysis into `run`, `ev` and `an`."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*TRAIN, "--max_steps", "2"]) == 0
        assert main([*EVAL, "--output", "ev"]) == 0
        assert main([*ANALYZE, "--output", "an"]) == 0
    finally:
        os.chdir(here)


def written(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A damage to a file's bytes."""

    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def in_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in a file's place."""

    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def without_a_column(path: Path) -> None:
    table = pd.read_parquet(path)
    table.drop(columns=table.columns[0]).to_parquet(path)


def bomb(path: Path) -> None:
    """A pickle that would run code, in torch's format and without it."""
    content = io.BytesIO()
    torch.save({"passes": Bomb(path.with_name("exploded"))}, content)
    path.write_bytes(
        content.getvalue() if path.suffix in (".pt", ".pth") else pickle.dumps(Bomb(path.with_name("exploded")))
    )


ANY = {
    "missing": Path.unlink,
    "empty": written(lambda content: b""),
    "cut": written(lambda content: content[: len(content) // 2]),
    "rubbish": written(lambda content: b"no such file\n" * 9),
    "a bomb": bomb,
    "a folder": in_place(Path.mkdir),
    "a pipe": in_place(os.mkfifo),
    "a link to itself": in_place(lambda path: path.symlink_to(path.name)),
}
TEXT = {
    "not UTF-8": written(lambda content: content[:3] + b"\xff\xfe" + content[3:]),
    "a list": written(lambda content: b"[]\n"),
    "a number": written(lambda content: b"7\n"),
    "no keys": written(lambda content: b"{}\n"),
    "nested": written(lambda content: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
    "5,000 digits": written(lambda content: NUMBER.sub(b"9" * 5000, content, count=1)),
    "NaN": written(lambda content: NUMBER.sub(b"NaN", content)),
    "null": written(lambda content: NUMBER.sub(b"null", content)),
    "another type": written(lambda content: FIRST_VALUE.sub(b'"x", "y": \\1', content)),
}
TABLE = {"without a column": without_a_column}
STATE = {
    "a list": lambda path: torch.save([1, 2], path),
    "no keys": lambda path: torch.save({}, path),
    "other keys": lambda path: torch.save({"passes": "x", "layout": 3, "parts": None}, path),
}
KINDS = {".parquet": ANY | TABLE, ".pt": ANY | STATE, ".pth": ANY | STATE}


def damages_of(name: str) -> dict[str, Callable[[Path], None]]:
    """The damages that a file of this name may have."""
    return KINDS.get(Path(name).suffix, ANY | TEXT)


def seen(folder: Path) -> dict[str, tuple[int, str | bytes]]:
    """Return modes and small contents of all below a folder."""
    found: dict[str, tuple[int, str | bytes]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            kind = path.lstat()
            small = path.is_file() and not path.is_symlink() and kind.st_size < 1 << 20
            found[str(path.relative_to(folder))] = kind.st_mode, path.read_bytes() if small else str(kind.st_size)
    return found


def copied(base: Path, folder: Path, names: str) -> None:
    """Copies of some of the runs."""
    for name in names.split():
        shutil.copytree(base / name, folder / name, symlinks=True)


def as_json(path: Path) -> dict:
    return json.loads(path.read_text())
