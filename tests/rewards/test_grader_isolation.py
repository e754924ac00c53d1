"""Grading children: they import nothing of the user's folders, know nothing of the user's secrets, write nothing, and end."""

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
    """A folder whose modules leave a file behind when they are imported."""
    folder = tmp_path / "trap"
    for name in MODULES:
        line = f"open({str(tmp_path / 'touched')!r}, 'a').write({name!r})\n"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(line)
        (folder / f"{name}.py").write_text(line)
    return folder


@pytest.fixture
def alone():
    grader = MathGrader(deadline=60.0, processes=1)
    yield grader
    grader.close()


def child_of(grader):
    child = grader._free.get()
    grader._free.put(child)
    return child.process.pid


def test_no_module_of_the_working_folder_is_imported(trap, tmp_path, monkeypatch, alone):
    """Not even where the user's process itself looks for modules there."""
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", f":.:{trap}")
    for place in (str(trap), ".", ""):
        monkeypatch.setattr(sys, "path", [place, *sys.path])
    assert alone.grade(*HALF) == ["correct"]
    assert not (tmp_path / "touched").exists()


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, alone):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert alone.grade(*HALF) == ["correct"]


def test_libraries_that_are_on_an_absolute_path_only_are_found(tmp_path, monkeypatch, alone):
    """As where a cluster installs packages by `pip install --target` and names the folder in `PYTHONPATH`."""
    places = dict.fromkeys(grader_module._get_worker_command()[3:])
    assert places and all(os.path.isabs(place) for place in places)
    bare = tmp_path / "bare.py"  # an interpreter without site packages: only what it is told of is there
    bare.write_text(
        f"import sys\nassert not any('site-packages' in p for p in sys.path)\nimport runpy\n"
        f"runpy.run_path({grader_worker.__file__!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [sys.executable, "-I", "-S", str(bare), *places])
    assert alone.grade(*HALF) == ["correct"]


@linux
def test_a_child_has_no_secret_no_files_and_little_time(monkeypatch, alone):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    alone.deadline = 7.0
    assert alone.grade(*HALF) == ["correct"]
    here = f"/proc/{child_of(alone)}"
    with open(f"{here}/environ") as file:
        names = {entry.partition("=")[0] for entry in file.read().split("\0") if entry}
    assert names <= {"OMP_NUM_THREADS", "LD_LIBRARY_PATH"}
    assert os.readlink(f"{here}/cwd") == "/"
    assert os.getsid(child_of(alone)) == child_of(alone)  # Ctrl-C in the terminal does not reach it
    with open(f"{here}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[:2] for line in file}
    assert limits["Max file size"] == limits["Max core file size"] == limits["Max processes"] == ["0", "0"]
    assert limits["Max address space"] == [str(grader_worker.MAX_MEMORY_BYTES)] * 2
    with open(f"{here}/stat") as file:
        spent = sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    assert spent + 5 < int(limits["Max cpu time"][0]) <= spent + 11


@pytest.mark.parametrize(
    ("program", "longest", "said"),
    [
        ("import sys; sys.exit(3)", 60, "it ended with status 3"),
        ("print('no reply', flush=True); import time; time.sleep(60)", 1, "no reply within 1 s"),
        ("print('[1]', flush=True); import time; time.sleep(60)", 1, "no reply within 1 s"),
    ],
)
def test_a_child_that_dies_at_its_start_is_one_line(tmp_path, monkeypatch, alone, program, longest, said):
    (tmp_path / "child.py").write_text(program)
    monkeypatch.setattr(grader_module, "_STARTUP_TIMEOUT", longest)
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [sys.executable, str(tmp_path / "child.py")])
    with pytest.raises(UserError, match=f"the grading process cannot start: {said}"):
        alone.grade(*HALF)
    monkeypatch.setattr(grader_module, "_get_worker_command", lambda: [str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"cannot start: .*No such file"):
        alone.grade(*HALF)
    monkeypatch.undo()
    assert alone.grade(*HALF) == ["correct"]


def test_without_math_verify_the_line_says_so(monkeypatch, alone):
    monkeypatch.setattr(
        grader_module, "_get_worker_command", lambda: [sys.executable, "-I", "-S", grader_worker.__file__]
    )
    with pytest.raises(UserError, match="cannot start: ModuleNotFoundError: No module named 'math_verify'"):
        alone.grade(*HALF)


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
    ids=["late", "no JSON", "nothing said", "empty", "no text", "half a line", "another's", "no verdict", "dead"],
)
def test_a_reply_that_is_late_or_none_is_a_time_out(tmp_path, monkeypatch, reply):
    """And is not taken for the next answer's."""
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


def _gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"  # of nobody who waits for it


@linux
@pytest.mark.faults
@pytest.mark.parametrize("busy", ["idle", "busy"])
def test_children_end_with_a_parent_that_is_killed(busy):
    """Idle ones read the end of their input; one that is lost in an answer is ended by the kernel's limit of CPU seconds."""
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
    while not _gone(pid):
        assert time.monotonic() < end, "the child outlives its parent"
        time.sleep(0.1)
