"""One rank of the two-process runs of test_ungraded.py: writes one rollout batch of each estimator as it reaches the loss.

Each process has 6 answers and a prompt has 4, so that both processes have answers of the second prompt.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from bupo import BuPOTrainer
from bupo.training.objective.rollout_batch import RolloutBatch
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of

folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
ODD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
found = []
for estimator, changes in json.loads(sys.argv[3]):
    args = config(
        folder / "run", advantage_estimator=estimator, per_device_train_batch_size=3, steps_per_generation=2, internal_steps=1,
        max_completion_length=5, probe_every=0, **changes,
    )  # fmt: skip

    rank = int(os.environ["RANK"])
    own = [ODD.get(value, value) for value in values[6 * rank : 6 * rank + 6]]

    def reward(completions, own=own, **kwargs):
        return own

    trainer = BuPOTrainer(model_of(num_hidden_layers=3), reward, args, PROBLEMS, processing_class=TOKENIZER)
    assert trainer.accelerator.process_index == rank
    trainer.model.train()
    output = trainer.generate_rollouts([PROBLEMS[(6 * rank + n) // 4] for n in range(6)])
    metrics = {name: listed[-1] for name, listed in trainer.train_metrics.items()}
    found.append(
        {
            "advantages": output["advantages"].tolist(),
            "lengths": output["completion_mask"].sum(1).tolist(),
            "mask": RolloutBatch(output).loss_mask.any(1).tolist(),
            "tokens": int(output["num_items_in_batch"]),
            "reward": metrics["reward"],
            "ungraded": metrics["completions/ungraded_ratio"],
            "finite": all(math.isfinite(value) for value in metrics.values()),
        }
    )
(folder / f"rank{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()
