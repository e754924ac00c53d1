"""`bupo` with a fault of `BUPO_FAULT`, in the second rollout batch of process 1; with `BUPO_FSDP2=1` truly under FSDP2 on CPUs.

`python -m tests.faults.faulty train …`, also under torchrun and accelerate launch.
"""

import os
import signal
import sys
import time

import accelerate.state
import torch

import bupo.training.run
from bupo.cli.main import main
from bupo.cli.process_exit import exit_process
from bupo.training.trainer import BuPOTrainer

calls = 0


def reward(prompts, completions, **columns):
    """Depends on the answers only."""
    global calls
    calls += 1
    if os.environ.get("BUPO_FAULT") == "reward" and int(os.environ["RANK"]) == 1 and calls == 2:
        raise ValueError("no reward today")
    return [float(len(str(completion)) % 3) for completion in completions]


def fault(kind, batch):
    if kind == "slow":
        time.sleep(4 if batch == 2 else 0)
    elif kind == "alone" and os.environ["RANK"] == "0" and batch == 2:
        time.sleep(60)
    elif int(os.environ.get("RANK", "0")) == 1 and batch == 2:
        if kind in ("raise", "alone"):
            raise LookupError("a fault of ours")
        if kind == "memory":
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        if kind == "exit":
            sys.exit(3)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def with_faults():
    plain = BuPOTrainer.generate_rollouts

    def rollout(self, inputs):
        if os.environ.get("BUPO_FSDP2"):
            assert self.is_fsdp_enabled and any("DTensor" in type(p).__name__ for p in self.model.parameters())
        fault(os.environ.get("BUPO_FAULT"), self.rollout_batch)
        return plain(self, inputs)

    BuPOTrainer.generate_rollouts = rollout
    if os.environ.get("BUPO_FAULT") == "loading":
        bupo.training.run.load_model = lambda *args, **kwargs: (print("loading", flush=True), time.sleep(60))


def with_fsdp2_on_cpus():
    """accelerate makes of FSDP on CPUs DDP, though torch shards, reduces and gathers over gloo."""
    state = accelerate.state
    plain = state.AcceleratorState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, kwargs["fsdp_plugin"]
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP

    state.AcceleratorState.__init__ = init


def run(arguments):
    with_faults()
    if os.environ.get("BUPO_FSDP2"):
        with_fsdp2_on_cpus()
    return main(arguments)


if __name__ == "__main__":
    exit_process(run(sys.argv[1:]))
