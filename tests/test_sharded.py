"""PPO's critic of its own and the policy, truly sharded by FSDP2 over two processes, against one process that holds both."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from bupo import AnalyzeOptions, UserError, analyze
from bupo.training.setup import check_run
from tests.faults.test_launches import FSDP2
from tests.test_trainer import config

ROOT = Path(__file__).parents[1]
UPDATES = 8  # two to a rollout batch, the first four of the first phase


def launched(folder, *arguments, processes=2):
    """Run `tests.sharded_run` into a folder. What the main process ends with, and what each holds."""
    folder.mkdir(exist_ok=True)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.sharded_run", str(folder), str(UPDATES), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (FSDP2 if processes == 2 else {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return torch.load(folder / "end.pt"), ranks


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, *launched(folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *launched(folder, processes=1)


@pytest.mark.slow
def test_sharded_policy_and_critic_end_as_those_of_one_process(sharded, one):
    """Gradients of two micro-batches, clipped, in both phases, with gradient checkpointing."""
    _, end, ranks = sharded
    folder, whole, (alone,) = one
    assert ranks[0]["phases"] == alone["phases"] == [1, 1, 1, 1, 2, 2, 2, 2]
    for part in ("policy", "critic"):
        assert end[part].keys() == whole[part].keys()
        for name, value in whole[part].items():
            torch.testing.assert_close(end[part][name], value, atol=1e-5, rtol=1e-5, msg=f"{part} {name}")
    start = torch.load(folder / "start.pt")
    for part in ("policy", "critic"):
        assert all((end[part][name] - start[part][name]).abs().max() > 1e-4 for name in start[part])


@pytest.mark.slow
def test_each_process_holds_its_half(sharded):
    """Of the policy, of the critic and of the critic's AdamW."""
    for rank in sharded[2]:
        assert "FSDP" in rank["kind"]
        assert all(0.45 < share < 0.55 for share in (*rank["held"], rank["held_by_optimizer"]))


@pytest.mark.slow
def test_a_sharded_run_is_gone_on_with_inside_the_first_phase(sharded, tmp_path):
    """To the bit, critic and both optimizers too: the layers above l have no state yet, and no step is counted for them."""
    folder, end, _ = sharded
    shutil.copytree(folder / "run" / "checkpoint-3", checkpoint := tmp_path / "run" / "checkpoint-3")
    again, _ = launched(tmp_path, checkpoint)
    for part in ("policy", "critic"):
        assert all(torch.equal(value, again[part][name]) for name, value in end[part].items()), part
    assert probes(tmp_path) == probes(folder)


def probes(folder):
    """The answers of a probe set, in no order."""
    rows = [json.loads(line) for line in (folder / "run" / "probes.jsonl").read_text().splitlines()]
    return sorted((row["prompt_ids"], row["completion_ids"]) for row in rows)


@pytest.mark.slow
def test_a_sharded_run_is_probed_afterwards(sharded, one, tmp_path):
    """On the answers that one process probes itself on, with the same numbers; while it goes, it is not probed."""
    run = sharded[0] / "run"
    assert probes(sharded[0]) == probes(one[0]) and len(probes(one[0])) == 8
    assert not (run / "dynamics.parquet").exists()
    options = AnalyzeOptions(rollouts=str(run / "probes.jsonl"), output=str(tmp_path / "out"))
    afterwards = analyze([str(run / f"checkpoint-{step}") for step in (3, 6, 8)], options).dynamics
    keys = ["rollout_batch", "measure", "layer", "later_layer"]
    its = pd.read_parquet(one[0] / "run" / "dynamics.parquet").astype({"rollout_batch": float})
    assert set(afterwards["rollout_batch"]) == {1.5, 3, 4}
    both = its.merge(afterwards, on=keys, suffixes=("", "_afterwards"))
    assert len(both) == 2 * (2 + 3 + 2 * 2)
    assert both["value_afterwards"].to_numpy() == pytest.approx(both["value"].to_numpy(), rel=1e-4, abs=1e-5)


# -- where it cannot be ----------------------------------------------------------------------------------------------


def trainer_under(version=None, stage=None):
    """Stands for a trainer under FSDP of a version, or DeepSpeed's ZeRO of a stage."""
    plugin = SimpleNamespace(state_dict_type="FULL_STATE_DICT", fsdp_version=version)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin if version else None))
    return SimpleNamespace(
        reads_images=False,
        is_fsdp_enabled=version is not None,
        is_deepspeed_enabled=stage is not None,
        accelerator=accelerator,
    )


def test_a_second_model_is_refused_where_it_cannot_train(tmp_path):
    args = config(tmp_path, advantage_estimator="ppo")
    with pytest.raises(
        UserError, match="copy trains a second model, which fsdp_version 1 does not shard: use fsdp_version 2"
    ):
        check_run(trainer_under(version=1), args)
    assert check_run(trainer_under(version=2), args)
    assert not check_run(trainer_under(stage=2), args)  # each process holds it whole, as the model itself
    args.critic_backbone = "shared"
    assert check_run(trainer_under(version=1), args)
