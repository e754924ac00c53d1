"""A run that is stopped after a checkpoint and resumed by a new trainer, beside one that is not stopped."""

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback

from bupo import BuPOConfig, BuPOTrainer
from tests.faults.harness import timeless, unequal
from tests.training.test_trainer import TOKENIZER, model_of

# three rollout batches of two updates are an epoch; phase 1 ends in its second rollout batch
OPTIONS: dict[str, Any] = {
    **{"internal_layer": 2, "internal_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2},
    **{"num_generations": 4, "max_completion_length": 4, "max_steps": 14, "learning_rate": 1e-2, "probe_every": 0},
    **{"save_strategy": "steps", "save_steps": 1, "report_to": "none", "logging_steps": 1, "seed": 3},
    **{"per_device_eval_batch_size": 4, "dataloader_pin_memory": False},
}
PROMPTS = [f"{n}+{n}=" for n in range(2, 8)]
ROWS = Dataset.from_dict({"prompt": PROMPTS, "level": list(range(6))})


class Cut(Exception):
    """The end of a run as a kill leaves it: right after a checkpoint."""


class CutAfter(TrainerCallback):
    def __init__(self, update: int, saves: int = 1):
        self.update, self.saves = update, saves

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            self.saves -= 1
            if self.saves == 0:
                raise Cut


@dataclass
class Seen:
    """Results of a run: prompts of each reward call with the update, rows of logs, weights, random numbers."""

    prompts: list[tuple[int, str]] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    random: tuple = ()

    def reward(self, prompts, completion_ids, trainer_state, **kwargs):
        """Note the prompts; some answers are better than others."""
        self.prompts += [(trainer_state.global_step, prompt) for prompt in prompts]
        return [sum(token % 7 for token in ids) / (6.0 * max(1, len(ids))) for ids in completion_ids]


def train(
    folder: Path, checkpoint: Path | None = None, cut: CutAfter | None = None, problems: Any = None, **changes: Any
) -> Seen:
    """Train a tiny model in a folder, from a checkpoint if one is given, until it ends or is cut."""
    seen = Seen()
    evaluation = {"eval_dataset": ROWS.select([1, 4])} if changes.get("eval_strategy", "no") != "no" else {}
    trainer = BuPOTrainer(
        model_of(),
        seen.reward,
        BuPOConfig(str(folder), **{**OPTIONS, **copy.deepcopy(changes)}),
        train_dataset=ROWS if problems is None else problems,
        processing_class=TOKENIZER,
        callbacks=[cut] if cut else None,
        **evaluation,
    )
    for state in (random.seed, np.random.seed, torch.manual_seed):  # a new process begins anywhere
        state(99 if checkpoint else 0)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Cut:
        return seen
    seen.rows = [timeless(row) for row in trainer.state.log_history]
    seen.weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    seen.random = (random.random(), np.random.rand(), torch.rand(1).item())
    return seen


def differences(whole: Seen, resumed: Seen, update: int) -> list[str]:
    """Return the differences of a run that was resumed after an update from one that was not stopped."""
    found = []
    after = [row for row in whole.prompts if row[0] > update]
    last = whole.prompts[len(whole.prompts) - len(resumed.prompts) :]
    if resumed.prompts != last or len(resumed.prompts) < len(after):
        found.append(f"prompts: {resumed.prompts} and {last}")
    found += [f"log: {what}"] if (what := unequal(whole.rows, resumed.rows)) else []
    found += [
        f"weights of {name}" for name in whole.weights if not torch.equal(whole.weights[name], resumed.weights[name])
    ]
    trained = bool(resumed.prompts)  # else nothing is drawn, and the state is not loaded
    found += ["random numbers"] if trained and whole.random != resumed.random else []
    return found


def streams() -> dict[str, Any]:
    """Return functions that make streams of problems, by their kind."""

    def rows(numbers):
        for number in numbers:
            yield {"prompt": f"{number}+{number}=", "level": number}

    def sharded(shards):
        for shard in shards:
            yield from rows(range(10 * shard, 10 * shard + 3))

    def generated(count=7):
        return IterableDataset.from_generator(rows, gen_kwargs={"numbers": tuple(range(count))})

    return {
        "generator": generated,
        "of a data set": ROWS.to_iterable_dataset,
        "shards of a data set": lambda: ROWS.to_iterable_dataset(num_shards=3),
        "shuffled in a buffer": lambda: generated(9).shuffle(seed=5, buffer_size=4),
        "mapped and filtered": lambda: (
            generated(12).map(lambda row: {"prompt": "1+" + row["prompt"]}).filter(lambda row: row["level"] % 3 != 1)
        ),
        "interleaved": lambda: interleaved(generated),
        "sharded": lambda: IterableDataset.from_generator(sharded, gen_kwargs={"shards": [0, 1, 2]}),
        "sharded and shuffled": lambda: IterableDataset.from_generator(
            sharded, gen_kwargs={"shards": [0, 1, 2]}
        ).shuffle(seed=1, buffer_size=2),
        "taken": lambda: generated(20).skip(2).take(5),
        "one batch a pass": lambda: generated(3),
    }


def interleaved(generated):
    from datasets import interleave_datasets

    return interleave_datasets(
        [generated(4), generated(6)], probabilities=[0.3, 0.7], seed=2, stopping_strategy="all_exhausted"
    )
