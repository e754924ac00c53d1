"""Runs in one process, under DDP and sharded by FSDP2 (two processes each) have equal numbers, with all features on."""

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
from filelock import FileLock

from bupo import UserError
from bupo.training.validation.arguments import check_run
from tests.faults.test_launches import FSDP2
from tests.training.test_trainer import config, model_of

ROOT = Path(__file__).parents[2]
KINDS = {"one": ("NO", 1), "ddp": ("MULTI_CPU", 2), "fsdp2": ("FSDP", 2)}
ESTIMATORS = ["grpo", "rloo", "reinforce++", "ppo-copy", "ppo-shared"]
FEATURES = ["tied", "frozen", "slow", "module", "attn", "reference", "guard", "auto", "evaluated", "lora", "sampled"]
CONTROLS = ["policy", "permuted", "handover", "rates"]
# seconds, and means of ratios or extremes over micro-batches, which differ between launches
OTHER = ("time", "runtime", "per_second", "explained_variance", "clip_ratio/low_min", "clip_ratio/high_max")


def launched(kind, folder, *arguments, processes=None):
    """Run cases of `tests.helpers.sharded_run`, and check their exit status."""
    processes = processes or KINDS[kind][1]
    (start := folder / "start").exists() or model_of().save_pretrained(start)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if kind != "one" else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.helpers.sharded_run", str(folder), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "BUPO_START": str(start)}
        | (FSDP2 if kind == "fsdp2" else {}),
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, worker_id):
    """Run each case under each kind of launch, once for all pytest workers; return the folders."""
    own = tmp_path_factory.getbasetemp()
    base = (own if worker_id == "master" else own.parent) / "sharded"
    base.mkdir(exist_ok=True)
    with FileLock(base / "lock"):
        for kind in KINDS:
            if not (base / kind / "made").exists():
                (base / kind).mkdir()
                launched(kind, base / kind, *ESTIMATORS, *FEATURES, *CONTROLS)
                (base / kind / "made").touch()
    return base


def of(runs, kind, case):
    folder = runs / kind / case
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(KINDS[kind][1])]
    return ranks, torch.load(folder / "end.pt")


def assert_same_numbers(rows, expected, tolerance=1e-5):
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if not any(part in name for part in OTHER):
                assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, wanted["step"])


def assert_same_weights(end, expected, tolerance):
    assert end.keys() == expected.keys()
    for part, weights in expected.items():
        assert end[part].keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(end[part][name], value, atol=tolerance, rtol=tolerance, msg=f"{part} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", [*ESTIMATORS, *FEATURES, *CONTROLS])
def test_losses_and_weights_are_those_of_one_process(runs, kind, case):
    """All logged numbers of both phases are equal: losses, gradient norms, entropies, probes, evaluations."""
    # completions of the model depend on the random numbers of each process
    (alone, *_), whole = of(runs, "ddp" if case == "sampled" else "one", case)
    ranks, end = of(runs, kind, case)
    assert all(KINDS[kind][0] in rank["kind"] for rank in ranks)
    phases = [row["phase"] for row in alone["rows"] if "phase" in row]
    assert {1, 2} == set(phases) and sorted(phases) == phases
    assert_same_numbers(ranks[0]["rows"], alone["rows"])
    assert_same_weights(end, whole, 1e-4)  # AdamW moves it by 1e-3 a step, however small the gradient
    assert ranks[0]["schedule"] == alone["schedule"]


@pytest.mark.slow
def test_each_process_holds_its_half(runs):
    """Policy, critic and the critic's AdamW are sharded; after a forward pass only the head is gathered."""
    ranks, _ = of(runs, "fsdp2", "ppo-copy")
    for rank in ranks:
        assert all(0.45 < share < 0.55 for share in (rank["held"], *rank["critic"]))
    assert [rank["held"] for rank in of(runs, "ddp", "ppo-copy")[0]] == [1, 1]


@pytest.mark.slow
def test_a_sharded_run_has_probes_early_stopping_auto_and_evaluations(runs):
    """The runs of the equality above have all features on."""
    rows = of(runs, "fsdp2", "guard")[0][0]["rows"]
    assert sum("internal/stopped_early" in row for row in rows) == 1
    assert sum("probe/kl" in row for row in rows) >= 8
    for folder in (runs / kind / "guard" / "run" for kind in KINDS):
        table = pd.read_parquet(folder / "dynamics.parquet")
        assert set(table["rollout_batch"]) == set(range(25))
    boundaries = [json.loads((runs / kind / "auto" / "run" / "boundary.json").read_text()) for kind in KINDS]
    assert boundaries[0] == boundaries[2] and boundaries[0]["boundary_layer"] == 2
    scores = [
        row["eval_arithmetic/avg@3"]
        for row in of(runs, "fsdp2", "evaluated")[0][0]["rows"]
        if "eval_arithmetic/avg@3" in row
    ]
    assert len(scores) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "step", "processes"),
    [
        ("ppo-copy", 3, 2),  # inside a rollout batch of phase 1: layers above l have no optimizer state yet
        ("ppo-copy", 2, 4),
        ("ppo-copy", 6, 1),
        ("guard", 8, 4),  # with a snapshot for early stopping
        ("guard", 8, 1),
        ("reference", 3, 4),  # a reference that follows the policy
    ],
)
def test_a_sharded_run_resumes_on_another_number_of_processes(runs, tmp_path, case, step, processes):
    shutil.copytree(
        runs / "fsdp2" / case / "run" / f"checkpoint-{step}",
        checkpoint := tmp_path / case / "run" / f"checkpoint-{step}",
    )
    launched("fsdp2", tmp_path, case, checkpoint, processes=processes)
    (whole, *_), end = of(runs, "fsdp2", case)
    again = torch.load(tmp_path / case / "end.pt")
    if processes == 2:
        assert all(torch.equal(value, again[part][name]) for part in end for name, value in end[part].items())
    assert_same_weights(again, end, 1e-4)
    resumed = json.loads((tmp_path / case / "rank0.json").read_text())
    assert resumed["schedule"] == whole["schedule"]


@pytest.mark.slow
def test_a_checkpoint_is_resumed_under_its_own_sharding_only(runs, tmp_path):
    """The refusal is one line, instead of transformers' error about missing files."""
    for kind, source in (("one", "fsdp2"), ("fsdp2", "one")):
        target = tmp_path / kind / "guard" / "run" / "checkpoint-8"
        shutil.copytree(runs / source / "guard" / "run" / "checkpoint-8", target)
        with pytest.raises(AssertionError, match=r"was saved (unsharded|under FSDP), and this run is"):
            launched(kind, tmp_path / kind, "guard", target)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_16_bit_model_trains_in_fp32(tmp_path, kind):
    """At a learning rate too small for 16-bit weights: a full model, an adapter, and a critic."""
    launched(kind, tmp_path, "half", "half lora", "half ppo")
    start = model_of().bfloat16().state_dict()
    for case in ("half", "half lora", "half ppo"):
        end = torch.load(tmp_path / case / "end.pt")
        trained = {name: w for name, w in end["policy"].items() if ("lora" in name) == (case == "half lora")}
        assert trained and {weights.dtype for weights in trained.values()} == {torch.float32}
        if case == "half lora":
            continue
        same = [(weights == start[name]).float().mean().item() for name, weights in trained.items()]
        assert max(same) < 0.5 and sum(same) / len(same) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_phase_that_trains_nothing_is_refused(tmp_path, kind):
    with pytest.raises(AssertionError, match=r"first phase .rollout batches 1 to 2. would train nothing"):
        launched(kind, tmp_path, "above")


# -- where it cannot be ----------------------------------------------------------------------------------------------


def trainer_under(version, kind="FULL_STATE_DICT"):
    """Return a stand-in for a trainer under a version of FSDP."""
    plugin = SimpleNamespace(state_dict_type=kind, fsdp_version=version)
    distributed_type = SimpleNamespace(value="FSDP")
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=distributed_type)
    return SimpleNamespace(
        is_vlm=False,
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
        optimizer=None,
        model=None,
        accelerator=accelerator,
    )


@pytest.mark.parametrize(
    ("under", "refused"),
    [
        ({"version": 1}, "fsdp_version is 1: use fsdp_version 2"),
        ({"version": 2, "kind": "SHARDED_STATE_DICT"}, "it must be FULL_STATE_DICT"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(tmp_path, under, refused):
    with pytest.raises(UserError, match=refused):
        check_run(trainer_under(**under), config(tmp_path))
