"""bupo's part of a checkpoint: the position inside a rollout batch and the batch itself, which TRL does not save.

Without it a resumed run would count rollout batches, and so the phases, from the start again. The files are:

- `bupo.pt`, shared by all processes: the schedule, the position, the metrics of the next log, probes, early stopping
  and critic;
- `rollouts_N.pt` of process N: its loss since the last log and, inside a rollout batch, its micro-batches;
- `options.json`: the options that decide the run ([`bupo.training.checkpoints.resume`]);
- `manifest.json`, written last ([`bupo.training.checkpoints.integrity`]).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch

from bupo.run_files.names import STATE_FILE
from bupo.run_files.reading import PARSE_ERRORS, DamagedFileError, check_keys, read_torch_file
from bupo.training.checkpoints.integrity import get_global_step
from bupo.training.checkpoints.resume import check_checkpoint_options, check_same_schedule, write_options
from bupo.training.checkpoints.selection import check_visible_to_all, resolve_checkpoint, run_on_main_process
from bupo.training.checkpoints.weights import find_weight_mismatch
from bupo.training.distributed.fsdp2 import get_full_weights, load_full_weights
from bupo.training.objective.phases import PhaseSchedule
from bupo.training.trl_internals import GRPOTrainerHooks
from bupo.utils.errors import UserError, summarize_error


class CheckpointPart(Protocol):
    """Object whose state, plain values and tensors, is part of a checkpoint."""

    def state(self) -> dict: ...

    def load(self, state: dict, rollout_batch: int) -> None: ...


def get_rollouts_path(folder: Path, process: int) -> Path:
    """Return the file that holds the rollout batch of a process."""
    return folder / f"rollouts_{process}.pt"


def get_batch_layout(trainer: GRPOTrainerHooks) -> dict[str, int]:
    """Return the sizes by which a rollout batch is cut into micro-batches."""
    return {
        "processes": trainer.accelerator.num_processes,
        "per_device_train_batch_size": trainer.args.per_device_train_batch_size,
        "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
        "micro_steps": trainer.micro_steps_per_rollout_batch,
    }


def select_checkpoint(trainer: GRPOTrainerHooks, option: str | bool | None) -> str | None:
    """Return the checkpoint that a run resumes from, or None.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): of the run.
        option (`str` or `bool`): a path, or `True` for the newest intact checkpoint.

    Raises:
        UserError: if it is damaged, differs between processes, or belongs to a run with other options.
    """
    log, trainer.resumed_at_step = trainer.accelerator.print, 0
    checkpoint = run_on_main_process(lambda: resolve_checkpoint(Path(trainer.args.output_dir), option, log))
    check_visible_to_all(checkpoint)
    if checkpoint is None:
        return None
    check_same_run(trainer, checkpoint, log)
    return str(checkpoint)


def check_same_run(trainer: GRPOTrainerHooks, checkpoint: Path, log: Callable[[str], None]) -> None:
    """Check that a checkpoint belongs to the run that resumes from it.

    Raises:
        UserError: if it was made under another kind of launch, with options that affect training and differ, or with another
            model.
    """
    _check_sharding(trainer, checkpoint)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not is_sharded and (mismatch := find_weight_mismatch(trainer.model, checkpoint)):
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} cannot be resumed: {mismatch}; resume from another checkpoint"
        )
    check_checkpoint_options(trainer, checkpoint, log)
    if (checkpoint / STATE_FILE).exists():  # checked here, before files of a finished run are deleted
        state = _read_shared_state(checkpoint, mmap=True)
        check_same_schedule(state["planned"], trainer.args.phase_schedule, checkpoint)
        _check_update_count(checkpoint, state)


def _check_update_count(checkpoint: Path, state: dict) -> None:
    """Refuse a checkpoint whose `trainer_state.json` belongs to another one.

    An update takes 1 to `gradient_accumulation_steps` forward and backward passes.
    """
    updates, passes = get_global_step(checkpoint), state["passes"]
    if not updates <= passes <= updates * state["layout"]["gradient_accumulation_steps"]:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} cannot be resumed: its trainer_state.json counts {updates} updates, and its "
            f"{STATE_FILE} {passes} passes: the two files belong to different checkpoints"
        )


def _check_sharding(trainer: GRPOTrainerHooks, checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights and optimizer are stored for another kind of launch."""
    launch = (
        "under FSDP" if trainer.is_fsdp_enabled else "under DeepSpeed" if trainer.is_deepspeed_enabled else "unsharded"
    )
    optimizer_files = {"under FSDP": "optimizer.bin", "under DeepSpeed": "global_step*", "unsharded": "optimizer.pt"}
    saved = next((kind for kind, pattern in optimizer_files.items() if any(checkpoint.glob(pattern))), launch)
    if saved != launch:
        raise UserError(
            f"{checkpoint} was saved {saved}, and this run is {launch}: resume under the same launch, or start a new run from "
            "the model in the checkpoint"
        )
    if launch != "under DeepSpeed" or not (checkpoint / STATE_FILE).exists():
        return
    processes = _read_shared_state(checkpoint, mmap=True)["layout"]["processes"]
    if processes != trainer.accelerator.num_processes:
        raise UserError(
            f"{checkpoint} is of {processes} processes, and this run has {trainer.accelerator.num_processes}: DeepSpeed "
            "resumes on the same number, FSDP2 on any number"
        )


def save_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    """Write bupo's part of a checkpoint.

    Args:
        trainer ([`~bupo.training.trl_internals.GRPOTrainerHooks`]): its position, rollout batch and metrics of the next log.
        folder (`Path`): the checkpoint.
        planned ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase that the options set.
        parts (`dict[str, CheckpointPart]`): further states by name.
    """
    accelerator = trainer.accelerator
    process_state = {
        "micro_batches": trainer.micro_batches if trainer.is_inside_rollout_batch else None,
        "counters": trainer.log_counters,
    }
    torch.save(process_state, get_rollouts_path(folder, accelerator.process_index))
    part_states = {name: part.state() for name, part in parts.items()}  # on all processes: sharded states are gathered
    reference = _get_synced_ref_model(trainer)
    reference_weights = None if reference is None else get_full_weights(reference)
    if not trainer.args.should_save:
        return
    write_options(trainer, folder)
    state = {
        "passes": trainer.micro_steps_done,
        "layout": get_batch_layout(trainer),
        "planned": planned.state(),
        "metrics": {name: list(values) for name, values in trainer.train_metrics.items()},
        "counters": trainer.log_counters,
        "completions": trainer.completions_table,
        "reference": reference_weights,
        "parts": part_states,
    }
    torch.save(state, folder / STATE_FILE)


def load_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    """Restore what `save_state` wrote. From another trainer's checkpoint, only the position is restored.

    Args: as for [`save_state`].

    Raises:
        UserError: if the checkpoint was made with another first phase, lacks a part or is damaged, or if it lies inside a
            rollout batch that was cut into other micro-batches.
    """
    try:
        _load_state(trainer, folder, planned, parts)
    except UserError:
        raise
    except (*PARSE_ERRORS, RuntimeError) as error:  # wrong types or shapes deep in the states of the parts
        raise DamagedFileError(folder / STATE_FILE, summarize_error(error), "resume from another checkpoint") from error


def _load_state(
    trainer: GRPOTrainerHooks, folder: Path, planned: PhaseSchedule, parts: Mapping[str, CheckpointPart]
) -> None:
    if not (folder / STATE_FILE).exists():  # of another trainer
        updates = get_global_step(folder)
        trainer.restore_position(updates * trainer.args.gradient_accumulation_steps, None)
        return
    # a sharded critic is stored in full: no process should hold more of it in memory than its share
    state = _read_shared_state(folder, mmap=trainer.is_fsdp_enabled)
    check_same_schedule(state["planned"], planned, folder)
    if state["layout"] == get_batch_layout(trainer):
        process_state = _read_process_state(trainer, folder)
        counters = process_state["counters"]
        trainer.restore_position(state["passes"], process_state["micro_batches"])
    else:
        counters = state["counters"]
        if trainer.stream_position:
            raise UserError(
                f"{folder} is of a run over a stream of problems under {state['layout']}: resume with the same number of "
                "processes and the same batch options"
            )
        trainer.restore_position(_convert_passes_done(trainer, folder, state), None)
    reference = _get_synced_ref_model(trainer)
    if reference is not None and state["reference"] is not None:
        load_full_weights(reference, state["reference"])
    trainer.restore_log_counters(counters)
    trainer.completions_table = state["completions"]
    for name, values in state["metrics"].items():
        trainer.train_metrics[name].extend(values)
    for name, part in parts.items():
        part.load(state["parts"][name], trainer.rollout_batch)


def _read_process_state(trainer: GRPOTrainerHooks, folder: Path) -> dict:
    path = get_rollouts_path(folder, trainer.accelerator.process_index)
    if not path.exists():
        raise UserError(f"{folder} cannot be resumed: {path.name} is missing")
    # with several processes on CPUs the device is cpu:0, which torch.load does not accept
    device = trainer.accelerator.device if trainer.accelerator.device.type != "cpu" else "cpu"
    state = read_torch_file(path, {"micro_batches": object, "counters": dict}, map_location=device)
    _check_log_values(path, state)
    return state


def _read_shared_state(folder: Path, mmap: bool) -> dict:
    path = folder / STATE_FILE
    keys = {"passes": int, "layout": dict, "planned": list, "metrics": dict, "counters": dict, "parts": dict}
    state = read_torch_file(path, {**keys, "completions": object, "reference": object}, mmap=mmap)
    try:
        check_keys(state["layout"], {"processes": int, "micro_steps": int, "gradient_accumulation_steps": int})
    except ValueError as error:
        raise DamagedFileError(path, f"layout: {error}") from error
    _check_log_values(path, state)
    return state


def _check_log_values(path: Path, state: dict) -> None:
    """Refuse metrics and counters that are no numbers, which the next log would fail on. A loss may be NaN."""
    values = [state["counters"].get(name, 0) for name in ("since_log", "logged", "last_log", "first_step")]
    for metric in state.get("metrics", {}).values():
        values += metric if isinstance(metric, list) else [metric]
    if invalid := [value for value in values if not isinstance(value, int | float)]:
        raise DamagedFileError(path, f"counters or metrics hold {invalid[0]!r:.40}, which is no number")


def _get_synced_ref_model(trainer: GRPOTrainerHooks) -> torch.nn.Module | None:
    """Return the reference model if `sync_ref_model` updates it, so that checkpoints must hold it."""
    if trainer.ref_model is None or not trainer.args.sync_ref_model:
        return None
    return trainer.accelerator.unwrap_model(trainer.ref_model)


def _convert_passes_done(trainer: GRPOTrainerHooks, folder: Path, state: dict) -> int:
    """Return the passes that took the same rollout batches under this run's micro-batches and processes."""
    batches, remainder = divmod(state["passes"], state["layout"]["micro_steps"])
    if remainder:
        raise UserError(
            f"{folder} lies inside a rollout batch: resume with the same number of processes and the same batch options "
            f"({state['layout']}), or from a checkpoint at the end of a rollout batch"
        )
    return batches * trainer.micro_steps_per_rollout_batch
