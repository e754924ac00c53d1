"""Runs on completions that depend on the prompts only, in one process or under the current launcher.

`python -m tests.helpers.deepspeed_run FOLDER RUNS` runs one configuration after another; RUNS is JSON of configurations by
name. Each process writes its final state. Additional options: `checkpoint` (to resume from), `rewards` (means by rollout
batch), `broken` (updates with a NaN loss), `lora` (adapters only) and `model` (a folder).
"""

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from bupo import BuPOTrainer
from bupo.utils.errors import UserError
from tests.helpers.sharded_run import ROWS, answers
from tests.training.test_probes import RewardByBatch
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, snapshot, token_reward


def trainer_of(folder, options):
    """Make a trainer that records its weights at the end of the first phase and at each rollout batch."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    means, broken, lora, named = (options.pop(name, None) for name in ("rewards", "broken", "lora", "model"))
    common = {
        "learning_rate": 3e-4,
        "max_grad_norm": 0.2,
        "max_steps": 8,
        "per_device_train_batch_size": ROWS // processes,
        "steps_per_generation": 2,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
    }
    args = config(folder / "run", **(common | options))
    reward = RewardByBatch(means) if means else token_reward
    peft = LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM") if lora else None
    model = named or model_of()
    data = {"train_dataset": PROBLEMS, "processing_class": TOKENIZER, "rollout_func": answers, "peft_config": peft}
    trainer = BuPOTrainer(model, reward, args, **data)
    sampling: dict[int, dict] = {}

    def rollout(inputs, inner=trainer.generate_rollouts):
        found = inner(inputs)
        sampling[trainer.rollout_batch] = snapshot(trainer.model)
        return found

    def loss(model, inputs, inner=trainer.compute_micro_batch_loss):
        return inner(model, inputs) * (float("nan") if trainer.state.global_step in (broken or ()) else 1)

    trainer.generate_rollouts, trainer.compute_micro_batch_loss = rollout, loss
    return trainer, sampling


def one(folder, options):
    folder.mkdir(exist_ok=True)
    checkpoint = options.pop("checkpoint", None)
    trainer, sampling = trainer_of(folder, options)
    start, refused = snapshot(trainer.model), None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except UserError as error:
        refused = str(error)
    rank = trainer.accelerator.process_index
    moments = sum(
        value.numel() for state in _torchs(trainer.optimizer).state.values() for value in state.values() if value.dim()
    )
    own = {
        "kind": str(trainer.accelerator.distributed_type),
        "log": trainer.state.log_history,
        "stages": trainer.phase_controller.schedule.state(),
        "moments": moments / 2 / sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "refused": refused,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(own))
    heads = {
        f"critic {name}": linear.weight.detach() for name, linear in getattr(trainer.critic, "linears", {}).items()
    }
    if hasattr(trainer.critic, "critic"):
        second = trainer.accelerator.unwrap_model(trainer.critic.value_model)
        heads |= {f"critic {name}": parameter for name, parameter in snapshot(second).items()}
    torch.save(
        {"start": start, "end": snapshot(trainer.model) | heads, "sampling": sampling}, folder / f"rank{rank}.pt"
    )
    trainer.save_model_atomically(folder / "saved")


def _torchs(optimizer):
    """Return torch's optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


if __name__ == "__main__":
    for name, options in json.loads(sys.argv[2]).items():
        one(Path(sys.argv[1]) / name, options)
