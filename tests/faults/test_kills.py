"""A run that is killed and resumed, in whatever setting and at whatever moment, is the uninterrupted one.

Every run is started by one command line, as a scheduler does that puts stopped jobs back into its queue: with
`--resume_from_checkpoint true` from the first time on.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from bupo.training.checkpoints.integrity import find_damage, list_checkpoints
from tests.faults.harness import COMMON, KILLED, ROOT, SHORT, differences, unequal, words

pytestmark = pytest.mark.faults

# settings, and what differs in each from `COMMON`: six rollout batches of three updates, three of them phase 1, an epoch of
# four, and a checkpoint after every fourth update
SETTINGS: dict[str, dict] = {
    "peft": {"use_peft": "true", "lora_r": 4, "lora_target_modules": "all-linear", "log_completions": "true"},
    "ppo-copy": {"advantage_estimator": "ppo", "critic_learning_rate": 1e-3},
    "ppo-shared": {"advantage_estimator": "ppo", "critic_backbone": "shared", "critic_learning_rate": 1e-3},
    "rloo": {"advantage_estimator": "rloo", "gradient_accumulation_steps": 3, "steps_per_generation": 9, "size": 72},
    "guard": {
        **{"reward_funcs": "tests.faults.rewards.falling", "internal_steps": 20, "steps_per_generation": 2},
        **{"max_steps": 24, "save_steps": 3, "save_total_limit": 20, "size": 16},
    },
    "auto": {"internal_layer": "auto", "per_device_train_batch_size": 16, "size": 48, "max_new_tokens": 28, "seed": 1},
    "iterations": {"num_iterations": 2, "max_steps": 24},
    "reference": {"beta": 0.1, "sync_ref_model": "true", "ref_model_sync_steps": 5, "gradient_accumulation_steps": 1},
    "evaluation": {
        **{"eval_benchmarks": "arithmetic", "eval_problems": 8, "eval_k": 1, "eval_every": 2},
        **{"eval_strategy": "steps", "eval_steps": 5, "eval_size": 4, "per_device_eval_batch_size": 8},
    },
    "epochs": {
        **{"eval_strategy": "epoch", "logging_strategy": "epoch", "eval_size": 4, "per_device_eval_batch_size": 8},
        **{"dataloader_num_workers": 1, "dataloader_persistent_workers": "true"},
    },
}
STEP = "transformers.trainer_callback.CallbackHandler.on_step_end"


def after_update(number: int) -> dict:
    """Killed after so many updates of this start, before they are logged or saved."""
    return {"call": STEP, "number": number, "when": "after"}


def in_a_save(number: int) -> dict:
    """Killed while a file of a checkpoint is being written: half of it is there."""
    return {"call": "torch.save", "number": number, "when": "half"}


def train(zygote, folder, kill=None, **changes):
    folder.mkdir(exist_ok=True)
    return zygote.run("train", *words(resume_from_checkpoint="true", **changes), folder=folder, kill=kill)


def killed(zygote, folder, *kills, **changes):
    """Start and kill a run, again and again, and then let it end."""
    for kill in kills:
        ended = train(zygote, folder, kill, **changes)
        assert ended.status == KILLED or "seconds" in kill, (kill, ended.output)
    ended = train(zygote, folder, **changes)
    assert ended.status == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def wholes(zygote, tmp_path_factory):
    """The uninterrupted run of each setting, made when it is asked for, and how long it took."""
    made: dict[str, tuple] = {}

    def whole(name, **changes):
        if name not in made:
            folder, started = tmp_path_factory.mktemp(name) / "whole", time.monotonic()
            ended = train(zygote, folder, **changes)
            assert ended.status == 0, ended.output
            made[name] = (folder, time.monotonic() - started)
        return made[name]

    return whole


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_killed_run_ends_as_the_whole_one(zygote, wholes, tmp_path, setting):
    changes = SETTINGS[setting]
    whole, seconds = wholes(setting, **changes)
    chance = random.Random(setting)
    kills = [[after_update(chance.randint(5, 15))]]
    if not SHORT:
        kills += [[in_a_save(chance.randint(7, 12))], [{"seconds": chance.uniform(0.4, 0.9) * seconds}]]
    for number, some in enumerate(kills):
        killed(zygote, tmp_path / str(number), *some, **changes)
        assert differences(whole / "run", tmp_path / str(number) / "run") == [], some


EPOCHS_END = {  # an epoch is twelve updates; the checkpoint after the twelfth is written before the epoch ends
    "before its evaluation": [{"call": "bupo.training.trainer.BuPOTrainer.evaluate", "number": 1, "when": "before"}],
    "after its evaluation": [{"call": "bupo.training.trainer.BuPOTrainer.evaluate", "number": 1, "when": "after"}],
    "after the next update": [after_update(13)],
    "twice": [
        {"call": "bupo.training.trainer.BuPOTrainer.evaluate", "number": 1, "when": "before"},
        {"call": "bupo.training.trainer.BuPOTrainer.evaluate", "number": 1, "when": "after"},
    ],
    "at the end of the run": [{"call": "bupo.training.trainer.BuPOTrainer.evaluate", "number": 2, "when": "before"}],
}


@pytest.mark.parametrize("moment", list(EPOCHS_END)[:1] if SHORT else EPOCHS_END)
def test_a_run_killed_at_the_end_of_an_epoch_ends_as_the_whole_one(zygote, wholes, tmp_path, moment):
    whole, _ = wholes("epochs", **SETTINGS["epochs"])
    killed(zygote, tmp_path / "killed", *EPOCHS_END[moment], **SETTINGS["epochs"])
    assert differences(whole / "run", tmp_path / "killed" / "run") == []


MOMENTS = {  # updates and files are counted from each start on; checkpoints come after updates 4, 8, 12, 16 and 18
    "before the first checkpoint": [after_update(2)],
    "twice in a row": [after_update(6), after_update(3)],
    "twice before the first checkpoint": [after_update(3), after_update(4)],
    "in the second epoch": [after_update(14)],
    "at the phase switch": [after_update(9)],
    "in the first rollout batch of phase 2": [after_update(10)],
    "in the last save": [{"call": "bupo.training.checkpoints.writer.write_manifest", "number": 5, "when": "before"}],
    # each of the last two saves moves the new one in and an older one out
    "while an older checkpoint is deleted": [{"call": "os.rename", "number": 5, "when": "after"}],
    "before the last checkpoint is in its place": [{"call": "os.rename", "number": 6, "when": "before"}],
    "between the last checkpoint and the model": [
        {"call": "bupo.training.trl_internals.move_files", "number": 1, "when": "before"}
    ],
    "before the figures": [{"call": "bupo.training.run.draw_figures", "number": 1, "when": "before"}],
    "before it is marked as finished": [{"call": "bupo.training.run.mark_finished", "number": 1, "when": "before"}],
}


@pytest.mark.parametrize("moment", list(MOMENTS)[:0] if SHORT else MOMENTS)
def test_a_run_killed_at_a_moment_ends_as_the_whole_one(zygote, wholes, tmp_path, moment):
    whole, _ = wholes("plain")
    ended = killed(zygote, tmp_path / "killed", *MOMENTS[moment])
    assert differences(whole / "run", tmp_path / "killed" / "run") == []
    if "before the first" in moment:
        assert "holds no checkpoint yet: the run starts from the beginning" in ended.output
    if moment in ("between the last checkpoint and the model", "before the figures", "before it is marked as finished"):
        assert "the run is finished: all 18 updates are done" in ended.output


@pytest.mark.parametrize(
    ("command", "words_of", "moments"),
    [
        (
            "eval",
            {"benchmarks": "arithmetic", "size": 12, "k": 2, "max_new_tokens": 12, "batch_size": 6, "output": "run"},
            [("bupo.run_files.result_cache.ResultCache.add", 4), ("bupo.run_files.result_cache.ResultCache.add", 17)],
        ),
        (
            "analyze",
            {"model": "embedded", "size": 12, "max_new_tokens": 12, "batch_size": 4, "output": "run"},
            [("bupo.run_files.result_cache.ResultCache.add", 3), ("bupo.run_files.result_cache.ResultCache.add", 15)],
        ),
    ],
)
def test_a_killed_evaluation_or_analysis_ends_as_the_whole_one(zygote, tmp_path, command, words_of, moments):
    argv = [command, *(word for name, value in words_of.items() for word in (f"--{name}", value))]
    (tmp_path / "whole").mkdir()
    ended = zygote.run(*argv, folder=tmp_path / "whole")
    assert ended.status == 0, ended.output
    expected = json.loads((tmp_path / "whole" / "run" / "summary.json").read_text())
    for number, (call, count) in enumerate(moments[:1] if SHORT else moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        kill = {"call": call, "number": count, "when": "after"}
        assert zygote.run(*argv, folder=folder, kill=kill).status == KILLED
        ended = zygote.run(*argv, folder=folder)
        assert ended.status == 0, ended.output
        found = json.loads((folder / "run" / "summary.json").read_text())
        within = {"eval": 0.0, "analyze": 1e-5}[command]  # what is measured after a kill is in other batches
        assert unequal(found, expected, within=within) == ""


def test_the_comparison_sees_what_differs(zygote, wholes, tmp_path):
    """Another seed is another run, in everything that is compared."""
    whole, _ = wholes("rloo", **SETTINGS["rloo"])
    assert train(zygote, tmp_path / "other", **SETTINGS["rloo"], seed=1).status == 0
    found = " ".join(differences(whole / "run", tmp_path / "other" / "run"))
    for name in ("metrics.jsonl", "model.safetensors", "optimizer.pt", "rng_state.pth", "bupo.pt", "training.png"):
        assert name in found, (name, found)
    assert COMMON["seed"] == 0


@pytest.mark.parametrize("room", ["no_room_for_the_model", "no_room_for_the_optimizer"])
def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on(zygote, wholes, tmp_path, room):
    whole, _ = wholes("plain")
    (tmp_path / "run").mkdir()
    argv = ("train", *words(resume_from_checkpoint="true"))
    ended = zygote.run(*argv, folder=tmp_path, before=f"tests.faults.limits.{room}")
    lines = [line for line in ended.output.splitlines() if line.startswith("bupo: error:")]
    assert ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.output, ended.output
    assert "checkpoint-8" in lines[0] and "resume with --resume_from_checkpoint true" in lines[0]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert find_damage(tmp_path / "run" / "checkpoint-4") is None and not (tmp_path / "run" / "_saving").exists()
    assert zygote.run(*argv, folder=tmp_path).status == 0
    assert differences(whole / "run", tmp_path / "run") == []


@pytest.mark.skipif(SHORT, reason="two launches of two processes")
def test_two_processes_go_on_as_they_would_have(tmp_path):
    """From the first checkpoint, inside a rollout batch, with what a kill in the next save leaves."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    changes = {"per_device_train_batch_size": 4, "max_steps": 10, "max_new_tokens": 8, "resume_from_checkpoint": "true"}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}

    def launched(name):
        (tmp_path / name).mkdir(exist_ok=True)
        command = [*launch, "-m", "bupo.cli.main", "train", *words(**changes)]
        done = subprocess.run(command, cwd=tmp_path / name, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    launched("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    run = tmp_path / "killed" / "run"
    for name in ("checkpoint-8", "checkpoint-10", "_saving"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("finished.json", "model.safetensors", "training.png"):
        (run / name).unlink()
    (run / "_saving" / "checkpoint-8").mkdir(parents=True)
    launched("killed")
    assert differences(tmp_path / "whole" / "run", run) == []
