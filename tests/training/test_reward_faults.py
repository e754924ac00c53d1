"""Rewards that leave by other ways than an error, or leave the process changed: one line that names them, or all put back."""

import asyncio
import io
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import PartialState

from bupo.training.failure_messages import wrap_async_reward, wrap_reward_errors, wrap_training_errors
from bupo.training.reward_environment import logger
from bupo.utils.errors import SignalInterrupt, UserError, summarize_error


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class NoText(Exception):
    def __str__(self):
        return 7


class Exits(Exception):
    def __str__(self):
        sys.exit("from __str__")


class Own(BaseException):
    pass


class TextRaises(Exception):
    def __str__(self):
        raise Own("from __str__")


class WithoutNotes(Exception):
    def add_note(self, note):
        raise TypeError("no notes")


def noted(error, notes):
    error.__notes__ = notes
    return error


def train(*rewards, batch=2):
    """Call rewards as a run does."""
    names = [reward.__name__ for reward in rewards]
    with wrap_training_errors(lambda: f"rollout batch {batch}"), wrap_reward_errors(rewards, names, batch):
        for reward in rewards:
            reward()


def raising(error):
    def mine():
        raise error

    return mine


LEFT = {
    "SystemExit": (SystemExit(), "it has called sys.exit()"),
    "status 0": (SystemExit(0), "it has called sys.exit(0)"),
    "status 3": (SystemExit(3), "it has called sys.exit(3)"),
    "text": (SystemExit("a\nb"), "it has called sys.exit('a\\nb')"),
    "generator": (GeneratorExit("g"), "GeneratorExit: g"),
    "interrupt": (KeyboardInterrupt(), "KeyboardInterrupt: no details"),
    "own": (Own("a\nb"), "Own: a"),
    "unreadable": (Unreadable(), "Unreadable: its text cannot be read"),
    "no text": (NoText(), "NoText: its text cannot be read"),
    "its text raises": (TextRaises(), "TextRaises: its text cannot be read"),
    "without notes": (WithoutNotes("a"), "WithoutNotes: a"),
    "notes of another type": (noted(ValueError("a"), [1, None]), "ValueError: a"),
    "exits": (Exits(), "Exits: its text cannot be read"),
    "lines": (ValueError("a\nb\nc"), "ValueError: a"),
    "empty": (ValueError(), "ValueError: no details"),
    "long": (ValueError("x" * 10_000), f"ValueError: {'x' * 500} ..."),
    "group": (ExceptionGroup("some", [ValueError("x")]), "ExceptionGroup: some (1 sub-exception)"),
}


@pytest.mark.parametrize("kind", LEFT)
def test_whatever_a_reward_leaves_by_is_one_line(kind):
    error, line = LEFT[kind]
    with pytest.raises(UserError) as refused:
        train(lambda: None, raising(error))
    assert str(refused.value) == f"reward function mine failed in rollout batch 2: {line}"
    assert refused.value.__cause__ is error


def test_a_timer_that_is_left_running_is_stopped(caplog):
    """Its handler would raise its error anywhere in the run."""

    def late(number, frame):
        raise TimeoutError("late")

    def mine():
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 30)

    before = signal.getsignal(signal.SIGALRM)
    try:
        train(mine)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert "reward function mine has left a timer of SIGALRM running: it is stopped" in caplog.text
        signal.setitimer(signal.ITIMER_REAL, 30)
        train(lambda: None)  # a timer of the user's own, of before
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("before", [True, False])
def test_gradients_are_switched_back(before, caplog):
    def mine():
        torch.set_grad_enabled(not before)

    with torch.set_grad_enabled(before):
        train(mine)
        assert torch.is_grad_enabled() == before
    assert (
        f"reward function mine has switched gradients {'off' if before else 'on'}: they are switched back"
        in caplog.text
    )


def test_descriptors_that_are_closed_with_their_copies(tmp_path):
    """Daemons close all of them: the run ends in its one line, although it can print it nowhere, and gives up its lock."""
    code = (
        "import os, sys\n"
        "from bupo.utils.errors import UserError\n"
        "from bupo.utils.lock import folder_lock\n"
        "from bupo.training.reward_environment import process_state_restored\n"
        "try:\n"
        "    with folder_lock(sys.argv[1]), process_state_restored(lambda: 'mine'):\n"
        "        os.closerange(0, 4096)\n"
        "except UserError as error:\n"
        "    os._exit(7 if 'closed sys.stdout and sys.stderr' in str(error) else 8)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=120)
    assert ended.returncode == 7
    assert not (tmp_path / "out").exists()


def test_a_signal_that_comes_meanwhile_is_no_fault_of_the_reward():
    with pytest.raises(SignalInterrupt):
        train(raising(SignalInterrupt("stopped by SIGTERM", signal.SIGTERM)))


def test_an_error_keeps_its_type_outside_a_run():
    error = LookupError("x")
    with pytest.raises(LookupError) as raised, wrap_reward_errors([f := raising(error)], ["mine"], 3):
        f()
    assert raised.value is error and error.__notes__ == ["reward function mine failed in rollout batch 3"]


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("no"), KeyboardInterrupt()])
def test_an_asynchronous_reward_does_not_end_the_loop(error):
    """TRL's loop has a thread of its own, which an exit would end while the trainer waits for it."""

    async def mine():
        raise error

    loop = asyncio.new_event_loop()
    with pytest.raises(UserError, match="reward function mine failed: "):
        loop.run_until_complete(wrap_async_reward(mine)())
    assert wrap_async_reward(mine).__name__ == "mine" and asyncio.iscoroutinefunction(wrap_async_reward(mine))
    loop.close()


@pytest.mark.parametrize("where", ["reward", "elsewhere"])
def test_a_killed_worker_of_a_data_loader_is_one_line(where):
    """torch's handler of SIGCHLD raises wherever the main thread stands."""
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. \nmore")
    with pytest.raises(
        UserError, match=r"^rollout batch 2: DataLoader worker \(pid 12\) is killed .* a smaller number or 0$"
    ):
        if where == "reward":
            train(raising(error))
        with wrap_training_errors(lambda: "rollout batch 2"):
            raise error


def test_a_callback_that_exits_is_named():
    def callback():
        sys.exit(0)

    with (
        pytest.raises(
            UserError, match=r"^batch 4: the run exited in test_reward_faults.py, line \d+, in callback: it has"
        ),
        wrap_training_errors(lambda: "batch 4"),
    ):
        callback()


@pytest.mark.parametrize("text", ["\x1b[2J", "a\u2028b", " \n ", "\r\nx"])
def test_the_first_line_of_any_text(text):
    assert "\n" not in summarize_error(ValueError(text))


# -- the process around it -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def state():
    """accelerate's loggers need it; a trainer has it."""
    PartialState()


@pytest.fixture
def warned(caplog):
    logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bupo.training.reward_environment"):
        logger.logger.addHandler(caplog.handler)
        yield lambda: [record.getMessage() for record in caplog.records]
        logger.logger.removeHandler(caplog.handler)


def test_the_working_directory_is_changed_back(tmp_path, monkeypatch, warned):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def moves():
        os.chdir("other")

    train(moves)
    assert os.getcwd() == str(tmp_path)
    assert any("reward function moves has changed the working directory" in line for line in warned())


def test_a_working_directory_that_is_gone_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def deletes():
        os.chdir("..")
        os.rmdir("here")

    with pytest.raises(
        UserError, match=r"rollout batch 2: reward function deletes has left the working directory .+ gone"
    ):
        train(deletes)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_redirected_stream_is_put_back(monkeypatch, warned, name, fails):
    monkeypatch.setattr(sys, name, mine := io.StringIO())

    def redirects():
        setattr(sys, name, io.StringIO())
        if fails:
            raise ValueError("x")

    if fails:
        with pytest.raises(UserError, match="redirects failed in rollout batch 2: ValueError: x"):
            train(redirects)
    else:
        train(redirects)
    assert getattr(sys, name) is mine


@pytest.mark.parametrize(("name", "number"), [("stdout", 1), ("stderr", 2)])
@pytest.mark.parametrize("way", ["close", "os.close"])
def test_a_closed_stream_is_refused_and_open_again(monkeypatch, capfd, name, number, way):
    monkeypatch.setattr(sys, name, stream := os.fdopen(number, "w", closefd=False))

    def closes():
        stream.close() if way == "close" else os.close(number)

    with pytest.raises(
        UserError, match=f"rollout batch 2: reward function closes has closed sys.{name}: leave it open"
    ):
        train(closes)
    print("still here", file=getattr(sys, name), flush=True)
    assert "still here" in getattr(capfd.readouterr(), name[3:])


def test_a_descriptor_that_leads_elsewhere_is_put_back(tmp_path, capfd):
    def leads():
        place = os.open(tmp_path / "elsewhere", os.O_CREAT | os.O_WRONLY)
        os.dup2(place, 1)
        os.close(place)

    train(leads)
    os.write(1, b"here")
    assert capfd.readouterr().out == "here" and (tmp_path / "elsewhere").read_bytes() == b""


def test_no_descriptors_are_left():
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        train(lambda: None)
    assert os.listdir("/proc/self/fd") == before


def test_a_replaced_handler_is_told(warned):
    before = signal.getsignal(signal.SIGUSR1)

    def handles():
        signal.signal(signal.SIGUSR1, lambda number, frame: None)

    try:
        train(handles)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert any("handles has replaced the handler of SIGUSR1" in line for line in warned())


@pytest.mark.parametrize(
    ("then", "status"),
    [
        (lambda: sys.exit(), 0),
        (lambda: sys.exit(7), 7),
        (lambda: sys.exit("x"), 1),
        (lambda: 1 / 0, 1),
        (lambda: None, 0),
    ],
)
def test_a_forked_child_that_leaves_the_reward_ends_there(then, status):
    parent, children = os.getpid(), []

    def forks():
        children.append(os.fork())
        if children[-1] == 0:
            then()

    try:
        train(forks)
    finally:
        if os.getpid() != parent:  # came back
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == status


# -- grading children ------------------------------------------------------------------------------------------------

# a worker whose answer takes a second
SLOW = "import json, sys, time\nprint('{}', flush=True)\nfor line in sys.stdin:\n    time.sleep(1)\n    number = json.loads(line)['number']\n    print(json.dumps({'number': number, 'verdict': 'correct', 'value': None, 'strict': 'correct'}), flush=True)"


@pytest.mark.slow
def test_time_in_which_the_process_was_stopped_is_no_grading_time(tmp_path):
    """Both are stopped for longer than the deadline, as in a container that is frozen; the process goes on first."""
    import subprocess

    (tmp_path / "slow.py").write_text(SLOW)
    code = (
        "import sys; from bupo.rewards import grader as module\n"
        f"module._get_worker_command = lambda: [sys.executable, {str(tmp_path / 'slow.py')!r}]\n"
        "grader = module.MathGrader(deadline=2.5, processes=1)\n"
        "grader.grade(['x'], ['y']); print(next(iter(grader._free.get() for _ in '1')).process.pid, flush=True)\n"
    ).replace("next(iter(grader._free.get() for _ in '1'))", "next(iter(grader._workers))")
    code += "print(*grader.grade(['x'], ['y']), flush=True)\ngrader.close()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        time.sleep(0.3)
        for pid in (child, process.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
        os.kill(child, signal.SIGCONT)
        assert process.stdout.readline() == "correct\n"


def test_a_forked_process_grades_with_children_of_its_own():
    from bupo.rewards.grader import MathGrader

    grader = MathGrader(deadline=30.0, processes=1)
    asked = (["\\boxed{\\frac{1}{2}}", "\\boxed{x}"], ["0.5", "y"])
    expected = grader.grade(*asked)
    (before,) = grader._workers
    child = os.fork()
    if child == 0:
        status = 9
        try:
            status = int(grader.grade(*asked) != expected or before in grader._workers)
            grader.close()
        finally:
            os._exit(status)
    assert grader.grade(*asked) == expected
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert grader.grade(*asked) == expected and grader._workers == {before}
    grader.close()


@pytest.mark.slow
@pytest.mark.parametrize("jumps", [0, 1])
def test_a_clock_that_jumps_takes_a_second_from_a_deadline(monkeypatch, jumps):
    """As it does for a process that was stopped; without a jump the deadline is what it says."""
    import select

    from bupo.rewards import grader as module

    plain, calls = time.monotonic, []

    def clock():
        calls.append(1)
        return plain() + 100.0 * jumps * (len(calls) > 1)

    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb"):
        monkeypatch.setattr(module.time, "monotonic", clock)
        deadline, began = module._Deadline(2.0), plain()
        assert not deadline.wait(pipe, select.POLLIN)
        assert 0.9 < plain() - began < 10 and (jumps or plain() - began > 1.9)
