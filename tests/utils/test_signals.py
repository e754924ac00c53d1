"""Signals: raised at once, or recorded while a run finishes an update; handlers are restored, also in forked children."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from bupo.utils.errors import SignalInterrupt
from bupo.utils.signals import STOP_SIGNALS, SignalRecorder, blocked_signals, raise_on_signal


@pytest.fixture(autouse=True)
def plain():
    """Set the handlers of a process started by a terminal, and restore the previous ones afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)


def handlers():
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_raised_at_once(number):
    before = handlers()
    with pytest.raises(SignalInterrupt, match=f"stopped by {number.name}") as stopped, raise_on_signal():
        send(number)
    assert stopped.value.signal == number and handlers() == before


def test_one_press_of_ctrl_c_may_come_twice():
    with raise_on_signal():
        with pytest.raises(SignalInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)


def test_signals_are_recorded_and_handlers_restored():
    before, lines = handlers(), []
    with raise_on_signal():
        outer = handlers()
        with SignalRecorder(lines.append) as recorder:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            assert recorder.first_signal == signal.SIGTERM
        assert handlers() == outer
        with SignalRecorder(lines.append) as recorder:
            send(signal.SIGINT)
            assert recorder.first_signal == signal.SIGINT and len(lines) == 1
    assert handlers() == before


def test_ignored_and_foreign_handlers_stay():
    received = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    with raise_on_signal(), SignalRecorder() as recorder:
        send(signal.SIGINT)
        send(signal.SIGUSR1)
        assert recorder.first_signal == 0 and received == [signal.SIGUSR1]


def test_a_handler_that_python_does_not_know_of_stays(tmp_path):
    """`faulthandler.register` is used to find where a rank hangs."""
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            with raise_on_signal(), SignalRecorder() as recorder:
                send(signal.SIGUSR1)
                assert recorder.first_signal == 0
            send(signal.SIGUSR1)  # would end the process if the default handler were restored
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert (tmp_path / "stacks").read_text().count("test_a_handler_that_python") == 2


def test_another_thread_than_the_main_one_sets_no_handlers():
    before, results = handlers(), []

    def work():
        with raise_on_signal(), SignalRecorder() as recorder:
            results.append((handlers(), recorder.first_signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [(before, 0)]


# a place where a Python handler runs, and one where none does: a deadlock in a C library
WAITS = ["time.sleep(60)", "[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in (1, 2)]"]


@pytest.mark.slow
@pytest.mark.parametrize("main_thread", WAITS)
def test_the_second_ctrl_c_needs_no_main_thread(main_thread):
    code = (
        "import ctypes, signal, time\n"
        "lock = ctypes.create_string_buffer(64)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from bupo.utils.signals import SignalRecorder\n"
        f"with SignalRecorder(print):\n    print('ready', flush=True)\n    {main_thread}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT


def test_forked_children_end_by_a_signal_to_them():
    """SIGTERM ends a child, and its parent does not record the signal; Ctrl-C does not end the child."""
    with raise_on_signal(), SignalRecorder() as recorder:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGINT)
        time.sleep(0.1)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.05)
        assert recorder.first_signal == 0


@pytest.mark.parametrize("context", [blocked_signals, nullcontext])
def test_a_process_started_with_blocked_signals_continues(context):
    with context():
        process = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    if context is blocked_signals:
        time.sleep(0.2)
        assert process.poll() is None
    else:
        assert process.wait(timeout=10) == -signal.SIGTERM
    process.kill()
    process.communicate()


def test_with_nothing_left_to_finish_sigterm_ends():
    code = "from bupo.utils.signals import SignalRecorder\nimport time\nwith SignalRecorder(is_finished=lambda: True):\n    print('ready', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_handler_set_inside_the_block_stays():
    received = []
    with raise_on_signal():
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        with SignalRecorder() as recorder:
            send(signal.SIGTERM)
            assert recorder.first_signal == 0 and received == [signal.SIGTERM]
