"""Work between rollout batches: the phase schedule, the probes, early stopping, and the detection of silent failures."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object

from bupo.models.metadata import get_model_metadata
from bupo.models.residual_stream import ResidualStream, eval_mode
from bupo.run_files.names import BOUNDARY_FILE
from bupo.training.callbacks.early_stopping import EarlyStoppingMonitor, restore_weights, snapshot_weights
from bupo.training.callbacks.failure_detection import FailureDetector
from bupo.training.callbacks.probe_series import DynamicsWriter
from bupo.training.callbacks.probes import (
    MAX_PROBE_TOKENS,
    PromptCompletionIds,
    get_default_probe_interval,
    probe_layers,
)
from bupo.training.config import BuPOConfig
from bupo.training.distributed import deepspeed
from bupo.training.distributed.fsdp2 import gather_full, reshard_model, to_shards, uses_fsdp
from bupo.training.failure_messages import warn_of_failure
from bupo.training.objective.advantages import GROUP_ESTIMATORS
from bupo.training.objective.auto_layer import MAX_MEASURED_TOKENS as BOUNDARY_TOKENS
from bupo.training.objective.auto_layer import describe_first_phase_length, find_boundary_layer, take_first_answers
from bupo.training.objective.layer_parameters import get_parameters_up_to
from bupo.training.objective.phases import Objective, PhaseSchedule, get_objective, recommend_first_phase_batches
from bupo.training.objective.policy_head import run_inside_forward
from bupo.utils.errors import UserError
from bupo.utils.files import make_folder, write_json

logger = get_logger(__name__)

# metrics of a rollout batch and of an update that failures are detected by
ROLLOUT_METRICS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "completions/mean_length",
)
UPDATE_METRICS = ("entropy", "kl", "approx_kl")

Metrics = dict[str, list[float]]


class PhaseController:
    """Phase schedule, probes, early stopping and failure detection of a run.

    All processes take the same decisions: on gathered rewards, means over processes and the main process' probes.

    Args:
        model (`nn.Module`): with a policy head, and the wrappers of PEFT and FSDP2.
        stream ([`~bupo.models.residual_stream.ResidualStream`], *optional*): of the model; without one there are no
            probes.
        accelerator (`Accelerator`): of the trainer.
        args ([`~bupo.BuPOConfig`]): of the run.
        decode (`Callable`): turns token ids into text, for `probes.jsonl`.
        max_positions (`float`): of the model, in tokens.

    Attributes:
        schedule ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase, with the decisions of `auto` and
            of early stopping so far.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stream: ResidualStream | None,
        accelerator: Accelerator,
        args: BuPOConfig,
        decode: Callable,
        max_positions: float = math.inf,
    ):
        self.model, self._stream, self.accelerator, self.args, self.decode = model, stream, accelerator, args, decode
        self.schedule: PhaseSchedule = args.phase_schedule
        self.probe_interval = args.probe_every  # None until the probe set is known
        self.uses_early_stopping = args.internal_early_stopping and bool(self.schedule.stages)
        metadata: dict = {"seed": args.seed}
        if stream is None:
            self.probe_interval = 0
        else:
            name = stream.config.name_or_path or type(stream.model).__name__
            metadata = get_model_metadata(name, stream, args.internal_lens, args.temperature) | metadata
        self.dynamics = DynamicsWriter(args.output_dir, metadata)
        self.probe_set: PromptCompletionIds = []
        self.early_stopping, self.monitored_stage = EarlyStoppingMonitor(), 0  # of the stage with this index
        self.best_weights: list[torch.Tensor] = []
        self.auto_layer_result: dict | None = None
        self.max_positions, self.failure_detector = max_positions, FailureDetector()
        self.update_metrics: dict[str, list[float]] = {}  # of the current rollout batch

    @property
    def stream(self) -> ResidualStream:
        """Residual stream of the model."""
        assert self._stream is not None, "a run without a stream measures no layers"
        return self._stream

    def get_objective(self, rollout_batch: int) -> Objective:
        """Return the objective of a rollout batch, by the schedule so far."""
        return get_objective(rollout_batch, self.schedule, self.args)

    # -- before and after a rollout batch ------------------------------------------------------------------------------

    def before_rollouts(self, rollout_batch: int, optimizer: torch.optim.Optimizer, metrics: Metrics) -> None:
        """Probe the weights that sample the next rollout batch, and end a stage that harms the model."""
        rows = []
        if rollout_batch > 1 and self._is_probe_due(rollout_batch):  # the first batch provides the probe set
            rows = self._run_probe(rollout_batch, metrics)
        if not (self.uses_early_stopping and self.early_stopping.rewards and self.best_weights):
            return
        self._record_probe(rows)
        reason = self.early_stopping.get_stop_reason()
        if reason:
            self._restore_best_weights(rollout_batch, optimizer, reason)
            metrics["internal/stopped_early"].append(1.0)
        stage = self.get_objective(rollout_batch).stage
        if reason or stage != self.monitored_stage:  # each stage has a separate monitor
            self.early_stopping, self.best_weights = EarlyStoppingMonitor(), []
            self.monitored_stage = self.monitored_stage if stage is None else stage
            if stage is not None and not reason:  # restored weights differ from those that were probed
                self._record_probe(rows)

    def _record_probe(self, rows: Sequence[dict]) -> None:
        """Record a probe of the monitored layer for early stopping."""
        if rows and self.uses_early_stopping and self.schedule.stages:
            values = _average_by_measure(rows, self.schedule.stages[self.monitored_stage].layer)
            self.early_stopping.record_probe(values["perplexity"], values.get("kl", values["kl_language_model"]))

    def after_rollouts(
        self, rollout_batch: int, completions: PromptCompletionIds, rewards: torch.Tensor, metrics: Metrics
    ) -> None:
        """Record a rollout batch, for the probes, early stopping and failure detection.

        Args:
            rollout_batch (`int`): from 1.
            completions (`list`): prompts and completions of this process, one completion of each prompt first.
            rewards (`torch.Tensor` of shape `(all completions,)`): of all processes, grouped by prompt.
            metrics (`dict`): of the next log.
        """
        if not self.probe_set and self._has_probe_set:
            self._select_probe_set(completions)
            if self._is_probe_due(rollout_batch):
                self._record_probe(self._run_probe(rollout_batch, metrics))
        if self._is_probe_due(rollout_batch) and self.accelerator.is_main_process:
            rows = [("response_length", metrics["completions/mean_length"][-1])]
            rows += [("repetition", metrics["completions/repetition"][-1]), ("reward", metrics["reward"][-1])]
            self.dynamics.add_rows(
                rollout_batch - 1, [_make_row(name, value) for name, value in rows if math.isfinite(value)]
            )
        stage = self.get_objective(rollout_batch).stage
        if self.uses_early_stopping and stage is not None:
            self.monitored_stage = stage
            by_prompt = rewards.view(-1, self.args.num_generations).nanmean(1)
            by_prompt = by_prompt[~by_prompt.isnan()]
            error = (by_prompt.std() / math.sqrt(len(by_prompt))).item() if len(by_prompt) > 1 else math.inf
            reward = by_prompt.mean().item() if len(by_prompt) else math.nan
            if self.early_stopping.record_rollouts(reward, error, metrics["completions/clipped_ratio"][-1]):
                copy = deepspeed.snapshot_weights if deepspeed.uses_deepspeed(self.accelerator) else snapshot_weights
                self.best_weights = copy(self._get_stage_parameters(stage))
        self._detect_rollout_failures(rollout_batch, completions, rewards, metrics)

    def _detect_rollout_failures(
        self, rollout_batch: int, completions: PromptCompletionIds, rewards: torch.Tensor, metrics: Metrics
    ) -> None:
        longest = torch.tensor([max((len(prompt) for prompt, _ in completions), default=0)], device=rewards.device)
        values = {name: metrics[name][-1] for name in ROLLOUT_METRICS}
        if self.args.advantage_estimator not in GROUP_ESTIMATORS:  # compare completions of all prompts
            values["frac_reward_zero_std"] = float(values["reward_std"] == 0)
        values["graded"] = rewards.isfinite().float().mean().item()
        values["tokens"] = self.accelerator.gather(longest).max().item() + self.args.max_completion_length
        values["positions"] = self.max_positions
        self._report_failures(self.failure_detector.record_rollouts(values), rollout_batch, values, metrics)

    def after_loss(
        self, rollout_batch: int, loss_metrics: Mapping[str, list[float]], metrics: Metrics, is_last: bool
    ) -> None:
        """Record the metrics of a loss, for failure detection at the end of the rollout batch.

        Args:
            rollout_batch (`int`): from 1.
            loss_metrics (`dict`): with the values of this loss last; empty for a micro-batch without a token to train
                on.
            metrics (`dict`): of the next log, for the failures.
            is_last (`bool`): whether this is the last micro-step of the rollout batch.
        """
        for name in UPDATE_METRICS:
            if loss_metrics.get(name):
                self.update_metrics.setdefault(name, []).append(loss_metrics[name][-1])
        if is_last:
            means = {name: sum(values) / len(values) for name, values in self.update_metrics.items()}
            self.update_metrics = {}
            new_failures = self.failure_detector.record_updates(means) if means else []
            self._report_failures(new_failures, rollout_batch, means, metrics)

    def _report_failures(
        self, new_failures: list[str], rollout_batch: int, values: dict[str, float], metrics: Metrics
    ) -> None:
        """Log the active failures, and warn of the new ones."""
        for name in self.failure_detector.active_failures:
            metrics[f"warning/{name}"].append(1.0)
        for name in new_failures:
            batches = self.failure_detector.consecutive_batches[name]
            any_rewarded = self.failure_detector.any_rewarded
            warn_of_failure(name, f"rollout batch {rollout_batch}", values, batches, any_rewarded, self.args)

    def after_training(self, rollout_batch: int, is_inside_batch: bool) -> None:
        """Probe the final weights, unless training ended inside a rollout batch.

        Raises:
            UserError: if no completion of the run was graded, so that its model is untrained.
        """
        if self.probe_interval and self.probe_set and not is_inside_batch:
            self._run_probe(rollout_batch, None)
        if self.failure_detector.has_never_graded:
            raise UserError(
                f"no answer of {self.failure_detector.num_batches} rollout batches was graded, every reward was None, "
                "NaN or infinite: the model has learned nothing; look at what the reward function returns"
            )

    def choose_auto_layer(self, completions: PromptCompletionIds, updates: int) -> None:
        """Choose the layer of `internal_layer: auto` on the first rollout batch, and write the measures to
        `boundary.json`.

        Args:
            completions (`list`): prompts and completions of this process.
            updates (`int`): of the run.
        """
        max_tokens, gather = BOUNDARY_TOKENS // self.accelerator.num_processes, gather_object
        if uses_fsdp(self.accelerator):  # all processes have to run the same forward passes
            completions, gather = gather_object(take_first_answers(completions, max_tokens)), list
            max_tokens = sum(len(completion) for _, completion in completions)
        lens, temperature = self.args.internal_lens, self.args.temperature

        def measure() -> dict:
            with eval_mode(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return find_boundary_layer(self.stream, completions, lens, temperature, max_tokens, gather)

        result = run_inside_forward(self.model, measure)
        batches = self.args.count_rollout_batches(updates)
        recommended = recommend_first_phase_batches(batches)
        self.schedule = self.schedule.resolve_auto(result["boundary_layer"], recommended)
        lengths = {
            "rollout_batches": batches,
            "recommended_steps": recommended,
            "internal_steps": self.schedule.batches,
        }
        self.auto_layer_result = result | lengths
        self.accelerator.print(f"internal_layer auto: {result['explanation']}")
        self.accelerator.print(describe_first_phase_length(self.auto_layer_result))
        self._write_auto_layer()

    def _write_auto_layer(self) -> None:
        if self.auto_layer_result and self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            make_folder(folder)
            write_json(folder / BOUNDARY_FILE, self.auto_layer_result)

    # -- probes ------------------------------------------------------------------------------------------------------

    @property
    def _has_probe_set(self) -> bool:
        """Return whether the run has probes."""
        return self.probe_interval != 0

    def _select_probe_set(self, completions: PromptCompletionIds) -> None:
        """Select truncated completions of different prompts as the probe set, the same on every process."""
        per_process = math.ceil(self.args.probe_answers / self.accelerator.num_processes)
        selected = [(prompt, completion[:MAX_PROBE_TOKENS]) for prompt, completion in completions[:per_process]]
        self.probe_set = gather_object(selected)[: self.args.probe_answers]
        if not self.probe_set:
            return
        layers = self._get_probed_layers()
        if self.probe_interval is None:
            tokens = sum(len(prompt) + len(completion) for prompt, completion in completions)
            interval = get_default_probe_interval(self.stream, self.probe_set, layers, tokens) if layers else 0
            self.probe_interval = broadcast_object_list([interval])[0]
        if self._has_probe_set and self.accelerator.is_main_process:
            self.dynamics.write_probe_set(self.probe_set, self.decode)

    def _get_probed_layers(self) -> list[int]:
        """Return the layers of the first phase, or without a first phase the layer of the options."""
        layer = self.args.internal_layer
        return self.schedule.layers or ([layer] if isinstance(layer, int) else [])

    def _is_probe_due(self, rollout_batch: int) -> bool:
        return bool(self.probe_interval and self.probe_set and (rollout_batch - 1) % self.probe_interval == 0)

    def _run_probe(self, rollout_batch: int, metrics: Metrics | None) -> list[dict]:
        """Measure the probes, write them and add their means to the next log."""
        start = perf_counter()
        layers = self._get_probed_layers()

        def measure() -> list[dict]:
            with eval_mode(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return probe_layers(self.stream, self.probe_set, layers, self.args.internal_lens, self.args.temperature)

        rows = broadcast_object_list([run_inside_forward(self.model, measure)])[0]
        if self.accelerator.is_main_process:
            self.dynamics.add_rows(rollout_batch - 1, rows)
        layer = self.get_objective(rollout_batch).layer or (layers[-1] if layers else None)
        if metrics is not None:
            for name, value in _average_by_measure(rows, layer).items():
                metrics[f"probe/{name}"].append(value)
            metrics["probe/time"].append(perf_counter() - start)
        return rows

    # -- early stopping ------------------------------------------------------------------------------------------------

    def _get_stage_parameters(self, stage: int) -> list[torch.nn.Parameter]:
        """Return the parameters that a stage moves, or this process' shards of them."""
        layer = self.schedule.stages[stage].layer
        assert layer is not None, "auto chooses the layer before a stage is monitored"
        reshard_model(self.model)
        return get_parameters_up_to(self.stream, layer, self.args.internal_lens == "final_norm", self.model)

    def _restore_best_weights(self, rollout_batch: int, optimizer, reason: str) -> None:
        """Restore the best weights of the monitored stage, and end the stage if it has not ended yet."""
        stage, best = self.schedule.stages[self.monitored_stage], self.early_stopping.best_batch + 1
        done = len(self.early_stopping.rewards)
        parameters = self._get_stage_parameters(self.monitored_stage)
        if deepspeed.uses_deepspeed(self.accelerator):
            deepspeed.restore_weights(parameters, self.best_weights, optimizer, stage.layer)
        else:
            restore_weights(parameters, self.best_weights, getattr(optimizer, "optimizer", optimizer))
        if self.get_objective(rollout_batch).stage == self.monitored_stage:
            self.schedule = self.schedule.end_stage_before(rollout_batch)
        self.accelerator.print(
            f"early stopping: {reason}; the stage on layer {stage.layer} ends after {done} of {stage.batches} rollout batches, "
            f"and training continues with the weights that sampled the {best}{_get_ordinal_suffix(best)}"
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """Return the state for a checkpoint. All processes must call this."""
        return {
            "schedule": self.schedule.state(),
            "probe_interval": self.probe_interval,
            "probe_set": [(list(prompt), list(completion)) for prompt, completion in self.probe_set],
            "early_stopping": asdict(self.early_stopping),
            "monitored_stage": self.monitored_stage,
            "best_weights": gather_full(self._get_stage_parameters(self.monitored_stage), self.best_weights)
            if self.best_weights
            else [],
            "dynamics": self.dynamics.state(),
            "auto_layer": json.dumps(self.auto_layer_result),
            "failures": self.failure_detector.state(),
            "update_metrics": self.update_metrics,
        }

    def load(self, state: dict, rollout_batch: int) -> None:
        """Load the state of a checkpoint. `probe_every`, if it is set, decides the probe interval."""
        self.schedule = PhaseSchedule.load(state["schedule"])
        self.probe_interval = state["probe_interval"] if self.args.probe_every is None else self.args.probe_every
        self.monitored_stage = state["monitored_stage"]
        monitor = state["early_stopping"] | {"rewards": [tuple(pair) for pair in state["early_stopping"]["rewards"]]}
        self.early_stopping, self.best_weights = EarlyStoppingMonitor(**monitor), []
        if state["best_weights"]:
            self.best_weights = to_shards(self._get_stage_parameters(self.monitored_stage), state["best_weights"])
        self.failure_detector, self.update_metrics = FailureDetector(**state["failures"]), state["update_metrics"]
        completions = state["probe_set"] if self._has_probe_set else []
        self.probe_set = [(list(prompt), list(completion)) for prompt, completion in completions]
        if self.probe_set and self.accelerator.is_main_process:
            self.dynamics.load(state["dynamics"])
            self.dynamics.write_probe_set(self.probe_set, self.decode)
        self.auto_layer_result = json.loads(state["auto_layer"])
        self._write_auto_layer()


def _make_row(measure: str, value: float) -> dict:
    return {"measure": measure, "layer": None, "later_layer": None, "value": value}


def _average_by_measure(rows: Sequence[dict], layer: int | None) -> dict[str, float]:
    """Return the mean of each measure of the language model policy and of one layer, over the later layers."""
    by_measure: dict[str, list[float]] = {}
    for row in rows:
        if row["layer"] in (None, layer):
            by_measure.setdefault(row["measure"], []).append(row["value"])
    return {name: sum(values) / len(values) for name, values in by_measure.items()}


def _get_ordinal_suffix(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
