"""One of two processes that join a group, train a step under DDP and leave it, over and over: `python -m tests.faults.groups RANK FOLDER TIMES`."""

import sys

import torch
from accelerate import Accelerator  # noqa: F401  as a run has it
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bupo.training.callbacks.stop_on_signal import leave_process_group


def once(rank, file):
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()
    leave_process_group()  # and what the model holds goes with the frame


if __name__ == "__main__":
    rank, folder, times = sys.argv[1:]
    for number in range(int(times)):
        once(int(rank), f"{folder}/{number}")
