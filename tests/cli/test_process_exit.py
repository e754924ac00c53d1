"""The end of a process: what blocks it is named, and its exit status is kept."""

import subprocess
import sys
import time

import pytest

HEAD = """
import atexit, ctypes, gc, multiprocessing, os, signal, sys, threading, time, types
from bupo.cli import process_exit
process_exit.GRACE_SECONDS, process_exit.MEASURED_SECONDS, process_exit.FORCED_EXIT_SECONDS = 1.5, 0.5, 2.0

def forever():
    while True:
        time.sleep(1)

def spin():
    while True:
        pass
"""


def run_to_end(code, status=0):
    """Run code, then `exit_process`; return the process and the seconds that `exit_process` took."""
    script = f"{HEAD}\n{code}\nprint(time.time(), flush=True)\nprint('last word', end='')\nprocess_exit.exit_process({status})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    began, last = done.stdout.split("\n")
    assert last == "last word"
    return done, time.time() - float(began)


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_a_process_ends_at_once_with_its_status(status):
    done, seconds = run_to_end("atexit.register(lambda: print('handler', file=sys.stderr))", status)
    assert done.returncode == status and done.stderr == "handler\n" and seconds < 1.5


def test_exit_handlers_run_after_threads_and_in_their_order():
    code = (
        "say = lambda word: print(word, file=sys.stderr)\n"
        "atexit.register(say, 'first'); atexit.register(say, 'second'); atexit.register(lambda: 1 / 0)\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), say('thread'))).start()"
    )
    lines = run_to_end(code)[0].stderr.splitlines()
    assert lines[0] == "thread" and lines[-2:] == ["second", "first"] and "ZeroDivisionError" in " ".join(lines)


WAITS = {  # code that keeps a process alive, and its description in the warning
    "a thread": (
        "threading.Thread(target=forever, name='uploader').start()",
        ["thread 'uploader': forever (<string>:"],
    ),
    "a busy thread": ("threading.Thread(target=spin).start()", ["(spin)': spin (<string>:", "of CPU"]),
    "a child": (
        "multiprocessing.get_context('fork').Process(target=forever).start()",
        ["the exit handler _exit_function: poll", "child process "],
    ),
    "an exit handler": ("atexit.register(forever)", ["the exit handler forever: forever (<string>:"]),
    "an exit handler in C": ("atexit.register(mutex)", ["the exit handler mutex: mutex"]),
    "a second exit handler": (
        "atexit.register(forever); atexit.register(print, 'ran', file=sys.stderr)",
        ["ran", "the exit handler forever"],
    ),
}
BLOCKED = """
def mutex():
    lock = ctypes.create_string_buffer(64)
    for _ in (1, 2):
        ctypes.{kind}(None).pthread_mutex_lock(lock)
"""


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 2])
@pytest.mark.parametrize("kind", WAITS)
def test_what_never_ends_is_named_and_left(kind, status):
    code, names = WAITS[kind]
    done, seconds = run_to_end(BLOCKED.format(kind="CDLL") + code, status)
    assert done.returncode == status and seconds < 20
    assert (
        f"bupo: warning: the work is done, but the process has not ended in 2 s; it exits now with status {status}"
        in (done.stderr)
    )
    assert all(name in done.stderr for name in names), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_where_no_python_runs_any_more_the_stacks_are_shown():
    """A C library waits while it holds the interpreter's lock: only a C thread can end the process."""
    done, seconds = run_to_end(BLOCKED.format(kind="PyDLL") + "atexit.register(mutex)")
    assert done.returncode == 1 and seconds < 20
    assert "Timeout" in done.stderr and "in mutex" in done.stderr


def test_objects_are_not_destroyed():
    """Destructors of libraries may wait forever."""
    code = "class Slow:\n    def __del__(self): forever()\nslow = Slow(); slow.me = slow"
    done, seconds = run_to_end(code)
    assert (done.returncode, done.stderr) == (0, "") and seconds < 1.5


@pytest.mark.parametrize("then", ["", "atexit.register(forever)"])
def test_files_that_were_left_open_are_written(tmp_path, then):
    paths = [tmp_path / name for name in ("text", "bytes", "both", "cycle")]
    code = (
        f"text, both = open({str(paths[0])!r}, 'w'), open({str(paths[2])!r}, 'w+b'); text.write('abc'); both.write(b'abc')\n"
        f"raw = open({str(paths[1])!r}, 'wb'); raw.write(b'abc')\n"
        f"class Log: pass\nlog = Log(); log.me, log.file = log, open({str(paths[3])!r}, 'w'); log.file.write('abc'); del log\n"
        f"{then}"
    )
    assert run_to_end(code)[0].returncode == 0
    assert [path.read_bytes() for path in paths] == [b"abc"] * 4


def test_a_tracker_is_waited_for():
    """The upload of a tracker is part of the work and may take longer than the grace period."""
    code = (
        "def finish(exit_code): time.sleep(2.5); print('uploaded', exit_code, file=sys.stderr)\n"
        "sys.modules['wandb'] = types.SimpleNamespace(run=object(), finish=finish)"
    )
    done, _ = run_to_end(code, 2)
    assert done.returncode == 2 and done.stderr == "uploaded 2\n"


@pytest.mark.slow
def test_a_reader_that_is_slow_is_waited_for():
    """The last output is written before the clock starts, for example into a pager."""
    code = f"{HEAD}\nsys.stdout.write('x' * 1_000_000)\nprocess_exit.exit_process(0)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    assert len(process.stdout.read()) == 1_000_000 and process.wait(30) == 0
    process.stdout.close()


def test_ctrl_c_ends_the_wait():
    code = (
        f"{HEAD}\nsignal.signal(2, signal.default_int_handler)\nprocess_exit.GRACE_SECONDS = 50\n"
        "threading.Thread(target=forever).start()\nprint(flush=True)\nprocess_exit.exit_process(0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(2)
    assert process.wait(10) == 0 and process.communicate()[1] == ""


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        ("SystemExit()", 0, ""),
        ("SystemExit(3)", 3, ""),
        ("SystemExit('no')", 1, "no\n"),
        ("KeyError('x')", 1, "KeyError: 'x'\n"),
    ],
)
def test_what_leaves_a_command_ends_the_process_as_python_would(raised, status, words):
    code = f"import sys; from bupo.cli import main\ndef run(argv): raise {raised}\nmain._run_command_line = run\nmain.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stderr.endswith(words) and bool(done.stderr) == bool(words)
