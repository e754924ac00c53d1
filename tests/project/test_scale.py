"""Launches over several processes and machines: the configurations in recipes/accelerate, torchrun, and the Slurm script with a
stand-in for Slurm, each machine being this one.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from bupo.training.callbacks.metrics_file import read_metrics
from tests.training.test_deepspeed import train

ROOT = Path(__file__).parents[2]
LAUNCHES = ROOT / "recipes" / "accelerate"
SLURM = LAUNCHES / "slurm.sh"
LONGER = {"max_steps": 20}  # ten rollout batches: time for a signal
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rows(folder):
    """Return the metrics that both of two launches log, without times."""
    return [
        {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero1", "DEEPSPEED"), ("zero2", "DEEPSPEED")]
)
def test_a_launch_configuration_is_read_and_named_by_its_own_comment(name, kind):
    file = LAUNCHES / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type.value == kind and (config.num_processes, config.mixed_precision) == (8, "bf16")
    assert f"accelerate launch --config_file recipes/accelerate/{file.name}" in file.read_text().splitlines()[0]
    stage = getattr(config, "deepspeed_config", {}).get("zero_stage")
    assert stage == {"zero1": 1, "zero2": 2}.get(name)
    assert sorted(path.name for path in LAUNCHES.iterdir()) == [
        "ddp.yaml", "fsdp2.yaml", "slurm.sh", "zero1.yaml", "zero2.yaml",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def standalone(tmp_path_factory):
    """A run of two processes by torchrun on one machine."""
    folder = tmp_path_factory.mktemp("standalone") / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *train(folder, **LONGER),
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **ENV}, check=True, capture_output=True, timeout=300)
    return rows(folder)


@pytest.mark.slow
def test_torchrun_over_two_machines(tmp_path, standalone):
    """A process on each, which meet at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_id=7",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *meeting,
        "--local_addr=127.0.0.1",
        *train(tmp_path / "out", **LONGER),
    ]
    agents = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENV}) for _ in range(2)]
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    assert rows(tmp_path / "out") == standalone


# -- Slurm ---------------------------------------------------------------------------------------------------------------

SRUN = """#!/bin/bash
# two machines with a process each; a signal goes to the processes
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" &
    echo $! >>"$STAND_IN/pids"
done
status=0
for pid in $(cat "$STAND_IN/pids"); do wait "$pid" || { code=$?; ((code > status)) && status=$code; }; done
rm "$STAND_IN/pids"
exit $status
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf 'localhost\\nother\\n' ;;
    requeue) echo "$2" >>"$STAND_IN/requeued" ;;
esac
"""
BUPO = f"""#!/bin/bash
exec {sys.executable} -m bupo.cli.main "$@"
"""


def stand_ins(folder):
    """Slurm's commands, and the environment in which the batch script finds them."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("bupo", BUPO)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "two", "STAND_IN": str(folder)}
    return {**os.environ, **ENV, **job, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    assert "#SBATCH --signal=TERM@600" in text and "#SBATCH --requeue" in text


@pytest.mark.slow
def test_a_slurm_job_is_stopped_put_back_and_ends_as_one_that_was_not(tmp_path, standalone):
    """On SIGTERM, ten minutes before its time is over, it keeps a checkpoint and is put back into the queue; then it finishes."""
    environment, out = stand_ins(tmp_path / "slurm"), tmp_path / "out"
    command = ["bash", str(SLURM), *train(out, **LONGER)[3:]]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    waiting = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < waiting and job.poll() is None:
        time.sleep(0.05)
    for pid in (tmp_path / "slurm" / "pids").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 143 and "stopped by SIGTERM" in said, said
    requeued = tmp_path / "slurm" / "requeued"
    assert requeued.read_text().split() == [environment["SLURM_JOB_ID"]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(requeued.read_text().split()) == 1  # what has finished is not
    assert rows(out) == standalone
