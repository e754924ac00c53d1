"""A run over a stream of problems, which kills itself after an update: `python -m tests.faults.streaming FOLDER KIND UPDATE`.

It resumes from the newest checkpoint of the folder. At the end it writes its weights, its logs and the prompts since its start.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from bupo import BuPOConfig, BuPOTrainer
from tests.faults.harness import timeless
from tests.helpers.resumed_runs import OPTIONS, Seen, streams
from tests.training.test_trainer import TOKENIZER, model_of


class Kill(TrainerCallback):
    def __init__(self, update: int):
        self.update = update

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kind: str, update: int) -> None:
    seen = Seen()
    args = BuPOConfig(str(folder), **{**OPTIONS, "max_steps": 13, "save_steps": 3})
    trainer = BuPOTrainer(
        model_of(),
        seen.reward,
        args,
        train_dataset=streams()[kind](),
        processing_class=TOKENIZER,
        callbacks=[Kill(update)],
    )
    trainer.train(resume_from_checkpoint=True)
    rows = [timeless(row) for row in trainer.state.log_history]
    (folder / "seen.json").write_text(json.dumps({"rows": rows, "prompts": seen.prompts}))
    torch.save({name: value.detach() for name, value in trainer.model.named_parameters()}, folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
