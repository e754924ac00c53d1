"""bupo's part of a checkpoint: the place inside a rollout batch and the batch itself, which TRL's part does not hold. Without
them a resumed run would count rollout batches, and so the phases, from the start again.

`bupo.pt` is what all processes share: the schedule, the place, the next log's metrics, probes, guard and critic.
`rollouts_N.pt` is process N's: its loss since the last log, and its rollout batch, where the checkpoint lies inside one.
`options.json` is what decides the run, and `manifest.json`, written last, tells whether all is there.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from bupo.analysis.checkpoint_series import STATE_FILE
from bupo.run_files.reading import BROKEN, Damaged, check, read_state
from bupo.training.checkpoints.integrity import check_shared, decided, updates_of
from bupo.training.checkpoints.resume import compare, same_phase, write_options
from bupo.training.checkpoints.weights import misfit
from bupo.training.checkpoints.writer import to_resume
from bupo.training.distributed.fsdp2 import load_whole_weights, whole_weights
from bupo.training.objective.phases import Schedule
from bupo.training.trl_internals import TRLTrainer
from bupo.utils.errors import UserError, first_line


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


def chosen(trainer: TRLTrainer, wanted: str | bool | None) -> str | None:
    """The checkpoint that a run goes on from, if it goes on from one; `True` is its newest whole one, if it has one.

    Raises:
        UserError: if it is damaged, is not the same on all processes, or was made with options that decide the run and differ.
    """
    say, trainer.resumed_at = trainer.accelerator.print, 0
    found = decided(lambda: to_resume(Path(trainer.args.output_dir), wanted, say))
    check_shared(found)
    if found is None:
        return None
    check_same_run(trainer, found, say)
    return str(found)


def check_same_run(trainer: TRLTrainer, found: Path, say: Callable[[str], None]) -> None:
    """Hold a run against the checkpoint that it goes on from.

    Raises:
        UserError: if it was made under another kind of launch, with options that decide the run and differ, or of another
            model.
    """
    _check_kind(trainer, found)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not sharded and (wrong := misfit(trainer.model, found)):
        raise UserError(
            f"resume_from_checkpoint: {found} cannot be gone on with: {wrong}; go on from another checkpoint"
        )
    compare(trainer, found, say)
    if (found / STATE_FILE).exists():  # refused before a former end of the run is deleted
        state = _state(found, mmap=True)
        same_phase(state["planned"], trainer.args.first_phase, found)
        _same_place(found, state)
    elif pieces_file(found, 0).exists():
        raise _earlier(found)


def _same_place(found: Path, state: dict) -> None:
    """Refuse a checkpoint whose trainer's state is of another one.

    An update takes 1 to `gradient_accumulation_steps` passes.
    """
    updates, passes = updates_of(found), state["passes"]
    if not updates <= passes <= updates * state["layout"]["gradient_accumulation_steps"]:
        raise UserError(
            f"resume_from_checkpoint: {found} cannot be gone on with: its trainer_state.json is of {updates} updates, and its "
            f"{STATE_FILE} of {passes} passes: the two belong to different checkpoints"
        )


def _check_kind(trainer: TRLTrainer, found: Path) -> None:
    """Refuse a checkpoint whose weights and optimizer are kept otherwise than this run would read them."""
    ours = (
        "under FSDP" if trainer.is_fsdp_enabled else "under DeepSpeed" if trainer.is_deepspeed_enabled else "unsharded"
    )
    optimizers = {"under FSDP": "optimizer.bin", "under DeepSpeed": "global_step*", "unsharded": "optimizer.pt"}
    its = next((kind for kind, name in optimizers.items() if any(found.glob(name))), ours)
    if its != ours:
        raise UserError(
            f"{found} is of a run {its}, and this one is {ours}: go on as it was, or start a new run from the model that the "
            "checkpoint holds"
        )
    if ours != "under DeepSpeed" or not (found / STATE_FILE).exists():
        return
    before = _state(found, mmap=True)["layout"]["processes"]
    if before != trainer.accelerator.num_processes:
        raise UserError(
            f"{found} is of {before} processes, and this run has {trainer.accelerator.num_processes}: DeepSpeed goes on on as "
            "many; FSDP2 on any number"
        )


def save(trainer: TRLTrainer, folder: Path, planned: Schedule, parts: Mapping[str, Part]) -> None:
    """Write a checkpoint's part.

    Args:
        trainer ([`~bupo.training.trl_internals.TRLTrainer`]): its place, its rollout batch and the metrics of its next log.
        folder (`Path`): the checkpoint.
        planned ([`~bupo.training.objective.phases.Schedule`]): the first phase that the options ask for.
        parts (`dict[str, Part]`): the rest, by name.
    """
    accelerator = trainer.accelerator
    own = {"pieces": trainer.pieces if trainer.inside_batch else None, "numbers": trainer.numbers}
    torch.save(own, pieces_file(folder, accelerator.process_index))
    states = {name: part.state() for name, part in parts.items()}  # on all: a sharded one is gathered
    reference = _moving_reference(trainer)
    moved = {} if reference is None else {"reference": whole_weights(reference)}
    if trainer.args.should_save:
        write_options(trainer, folder)
        place = {"passes": trainer.passes_done, "layout": layout(trainer), "planned": planned.state()}
        metrics = {name: list(values) for name, values in trainer.train_metrics.items()}
        logged = {"metrics": metrics, "numbers": trainer.numbers, "completions": trainer.completions}
        torch.save({**place, **logged, **moved, "parts": states}, folder / STATE_FILE)


def load(trainer: TRLTrainer, folder: Path, planned: Schedule, parts: Mapping[str, Part]) -> None:
    """Take up what `save` wrote. Of another trainer's checkpoint, only the place.

    Raises:
        UserError: if the checkpoint was made with another first phase, lacks a part or is damaged, or its rollout batch was cut
            up otherwise.
    """
    try:
        _load(trainer, folder, planned, parts)
    except UserError:
        raise
    except (*BROKEN, RuntimeError) as error:  # values of other types or shapes, deep in the states of the parts
        raise Damaged(folder / STATE_FILE, first_line(error), "go on from another checkpoint") from error


def _load(trainer: TRLTrainer, folder: Path, planned: Schedule, parts: Mapping[str, Part]) -> None:
    if not (folder / STATE_FILE).exists():
        if pieces_file(folder, 0).exists():
            raise _earlier(folder)
        done = updates_of(folder)  # another trainer's
        trainer.restore_place(done * trainer.args.gradient_accumulation_steps, None)
        return
    # a sharded critic lies in it whole: no process needs more of it in its memory than its share
    mapped = trainer.is_fsdp_enabled
    state = _state(folder, mmap=mapped)
    same_phase(state["planned"], planned, folder)
    if state["layout"] == layout(trainer):
        saved = _own(trainer, folder)
        trainer.restore_place(state["passes"], saved["pieces"])
    else:
        saved = state
        if trainer.problem_stream:
            raise UserError(
                f"{folder} is of a run over a stream of problems under {state['layout']}: go on with the same number of "
                "processes and the same batch options"
            )
        trainer.restore_place(_same_batch(trainer, folder, state), None)
    reference = _moving_reference(trainer)
    if reference is not None and "reference" in state:
        load_whole_weights(reference, state["reference"])
    trainer.resume_numbers(saved["numbers"])
    trainer.completions = state["completions"]
    for name, values in state["metrics"].items():
        trainer.train_metrics[name].extend(values)
    for name, part in parts.items():
        if name in state["parts"]:
            part.load(state["parts"][name], trainer.rollout_batch)
        elif name == "critic":
            raise UserError(f"{folder} holds no {name}: it was made without one, by another advantage_estimator")


def _earlier(folder: Path) -> UserError:
    return UserError(f"{folder} was made by bupo 0.1 ({STATE_FILE} is missing): go on with that version")


def _own(trainer: TRLTrainer, folder: Path) -> dict:
    """This process' file."""
    own = pieces_file(folder, trainer.accelerator.process_index)
    if not own.exists():
        raise UserError(f"{folder} cannot be gone on with: {own.name} is missing")
    # of several processes on CPUs the device is cpu:0, which torch cannot load to
    device = trainer.accelerator.device if trainer.accelerator.device.type != "cpu" else "cpu"
    state = read_state(own, {"pieces": object, "numbers": dict}, map_location=device)
    _check_logged(own, state)
    return state


def _state(folder: Path, mmap: bool) -> dict:
    """What all processes share."""
    kinds = {"passes": int, "layout": dict, "planned": list, "metrics": dict, "numbers": dict, "parts": dict}
    state = read_state(folder / STATE_FILE, {**kinds, "completions": object}, mmap=mmap)
    try:
        check(state["layout"], {"processes": int, "micro_steps": int, "gradient_accumulation_steps": int})
    except ValueError as error:
        raise Damaged(folder / STATE_FILE, f"layout: {error}") from error
    _check_logged(folder / STATE_FILE, state)
    return state


def _check_logged(path: Path, state: dict) -> None:
    """Refuse what the next log could not be made of. A loss may be NaN."""
    values = [state["numbers"].get(name, 0) for name in ("since_log", "logged", "last_log", "first_step")]
    values += [
        value for row in state.get("metrics", {}).values() for value in (row if isinstance(row, list) else [row])
    ]
    if wrong := [value for value in values if not isinstance(value, int | float)]:
        raise Damaged(path, f"numbers or metrics hold {wrong[0]!r:.40}, which is no number")


def _moving_reference(trainer: TRLTrainer) -> torch.nn.Module | None:
    """The reference model, if it follows the policy."""
    if trainer.ref_model is None or not trainer.args.sync_ref_model:
        return None
    return trainer.accelerator.unwrap_model(trainer.ref_model)


def _same_batch(trainer: TRLTrainer, folder: Path, state: dict) -> int:
    """Passes done, for the same rollout batches in other pieces, or on another number of processes."""
    done, inside = divmod(state["passes"], state["layout"]["micro_steps"])
    if inside:
        raise UserError(
            f"{folder} lies inside a rollout batch: go on with the same number of processes and the same batch "
            f"options ({state['layout']}), or from a checkpoint at a rollout batch's end"
        )
    return done * trainer.passes_a_batch
