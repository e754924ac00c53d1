"""Every launch ends: of two processes under DDP and FSDP2, when one of them fails, and after signals.

`BUPO_FAULTS=short` does less of each. Most processes are forked (`forks.py`) and have no launcher above them; torchrun and
accelerate launch are among them.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from tests.faults.harness import differences

ROOT = Path(__file__).parents[2]
SHORT = os.environ.get("BUPO_FAULTS") == "short"
DEADLINE = 240  # seconds, on a busy machine; a launch takes 10 to 30
SECONDS = 20  # in which the others have ended once one has
UPDATES = 6  # two to a rollout batch

ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
FSDP2 = {
    "BUPO_FSDP2": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
TRAIN = {
    "model": "embedded",
    "dataset": "arithmetic",
    "size": 64,
    "reward_funcs": "tests.faults.faulty.reward",
    "internal_layer": 5,
    "internal_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_generations": 4,
    "max_new_tokens": 6,
    "max_steps": UPDATES,
    "gradient_checkpointing": "false",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
}

pytestmark = pytest.mark.faults


def train(folder, **changes):
    options = TRAIN | {"output": str(folder)} | changes
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def until(true, seconds=DEADLINE):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "nothing happened"
        time.sleep(0.01)


def logged(folder, rows):
    """Whether a run has logged so many updates."""
    file = folder / "metrics.jsonl"
    return lambda: file.exists() and file.read_bytes().count(b"\n") >= rows


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class Forked:
    def __init__(self, server, pids, log):
        self.server, self.pids, self.log = server, pids, log

    def send(self, number, rank=0):
        os.kill(self.pids[rank], number)

    def wait(self, deadline=DEADLINE):
        """The statuses; none of them may be that of a process that had to be killed."""
        self.ended = self.server.ask(wait=self.pids, deadline=deadline)
        statuses = [status for status, _ in self.ended]
        assert None not in statuses, f"stuck: {statuses}\n{self.said()}"
        return statuses

    def apart(self):
        """Seconds between the first end and the last."""
        return max(seconds for _, seconds in self.ended) - min(seconds for _, seconds in self.ended)

    def said(self):
        return "\n".join(Path(f"{self.log}.{rank}").read_text() for rank in range(len(self.pids)))


class Server:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.forks"],
            cwd=ROOT,
            env={**os.environ, **ENV},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv, log, ranks=1, **env):
        return Forked(self, self.ask(argv=argv, ranks=ranks, log=str(log), env=env), log)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


def with_mark(mark):
    """The processes that were started with this mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes() and int(place.name) != os.getpid():
                found.append(int(place.name))
        except OSError:
            pass
    return found


def launched(launcher, argv, tmp_path, meanwhile=lambda process: None, **env):
    """A launch of two processes: its status and what it said, none of its processes being left."""
    mark = f"BUPO_LAUNCH={uuid.uuid4()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    if launcher == "accelerate":
        config = {
            "distributed_type": "FSDP",
            "use_cpu": True,
            "num_processes": 2,
            "num_machines": 1,
            "mixed_precision": "no",
        }
        fsdp = {name.lower(): value for name, value in FSDP2.items() if name.startswith("FSDP_")}
        file = tmp_path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(config | {"compute_environment": "LOCAL_MACHINE", "fsdp_config": fsdp}))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    process = subprocess.Popen(
        [*command, "-m", "tests.faults.faulty", *argv],
        cwd=ROOT,
        env={**os.environ, **ENV, **env, "BUPO_LAUNCH": mark.partition("=")[2]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        meanwhile(process)
        said, _ = process.communicate(timeout=DEADLINE)
    finally:
        left = with_mark(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not left
    return process.returncode, said


# -- launches that succeed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_launches_end(server, tmp_path, kind):
    """20 under DDP and 10 under FSDP2 end with status 0 and the same weights."""
    env = FSDP2 if kind == "fsdp2" else {}
    forked, by_launcher = (1, 1) if SHORT else (12, 4) if kind == "ddp" else (6, 2)
    first = None
    for number in range(forked):
        run = server.start(train(folder := tmp_path / f"forked{number}"), tmp_path / "log", ranks=2, **env)
        assert run.wait() == [0, 0], run.said()
        first = first or weights(folder)
        assert weights(folder) == first
    for launcher in ("accelerate" if kind == "ddp" else "torchrun",) if SHORT else ("torchrun", "accelerate"):
        for number in range(by_launcher):
            status, said = launched(launcher, train(folder := tmp_path / f"{launcher}{number}"), tmp_path, **env)
            assert status == 0, said
            assert weights(folder) == first
        asked = launcher == "accelerate" and kind == "ddp"  # for FSDP, which accelerate has only where there is no CPU
        assert said.count("FSDP is configured, but") == asked


def test_a_group_is_left_without_waiting_for_its_own_threads(tmp_path):
    """100 of 100 times; where the group goes with DDP's reducer, some 3 of 100 hang."""
    times = 40 if SHORT else 100
    command = [sys.executable, "-m", "tests.faults.groups"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), str(times)], cwd=ROOT, env=os.environ | ENV)
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=DEADLINE) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


# -- one process fails -----------------------------------------------------------------------------------------------

FAULTS = {
    "reward": (
        0,
        "bupo: error: reward function reward failed in rollout batch 2: ValueError: no reward today",
    ),
    "raise": (1, "bupo: error: process 1 has failed"),
    "memory": (1, "bupo: error: process 1 has failed"),
    "exit": (0, "bupo: error: process 1 called sys.exit(3)"),
    "kill": (0, "bupo: error: another process of this launch has ended without an error message"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_process_fails_and_the_other_ends(server, tmp_path, fault):
    """By itself, within seconds; the cause is said once, and no consequence of it."""
    tracebacks, line = FAULTS[fault]
    run = server.start(train(tmp_path / "run"), tmp_path / "log", ranks=2, BUPO_FAULT=fault)
    statuses = run.wait()
    assert all(statuses) and (statuses[1] == -signal.SIGKILL) == (fault == "kill")
    assert run.apart() < SECONDS
    said = run.said()
    assert said.count("bupo: error") == 1 and line in said
    assert said.count("Traceback (most recent call last)") == tracebacks


def test_a_launcher_ends_a_process_that_has_work_left(server, tmp_path):
    """By SIGTERM after another has failed: there is nothing left to finish."""
    run = server.start(train(tmp_path / "run"), tmp_path / "log", ranks=2, BUPO_FAULT="alone")
    until(lambda: "bupo: error: process 1 has failed" in run.said())
    sent = time.monotonic()
    run.send(signal.SIGTERM, rank=0)
    assert run.wait() == [128 + signal.SIGTERM, 1] and time.monotonic() - sent < SECONDS
    assert run.said().count("bupo: error") == 1


@pytest.mark.parametrize("fault", ["reward"] if SHORT else ["reward", "kill", "raise"])
def test_a_launch_says_once_why_it_failed(tmp_path, fault):
    status, said = launched("torchrun", train(tmp_path / "run"), tmp_path, BUPO_FAULT=fault)
    assert status and said.count("bupo: error") == 1 and FAULTS[fault][1] in said


def test_a_bad_option_is_one_line_in_a_launch(tmp_path):
    status, said = launched("torchrun", train(tmp_path / "run", loss_type="none"), tmp_path)
    assert status and said.count("bupo: error") == 1 and not (tmp_path / "run").exists()


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The folder of the uninterrupted run of so many processes."""
    done = {}

    def folder(ranks, **env):
        key = (ranks, *env)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole") / "run"
            run = server.start(train(done[key]), done[key].with_name("log"), ranks=ranks, **env)
            assert run.wait() == [0] * ranks, run.said()
        return done[key]

    return folder


def go_on(server, folder, ranks, **env):
    run = server.start(train(folder, resume_from_checkpoint="true"), folder.with_name("log"), ranks=ranks, **env)
    assert run.wait() == [0] * ranks, run.said()


SIGNALS = [signal.SIGTERM] if SHORT else [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_update_and_the_run_goes_on(server, whole, tmp_path, number):
    """Also without checkpoints and inside a rollout batch: the resumed run is the uninterrupted one."""
    run = server.start(train(folder := tmp_path / "run"), tmp_path / "log", BUPO_FAULT="slow")
    until(logged(folder, 2))  # the third update opens the second rollout batch, which takes 4 seconds
    run.send(number)
    time.sleep(0.3)
    run.send(number)  # a launcher's second
    assert run.wait() == [128 + number]
    said = run.said()
    line = f"bupo: stopped by {number.name} after update 3 of {UPDATES}, saved in {folder}/checkpoint-3: resume with the same command and"
    assert said.count(f"{line} --resume_from_checkpoint true") == 1 and "Traceback" not in said
    assert said.count("Ctrl-C again") == (number == signal.SIGINT)
    assert not (folder / "model.safetensors").exists() and not (folder / "training.png").exists()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not [row for row in (folder / "metrics.jsonl").read_text().splitlines() if "train_runtime" in row]
    go_on(server, folder, 1)
    assert not [what for what in differences(whole(1), folder) if not what.startswith("files: ")]  # its checkpoint


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_stop_after_the_same_update(server, whole, tmp_path, kind):
    """Wherever the signal arrives."""
    env = FSDP2 if kind == "fsdp2" else {}
    run = server.start(train(folder := tmp_path / "run"), tmp_path / "log", ranks=2, BUPO_FAULT="slow", **env)
    until(logged(folder, 2))
    run.send(signal.SIGUSR1, rank=1)
    assert run.wait() == [128 + signal.SIGUSR1] * 2
    said = run.said()
    assert said.count("bupo: stopped by SIGUSR1 after update 3") == 1 and "Traceback" not in said
    assert said.count("bupo: ") == 1
    go_on(server, folder, 2, **env)
    assert not [what for what in differences(whole(2, **env), folder) if not what.startswith("files: ")]


@pytest.mark.parametrize(
    "number", [signal.SIGINT] if SHORT else [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_launcher_passes_signals_on(tmp_path, number):
    def meanwhile(process):
        until(logged(folder, 2))
        process.send_signal(number)

    folder = tmp_path / "run"
    status, said = launched("torchrun", train(folder), tmp_path, meanwhile, BUPO_FAULT="slow")
    assert status and said.count(f"bupo: stopped by {number.name} after update 3") == 1
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_second_ctrl_c_ends_at_once(server, tmp_path, ranks):
    """Though the other process still waits for this one."""
    run = server.start(train(folder := tmp_path / "run"), tmp_path / "log", ranks=ranks, BUPO_FAULT="slow")
    until(logged(folder, 2))
    for _ in range(2):
        for rank in range(ranks):
            run.send(signal.SIGINT, rank)
        time.sleep(1.2)
    sent = time.monotonic()
    assert run.wait() == [128 + signal.SIGINT] * ranks
    assert time.monotonic() - sent < 1.5  # and not the slow batch's 4 seconds
    assert "Traceback" not in run.said() and not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_before_training_a_signal_ends_at_once(server, tmp_path, number):
    run = server.start(train(tmp_path / "run"), tmp_path / "log", BUPO_FAULT="loading")
    until(lambda: "loading" in run.said())
    run.send(number)
    assert run.wait(60) == [128 + number]
    assert run.said().splitlines()[-1] == f"bupo: stopped by {number.name}" and "Traceback" not in run.said()
    assert not (tmp_path / "run").exists()


def test_the_demo_is_stopped_and_goes_on(server, tmp_path):
    command = [
        "demo",
        "--output",
        str(folder := tmp_path / "run"),
        "--steps",
        "3",
        "--internal_steps",
        "1",
        "--problems",
        "16",
    ]
    run = server.start(command, tmp_path / "log")
    until(logged(folder, 1))
    run.send(signal.SIGTERM)
    assert run.wait() == [128 + signal.SIGTERM] and "--resume_from_checkpoint true" in run.said()
    assert not (folder / "summary.json").exists()
    run = server.start([*command, "--resume_from_checkpoint", "true"], tmp_path / "log")
    assert run.wait() == [0], run.said()
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("command", ["eval", "analyze"])
def test_sigterm_keeps_finished_answers(server, tmp_path, command):
    options = {
        "model": "embedded",
        "size": 400,
        "max_new_tokens": 16,
        "batch_size": 8,
        "output": str(folder := tmp_path / "run"),
    }
    options |= {"benchmarks": "arithmetic", "k": 4} if command == "eval" else {}
    options |= {"dataset": "arithmetic"} if command == "analyze" else {}
    run = server.start(
        [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], tmp_path / "log"
    )
    until(lambda: any(path.stat().st_size for path in folder.rglob("*.jsonl")))
    run.send(signal.SIGTERM)
    assert run.wait(60) == [128 + signal.SIGTERM]
    assert run.said().count(f"bupo: interrupted: finished answers are saved in {folder}") == 1
    assert "Traceback" not in run.said()


def test_graders_do_not_survive_a_killed_parent(tmp_path):
    """Not even one that is busy with an expression without an end."""
    code = (
        "from bupo.rewards.grader import MathGrader\n"
        "grader = MathGrader(deadline=4.0, processes=1)\n"
        "print(grader.grade(['\\\\boxed{x+1}'], ['x+1']), flush=True)\n"
        "grader.grade(['\\\\boxed{9^{9^{9^{9}}}}'], ['x+1'])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | ENV, stdout=subprocess.PIPE, text=True)
    assert "correct" in parent.stdout.readline().lower()
    everyone = [int(place.name) for place in Path("/proc").glob("[0-9]*")]
    (child,) = (pid for pid in everyone if (state_of(pid) or "  ")[1] == str(parent.pid))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(child, number)  # which reach it where a terminal or a cluster sends them to all
    time.sleep(0.3)
    assert state_of(child)[0] != "Z"
    parent.kill()
    parent.wait()
    until(lambda: (state_of(child) or ["Z"])[0] == "Z", seconds=30)


def state_of(pid):
    """A process' state and its parent, as /proc has them; None of no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
