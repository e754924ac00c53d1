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

from bupo.run_files.names import STATE_FILE
from bupo.run_files.reading import PARSE_ERRORS, DamagedFileError, check_keys, read_torch_file
from bupo.training.checkpoints.integrity import check_visible_to_all, get_global_step, run_on_main_process
from bupo.training.checkpoints.resume import check_checkpoint_options, check_same_schedule, write_options
from bupo.training.checkpoints.weights import find_weight_mismatch
from bupo.training.checkpoints.writer import resolve_checkpoint
from bupo.training.distributed.fsdp2 import get_full_weights, load_full_weights
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.errors import UserError, summarize_error


class CheckpointPart(Protocol):
    """What has a state of its own: plain values and tensors."""

    def state(self) -> dict: ...

    def load(self, state: dict, rollout_batch: int) -> None: ...


def get_rollouts_path(folder: Path, process: int) -> Path:
    """Where a process keeps its rollout batch."""
    return folder / f"rollouts_{process}.pt"


def get_batch_layout(trainer: GRPOTrainerHooks) -> dict[str, int]:
    """How a rollout batch is cut up: what its pieces depend on."""
    return {
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "micro_steps": trainer.micro_steps_per_rollout_batch,
    }


def select_checkpoint(trainer: GRPOTrainerHooks, wanted: str | bool | None) -> str | None:
    """The checkpoint that a run goes on from, if it goes on from one; `True` is its newest whole one, if it has one.

    Raises:
        UserError: if it is damaged, is not the same on all processes, or was made with options that decide the run and differ.
    """
    say, trainer.resumed_at_step = trainer.accelerator.print, 0
    found = run_on_main_process(lambda: resolve_checkpoint(Path(trainer.args.output_dir), wanted, say))
    check_visible_to_all(found)
    if found is None:
        return None
    check_same_run(trainer, found, say)
    return str(found)


def check_same_run(trainer: GRPOTrainerHooks, found: Path, say: Callable[[str], None]) -> None:
    """Hold a run against the checkpoint that it goes on from.

    Raises:
        UserError: if it was made under another kind of launch, with options that decide the run and differ, or of another
            model.
    """
    _check_sharding(trainer, found)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not sharded and (wrong := find_weight_mismatch(trainer.model, found)):
        raise UserError(
            f"resume_from_checkpoint: {found} cannot be gone on with: {wrong}; go on from another checkpoint"
        )
    check_checkpoint_options(trainer, found, say)
    if (found / STATE_FILE).exists():  # refused before a former end of the run is deleted
        state = _read_shared_state(found, mmap=True)
        check_same_schedule(state["planned"], trainer.args.first_phase, found)
        _check_trainer_state(found, state)
    elif get_rollouts_path(found, 0).exists():
        raise _make_version_error(found)


def _check_trainer_state(found: Path, state: dict) -> None:
    """Refuse a checkpoint whose trainer's state is of another one.

    An update takes 1 to `gradient_accumulation_steps` passes.
    """
    updates, passes = get_global_step(found), state["passes"]
    if not updates <= passes <= updates * state["layout"]["gradient_accumulation_steps"]:
        raise UserError(
            f"resume_from_checkpoint: {found} cannot be gone on with: its trainer_state.json is of {updates} updates, and its "
            f"{STATE_FILE} of {passes} passes: the two belong to different checkpoints"
        )


def _check_sharding(trainer: GRPOTrainerHooks, found: Path) -> None:
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
    before = _read_shared_state(found, mmap=True)["layout"]["processes"]
    if before != trainer.accelerator.num_processes:
        raise UserError(
            f"{found} is of {before} processes, and this run has {trainer.accelerator.num_processes}: DeepSpeed goes on on as "
            "many; FSDP2 on any number"
        )


def save_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    """Write a checkpoint's part.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its place, its rollout batch and the metrics of its next log.
        folder (`Path`): the checkpoint.
        planned ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase that the options ask for.
        parts (`dict[str, Part]`): the rest, by name.
    """
    accelerator = trainer.accelerator
    own = {"pieces": trainer.pieces if trainer.is_inside_rollout_batch else None, "numbers": trainer.numbers}
    torch.save(own, get_rollouts_path(folder, accelerator.process_index))
    states = {name: part.state() for name, part in parts.items()}  # on all: a sharded one is gathered
    reference = _get_synced_ref_model(trainer)
    moved = {} if reference is None else {"reference": get_full_weights(reference)}
    if trainer.args.should_save:
        write_options(trainer, folder)
        place = {"passes": trainer.micro_steps_done, "layout": get_batch_layout(trainer), "planned": planned.state()}
        metrics = {name: list(values) for name, values in trainer.train_metrics.items()}
        logged = {"metrics": metrics, "numbers": trainer.numbers, "completions": trainer.completions_table}
        torch.save({**place, **logged, **moved, "parts": states}, folder / STATE_FILE)


def load_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    """Take up what `save` wrote. Of another trainer's checkpoint, only the place.

    Raises:
        UserError: if the checkpoint was made with another first phase, lacks a part or is damaged, or its rollout batch was cut
            up otherwise.
    """
    try:
        _load_state(trainer, folder, planned, parts)
    except UserError:
        raise
    except (*PARSE_ERRORS, RuntimeError) as error:  # values of other types or shapes, deep in the states of the parts
        raise DamagedFileError(folder / STATE_FILE, summarize_error(error), "go on from another checkpoint") from error


def _load_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    if not (folder / STATE_FILE).exists():
        if get_rollouts_path(folder, 0).exists():
            raise _make_version_error(folder)
        done = get_global_step(folder)  # another trainer's
        trainer.restore_position(done * trainer.args.gradient_accumulation_steps, None)
        return
    # a sharded critic lies in it whole: no process needs more of it in its memory than its share
    mapped = trainer.is_fsdp_enabled
    state = _read_shared_state(folder, mmap=mapped)
    check_same_schedule(state["planned"], planned, folder)
    if state["layout"] == get_batch_layout(trainer):
        saved = _read_process_state(trainer, folder)
        trainer.restore_position(state["passes"], saved["pieces"])
    else:
        saved = state
        if trainer.stream_position:
            raise UserError(
                f"{folder} is of a run over a stream of problems under {state['layout']}: go on with the same number of "
                "processes and the same batch options"
            )
        trainer.restore_position(_convert_passes_done(trainer, folder, state), None)
    reference = _get_synced_ref_model(trainer)
    if reference is not None and "reference" in state:
        load_full_weights(reference, state["reference"])
    trainer.restore_log_counters(saved["numbers"])
    trainer.completions_table = state["completions"]
    for name, values in state["metrics"].items():
        trainer.train_metrics[name].extend(values)
    for name, part in parts.items():
        if name in state["parts"]:
            part.load(state["parts"][name], trainer.rollout_batch)
        elif name == "critic":
            raise UserError(f"{folder} holds no {name}: it was made without one, by another advantage_estimator")


def _make_version_error(folder: Path) -> UserError:
    return UserError(f"{folder} was made by bupo 0.1 ({STATE_FILE} is missing): go on with that version")


def _read_process_state(trainer: GRPOTrainerHooks, folder: Path) -> dict:
    """This process' file."""
    own = get_rollouts_path(folder, trainer.accelerator.process_index)
    if not own.exists():
        raise UserError(f"{folder} cannot be gone on with: {own.name} is missing")
    # of several processes on CPUs the device is cpu:0, which torch cannot load to
    device = trainer.accelerator.device if trainer.accelerator.device.type != "cpu" else "cpu"
    state = read_torch_file(own, {"pieces": object, "numbers": dict}, map_location=device)
    _check_log_values(own, state)
    return state


def _read_shared_state(folder: Path, mmap: bool) -> dict:
    """What all processes share."""
    kinds = {"passes": int, "layout": dict, "planned": list, "metrics": dict, "numbers": dict, "parts": dict}
    state = read_torch_file(folder / STATE_FILE, {**kinds, "completions": object}, mmap=mmap)
    try:
        check_keys(state["layout"], {"processes": int, "micro_steps": int, "gradient_accumulation_steps": int})
    except ValueError as error:
        raise DamagedFileError(folder / STATE_FILE, f"layout: {error}") from error
    _check_log_values(folder / STATE_FILE, state)
    return state


def _check_log_values(path: Path, state: dict) -> None:
    """Refuse what the next log could not be made of. A loss may be NaN."""
    values = [state["numbers"].get(name, 0) for name in ("since_log", "logged", "last_log", "first_step")]
    values += [
        value for row in state.get("metrics", {}).values() for value in (row if isinstance(row, list) else [row])
    ]
    if wrong := [value for value in values if not isinstance(value, int | float)]:
        raise DamagedFileError(path, f"numbers or metrics hold {wrong[0]!r:.40}, which is no number")


def _get_synced_ref_model(trainer: GRPOTrainerHooks) -> torch.nn.Module | None:
    """The reference model, if it follows the policy."""
    if trainer.ref_model is None or not trainer.args.sync_ref_model:
        return None
    return trainer.accelerator.unwrap_model(trainer.ref_model)


def _convert_passes_done(trainer: GRPOTrainerHooks, folder: Path, state: dict) -> int:
    """Passes done, for the same rollout batches in other pieces, or on another number of processes."""
    done, inside = divmod(state["passes"], state["layout"]["micro_steps"])
    if inside:
        raise UserError(
            f"{folder} lies inside a rollout batch: go on with the same number of processes and the same batch "
            f"options ({state['layout']}), or from a checkpoint at a rollout batch's end"
        )
    return done * trainer.micro_steps_per_rollout_batch
