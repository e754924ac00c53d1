"""Standard output that is closed, full or ASCII, a working folder that no longer exists, and a missing home."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from bupo.cli.main import main
from bupo.cli.stdout_guard import guard_standard_streams
from bupo.utils.progress import add_progress_task, create_progress


@pytest.fixture
def printing_to(monkeypatch):
    """Replace standard output by a stream of a file descriptor."""
    opened = []

    def put(descriptor, encoding="utf-8"):
        opened.append(io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding=encoding, write_through=True))
        monkeypatch.setattr(sys, "stdout", opened[-1])
        guard_standard_streams()

    yield put
    for stream in opened:
        stream.close()


def test_a_reader_that_leaves_does_not_end_the_work(printing_to, capfd):
    reader, writer = os.pipe()
    printing_to(writer)
    os.close(reader)
    for _ in range(3):
        print("x" * 100_000, flush=True)  # raises BrokenPipeError on a plain stream
    assert capfd.readouterr().err == ""


def test_a_full_disk_under_standard_output_is_told_once(printing_to, capfd):
    printing_to(os.open("/dev/full", os.O_WRONLY))
    for _ in range(3):
        print("x" * 100_000, flush=True)
    told = capfd.readouterr().err
    assert (
        told
        == "bupo: warning: standard output cannot be written (No space left on device): further output is discarded\n"
    )


def test_a_terminal_of_ascii_gets_question_marks(printing_to, tmp_path):
    path = tmp_path / "out"
    printing_to(os.open(path, os.O_WRONLY | os.O_CREAT), "ascii")
    print("▶ 5 é", flush=True)
    assert path.read_bytes() == b"? 5 ?\n"


def test_a_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["sample", "--prompt", "1+1"]) == 2
    assert capsys.readouterr().err == "bupo: error: the working folder no longer exists: change to one that exists\n"
    assert main(["--help"]) == 0


def bupo(shell, cwd, **environment):
    """Run a shell command in which $bupo is the program."""
    command = {"bupo": f"{sys.executable} -m bupo.cli.main", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=600,
        env={**os.environ, **command, **environment},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.faults
def test_processes_whose_surroundings_are_wanting(tmp_path):
    """The same in separate processes up to their exit: Python's flush at exit, and a free file descriptor 1."""
    run = "analyze --size 2 --max_new_tokens 4 --output"
    assert bupo("$bupo --help | head -1", tmp_path).stdout.startswith("usage:")
    assert bupo(f"$bupo {run} pipe | true", tmp_path).returncode == 0
    assert bupo(f"$bupo {run} closed >&-", tmp_path).returncode == 0
    full = bupo(f"$bupo {run} full >/dev/full", tmp_path)
    assert full.returncode == 0 and "standard output cannot be written" in full.stderr
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    assert bupo(f"$bupo {run} ascii", tmp_path, **ascii_only).returncode == 0
    (tmp_path / "p.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    homeless = {"HOME": "/proc/nobody", "XDG_CACHE_HOME": "/proc/nobody", "HF_HOME": "/proc/nobody"}
    assert bupo(f"$bupo {run} homeless --dataset p.jsonl", tmp_path, **homeless).returncode == 0
    for name in ("pipe", "closed", "full", "ascii", "homeless"):  # the work is complete
        assert json.loads((tmp_path / name / "summary.json").read_text())
        assert (tmp_path / name / "report.html").is_file()
    gone = bupo(f"mkdir gone; cd gone; rmdir ../gone; $bupo {run} /tmp/never", tmp_path)
    assert gone.returncode == 2
    assert gone.stderr.splitlines()[-1] == "bupo: error: the working folder no longer exists: change to one that exists"


@pytest.mark.parametrize(("terminal", "term"), [(False, "xterm"), (True, "dumb"), (True, "xterm")])
def test_where_no_bar_is_drawn_lines_tell_the_time_left(monkeypatch, terminal, term):
    monkeypatch.setenv("TERM", term)
    clock, stream = [100.0], io.StringIO()
    monkeypatch.setattr("bupo.utils.progress.time.monotonic", lambda: clock[0])
    with create_progress(Console(file=stream, force_terminal=terminal, width=100)) as bar:
        bar.get_time = lambda: clock[0]
        done = add_progress_task(bar, "answers [of] x", 200)
        for _ in range(20):
            done(5)
            clock[0] += 10
        clock[0] += 10
        bar.update(bar.task_ids[0], completed=150)
    said = stream.getvalue()
    lines = [line for line in said.splitlines() if line.startswith("answers [of] x:")]
    if terminal and term == "xterm":
        assert not lines and "━" in said and "answers [of] x" in said and "150/200" in said
        return
    assert lines[0] == "answers [of] x: 20 of 200, 0:00:30 taken, 0:06:00 left"
    assert len(lines) == 7 and "\r" not in said and lines[-1].startswith("answers [of] x: 150 of 200, 0:03:30")


@pytest.mark.slow
def test_no_carriage_return_reaches_a_log_file(tmp_path):
    """Neither bupo's bars nor those of libraries that load weights and data write one."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")
    command = [
        sys.executable,
        "-m",
        "bupo.cli.main",
        "analyze",
        "--dataset",
        str(problems),
        "--max_new_tokens",
        "4",
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "run")], capture_output=True, timeout=300)
    assert done.returncode == 0 and b"\r" not in done.stdout + done.stderr, done.stderr
