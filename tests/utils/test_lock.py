"""One writing run per output folder, tested with real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bupo.cli.main import main
from bupo.utils.errors import UserError
from bupo.utils.lock import LOCK_FILE, folder_lock

HOLD = "import sys, time; from bupo.utils.lock import folder_lock\nwith folder_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Start another process that writes into `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_and_told_who(tmp_path, holder):
    message = rf"run is being written by process {holder.pid} on .+ since 20.+: wait"
    with pytest.raises(UserError, match=message), folder_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK_FILE).exists()  # of the holder


@pytest.mark.parametrize("command", ["train", "demo", "analyze", "eval"])
def test_every_command_that_writes_is_refused(tmp_path, holder, command, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--model", "embedded", "--dataset", "arithmetic", "--size", "8"] if command in ("train", "analyze") else []
    more += ["--internal_layer", "5"] if command == "train" else []
    assert main([command, "--output", "run", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run is being written by process {holder.pid}" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


def test_what_a_killed_run_leaves_locks_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with folder_lock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_one_thread_may_enter_twice_and_another_may_not(tmp_path):
    refused = []

    def other():
        try:
            with folder_lock(tmp_path):
                pass
        except UserError as error:
            refused.append(str(error))

    with folder_lock(tmp_path):
        with folder_lock(f"{tmp_path}/../{tmp_path.name}"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / LOCK_FILE).exists()
    assert len(refused) == 1 and "another thread" in refused[0]
    other()
    assert len(refused) == 1


def test_folders_that_stay_empty_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    for where in ("a/b/c", "mine"):
        with pytest.raises(KeyError), folder_lock(tmp_path / where):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with folder_lock(tmp_path / "a/b/c"):
        (tmp_path / "a" / "kept").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["kept"]


def test_only_the_main_process_takes_the_lock(tmp_path, holder, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with folder_lock(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_reading_the_lock_file_keeps_the_lock(tmp_path):
    """Copying or uploading the folder opens and closes the lock file in the same process."""
    with folder_lock(tmp_path / "run"):
        (tmp_path / "run" / LOCK_FILE).read_bytes()
        other = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path / "run"], capture_output=True, text=True, timeout=60
        )
        assert "is being written by process" in other.stderr and not other.stdout


def test_a_full_disk_is_one_line(tmp_path):
    code = "import sys, signal, resource; from bupo.utils.lock import folder_lock\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nwith folder_lock(sys.argv[1]): pass"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, timeout=60)
    assert "UserError" in done.stderr and "cannot be written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_where_nothing_can_be_written(tmp_path, where):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .+; choose another output"), folder_lock(tmp_path / where):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_many_runs_in_turn(tmp_path):
    """Never two holders at once, while the lock file is removed and created again: each increments a counter in a file."""
    count = "import sys; from bupo.utils.errors import UserError; from bupo.utils.lock import folder_lock; from pathlib import Path\nfile, n = Path(sys.argv[1]) / 'n', 0\nwhile n < 60:\n    try:\n        with folder_lock(sys.argv[1]):\n            file.write_text(str(int(file.read_text()) + 1)); n += 1\n    except UserError: pass"
    (tmp_path / "n").write_text("0")
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(subprocess.run, [sys.executable, "-c", count, tmp_path], timeout=60) for _ in range(3)]
        assert [run.result().returncode for run in runs] == [0, 0, 0]
    assert (tmp_path / "n").read_text() == "180"
    assert os.listdir(tmp_path) == ["n"]


# ways in which a reward function may start a process that outlives its parent
CHILDREN = {
    "fork": "pid = os.fork()\n    if pid == 0:\n        time.sleep(60); os._exit(0)",
    "fork in a fork": "pid = os.fork()\n    if pid == 0:\n        os.fork(); time.sleep(60); os._exit(0)",
    "multiprocessing": "p = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,)); p.start(); pid = p.pid",
    "spawn": "p = multiprocessing.get_context('spawn').Process(target=time.sleep, args=(60,)); p.start(); pid = p.pid",
    "pool": "pool = ProcessPoolExecutor(1, multiprocessing.get_context('fork')); pid = pool.submit(os.getpid).result(); pool.submit(time.sleep, 60)",
    "popen": "pid = subprocess.Popen(['sleep', '60']).pid",
    "inherits all": "pid = subprocess.Popen(['sleep', '60'], close_fds=False).pid",
}


@pytest.mark.parametrize("kind", CHILDREN)
def test_a_child_that_outlives_its_run_keeps_no_lock(tmp_path, kind):
    code = (
        "import multiprocessing, os, subprocess, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from bupo.utils.lock import folder_lock\n"
        "if __name__ == '__main__':\n"
        "  with folder_lock(sys.argv[1]):\n"
        f"    {CHILDREN[kind]}\n    print(pid, flush=True); time.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(code)
    run = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    child = int(run.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"written by process {run.pid}"), folder_lock(tmp_path / "run"):
            pass  # the parent holds the lock while it lives
        run.kill()
        run.wait()
        os.kill(child, 0)  # the child is alive
        end = time.monotonic() + 20
        while True:  # a child forked just before may not have closed its copy yet
            try:
                with folder_lock(tmp_path / "run"):
                    break
            except UserError:
                assert time.monotonic() < end, "the child keeps the lock"
                time.sleep(0.1)
    finally:
        run.kill()
        os.kill(child, signal.SIGKILL)
        run.stdout.close()


def test_a_forked_child_that_leaves_the_block_keeps_the_parents_lock(tmp_path):
    """A child that calls `sys.exit` inside the run leaves the block too."""
    with folder_lock(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            try:
                with folder_lock(tmp_path / "other"):
                    pass
                with pytest.raises(UserError, match="being written by process"), folder_lock(tmp_path / "run"):
                    pass
                raise KeyError
            except BaseException as error:
                os._exit(3 if isinstance(error, KeyError) else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert (tmp_path / "run" / LOCK_FILE).exists()
        other = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path / "run"], capture_output=True, text=True, timeout=60
        )
        assert "is being written by process" in other.stderr


def test_a_child_that_unwinds_through_the_run_removes_nothing(tmp_path):
    code = (
        "import os, sys, time; from bupo.utils.lock import folder_lock\n"
        "with folder_lock(sys.argv[1]):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: sys.exit(5)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5\n"
        "    print(os.listdir(sys.argv[1]), flush=True); time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == f"['{LOCK_FILE}']\n"
        with pytest.raises(UserError, match="is being written"), folder_lock(tmp_path / "run"):
            pass
    finally:
        run.kill()
        run.communicate()
