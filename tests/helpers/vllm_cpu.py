"""What vLLM's build for CPUs lacks for training: `python -m tests.helpers.vllm_cpu train …` is `bupo train …` with it.

A server gets it by `--worker-extension-cls tests.helpers.vllm_cpu.Worker`. Three things stand for what a GPU has, and nothing else:

- matrices are multiplied by torch, from the weights themselves. The CPU build multiplies copies in an order of its own, which
  it makes once, and drops the weights: there would be nothing left to load new ones into;
- an engine beside the trainer samples in float32, where TRL leaves it to vLLM, which takes bfloat16 for a float32 model;
  `VLLM_DTYPE` says otherwise;
- weights reach a server by its rendezvous' TCP store, where a GPU has NCCL.
"""

import os
import sys
from functools import partial
from typing import Any

import torch
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, nccl_engine
from vllm.model_executor.layers import utils


class Worker:
    """Nothing: that a worker imports it is what counts."""


class Store:
    """In the place of vLLM's NCCL communicator."""

    def __init__(self, host: str, port: int, rank: int, world_size: int, device: Any):
        self.group = StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size)

    def destroy(self):
        self.group = None


def send(iterator, group, src, post_iter_func, **sizes):
    for item in iterator:
        group.group.broadcast(post_iter_func(item).detach().clone(), src)


def receive(iterator, group, src, post_unpack_func, **sizes):
    for name, (shape, dtype) in iterator:
        weight = group.group.broadcast(None, src)
        assert (list(weight.shape), weight.dtype) == (list(shape), dtype), name  # as it was announced
        post_unpack_func([(name, weight)])


def multiply(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


utils.dispatch_cpu_unquantized_gemm = multiply
nccl_common.stateless_init_process_group = Store
nccl_engine.packed_nccl_broadcast_consumer = receive
torch.accelerator.current_device_index = lambda: 0


def trainers_side():
    """What TRL asks vLLM for."""
    from trl.generation import vllm_client, vllm_generation

    vllm_client.packed_nccl_broadcast_producer = send
    connect = vllm_client.VLLMClient.init_communicator
    vllm_client.VLLMClient.init_communicator = lambda self, device: connect(
        self, "cuda"
    )  # it asks for no more than the word
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype=os.environ.get("VLLM_DTYPE", "float32"))


if __name__ == "__main__":
    from bupo.cli.main import main

    trainers_side()
    sys.exit(main(sys.argv[1:]))
