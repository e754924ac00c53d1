"""Runs in one process, under DDP, or under FSDP2 on CPUs with `BUPO_FSDP2=1` and accelerate's environment.

`python -m tests.helpers.sharded_run FOLDER CASE... [CHECKPOINT]` runs one case after another, each in a separate folder.
Each process writes its logs and shards, and the main process the full state of policy and critic. `BUPO_START` holds
`model_of()`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from bupo import BuPOTrainer
from bupo.training.callbacks.stop_on_signal import leave_process_group
from bupo.training.objective.critic import CopiedCritic
from tests.faults.faulty import with_fsdp2_on_cpus
from tests.training.test_probes import FALLING, RewardByBatch, built
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, token_reward

ROWS = 8  # rows of a micro-batch, over all processes
PPO = {"advantage_estimator": "ppo", "critic_learning_rate": 1e-3, "num_iterations": 2}
# options of a run; `model`, `reward`, `peft` and `sampled` (by the model) are options of this script
CASES: dict[str, dict] = {
    "grpo": {},
    "rloo": {"advantage_estimator": "rloo"},
    "reinforce++": {"advantage_estimator": "reinforce++", "beta": 0.1},
    "ppo-copy": {**PPO, "critic_backbone": "copy", "gradient_checkpointing": True, "save_steps": 1},
    "ppo-shared": {**PPO, "critic_backbone": "shared"},
    "tied": {"model": lambda: model_of(tie_word_embeddings=True), "loss_type": "grpo"},
    "frozen": {"frozen_up_to_layer": 1, "internal_layer": 3},
    "slow": {"layer_lr_multipliers": {2: 0.5}, "max_grad_norm": 0.1},
    "policy": {"internal_objective": "frozen_upper", "max_grad_norm": 0.1},
    "permuted": {"internal_objective": "shuffled_vocab"},
    "handover": {"internal_fade_batches": 3, "internal_loss_weight": 0.1, "beta": 0.1, "gradient_checkpointing": True},
    "rates": {"layer_lr_multipliers": [0.5, 1.0, 0.0, 2.0], "max_grad_norm": 0.1},
    "module": {"internal_module": "ffn", "internal_lens": "final_norm", "gradient_checkpointing": True},
    "attn": {"internal_module": "attn"},
    "reference": {
        "beta": 0.1,
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.5,
        "save_steps": 3,
    },
    "guard": {
        "internal_steps": 20,
        "max_steps": 24,
        "reward": lambda: RewardByBatch(FALLING),
        "internal_early_stopping": True,
        "save_steps": 8,
    },
    "auto": {"internal_layer": "auto", "model": lambda: built([1e-3, 1e-3, 40.0, 40.0])},
    "evaluated": {"eval_benchmarks": ["arithmetic"], "eval_every": 2, "eval_k": 3, "eval_problems": 5},
    "lora": {"peft": LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=True)},
    "half": {"model": lambda: model_of().bfloat16(), "learning_rate": 1e-6, "weight_decay": 0.0},
    "half lora": {
        "model": lambda: model_of().bfloat16(),
        "peft": LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", init_lora_weights=False),
        "learning_rate": 1e-6,
    },
    "half ppo": {"model": lambda: model_of().bfloat16(), **PPO, "critic_learning_rate": 1e-6},
    "above": {"peft": LoraConfig(target_modules=["q_proj"], layers_to_transform=[3], r=4, task_type="CAUSAL_LM")},
    "sampled": {"sampled": True, "eval_benchmarks": ["arithmetic"], "eval_every": 2, "eval_k": 2, "eval_problems": 3},
}


def answers(prompts, trainer):
    """Return completions as a `rollout_func`: the n-th completion of a prompt is the same in every launch."""
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
    """Copy a model's weights, gathered on the main process."""
    weights: dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name.removeprefix("module."): value.clone() for name, value in weights.items()}


def held(tensors):
    """Return the share of the tensors' numbers on this process."""
    tensors = list(tensors)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(t.numel() for t in local) / sum(t.numel() for t in tensors)


def trainer_of(folder, case, done=0):
    options = dict(CASES[case])
    # the reference is loaded from the folder of the policy
    start = os.environ["BUPO_START"]
    made = (
        (lambda: AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)) if options.get("beta") else model_of
    )
    model = options.pop("model", made)()
    reward = options.pop("reward", lambda: token_reward)()
    if isinstance(reward, RewardByBatch):
        reward.calls = done  # rollout batches, of one update each
    peft, sampled = options.pop("peft", None), options.pop("sampled", False)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    usual = {
        "learning_rate": 1e-3,
        "max_grad_norm": 0.2,
        "max_steps": 8,
        "per_device_train_batch_size": ROWS // processes,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,  # an update is a full rollout batch, whose rows TRL shuffles
        "steps_per_generation": 2,
        "save_strategy": "steps" if "save_steps" in options else "no",
        "probe_every": 1,
        "internal_early_stopping": False,
        "optim": "adamw_torch",
    }
    args = config(folder / "run", **{**usual, **options})
    return BuPOTrainer(
        model,
        reward,
        args,
        train_dataset=PROBLEMS,
        processing_class=TOKENIZER,
        peft_config=peft,
        rollout_func=None if sampled else answers,
    )


def run(folder, case, checkpoint=None):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = trainer_of(folder, case, int(str(checkpoint or 0).rpartition("-")[2]))
    second = trainer.critic if isinstance(trainer.critic, CopiedCritic) else None
    trainer.train(resume_from_checkpoint=checkpoint)
    own = {
        "kind": str(trainer.accelerator.distributed_type),
        "rows": trainer.state.log_history,
        "held": held(trainer.model_wrapped.parameters()),
        "schedule": trainer.phase_controller.schedule.state(),
    }
    state: dict[str, Any] = {"policy": whole(trainer.model_wrapped)}
    if second:
        moments = [value for state in second.optimizer.state.values() for value in state.values() if value.dim()]
        own["critic"] = [held(second.value_model.parameters()), held(moments)]
        state["critic"] = whole(second.value_model)
    elif trainer.critic:
        state["critic"] = {name: linear.weight.detach() for name, linear in trainer.critic.value_heads.items()}
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(own))
    if trainer.accelerator.is_main_process:
        torch.save(state, folder / "end.pt")
    trainer.save_model_atomically(folder / "model")


if __name__ == "__main__":
    if os.environ.get("BUPO_FSDP2"):
        with_fsdp2_on_cpus()
    base, *named = sys.argv[1:]
    checkpoint = named.pop() if "checkpoint-" in named[-1] else None
    for case in named:
        run(Path(base) / case, case, checkpoint)
    leave_process_group()
