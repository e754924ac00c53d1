"""A run with a critic of its own on answers that only prompts decide, under whatever this launch is: `python -m tests.sharded_run
FOLDER UPDATES [CHECKPOINT]`. The main process writes what policy and critic end with, whole; each process what it holds of them.

`BUPO_FSDP2=1` and accelerate's environment make it FSDP2 on CPUs.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from bupo import BuPOTrainer
from bupo.training.critic import CopiedCritic
from tests.faults.faulty import with_fsdp2_on_cpus
from tests.test_trainer import PROBLEMS, TOKENIZER, config, model_of, token_reward

ROWS = 8  # of a micro-batch, over all processes


def answers(prompts, trainer):
    """A `rollout_func`: the n-th answer to a prompt of a rollout batch is the same in every launch."""
    met: dict[str, int] = {}
    found: dict = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
    for prompt in prompts:
        ids = TOKENIZER(prompt)["input_ids"]
        met[prompt] = met.get(prompt, 0) + 1
        generator = torch.Generator().manual_seed(sum(ids) * 100 + met[prompt])
        answer = torch.randint(3, 262, (2 + met[prompt],), generator=generator).tolist()
        found["prompt_ids"].append(ids)
        found["completion_ids"].append([*answer, TOKENIZER.eos_token_id])
    return found


def whole(model):
    """A copy of a model's weights, gathered on the main process."""
    weights: dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in weights.items()}


def held(tensors):
    """The share of some tensors' numbers that this process holds."""
    tensors = list(tensors)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(t.numel() for t in local) / sum(t.numel() for t in tensors)


def main(folder, updates, checkpoint=None):
    if os.environ.get("BUPO_FSDP2"):
        with_fsdp2_on_cpus()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = config(
        folder / "run",
        advantage_estimator="ppo",
        critic_backbone="copy",
        critic_learning_rate=1e-3,
        learning_rate=1e-3,
        max_grad_norm=0.2,
        max_steps=updates,
        per_device_train_batch_size=ROWS // processes,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        num_iterations=2,
        gradient_checkpointing=True,
        save_strategy="steps",
        save_steps=3,
        probe_every=1,
        internal_guard=False,
        optim="adamw_torch",
    )
    trainer = BuPOTrainer(
        model_of(), token_reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER, rollout_func=answers
    )
    second = trainer.critic
    assert isinstance(second, CopiedCritic)
    if processes == 1:
        torch.save({"policy": whole(trainer.model), "critic": whole(second.critic)}, folder / "start.pt")
    trainer.train(resume_from_checkpoint=checkpoint)
    moments = [value for state in second.optimizer.state.values() for value in state.values() if value.dim()]
    own = {
        "kind": str(trainer.accelerator.distributed_type),
        "held": [held(trainer.model_wrapped.parameters()), held(second.critic.parameters())],
        "held_by_optimizer": held(moments),
        "phases": [row["phase"] for row in trainer.state.log_history if "phase" in row],
    }
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(own))
    state = {"policy": whole(trainer.model_wrapped), "critic": whole(second.critic)}
    if trainer.accelerator.is_main_process:
        torch.save(state, folder / "end.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
