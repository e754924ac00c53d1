"""`python -m tests.helpers.vllm_run FOLDER OPTIONS`: a short run of BuPOTrainer whose answers vLLM samples, and what was seen of it.

`FOLDER/seen.pt` holds of each rollout batch the weights at its beginning, what vLLM was asked and has answered, what the loss
was given, and what came of the batch's first pass.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from bupo import BuPOConfig, BuPOTrainer
from bupo.data.problems import load_problems
from bupo.models.loading import load_model, load_tokenizer
from tests.helpers.vllm_cpu import trainers_side

SCALE = 16.0  # of the adapter
GIVEN = (
    "completion_mask",
    "advantages",
    "old_per_token_logps",
    "importance_sampling_ratio",
    "sampling_per_token_logps",
)


def reward(completion_ids, **kwargs):
    """Something to learn in each batch: the share of even tokens, and a little for each token."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) + len(ids) / 100 for ids in completion_ids]


def weights(model):
    """The language model policy's, an adapter's product added to them."""
    named = {name.replace("base_model.model.", ""): p.detach() for name, p in model.named_parameters()}
    kept = {name: p.clone() for name, p in named.items() if ".lora_" not in name and ".base_layer" not in name}
    for name, p in named.items():
        place, inside, kind = name.partition(".base_layer")
        if inside:
            down, up = (named[f"{place}.lora_{part}.default.weight"] for part in "AB")
            kept[place + kind] = p + SCALE * up @ down
    return kept


def main(folder, options):
    trainers_side()
    adapter = (
        LoraConfig(r=4, lora_alpha=4 * SCALE, target_modules="all-linear") if options.pop("adapter", False) else None
    )
    args = BuPOConfig(
        str(folder / "run"), internal_steps=2, max_steps=8, per_device_train_batch_size=8, steps_per_generation=2,
        num_generations=4, max_completion_length=12, lr_scheduler_type="constant", loss_type="grpo", use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", use_vllm=True, **{"learning_rate": 3e-4} | options,
    )  # fmt: skip
    trainer = BuPOTrainer(
        load_model("embedded"), reward, args, train_dataset=load_problems("arithmetic", size=64),
        processing_class=load_tokenizer("embedded"), peft_config=adapter,
    )  # fmt: skip
    seen = []
    generate, rollout, loss = (
        trainer.vllm_generation.generate,
        trainer.generate_rollouts,
        trainer.compute_micro_batch_loss,
    )

    def generated(**asked):
        seen.append({"weights": weights(trainer.model)})
        answer = generate(**asked)
        seen[-1] |= {"prompts": asked["prompts"], "answers": [list(ids) for ids in answer[1]]}
        seen[-1] |= {"log_probs": [[token[0] for token in row] for row in answer[2]]}
        return answer

    def rolled(inputs):
        tensors = rollout(inputs)
        seen[-1]["phase"] = trainer.objective.phase
        seen[-1] |= {name: tensors[name].clone() for name in GIVEN}
        return tensors

    def lost(model, inputs):
        value = loss(model, inputs)
        if trainer.micro_steps_done % trainer.micro_steps_per_rollout_batch == 0:
            seen[-1] |= {"loss": value.item(), "of": {name: inputs[name].clone() for name in GIVEN}}
        return value

    trainer.vllm_generation.generate, trainer.generate_rollouts, trainer.compute_micro_batch_loss = (
        generated,
        rolled,
        lost,
    )
    trainer.train()
    torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
