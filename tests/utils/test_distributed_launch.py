"""Rank of a process: from a process group or a complete launch, never from a variable left over by an earlier launch."""

import json
import os
import subprocess
import sys

import pytest

from bupo.cli.main import main
from bupo.utils import distributed_launch
from bupo.utils.errors import UserError
from bupo.utils.lock import LOCK_FILE, folder_lock

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI = ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
WHERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

LEFTOVERS = [
    {"RANK": "1"},
    {"WORLD_SIZE": "2"},
    {"LOCAL_RANK": "0"},
    {"RANK": "1", "WORLD_SIZE": "2"},
    {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
    {"RANK": "1", **WHERE},
    {"RANK": "2", "WORLD_SIZE": "2", **WHERE},
    {"RANK": "-1", "WORLD_SIZE": "2", **WHERE},
    {"RANK": "one", "WORLD_SIZE": "2", **WHERE},
    {"RANK": "", "WORLD_SIZE": "2", **WHERE},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "one", **WHERE},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", **WHERE},
    {"RANK": "0", "WORLD_SIZE": "2", **WHERE, "MASTER_PORT": "http"},
    {"RANK": "0", "WORLD_SIZE": "2", **WHERE, "MASTER_PORT": "99999"},
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Return a function that sets variables, in an environment without those of any launch."""
    for name in (*NAMES, *MPI):
        monkeypatch.delenv(name, raising=False)

    def put(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("left", LEFTOVERS, ids=str)
def test_leftovers_make_no_launch(environment, left):
    environment(left)
    assert (
        distributed_launch.get_process_info() == (0, 1)
        and distributed_launch.get_rank() == 0
        and not distributed_launch.is_distributed()
    )
    line = distributed_launch.drop_leftover_variables()
    assert all(f"{name}={value}" in line for name, value in left.items() if name not in WHERE)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
    assert distributed_launch.drop_leftover_variables() is None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_complete_launch_is_not_removed(environment, rank):
    environment(values := {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": "0", **WHERE})
    assert distributed_launch.get_process_info() == (rank, 3) and distributed_launch.is_distributed()
    assert distributed_launch.drop_leftover_variables() is None and values.items() <= os.environ.items()


def test_a_launch_of_mpi_is_not_removed(environment):
    environment({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "LOCAL_RANK": "1"})
    assert distributed_launch.drop_leftover_variables() is None and os.environ["LOCAL_RANK"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("left", [{}, {"RANK": "1"}, {"RANK": "5", "WORLD_SIZE": "9", **WHERE}])
def test_a_process_group_has_priority(tmp_path, left):
    """The group may be created without the environment's variables."""
    code = (
        "import sys, torch.distributed as d; from bupo.utils import distributed_launch as launch\n"
        "d.init_process_group('gloo', init_method=f'file://{sys.argv[1]}/meet', rank=0, world_size=1)\n"
        "print(*launch.get_process_info()); print(launch.drop_leftover_variables()); d.destroy_process_group(); print(*launch.get_process_info())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | left
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    inside, dropped, outside = done.stdout.splitlines()
    assert inside == "0 1" and dropped == "None", done.stderr
    assert outside == ("5 9" if len(left) > 1 else "0 1")


@pytest.mark.parametrize("left", LEFTOVERS[:4], ids=str)
def test_a_leftover_locks_as_a_single_process(environment, tmp_path, left):
    environment(left)
    with folder_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("left", LEFTOVERS, ids=str)
def test_a_command_warns_once_and_is_a_single_process(environment, tmp_path, left, capsys):
    """The folder of another run is refused: a leftover rank does not skip the lock."""
    environment(left)
    hold = "import sys, time; from bupo.utils.lock import folder_lock\nwith folder_lock(sys.argv[1]): print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "run"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert main(["eval", "--model", "embedded", "--size", "2", "--k", "1", "--output", str(tmp_path / "run")]) == 2
        holder.kill()
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("bupo: warning: ") and "this is a single process" in warning
    assert f"is being written by process {holder.pid}" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("command", ["analyze", "demo", "eval", "report", "reproduce"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_of_one_process_is_refused_in_a_launch(environment, tmp_path, command, rank, capsys, monkeypatch):
    environment({"RANK": rank, "WORLD_SIZE": "2", **WHERE})
    monkeypatch.setattr(distributed_launch, "is_first_to_fail", lambda lost_peer: True)  # there is no other process
    monkeypatch.chdir(tmp_path)
    assert main([command]) == 2
    assert f"bupo: error: bupo {command} is one process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_refusal_of_a_launch_is_the_same_from_python(environment, tmp_path):
    from bupo.evaluation.options import EvalOptions

    environment({"RANK": "1", "WORLD_SIZE": "2", **WHERE})
    with pytest.raises(UserError, match="one process"):
        EvalOptions(benchmarks=["arithmetic"], output=str(tmp_path)).check()
