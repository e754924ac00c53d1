"""DeepSpeed's ZeRO 1 and 2 in two CPU processes, against one process and DDP; and refused options of DeepSpeed.

`make test-deepspeed` runs the marked tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bupo import UserError
from bupo.models.residual_stream import Activation, ResidualStream
from bupo.run_files.names import STATE_FILE
from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.checkpoints.trainer_state import _check_sharding
from bupo.training.distributed.deepspeed import (
    REACHED_BY,
    ReachedGroupsCallback,
    check_deepspeed_config,
    get_stepped_parameters,
    split_groups_by_layer,
)
from bupo.training.validation.arguments import check_run
from tests.training.test_probes import FALLING
from tests.training.test_trainer import assert_only_below, model_of

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SAVING = {"save_strategy": "steps", "save_steps": 3}
RUNS: dict[str, dict] = {
    "grpo": SAVING,
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce++": {"advantage_estimator": "reinforce++"},
    "ppo": {"advantage_estimator": "ppo", "critic_backbone": "shared", "critic_learning_rate": 1e-3},
    "ppo-copy": {"advantage_estimator": "ppo", "critic_learning_rate": 1e-3, **SAVING},
    "attn": {"max_steps": 4, "internal_module": "attn"},
    "final_norm": {"max_steps": 4, "internal_lens": "final_norm"},
    "stages": {
        "internal_layer": None,
        "internal_schedule": [[1, 1], [3, 1]],
        "layer_lr_multipliers": {3: 0.1},
    },
    "lora": {"lora": True},
    "auto": {
        "internal_layer": "auto",
        "probe_every": 1,
        "eval_benchmarks": ["arithmetic"],
        "eval_k": 3,
        "eval_every": 2,
        "eval_problems": 5,
        "max_steps": 6,
    },
    "guard": {"rewards": FALLING, "internal_steps": 20, "max_steps": 26, "probe_every": 2},
    "skipped": {"broken": [1, 5]},
    "stopped": {"broken": [4, 5, 6]},
}
FOLLOWING = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 4}


def zero(stage, **more):
    """A DeepSpeed configuration."""
    return {"zero_optimization": {"stage": stage}, **dict.fromkeys(AUTO, "auto"), **more}


def run(command, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)


def launched(folder, kind, wanted):
    """Run `tests.helpers.deepspeed_run` in one process (`one`), under DDP (`ddp`) or a stage of ZeRO.

    Returns:
        `dict`: the final state of each run by name, equal on both processes."""
    folder.mkdir(exist_ok=True)
    more = {} if kind in ("one", "ddp") else {"deepspeed": zero(kind)}
    launch = [sys.executable] if kind == "one" else TORCHRUN
    asked = json.dumps({name: {**options, **more} for name, options in wanted.items()})
    done = run([*launch, "-m", "tests.helpers.deepspeed_run", str(folder), asked], timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name in wanted:
        first, *others = (_end(folder / name, rank) for rank in range(1 if kind == "one" else 2))
        for other in others:
            assert all(torch.equal(value, other["end"][key]) for key, value in first["end"].items()), name
        found[name] = first
    return found


def _end(folder, rank):
    return json.loads((folder / f"rank{rank}.json").read_text()) | torch.load(folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model_of().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def runs(place):
    """Return the final states of all runs of a kind of launch, which runs once. Their folders are in `place / kind`."""
    made: dict = {}

    def get(kind, name):
        if kind not in made:
            following = {"following": {**FOLLOWING, "model": str(place / "model")}}
            made[kind] = launched(place / str(kind), kind, RUNS | following)
        return made[kind][name]

    return get


def assert_alike(found, wanted, atol=1e-5):
    """Check that weights, value heads and the logs of each update are equal."""
    assert found["end"].keys() == wanted["end"].keys()
    for name, value in wanted["end"].items():
        torch.testing.assert_close(found["end"][name], value, atol=atol, rtol=1e-5, msg=name)
    names = (
        "loss",
        "grad_norm",
        "reward",
        "entropy",
        "internal/entropy",
        "learning_rate",
        "phase",
        "critic/value_loss",
    )
    assert len(found["log"]) == len(wanted["log"])
    for row, other in zip(found["log"], wanted["log"], strict=True):
        assert {n: row[n] for n in names if n in row} == pytest.approx(
            {n: other[n] for n in names if n in other}, abs=1e-5
        )


# -- what moves ----------------------------------------------------------------------------------------------------------


@pytest.mark.external
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", [*(name for name in RUNS if "broken" not in RUNS[name]), "following"])
def test_zero_equals_one_process(runs, stage, name):
    """Both phases, with two micro-batches an update, clipping and weight decay; the same parameters move."""
    found, wanted = runs(stage, name), runs("one", name)
    assert "DEEPSPEED" in found["kind"] and wanted["kind"] == "DistributedType.NO"
    assert any(row.get("grad_norm", 0) > 0.2 for row in wanted["log"])  # beyond max_grad_norm
    assert_alike(found, wanted)
    for key, start in wanted["start"].items():
        assert torch.equal(start, found["end"][key]) == torch.equal(start, wanted["end"][key]), key
    assert found["moments"] == pytest.approx(wanted["moments"] / 2, rel=0.02)  # each process steps its half


@pytest.mark.external
def test_zero_equals_ddp(runs, tmp_path):
    assert_alike(runs(2, "ppo"), launched(tmp_path, "ddp", {"ppo": RUNS["ppo"]})["ppo"])


@pytest.mark.external
@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_phase_leaves_layers_above_unchanged(runs, stage):
    """Weights above l are equal to the bit before the second phase, although weight decay is on."""
    found = runs(stage, "grpo")
    after = found["sampling"][3]
    assert_only_below({n for n in after if not torch.equal(after[n], found["start"][n])}, after, 2)


def test_what_the_attention_of_a_layer_writes_is_reached_without_its_ffn():
    stream = ResidualStream(model_of())
    names = {parameter: name for name, parameter in stream.model.named_parameters()}
    whole = {names[p] for p in get_stepped_parameters(stream, Activation("layer", 2), False)}
    attention = {names[p] for p in get_stepped_parameters(stream, Activation("attn", 2), False)}
    assert whole - attention == {f"model.layers.1.{part}.weight" for part in (
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"
    )} and attention < whole  # fmt: skip


def test_a_group_steps_only_where_the_policy_reaches_it():
    """DeepSpeed calls it for one group at a time, each with a gradient that may be zero."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.1}], weight_decay=0.5)
    split_groups_by_layer(optimizer, {1: {weights[0]}, 2: set(weights[:2])})
    assert [(g["params"], g[REACHED_BY], g["lr"]) for g in optimizer.param_groups] == [
        ([weights[0]], [1, 2], 0.1), ([weights[1]], [2], 0.1), ([weights[2]], [], 0.1),
    ]  # fmt: skip
    in_force: list[int | None] = []
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    ReachedGroupsCallback(lambda: in_force[-1]).on_train_begin(None, None, None, optimizer=wrapped)
    stepped = []
    for layer in (1, 2, None):
        in_force.append(layer)
        before = [weight.detach().clone() for weight in weights]
        groups = optimizer.param_groups
        for group in groups:
            optimizer.param_groups = [group]
            for weight in group["params"]:
                weight.grad = torch.zeros(3)
            optimizer.step()
            assert all(weight.grad is not None for weight in group["params"])  # DeepSpeed keeps using it
        optimizer.param_groups = groups
        stepped.append([not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)])
    assert stepped == [[True, False, False], [True, True, False], [True, True, True]]
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [3, 2, 1]


# -- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.external
@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_is_equal_to_the_bit(runs, place, tmp_path, stage):
    """Runs resume inside a rollout batch of each phase, with a reference model that has moved, and a lower learning rate."""

    def gone_on(name, of, step, **options):
        checkpoint = tmp_path / name / "run" / f"checkpoint-{step}"
        shutil.copytree(place / str(stage) / of / "run" / checkpoint.name, checkpoint)
        return {name: {**options, "checkpoint": str(checkpoint)}}

    again = gone_on("first", "grpo", 3, **SAVING) | gone_on("second", "grpo", 6, **SAVING)
    again |= gone_on("critic", "ppo-copy", 3, **RUNS["ppo-copy"])
    again |= gone_on("following", "following", 4, **FOLLOWING, model=str(place / "model"))
    again |= gone_on("lower", "grpo", 3, **SAVING, learning_rate=1e-4)
    found = launched(tmp_path, stage, again)
    for name, of in (("first", "grpo"), ("second", "grpo"), ("critic", "ppo-copy"), ("following", "following")):
        whole = runs(stage, of)
        assert all(torch.equal(value, found[name]["end"][key]) for key, value in whole["end"].items()), name
        assert [row.get("loss") for row in found[name]["log"]] == [row.get("loss") for row in whole["log"]]
    rates = [row["learning_rate"] for row in found["lower"]["log"] if "learning_rate" in row]
    assert rates == [3e-4] * 3 + [1e-4] * 5


@pytest.mark.external
def test_the_saved_model_is_what_was_trained(runs, place):
    found = runs(2, "grpo")
    saved = load_file(place / "2" / "grpo" / "saved" / "model.safetensors")
    head = saved.pop("lm_head.weight")  # a tied one too
    assert torch.equal(head, saved["model.embed_tokens.weight"]) and saved.keys() == found["end"].keys()
    assert all(torch.equal(value, found["end"][name]) for name, value in saved.items())


# -- between rollout batches ---------------------------------------------------------------------------------------------


@pytest.mark.external
@pytest.mark.parametrize("stage", [1, 2])
def test_early_stopping_restores_weights_and_each_process_shard(runs, stage):
    """The weights that sample next equal the best ones to the bit; a test above compares the run with one process."""
    found, wanted = runs(stage, "guard"), runs("one", "guard")
    assert found["stages"] == wanted["stages"] == [[2, 8]]
    best, last, after = (found["sampling"][batch] for batch in (7, 8, 9))
    assert all(torch.equal(value, after[name]) for name, value in best.items())
    assert any(not torch.equal(value, last[name]) for name, value in best.items())


@pytest.mark.external
@pytest.mark.parametrize("stage", [1, 2])
def test_auto_probes_and_evaluations_use_the_full_model(runs, place, stage):
    found, wanted = runs(stage, "auto"), runs("one", "auto")
    folders = [place / kind / "auto" / "run" for kind in (str(stage), "one")]
    tables = [pd.read_parquet(folder / "dynamics.parquet") for folder in folders]
    both = tables[0].merge(tables[1], on=["rollout_batch", "measure", "layer", "later_layer"], suffixes=("", "_of_one"))
    assert len(both) == len(tables[0]) == len(tables[1]) > 20
    assert both["value"].to_numpy() == pytest.approx(both["value_of_one"].to_numpy(), rel=1e-4, abs=1e-5)
    mine, its = (json.loads((folder / "boundary.json").read_text())["boundary_layer"] for folder in folders)
    assert mine == its == found["stages"][0][0]
    evaluated = [[row for row in each["log"] if "eval_rollout_batches" in row] for each in (found, wanted)]
    assert [row["eval_rollout_batches"] for row in evaluated[0]] == [0, 2, 3]
    assert [row["eval_arithmetic/tokens"] for row in evaluated[0]] == [
        row["eval_arithmetic/tokens"] for row in evaluated[1]
    ]


@pytest.mark.external
def test_updates_that_are_not_finite_are_skipped_and_three_in_a_row_stop_the_run(runs):
    """Warnings are those of one process, which measures the norm of the gradient in another way."""
    found, wanted = runs(2, "skipped"), runs("one", "skipped")
    assert not found["refused"]
    assert all(torch.allclose(value, found["end"][name], atol=1e-5) for name, value in wanted["end"].items())
    told = "the gradient is not finite in 3 updates in a row, the last in rollout batch 4"
    assert told in runs(2, "stopped")["refused"] and told in runs("one", "stopped")["refused"]


# -- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "more", "asked", "refused"),
    [
        (3, {}, {}, "ZeRO-3 partitions the weights while loading, .*: use FSDP2, or ZeRO stage 1 or 2"),
        (0, {}, {}, "ZeRO-0 shards nothing: use ZeRO stage 1 or 2"),
        (2, {"optimizer": {"type": "AdamW"}}, {}, "holds an optimizer, .*: set the optimizer with optim"),
        (2, {"fp16": {"enabled": True}}, {}, "fp16 skips updates .*: use bf16, or fp32"),
        (2, {}, {"fp16": True}, "fp16 skips updates"),
        (2, {"bf16": {"enabled": True}}, {}, "computes in bf16 .*, and bf16 is false"),
    ],
)
def test_what_does_not_run_is_refused_by_name(stage, more, asked, refused):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=zero(stage, **more))
    args = SimpleNamespace(**{"deepspeed_plugin": plugin, "fp16": False, "bf16": False, **asked})
    with pytest.raises(UserError, match=f"DeepSpeed.*{refused}"):
        check_deepspeed_config(args)
    plugin.zero_stage, plugin.deepspeed_config = 2, zero(2, bf16={"enabled": "auto"})
    args.fp16 = False
    check_deepspeed_config(args)


@pytest.mark.parametrize(
    ("trainer", "args", "refused"),
    [
        ({"optimizer": object()}, {}, "an optimizer was given, which DeepSpeed would replace"),
        (
            {"is_deepspeed_enabled": False},
            {"deepspeed": zero(2)},
            "DeepSpeed is configured, but accelerate runs NO",
        ),
    ],
)
def test_what_would_be_left_out_is_refused(trainer, args, refused):
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    trainer = {
        "is_deepspeed_enabled": True,
        "is_vlm": False,
        "is_fsdp_enabled": False,
        "optimizer": None,
        "model": None,
    } | trainer
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "layer_lr_multipliers": None, **args})
    made: Any = SimpleNamespace(accelerator=accelerator, **trainer)
    with pytest.raises(UserError, match=refused):
        check_run(made, args)


def test_a_checkpoint_resumes_on_the_same_number_of_processes_only(tmp_path):
    (tmp_path / "global_step4").mkdir()
    state = {
        "passes": 4,
        "layout": {"processes": 2, "micro_steps": 2, "gradient_accumulation_steps": 1},
        "planned": [],
        "metrics": {},
        "counters": {},
        "reference": None,
        "parts": {},
    }
    torch.save({**state, "completions": None, "reference": None}, tmp_path / STATE_FILE)
    trainer: Any = SimpleNamespace(
        is_fsdp_enabled=False,
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(num_processes=1),
    )
    with pytest.raises(UserError, match="is of 2 processes, and this run has 1: DeepSpeed resumes on the same number"):
        _check_sharding(trainer, tmp_path)
    trainer.accelerator.num_processes = 2
    _check_sharding(trainer, tmp_path)  # without options that could differ
    trainer.is_deepspeed_enabled = False
    with pytest.raises(UserError, match="was saved under DeepSpeed, and this run is unsharded"):
        _check_sharding(trainer, tmp_path)


TRAIN = {
    "model": "embedded",
    "dataset": "arithmetic",
    "size": 64,
    "internal_layer": 5,
    "internal_steps": 1,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "max_new_tokens": 16,
    "max_grad_norm": 0.3,
    "report_to": "none",
}


def train(folder, **options):
    """Return the arguments of the command."""
    pairs = {**TRAIN, **options, "output": folder}
    return [
        "-m",
        "bupo.cli.main",
        "train",
        *(str(word) for name, value in pairs.items() for word in (f"--{name}", value)),
    ]


@pytest.mark.external
def test_a_refused_launch_prints_one_reason_and_leaves_no_files(tmp_path):
    done = run([*TORCHRUN, *train(tmp_path / "out", deepspeed=json.dumps(zero(3)))])
    said = [line for line in (done.stdout + done.stderr).splitlines() if "bupo: error" in line]
    assert done.returncode != 0 and len(said) == 1, done.stderr[-3000:]
    assert "bupo: error: DeepSpeed ZeRO-3 partitions the weights" in said[0] and not (tmp_path / "out").exists()


# -- launch configurations -----------------------------------------------------------------------------------------------


@pytest.mark.external
def test_the_launch_configurations_make_one_run(tmp_path):
    """Clipping and accumulation follow the run's options: DDP and ZeRO are equal, and a bf16 launch trains in bf16."""

    def launch(name, *flags, **options):
        config = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(config),
            "--num_processes",
            "2",
        ]
        done = run([*command, *flags, *train(tmp_path / (name + "".join(options)), **options)])
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / (name + "".join(options))
        return load_file(folder / "model.safetensors"), read_metrics(folder / "metrics.jsonl")

    weights, rows = launch("ddp", "--mixed_precision", "no")
    assert any(row.get("grad_norm", 0) > TRAIN["max_grad_norm"] for row in rows)
    for name in ("zero1", "zero2"):
        mine, its = launch(name, "--mixed_precision", "no")
        assert all(torch.allclose(value, mine[key], atol=1e-6) for key, value in weights.items())
        assert [row["grad_norm"] for row in its if "grad_norm" in row] == pytest.approx(
            [row["grad_norm"] for row in rows if "grad_norm" in row], rel=1e-4
        )
    mine, its = launch("zero2", bf16="true")
    assert {value.dtype for value in mine.values()} == {torch.bfloat16}
    assert [row["phase"] for row in its if "phase" in row] == [1, 2]
