"""One rank of the two-process run of test_distributed.py: train through both phases, and write the final state of this rank."""

import json
import sys
from pathlib import Path

import torch

from bupo.evaluation.answers import sample_completions, tokenize_prompts
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.training.callbacks.benchmark_evaluation import BenchmarkCallback
from tests.training.test_trainer import config, model_of, snapshot, trainer_of

folder = Path(sys.argv[1])
checkpointing, (estimator, _, backbone) = sys.argv[2] == "checkpointing", sys.argv[3].partition("-")
model = model_of()
start = snapshot(model)
args = config(
    folder / "run",
    gradient_checkpointing=checkpointing,
    max_steps=16,
    learning_rate=1e-3,
    per_device_train_batch_size=2,
    logging_steps=None,
    advantage_estimator=estimator,
    critic_backbone=backbone or "copy",
    probe_every=1,
    eval_benchmarks=["arithmetic"],
    eval_every=2,
    eval_k=3,
    eval_problems=5,
)
trainer = trainer_of(model, args)
after_first = {}


def on_batch(batch=trainer.generate_rollouts):
    def generate(inputs):
        if trainer.rollout_batch == 3 and not after_first:
            after_first.update(snapshot(model))
        return batch(inputs)

    return generate


trainer.generate_rollouts = on_batch()
trainer.train()
rank = trainer.accelerator.process_index
problems = load_benchmarks(["arithmetic"], 5, seed=args.seed)["arithmetic"]
engine = TransformersEngine(model, trainer.processing_class, args.max_completion_length, batch_size=4)
prompts = tokenize_prompts(problems, trainer.processing_class)
alone = sample_completions(engine, prompts, 3, args.seed)
(callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, BenchmarkCallback)]
shared = sample_completions(callback._split_across_processes(engine), prompts, 3, args.seed)
evaluations = [row for row in trainer.state.log_history if "eval_rollout_batches" in row]
result = {
    "world": trainer.accelerator.num_processes,
    "kind": str(trainer.accelerator.distributed_type),
    "phases": [row["phase"] for row in trainer.state.log_history if "phase" in row],
    "evaluated": [row["eval_rollout_batches"] for row in evaluations],
    "shared_as_alone": shared == alone and len({answer.text for answers in alone for answer in answers}) > 5,
    "moved_in_phase_1": [n for n in start if not torch.equal(start[n], after_first[n])],
    "parameters": {n: p.double().sum().item() for n, p in model.named_parameters()},
    "moved": [n for n, p in model.named_parameters() if not torch.equal(start[n], p)],
}
(folder / f"rank{rank}.json").write_text(json.dumps(result))
critic = {}
if backbone == "copy":
    critic = trainer.accelerator.unwrap_model(trainer.critic.value_model).state_dict()
elif backbone == "shared":
    critic = {name: linear.weight.detach() for name, linear in trainer.critic.value_heads.items()}
torch.save(model.state_dict() | {f"critic.{name}": value for name, value in critic.items()}, folder / f"rank{rank}.pt")
