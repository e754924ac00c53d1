"""Isolation of grading workers: no imports from the user's folders, no secrets, no files, and no worker outlives its parent."""

import os
import subprocess
import sys
import time

import pytest

from bupo import MathGrader, UserError
from bupo.rewards import grader as grader_module
from bupo.rewards import grader_worker

MODULES = ("sympy", "random", "json", "math_verify", "mpmath", "antlr4", "sitecustomize", "usercustomize", "bupo", "re")
HALF = (["\\boxed{\\frac{1}{2}}"], ["0.5"])
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")


@pytest.fixture
def trap(tmp_path):
    """A folder whose modules write to a file when they are imported."""
    folder = tmp_path / "trap"
    for name in MODULES:
        line = f"open({str(tmp_path / 'touched')!r}, 'a').write({name!r})\n"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(line)
        (folder / f"{name}.py").write_text(line)
    return folder


@pytest.fixture
def single():
    grader = MathGrader(deadline=60.0, processes=1)
    yield grader
    grader.close()


def child_of(grader):
    child = grader._free.get()
    grader._free.put(child)
    return child.process.pid


def test_no_module_of_the_working_folder_is_imported(trap, tmp_path, monkeypatch, single):
    """Not even if the import path of the user's process contains it."""
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", f":.:{trap}")
    for place in (str(trap), ".", ""):
        monkeypatch.setattr(sys, "path", [place, *sys.path])
    assert single.grade(*HALF) == ["correct"]
    assert not (tmp_path / "touched").exists()


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, single):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert single.grade(*HALF) == ["correct"]


def test_libraries_that_are_on_an_absolute_path_only_are_found(tmp_path, monkeypatch, single):
    """For example on a cluster that installs packages with `pip install --target` and adds the folder to `PYTHONPATH`."""
    places = dict.fromkeys(grader_module._get_worker_command()[3:])
    assert places and all(os.path.isabs(place) for place in places)
    bare = tmp_path / "bare.py"  # an interpreter without site packages, which needs the folders of its arguments
    bare.write_text(
        f"import sys\nassert not any('site-packages' in p for p in sys.path)\nimport runpy\n"
        f"runpy.run_path({grader_worker.__file__!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [sys.executable, "-I", "-S", str(bare), *places])
    assert single.grade(*HALF) == ["correct"]


@linux
def test_a_child_has_no_secret_no_files_and_little_time(monkeypatch, single):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    single.deadline = 7.0
    assert single.grade(*HALF) == ["correct"]
    here = f"/proc/{child_of(single)}"
    with open(f"{here}/environ") as file:
        names = {entry.partition("=")[0] for entry in file.read().split("\0") if entry}
    assert names <= {"OMP_NUM_THREADS", "LD_LIBRARY_PATH"}
    assert os.readlink(f"{here}/cwd") == "/"
    assert os.getsid(child_of(single)) == child_of(single)  # Ctrl-C in the terminal does not reach it
    with open(f"{here}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
    assert limits["Max file size"] == limits["Max core file size"] == limits["Max processes"] == ["0", "0"]
    assert limits["Max address space"] == [str(grader_worker.MAX_MEMORY_BYTES)] * 2
    with open(f"{here}/stat") as file:
        spent = sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    assert spent + 5 < int(limits["Max cpu time"][0]) <= spent + 11


@pytest.mark.parametrize(
    ("program", "timeout", "message"),
    [
        ("import sys; sys.exit(3)", 60, "it ended with status 3"),
        ("print('no reply', flush=True); import time; time.sleep(60)", 1, "no reply within 1 s"),
        ("print('[1]', flush=True); import time; time.sleep(60)", 1, "no reply within 1 s"),
    ],
)
def test_a_child_that_dies_at_its_start_is_one_line(tmp_path, monkeypatch, single, program, timeout, message):
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(grader_module, "_STARTUP_TIMEOUT", timeout)
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [sys.executable, str(tmp_path / "child.py")])
    with pytest.raises(UserError, match=f"the grading process cannot start: {message}"):
        single.grade(*HALF)
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"cannot start: .*No such file"):
        single.grade(*HALF)
    monkeypatch.undo()
    assert single.grade(*HALF) == ["correct"]


def test_without_math_verify_the_line_says_so(monkeypatch, single):
    monkeypatch.setattr(
        grader_module, "_get_worker_command", lambda: [sys.executable, "-I", "-S", grader_worker.__file__]
    )
    with pytest.raises(UserError, match="cannot start: ModuleNotFoundError: No module named 'math_verify'"):
        single.grade(*HALF)


LATE = """
import json, sys, time
print("{}", flush=True)
for line in sys.stdin:
    REPLY
"""


@pytest.mark.parametrize(
    "reply",
    [
        "time.sleep(1.2); print(json.dumps({'number': 1, 'verdict': 'correct', 'value': '1', 'strict': 'correct'}), flush=True)",
        "print('correct', flush=True)",
        "print('{}', flush=True); print('{}', flush=True)",
        "print('', flush=True)",
        r"sys.stdout.buffer.write(b'\xff\n'); sys.stdout.flush()",
        "print('{\"verdict\": \"corr', end='', flush=True)",
        "print(json.dumps({'number': 2, 'verdict': 'correct', 'value': '1', 'strict': 'correct'}), flush=True)",
        "print(json.dumps({'number': 1, 'verdict': 'right', 'value': '1', 'strict': 'correct'}), flush=True)",
        "sys.exit()",
    ],
    ids=["late", "no JSON", "no content", "empty", "no text", "half a line", "another's", "no verdict", "dead"],
)
def test_a_reply_that_is_late_or_none_is_a_time_out(tmp_path, monkeypatch, reply):
    """It must not be used for the next answer."""
    (tmp_path / "child.py").write_text(LATE.replace("REPLY", reply))
    grader = MathGrader(deadline=1.0, processes=1)
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [sys.executable, str(tmp_path / "child.py")])
    assert grader.grade(*HALF) == ["timeout"]
    if "sleep" in reply:
        monkeypatch.undo()
        grader.deadline = 60.0
        assert grader.grade(["\\boxed{\\frac{1}{3}}"], ["0.5"]) == ["wrong"]
    grader.close()


PARENT = """
import os, sys, threading
from bupo import MathGrader
grader = MathGrader(deadline=3.0, processes=1)
grader.grade(["\\\\boxed{x}"], ["x"])
child = grader._free.get(); grader._free.put(child)
print(child.process.pid, flush=True)
if sys.argv[1] == "busy":
    grader.grade([sys.stdin.read()], ["1"])
sys.stdin.read()
"""


def _has_ended(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"  # a zombie that no process waits for


@linux
@pytest.mark.faults
@pytest.mark.parametrize("busy", ["idle", "busy"])
def test_children_end_with_a_parent_that_is_killed(busy):
    """Idle workers read the end of their input. The limit of CPU time ends a worker that hangs in an answer."""
    hang = "\\boxed{" + "(" * 100_000 + "1" + ")" * 100_000 + "}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    if busy == "busy":
        parent.stdin.write(hang)
        parent.stdin.close()
        time.sleep(1)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while not _has_ended(pid):
        assert time.monotonic() < end, "the worker outlives its parent"
        time.sleep(0.1)
