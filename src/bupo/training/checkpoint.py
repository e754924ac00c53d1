"""bupo's part of a checkpoint: the place inside a rollout batch and the batch itself, which TRL's part does not hold. Without
them a resumed run would count rollout batches, and so the phases, from the start again.

`bupo.pt` is what all processes share: the schedule, the place, the next log's metrics, probes, guard and critic.
`rollouts_N.pt` is process N's rollout batch, where the checkpoint lies inside one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers.trainer import TRAINER_STATE_NAME

from bupo.errors import UserError
from bupo.training.schedule import Schedule
from bupo.training.seam import TRLTrainer

STATE_FILE = "bupo.pt"


class Part(Protocol):
    """What has a state of its own: plain values and tensors."""

    def state(self) -> dict: ...

    def load(self, state: dict, rollout_batch: int) -> None: ...


def pieces_file(folder: Path, process: int) -> Path:
    """Where a process keeps its rollout batch."""
    return folder / f"rollouts_{process}.pt"


def layout(trainer: TRLTrainer) -> dict[str, int]:
    """How a rollout batch is cut up: what its pieces depend on."""
    return {
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "micro_steps": trainer.passes_a_batch,
    }


def save(trainer: TRLTrainer, folder: Path, planned: Schedule, parts: Mapping[str, Part]) -> None:
    """Write a checkpoint's part.

    Args:
        trainer ([`~bupo.training.seam.TRLTrainer`]): its place, its rollout batch and the metrics of its next log.
        folder (`Path`): the checkpoint.
        planned ([`~bupo.training.schedule.Schedule`]): the first phase that the options ask for.
        parts (`dict[str, Part]`): the rest, by name.
    """
    accelerator = trainer.accelerator
    pieces = trainer.pieces if trainer.inside_batch else None
    torch.save({"pieces": pieces}, pieces_file(folder, accelerator.process_index))
    if accelerator.is_main_process:
        place = {"passes": trainer.passes_done, "layout": layout(trainer), "planned": planned.state()}
        metrics = {name: list(values) for name, values in trainer.train_metrics.items()}
        states = {name: part.state() for name, part in parts.items()}
        torch.save({**place, "metrics": metrics, "parts": states}, folder / STATE_FILE)


def load(trainer: TRLTrainer, folder: Path, planned: Schedule, parts: Mapping[str, Part]) -> None:
    """Take up what `save` wrote. Of another trainer's checkpoint, only the place.

    Raises:
        UserError: if the checkpoint was made with another first phase, lacks a part, or its rollout batch was cut up otherwise.
    """
    if not (folder / STATE_FILE).exists():
        if pieces_file(folder, 0).exists():
            raise UserError(f"{folder} was made by bupo 0.1 ({STATE_FILE} is missing): go on with that version")
        done = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]  # another trainer's
        trainer.restore_place(done * trainer.args.gradient_accumulation_steps, None)
        return
    state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    before = Schedule.load(state["planned"])
    if before != planned:
        raise UserError(
            f"{folder} was made with the first phase {before}, the options say {planned}: go on with the same"
        )
    if state["layout"] == layout(trainer):
        own = pieces_file(folder, trainer.accelerator.process_index)
        device = trainer.accelerator.device
        place = (
            "cpu" if device.type == "cpu" else device
        )  # of several processes on CPUs it is cpu:0, which torch cannot read to
        saved = torch.load(own, map_location=place, weights_only=True)
        trainer.restore_place(state["passes"], saved["pieces"])
    else:
        trainer.restore_place(_same_batch(trainer, folder, state), None)
    for name, values in state["metrics"].items():
        trainer.train_metrics[name].extend(values)
    for name, part in parts.items():
        if name not in state["parts"]:
            raise UserError(f"{folder} holds no {name}: it was made without one, by another advantage_estimator")
        part.load(state["parts"][name], trainer.rollout_batch)


def _same_batch(trainer: TRLTrainer, folder: Path, state: dict) -> int:
    """Passes done, for the same rollout batches in other pieces, or on another number of processes."""
    done, inside = divmod(state["passes"], state["layout"]["micro_steps"])
    if inside:
        raise UserError(
            f"{folder} lies inside a rollout batch: go on with the same number of processes and the same batch "
            f"options ({state['layout']}), or from a checkpoint at a rollout batch's end"
        )
    return done * trainer.passes_a_batch
