"""Readers of a run's files: any damage is one line with the file's name. tests/faults covers all files and commands."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from bupo.analysis.tables import CompletionSums
from bupo.evaluation.answers import read_graded_table as graded_table
from bupo.evaluation.comparison_table import read_scoreboard
from bupo.evaluation.run import check_scores, read_summary
from bupo.run_files.reading import (
    NONE_TYPE,
    DamagedFileError,
    check_keys,
    read_bytes,
    read_json,
    read_parquet,
    read_rows,
    read_text,
    read_torch_file,
)
from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.checkpoints.integrity import find_damage
from bupo.training.config import BuPOConfig
from bupo.training.run_directory import read_finished_run
from bupo.utils.errors import UserError
from bupo.utils.files import read_appended_rows
from tests.helpers.damages import ANY, STATE, TABLE, TEXT

DONE = {
    "schema_version": 1,
    "updates": 4,
    "rollout_batches": 1.0,
    "epochs": 1.0,
    "schedule": [[2, 1]],
    "planned": [[2, 1]],
    "options": {"seed": 1},
}
NUMBERS = {"problems": 2, "k": 2, "avg@k": 0.5, "pass@k": {"1": 0.5, "2": 1.0}}
HARMLESS = {"not UTF-8": (), "null": ("a table",)}


def damaged(path, damage):
    """Return the error line of a damaged file."""
    with pytest.raises(UserError) as error:
        damage()
    assert path.name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("name", ANY | TEXT)
def test_json(tmp_path, name):
    path = tmp_path / "options.json"
    path.write_text('{"updates": 12, "rate": 1.5, "name": "a"}')
    keys = {"updates": int, "rate": float, "name": str}
    assert read_json(path, keys) == {"updates": 12, "rate": 1.5, "name": "a"}
    (ANY | TEXT)[name](path)
    line = damaged(path, lambda: read_json(path, keys))
    assert line.startswith(f"{path} is damaged: ") and line.endswith("delete it, or choose another output")


@pytest.mark.parametrize(
    "name", [name for name in ANY | TEXT if name not in ("missing", "a list", "no keys", "a number")]
)
def test_finished_runs(tmp_path, name):
    path = tmp_path / "finished.json"
    path.write_text(json.dumps(DONE))
    config = BuPOConfig(str(tmp_path), internal_layer=2, internal_steps=1, max_steps=4, resume_from_checkpoint="true")
    assert read_finished_run(config) == {part: DONE[part] for part in ("schedule", "planned", "options")}
    (ANY | TEXT)[name](path)
    before = os.listdir(tmp_path)
    assert "delete it, and the run resumes" in damaged(path, lambda: read_finished_run(config))
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize(
    "change", [{"schedule": [[1]]}, {"planned": "x"}, {"options": []}, {"updates": True}, {"epochs": "1"}]
)
def test_finished_runs_of_other_contents(tmp_path, change):
    path = tmp_path / "finished.json"
    path.write_text(json.dumps(DONE | change))
    config = BuPOConfig(str(tmp_path), internal_layer=2, internal_steps=1, max_steps=4, resume_from_checkpoint="true")
    damaged(path, lambda: read_finished_run(config))


@pytest.mark.parametrize("name", [name for name in ANY | TEXT if name not in ("missing", "null")])
def test_summaries(tmp_path, name):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"schema_version": 4, "benchmarks": {"a": NUMBERS}, "meta": {}}))
    assert read_summary(str(tmp_path))["benchmarks"]["a"] == NUMBERS
    (ANY | TEXT)[name](path)
    damaged(path, lambda: read_scoreboard([str(tmp_path)]))


@pytest.mark.parametrize(
    "numbers", [7, [], {}, NUMBERS | {"k": "2"}, NUMBERS | {"avg@k": None}, NUMBERS | {"pass@k": {"1": "x"}}]
)
def test_summaries_of_other_numbers(tmp_path, numbers):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"schema_version": 4, "benchmarks": {"a": numbers}}))
    summary = read_summary(str(tmp_path))
    assert "a: " in damaged(path, lambda: check_scores(str(tmp_path), summary, ["a"]))


def test_files_larger_than_the_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 43)  # sparse
    for read in (read_bytes, read_json, read_rows, read_parquet, lambda path: read_appended_rows(path, json.loads)):
        assert "larger than the memory (8192 GB)" in damaged(path, lambda read=read: read(path))


def table(rows=4):
    return pd.DataFrame(
        {
            "problem": [n // 2 for n in range(rows)],
            "sample": [n % 2 for n in range(rows)],
            "question": ["q"] * rows,
            "verdict": ["correct"] * rows,
            "strict": ["correct"] * rows,
            "reason": [None] * rows,
            "answer_class": pd.array([0] * rows, dtype="Int64"),
        }
    )


@pytest.mark.parametrize("name", [name for name in ANY | TABLE if name != "missing"])
def test_tables(tmp_path, name):
    path = tmp_path / "graded.parquet"
    table().to_parquet(path)
    assert graded_table(tmp_path).equals(table())
    (ANY | TABLE)[name](path)
    damaged(path, lambda: graded_table(tmp_path))


@pytest.mark.parametrize(
    "broken",
    [
        table(3),
        table(0),
        table().assign(problem=["a", "b", "c", "d"]),
        table().assign(problem=[0.0, np.nan, 1, 1]),
        table().assign(verdict=[1, 2, 3, 4]),
        table().assign(question=[None, "q", "q", "q"]),
    ],
    ids=["unequal", "none", "words", "NaN", "numbers", "null"],
)
def test_tables_of_other_contents(tmp_path, broken):
    broken.to_parquet(tmp_path / "graded.parquet")
    damaged(tmp_path / "graded.parquet", lambda: graded_table(tmp_path))


@pytest.mark.parametrize("name", ANY | STATE)
def test_states(tmp_path, name):
    path = tmp_path / "bupo.pt"
    keys = {"passes": int, "layout": dict}
    torch.save({"passes": 1, "layout": {}, "tensor": torch.ones(3), "numbers": np.ones(2, dtype=np.uint32)}, path)
    assert read_torch_file(path, keys)["passes"] == 1
    (ANY | STATE)[name](path)
    assert damaged(path, lambda: read_torch_file(path, keys)).startswith(f"{path} is damaged: ")
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def checkpoint(tmp_path):
    """Create a checkpoint without a manifest."""
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(
        '{"global_step": 4, "epoch": 0.5, "log_history": [{"step": 4, "loss": 0.1}]}'
    )
    tensor = torch.arange(100.0)
    torch.save({"state": {0: tensor}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": 4, "numbers": tensor}, folder / "scheduler.pt")
    torch.save({"python": (3, (1, 2), None), "numpy": ("MT19937", tensor), "cpu": tensor}, folder / "rng_state.pth")
    from safetensors.torch import save_file

    save_file({"a": torch.arange(100.0)}, folder / "model.safetensors")
    assert find_damage(folder) is None
    return folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("kind", [kind for kind in ANY if kind != "a link to itself"])
def test_a_checkpoint_without_a_manifest(checkpoint, name, kind):
    ANY[kind](checkpoint / name)
    assert (name in find_damage(checkpoint) or "weights" in find_damage(checkpoint)) and "\n" not in find_damage(
        checkpoint
    )
    assert not (checkpoint / "exploded").exists()


@pytest.mark.parametrize("kind", ANY | TEXT)
def test_the_state_of_a_checkpoint(checkpoint, kind):
    (ANY | TEXT)[kind](checkpoint / "trainer_state.json")
    assert "trainer_state.json" in find_damage(checkpoint) and "\n" not in find_damage(checkpoint)


@pytest.mark.parametrize(
    "state",
    [
        {"global_step": -1},
        {"global_step": "4"},
        {"global_step": True},
        {"global_step": 4, "log_history": {}},
        {"global_step": 4, "log_history": [{"loss": 1}]},
        {"global_step": 4, "log_history": [7]},
        {"global_step": 4, "no_such_entry": 1},
    ],
)
def test_the_state_of_a_checkpoint_of_other_contents(checkpoint, state):
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert "trainer_state.json" in find_damage(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"index": "0"}, {"tokens": 0}, {"entropy": None}, {"sums": [[1.0]]}, {"similarity": [1.0, 2.0]}, {"kl": [[1.0]]}],
)
def test_measures_of_other_shapes(change):
    from bupo.analysis.measures import MEASURES

    row = {"index": 0, "tokens": 2, "log_prob": -1.0, "entropy": 0.5, "similarity": [[1.0, 0.5], [0.5, 1.0]]}
    row |= {name: [[1.0, 2.0]] * len(MEASURES) for name in ("sums", "squared_sums")}
    assert CompletionSums.from_json(json.dumps(row)).tokens == 2
    with pytest.raises((ValueError, TypeError)):
        CompletionSums.from_json(json.dumps(row | change))


def test_rows_and_texts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_rows(path, {"a": int}) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": "b"}\n')
    assert "line 2: a is 'b', not int" in damaged(path, lambda: read_rows(path, {"a": int}))
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8" in damaged(path, lambda: read_text(path))
    with pytest.raises(DamagedFileError, match="larger than 1 KB"):
        read_bytes(path.with_name("large"), max_bytes=1 << 10) if path.with_name("large").write_bytes(
            b"x" * 2000
        ) else None


@pytest.mark.parametrize("name", ANY | TEXT)
def test_metrics(tmp_path, name, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    (ANY | TEXT)[name](path)
    if name in ("missing", "a folder", "a pipe", "a link to itself"):
        assert "overwrite" in damaged(path, lambda: read_metrics(path))
    else:
        assert all(isinstance(row, dict) for row in read_metrics(path))


def test_links_out_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "secret.parquet").write_text("hunter2")
    (tmp_path / "a" / "x.parquet").symlink_to(tmp_path / "secret.parquet")
    for read in (read_json, read_rows, read_parquet, read_torch_file):
        assert "hunter2" not in damaged(
            tmp_path / "a" / "x.parquet", lambda read=read: read(tmp_path / "a" / "x.parquet")
        )


def test_types():
    assert check_keys({"a": 1, "b": None}, {"a": float, "b": (str, NONE_TYPE), "c": (int, NONE_TYPE)})
    for value, kind in (
        (True, int),
        (True, float),
        (float("nan"), float),
        (1.0, int),
        (None, str),
        (10**400, float),
        ("1", int),
    ):
        with pytest.raises(ValueError, match="a is"):
            check_keys({"a": value}, {"a": kind})
