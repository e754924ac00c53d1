"""Signals: raised at once, or noted while a run finishes an update; handlers are given back, and children have their own."""

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
    """As in a process that a terminal has started; afterwards the handlers are those from before."""
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
def test_at_once(number):
    before = handlers()
    with pytest.raises(SignalInterrupt, match=f"stopped by {number.name}") as stopped, raise_on_signal():
        send(number)
    assert stopped.value.signal == number and handlers() == before


def test_one_press_of_ctrl_c_may_come_twice():
    with raise_on_signal():
        with pytest.raises(SignalInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)


def test_signals_are_heard_and_handlers_given_back():
    before, said = handlers(), []
    with raise_on_signal():
        outer = handlers()
        with SignalRecorder(said.append) as heard:
            send(signal.SIGTERM)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            assert heard.first_signal == signal.SIGTERM
        assert handlers() == outer
        with SignalRecorder(said.append) as heard:
            send(signal.SIGINT)
            assert heard.first_signal == signal.SIGINT and len(said) == 1
    assert handlers() == before


def test_ignored_and_foreign_handlers_stay():
    theirs = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: theirs.append(number))
    with raise_on_signal(), SignalRecorder() as heard:
        send(signal.SIGINT)
        send(signal.SIGUSR1)
        assert heard.first_signal == 0 and theirs == [signal.SIGUSR1]


def test_a_handler_that_python_does_not_know_of_stays(tmp_path):
    """`faulthandler.register` is how people see where a rank hangs."""
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        try:
            with raise_on_signal(), SignalRecorder() as heard:
                send(signal.SIGUSR1)
                assert heard.first_signal == 0
            send(signal.SIGUSR1)  # would end the process, if it were given back
        finally:
            faulthandler.unregister(signal.SIGUSR1)
    assert (tmp_path / "stacks").read_text().count("test_a_handler_that_python") == 2


def test_another_thread_than_the_main_one_sets_no_handlers():
    before, seen = handlers(), []

    def work():
        with raise_on_signal(), SignalRecorder() as heard:
            seen.append((handlers(), heard.first_signal))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


# where a handler would run, and where none does: in a C library's lock that is never given back
WAITS = ["time.sleep(60)", "[ctypes.CDLL(None).pthread_mutex_lock(lock) for _ in (1, 2)]"]


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


def test_forked_children_end_by_their_parents_hand():
    """A SIGTERM ends them, and their parent does not take it for its own; a Ctrl-C ends neither."""
    with raise_on_signal(), SignalRecorder() as heard:
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
        assert heard.first_signal == 0


@pytest.mark.parametrize("within", [blocked_signals, nullcontext])
def test_what_is_started_unheard_goes_on(within):
    with within():
        process = subprocess.Popen([sys.executable, "-c", "print('ready', flush=True); input()"], stdin=-1, stdout=-1)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    if within is blocked_signals:
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


def test_a_handler_that_others_set_inside_stays_theirs():
    theirs = []
    with raise_on_signal():
        signal.signal(signal.SIGTERM, lambda number, frame: theirs.append(number))
        with SignalRecorder() as heard:
            send(signal.SIGTERM)
            assert heard.first_signal == 0 and theirs == [signal.SIGTERM]
