"""What each process of a launch really holds of the embedded model under FSDP2, in bytes: `python -m tests.helpers.plan_run FOLDER OPTIONS`.

Tensors are counted wherever Python or C++ keeps them for Python to find: what the garbage collector knows, each storage once.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from bupo import BuPOTrainer
from bupo.models.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from tests.faults.faulty import with_fsdp2_on_cpus
from tests.helpers.sharded_run import answers
from tests.planning.test_plan import config
from tests.training.test_trainer import PROBLEMS, token_reward


def local(tensors):
    """Bytes of tensors, of sharded ones this process' part."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def alive():
    """Bytes of all tensors that Python knows. Scalars, such as a loss or a count, come and go, and no plan counts them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    tensors += [x.grad for x in tensors if type(x) is torch.nn.Parameter and x.grad is not None]
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(size for size in storages.values() if size > 8)


class Held(TrainerCallback):
    """Of each rollout batch: weights, gradients and optimizer; and how much more there is between its two micro-batches."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = alive()

    def on_substep_end(self, args, state, control, **kwargs):
        self.between = alive()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = local(p.grad for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = [v for each in optimizer.state.values() for v in each.values() if v.dim()]
        parts = {"weights": local(model.parameters()), "optimizer": local(states), "gradients": self.gradients}
        self.found.append(parts | {"kept back": self.between - self.before})


def main(folder, options):
    with_fsdp2_on_cpus()
    held = Held()
    args = config(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=4,
        num_generations=4,
        probe_every=0,
        internal_early_stopping=False,
        optim="adamw_torch",
        report_to="none",
        save_strategy="no",
        **options,
    )
    trainer = BuPOTrainer(
        load_model(EMBEDDED_MODEL),
        token_reward,
        args,
        train_dataset=PROBLEMS,
        processing_class=load_tokenizer(EMBEDDED_MODEL),
        rollout_func=answers,
        callbacks=[held],
    )
    trainer.train()
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(held.found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
