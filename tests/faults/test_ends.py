"""Processes end: a hundred runs on a busy machine, those that are kept from it, and rewards that leave in other ways than by an error.

`BUPO_FAULTS=short` does less of each. A process that does not end says itself what it waits for.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bupo.cli import process_exit
from bupo.training.checkpoints.integrity import list_checkpoints
from tests.faults.harness import KILLED, ROOT, SHORT, words

pytestmark = pytest.mark.faults

RUN = {
    **{"size": 16, "max_new_tokens": 8, "internal_steps": 1, "per_device_train_batch_size": 4, "max_steps": 3},
    **{"steps_per_generation": 1, "save_steps": 1},
}
SETTINGS = [
    {"internal_module": "attn", "internal_lens": "final_norm"},
    {"optim": "rmsprop"},
    {"save_strategy": "epoch"},
    {"lr_scheduler_type": "cosine_with_restarts", "accelerator_config": '{"use_seedable_sampler": false}'},
    {
        **{"internal_module": "attn", "internal_lens": "final_norm", "optim": "rmsprop", "save_strategy": "epoch"},
        **{"lr_scheduler_type": "cosine_with_restarts", "accelerator_config": '{"use_seedable_sampler": false}'},
    },
    {"reward_funcs": "math"},
    {"dataloader_num_workers": 2},
]
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
LATE = "the process has not ended in"


def train(zygote, folder, reward=None, **changes):
    folder.mkdir(exist_ok=True)
    more = {name: changes.pop(name) for name in ("kill", "env", "before", "seconds") if name in changes}
    named = {"reward_funcs": f"tests.faults.misbehaving.{reward}"} if reward else {}
    return zygote.run("train", *words(**RUN | named | changes), folder=folder, **more)


def ended_well(output, folder, ended):
    assert LATE not in output, output
    assert time.time() - (folder / "run" / "finished.json").stat().st_mtime < process_exit.GRACE_SECONDS
    assert ended == 0, output


@pytest.mark.parametrize("number", range(4 if SHORT else 100))
def test_a_forked_run_ends(zygote, tmp_path, number):
    """Every third is resumed, with more updates."""
    settings = SETTINGS[number % len(SETTINGS)]
    ended = train(zygote, tmp_path, **settings, seconds=300)
    ended_well(ended.output, tmp_path, ended.status)
    if number % 3 == 0:
        ended = train(zygote, tmp_path, **settings, max_steps=5, resume_from_checkpoint="true", seconds=300)
        ended_well(ended.output, tmp_path, ended.status)


@pytest.mark.parametrize("number", range(0 if SHORT else 8))
def test_real_interpreters_end_beside_each_other(tmp_path, number):
    """Four at a time, more than there may be cores."""

    def one(place):
        folder = tmp_path / str(place)
        folder.mkdir()
        argv = words(**RUN | SETTINGS[(number + place) % len(SETTINGS)])
        command = [sys.executable, "-m", "bupo.cli.main", "train", *argv]
        done = subprocess.run(command, cwd=folder, env=os.environ | ENV, capture_output=True, text=True, timeout=500)
        ended_well(done.stderr, folder, done.returncode)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


KEEPS = {
    "leaves_a_thread": "thread 'mine': forever (faults/misbehaving.py:",
    "leaves_a_child": "child process ",
    "leaves_a_handler": "the exit handler forever: ",
}


@pytest.mark.parametrize("reward", list(KEEPS)[:1] if SHORT else KEEPS)
def test_a_run_that_is_kept_from_its_end_says_by_what(zygote, tmp_path, reward):
    ended = train(zygote, tmp_path, reward, before="tests.faults.misbehaving.short_grace")
    assert ended.status == 0 and "it exits now with status 0" in ended.output
    assert KEEPS[reward] in ended.output and (tmp_path / "run" / "finished.json").exists()


# -- rewards ---------------------------------------------------------------------------------------------------------

LEAVES = {
    "exits": "reward function exits failed in rollout batch 2: it has called sys.exit()",
    "exits_with_text": "reward function exits_with_text failed in rollout batch 2: it has called sys.exit('enough\\nof this')",
    "leaves_a_generator": "reward function leaves_a_generator failed in rollout batch 2: GeneratorExit: no details",
    "interrupts": "reward function interrupts failed in rollout batch 2: KeyboardInterrupt: no details",
    "unreadable": "reward function unreadable failed in rollout batch 2: Unreadable: its text cannot be read",
    "closes_stdout": "rollout batch 2: reward function closes_stdout has closed sys.stdout",
    "closes_stderr": "rollout batch 2: reward function closes_stderr has closed sys.stderr",
    "exits_in_the_loop": "rollout batch 1: reward function exits_in_the_loop failed: it has called sys.exit(0)",
}
SOME = ["exits", "closes_stdout", "exits_in_the_loop"]


@pytest.mark.parametrize("reward", SOME if SHORT else LEAVES)
def test_a_reward_that_leaves_is_one_line(zygote, tmp_path, reward):
    ended = train(zygote, tmp_path, reward)
    lines = [line for line in ended.output.splitlines() if line.startswith("bupo: ")]
    assert ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.output, ended.output
    assert lines[0].startswith(f"bupo: error: {LEAVES[reward]}")
    assert len(list_checkpoints(tmp_path / "run")) == (0 if "loop" in reward else 1)
    assert not (tmp_path / "run" / "finished.json").exists()


@pytest.mark.parametrize("reward", [] if SHORT else ["redirects", "moves", "handles", "comes_back"])
def test_a_reward_that_changes_the_process_does_not_change_the_run(zygote, tmp_path, reward):
    ended = train(zygote, tmp_path, reward)
    assert ended.status == 0 and ended.output.count("run folder: ") == 1, ended.output
    assert (tmp_path / "run" / "finished.json").exists()
    assert ended.output.count(f"reward function {reward} has ") == (reward != "comes_back")


def test_a_killed_worker_of_the_data_loader_is_one_line(zygote, tmp_path):
    ended = train(zygote, tmp_path, "kills_workers", dataloader_num_workers=2)
    lines = [line for line in ended.output.splitlines() if line.startswith("bupo: ")]
    assert ended.status == 2 and len(lines) == 1 and "Traceback" not in ended.output, ended.output
    assert "DataLoader worker (pid" in lines[0] and "dataloader_num_workers" in lines[0]


@pytest.mark.parametrize("reward", ["pool"] if SHORT else ["pool", "forks"])
def test_a_child_that_outlives_its_run_does_not_keep_the_folder(zygote, tmp_path, reward):
    kill = {"call": "transformers.trainer_callback.CallbackHandler.on_step_end", "number": 3, "when": "before"}
    assert train(zygote, tmp_path, reward, kill=kill).status == KILLED
    child = int((tmp_path / "child").read_text())
    try:
        os.kill(child, 0)  # is there still
        ended = train(zygote, tmp_path, reward, resume_from_checkpoint="true")
        assert ended.status == 0, ended.output
    finally:
        os.kill(child, signal.SIGKILL)


# -- ranks -----------------------------------------------------------------------------------------------------------

LEFTOVERS = [
    {"RANK": "1"},
    {"LOCAL_RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
]


@pytest.mark.parametrize("left", LEFTOVERS[:2] if SHORT else LEFTOVERS, ids=str)
def test_a_run_with_variables_of_an_earlier_launch_is_a_single_process(zygote, tmp_path, left):
    ended = train(zygote, tmp_path, reward_funcs="tests.faults.rewards.digits", env=left)
    assert ended.status == 0 and ended.output.count("bupo: warning: ") == 1, ended.output
    assert "this is a single process" in ended.output
    assert (tmp_path / "run" / "finished.json").exists() and "reward" in ended.output  # rank 0's lines


def test_two_evaluations_of_one_folder_are_not_mixed(tmp_path):
    """Though both take themselves for rank 1 of nothing."""
    options = {
        "model": "embedded",
        "benchmarks": "arithmetic",
        "size": 40,
        "k": 3,
        "max_new_tokens": 16,
        "output": "run",
    }
    argv = ["eval", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    command = [sys.executable, "-m", "bupo.cli.main", *argv]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENV | {"RANK": "1"}, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=400)[1] for process in both]
    statuses = [process.returncode for process in both]
    rows = [json.loads(line) for path in (tmp_path / "run").rglob("samples.jsonl") for line in path.open()]
    assert len(rows) == 120, (statuses, said)
    refused = [text for status, text in zip(statuses, said, strict=True) if status == 2]
    # on a busy machine one may have ended before the other began
    assert statuses.count(0) >= 1 and all("is being written by process" in text for text in refused), said
