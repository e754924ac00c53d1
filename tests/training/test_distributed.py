"""Two gloo processes train through both phases and end with the same parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.training.test_trainer import assert_only_below

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("checkpointing", "estimator"),
    [
        ("checkpointing", "ppo-shared"),
        pytest.param("checkpointing", "grpo", marks=pytest.mark.slow),
        pytest.param("plain", "reinforce++", marks=pytest.mark.slow),
        pytest.param("plain", "ppo-copy", marks=pytest.mark.slow),
    ],
)
def test_two_processes(tmp_path, checkpointing, estimator):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "tests.helpers.distributed_run", str(tmp_path), checkpointing, estimator],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for rank in ranks:
        assert rank["world"] == 2 and "MULTI_CPU" in rank["kind"]
        assert_only_below(set(rank["moved_in_phase_1"]), rank["parameters"], 2)
        assert set(rank["moved"]) == set(rank["parameters"])
    assert ranks[0]["phases"] == [1, 1, 2, 2]
    assert ranks[0]["evaluated"] == [0, 2, 4]
    assert all(
        rank["shared_as_alone"] for rank in ranks
    )  # each process samples a part of an evaluation, and all get the result
    assert any(name.startswith("critic") for name in first) == estimator.startswith("ppo")
    table = pd.read_parquet(tmp_path / "run" / "dynamics.parquet")  # the main process' probes of all
    assert sorted(table["rollout_batch"].unique()) == [0, 1, 2, 3, 4]
    probes = [json.loads(line) for line in (tmp_path / "run" / "probes.jsonl").read_text().splitlines()]
    assert len({tuple(row["prompt_ids"]) for row in probes}) > 1
