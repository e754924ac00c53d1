"""What stands between rollout batches: the schedule, the probes, the guard, which reads them and may end a stage early, and
the symptoms of failures that make no noise.
"""

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
from bupo.training.objective.phases import AuxiliaryObjective, PhaseSchedule, recommend_first_phase_batches
from bupo.training.objective.policy_head import run_inside_forward
from bupo.utils.errors import UserError
from bupo.utils.files import make_folder, write_json

logger = get_logger(__name__)

# metrics of a rollout batch and of a pass that symptoms are told by
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
    """Schedule, probes, guard and symptoms of a run. All processes decide alike: on gathered rewards, means over processes and
    the main process' probes.

    Args:
        model (`nn.Module`): with a policy head, and the wrappers of PEFT and FSDP2.
        stream ([`~bupo.models.residual_stream.ResidualStream`], *optional*): the model's; without one there are no probes.
        accelerator (`Accelerator`): the trainer's.
        args ([`~bupo.BuPOConfig`]): of the run.
        decode (`Callable`): token ids into text, for `probes.jsonl`.
        positions (`float`): of the model.

    Attributes:
        schedule ([`~bupo.training.objective.phases.PhaseSchedule`]): the first phase, as far as `auto` and the guard have decided it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stream: ResidualStream | None,
        accelerator: Accelerator,
        args: BuPOConfig,
        decode: Callable,
        positions: float = math.inf,
    ):
        self.model, self._stream, self.accelerator, self.args, self.decode = model, stream, accelerator, args, decode
        self.schedule: PhaseSchedule = args.first_phase
        self.probe_interval = args.probe_every  # None: once the probe set is known
        self.uses_early_stopping = args.internal_early_stopping and bool(self.schedule.stages)
        meta: dict = {"seed": args.seed}
        if stream is None:
            self.probe_interval = 0
        else:
            name = stream.config.name_or_path or type(stream.model).__name__
            meta = get_model_metadata(name, stream, args.internal_lens, args.temperature) | meta
        self.dynamics = DynamicsWriter(args.output_dir, meta)
        self.probe_set: PromptCompletionIds = []
        self.early_stopping, self.monitored_stage = (
            EarlyStoppingMonitor(),
            0,
        )  # of the stage in this place of the schedule
        self.best_weights: list[torch.Tensor] = []
        self.auto_layer_result: dict | None = None  # what `auto` found
        self.max_positions, self.failure_detector = positions, FailureDetector()
        self.update_metrics: dict[str, list[float]] = {}  # of the rollout batch that is being trained on

    @property
    def stream(self) -> ResidualStream:
        """The model's, for what looks at layers."""
        assert self._stream is not None, "without a stream nothing looks at layers"
        return self._stream

    def get_auxiliary_objective(self, rollout_batch: int) -> AuxiliaryObjective | None:
        """The layer that a rollout batch optimises besides the language model policy, and its weight; None where it optimises
        one policy."""
        weight = self.schedule.get_layer_weight(
            rollout_batch, self.args.internal_fade_batches, self.args.internal_loss_weight
        )
        layer = self.schedule.stages[-1].layer if self.schedule.stages else self.args.internal_layer
        return AuxiliaryObjective(layer, weight) if isinstance(layer, int) and 0 < weight < 1 else None

    def describe_policy(self, rollout_batch: int) -> str:
        """Which policy a rollout batch optimises, in words."""
        stage = self.schedule.get_stage(rollout_batch)
        if stage is None:
            mixed = self.get_auxiliary_objective(rollout_batch)
            return f"the whole policy and that of layer {mixed.layer}" if mixed else "the whole policy"
        layer = stage.layer or "auto"
        if self.args.internal_objective == "frozen_upper":
            return f"the whole policy, by layers up to {layer}"
        return f"the policy of layer {layer}"

    # -- around a rollout batch --------------------------------------------------------------------------------------

    def before_rollouts(self, rollout_batch: int, optimizer: torch.optim.Optimizer, metrics: Metrics) -> None:
        """Probe the weights that are about to sample, and end the stage if it has turned."""
        rows = (
            self._run_probe(rollout_batch, metrics) if rollout_batch > 1 and self._is_probe_due(rollout_batch) else []
        )
        if not (self.uses_early_stopping and self.early_stopping.rewards and self.best_weights):
            return
        self._record_probe(rows)
        why = self.early_stopping.get_stop_reason()
        if why:
            self._restore_best_weights(rollout_batch, optimizer, why)
            metrics["internal/stopped_early"].append(1.0)
        place = self.schedule.get_stage_index(rollout_batch)
        if why or place != self.monitored_stage:  # the next stage has a record of its own
            self.early_stopping, self.best_weights = EarlyStoppingMonitor(), []
            self.monitored_stage = self.monitored_stage if place is None else place
            if place is not None and not why:  # else the weights are no longer those that were probed
                self._record_probe(rows)

    def _record_probe(self, rows: Sequence[dict]) -> None:
        """Give the guard what a probe says of the layer that it watches."""
        if rows and self.uses_early_stopping and self.schedule.stages:
            values = _average_by_measure(rows, self.schedule.stages[self.monitored_stage].layer)
            self.early_stopping.record_probe(values["perplexity"], values.get("kl", values["kl_language_model"]))

    def after_rollouts(
        self, rollout_batch: int, answers: PromptCompletionIds, rewards: torch.Tensor, metrics: Metrics
    ) -> None:
        """Note what a rollout batch says of the weights that sampled it.

        Args:
            answers (`list`): of this process, one of each prompt first.
            rewards (`torch.Tensor` of shape `(answers,)`): of all processes, groups of a prompt one after another.
        """
        if not self.probe_set and self._has_probe_set:  # of the first rollout batch, if it has any
            self._select_probe_set(answers)
            if self._is_probe_due(rollout_batch):
                self._record_probe(self._run_probe(rollout_batch, metrics))
        if self._is_probe_due(rollout_batch) and self.accelerator.is_main_process:
            rows = [("response_length", metrics["completions/mean_length"][-1])]
            rows += [("repetition", metrics["completions/repetition"][-1]), ("reward", metrics["reward"][-1])]
            self.dynamics.add_rows(
                rollout_batch - 1, [_make_row(name, value) for name, value in rows if math.isfinite(value)]
            )
        place = self.schedule.get_stage_index(rollout_batch)
        if self.uses_early_stopping and place is not None:
            self.monitored_stage = place
            by_prompt = rewards.view(-1, self.args.num_generations).nanmean(1)
            by_prompt = by_prompt[~by_prompt.isnan()]
            error = (by_prompt.std() / math.sqrt(len(by_prompt))).item() if len(by_prompt) > 1 else math.inf
            reward = by_prompt.mean().item() if len(by_prompt) else math.nan
            if self.early_stopping.record_rollouts(reward, error, metrics["completions/clipped_ratio"][-1]):
                take = deepspeed.snapshot_weights if deepspeed.uses_deepspeed(self.accelerator) else snapshot_weights
                self.best_weights = take(self._get_stage_parameters(place))
        self._detect_rollout_failures(rollout_batch, answers, rewards, metrics)

    def _detect_rollout_failures(
        self, rollout_batch: int, answers: PromptCompletionIds, rewards: torch.Tensor, metrics: Metrics
    ) -> None:
        longest = torch.tensor([max((len(prompt) for prompt, _ in answers), default=0)], device=rewards.device)
        seen = {name: metrics[name][-1] for name in ROLLOUT_METRICS}
        if self.args.advantage_estimator not in GROUP_ESTIMATORS:  # compares prompts too
            seen["frac_reward_zero_std"] = float(seen["reward_std"] == 0)
        seen["graded"] = rewards.isfinite().float().mean().item()
        seen["tokens"] = self.accelerator.gather(longest).max().item() + self.args.max_completion_length
        seen["positions"] = self.max_positions
        self._report_failures(self.failure_detector.record_rollouts(seen), rollout_batch, seen, metrics)

    def after_loss(self, rollout_batch: int, measured: Mapping[str, list[float]], metrics: Metrics, last: bool) -> None:
        """Note what a forward and backward pass says of the updates.

        Args:
            measured (`dict`): the metrics, or nothing where the pass had no token to train on.
            metrics (`dict`): gets the symptoms.
            last (`bool`): whether it is the last pass over the rollout batch.
        """
        for name in UPDATE_METRICS:
            if measured.get(name):
                self.update_metrics.setdefault(name, []).append(measured[name][-1])
        if last:
            seen = {name: sum(values) / len(values) for name, values in self.update_metrics.items()}
            self.update_metrics = {}
            self._report_failures(
                self.failure_detector.record_updates(seen) if seen else [], rollout_batch, seen, metrics
            )

    def _report_failures(self, news: list[str], rollout_batch: int, seen: dict[str, float], metrics: Metrics) -> None:
        """Log the symptoms that hold, and say what is new."""
        for name in self.failure_detector.active_failures:
            metrics[f"warning/{name}"].append(1.0)
        for name in news:
            batches = self.failure_detector.consecutive_batches[name]
            warn_of_failure(
                name, f"rollout batch {rollout_batch}", seen, batches, self.failure_detector.any_rewarded, self.args
            )

    def after_training(self, rollout_batch: int, inside: bool) -> None:
        """Probe the last weights, whatever the cadence, but not `inside` a rollout batch.

        Raises:
            UserError: if no answer of the run has been graded: its model must not pass for a trained one.
        """
        if self.probe_interval and self.probe_set and not inside:
            self._run_probe(rollout_batch, None)
        if self.failure_detector.has_never_graded:
            raise UserError(
                f"no answer of {self.failure_detector.num_batches} rollout batches was graded, every reward was None, NaN or infinite: "
                "the model has learned nothing; look at what the reward function returns"
            )

    def choose_auto_layer(self, answers: PromptCompletionIds, updates: int) -> None:
        """`internal_layer: auto` of a run of so many updates, on the first rollout batch's answers of this process. Also
        written to `boundary.json`."""
        tokens, gather = BOUNDARY_TOKENS // self.accelerator.num_processes, gather_object
        if uses_fsdp(self.accelerator):  # all have to run the same passes
            answers, gather = gather_object(take_first_answers(answers, tokens)), list
            tokens = sum(len(answer) for _, answer in answers)
        lens, temperature = self.args.internal_lens, self.args.temperature

        def measured() -> dict:
            with eval_mode(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return find_boundary_layer(self.stream, answers, lens, temperature, tokens=tokens, gather=gather)

        found = run_inside_forward(self.model, measured)
        batches = self.args.count_rollout_batches(updates)
        self.schedule = self.schedule.resolve_auto(found["boundary_layer"], recommend_first_phase_batches(batches))
        lengths = {"rollout_batches": batches, "recommended_steps": recommend_first_phase_batches(batches)}
        self.auto_layer_result = found | lengths | {"internal_steps": self.schedule.batches}
        self.accelerator.print(f"internal_layer auto: {found['explanation']}")
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
        """Whether there is a probe set."""
        return self.probe_interval != 0

    def _select_probe_set(self, answers: PromptCompletionIds) -> None:
        """The probe set: answers to different prompts, cut to a length, the same on every process."""
        share = math.ceil(self.args.probe_answers / self.accelerator.num_processes)
        mine = [(prompt, answer[:MAX_PROBE_TOKENS]) for prompt, answer in answers[:share]]
        self.probe_set = gather_object(mine)[: self.args.probe_answers]
        if not self.probe_set:
            return
        layers = self._get_probed_layers()
        if self.probe_interval is None:
            tokens = sum(len(prompt) + len(answer) for prompt, answer in answers)
            self.probe_interval = (
                get_default_probe_interval(self.stream, self.probe_set, layers, tokens) if layers else 0
            )
            self.probe_interval = broadcast_object_list([self.probe_interval])[0]
        if self._has_probe_set and self.accelerator.is_main_process:
            self.dynamics.write_probe_set(self.probe_set, self.decode)

    def _get_probed_layers(self) -> list[int]:
        """The layers of the first phase, or, without one, the layer that is named all the same."""
        named = self.args.internal_layer
        return self.schedule.layers or ([named] if isinstance(named, int) else [])

    def _is_probe_due(self, rollout_batch: int) -> bool:
        return bool(self.probe_interval and self.probe_set and (rollout_batch - 1) % self.probe_interval == 0)

    def _run_probe(self, rollout_batch: int, metrics: Metrics | None) -> list[dict]:
        """Measure, write, log."""
        started = perf_counter()
        layers = self._get_probed_layers()

        def measured() -> list[dict]:
            with eval_mode(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return probe_layers(self.stream, self.probe_set, layers, self.args.internal_lens, self.args.temperature)

        rows = broadcast_object_list([run_inside_forward(self.model, measured)])[0]
        if self.accelerator.is_main_process:
            self.dynamics.add_rows(rollout_batch - 1, rows)
        stage = self.schedule.get_stage(rollout_batch)
        layer = stage.layer if stage else (layers[-1] if layers else None)
        if metrics is not None:
            for name, value in _average_by_measure(rows, layer).items():
                metrics[f"probe/{name}"].append(value)
            metrics["probe/time"].append(perf_counter() - started)
        return rows

    # -- guard -------------------------------------------------------------------------------------------------------

    def _get_stage_parameters(self, place: int) -> list[torch.nn.Parameter]:
        """Parameters that a stage moves, as this process holds them."""
        layer = self.schedule.stages[place].layer
        assert layer is not None, "the guard watches layers that are known"
        reshard_model(self.model)
        return get_parameters_up_to(self.stream, layer, self.args.internal_lens == "final_norm", self.model)

    def _restore_best_weights(self, rollout_batch: int, optimizer, why: str) -> None:
        """Put the best weights back, and end the stage if it has not ended by itself."""
        stage, best = self.schedule.stages[self.monitored_stage], self.early_stopping.best_batch + 1
        done = len(self.early_stopping.rewards)
        moved = self._get_stage_parameters(self.monitored_stage)
        if deepspeed.uses_deepspeed(self.accelerator):
            deepspeed.restore_weights(moved, self.best_weights, optimizer, stage.layer)
        else:
            restore_weights(moved, self.best_weights, getattr(optimizer, "optimizer", optimizer))
        if self.schedule.get_stage_index(rollout_batch) == self.monitored_stage:
            self.schedule = self.schedule.end_stage_before(rollout_batch)
        self.accelerator.print(
            f"guard: {why}; layer {stage.layer} is left after {done} of {stage.batches} rollout batches, and the run goes on "
            f"from the weights that sampled the {best}{_get_ordinal_suffix(best)}"
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint must hold. Every process has to ask."""
        return {
            "schedule": self.schedule.state(),
            "every": self.probe_interval,
            "answers": [(list(prompt), list(answer)) for prompt, answer in self.probe_set],
            "guard": asdict(self.early_stopping),
            "guarded": self.monitored_stage,
            "kept": gather_full(self._get_stage_parameters(self.monitored_stage), self.best_weights)
            if self.best_weights
            else [],
            "series": self.dynamics.state(),
            "boundary": json.dumps(self.auto_layer_result),
            "symptoms": self.failure_detector.state(),
            "updates": self.update_metrics,
        }

    def load(self, state: dict, rollout_batch: int) -> None:
        """Go on from a checkpoint's state. The options decide how often is probed, if they say."""
        self.schedule = PhaseSchedule.load(state["schedule"])
        self.probe_interval = state["every"] if self.args.probe_every is None else self.args.probe_every
        self.monitored_stage = state["guarded"]
        guard = state["guard"] | {"rewards": [tuple(pair) for pair in state["guard"]["rewards"]]}
        self.early_stopping, self.best_weights = EarlyStoppingMonitor(**guard), []
        if state["kept"]:
            self.best_weights = to_shards(self._get_stage_parameters(self.monitored_stage), state["kept"])
        self.failure_detector, self.update_metrics = FailureDetector(**state["symptoms"]), state["updates"]
        kept = state["answers"] if self._has_probe_set else []
        self.probe_set = [(list(prompt), list(answer)) for prompt, answer in kept]
        if self.probe_set and self.accelerator.is_main_process:
            self.dynamics.load(state["series"])
            self.dynamics.write_probe_set(self.probe_set, self.decode)
        self.auto_layer_result = json.loads(state["boundary"])
        self._write_auto_layer()


def _make_row(measure: str, value: float) -> dict:
    return {"measure": measure, "layer": None, "later_layer": None, "value": value}


def _average_by_measure(rows: Sequence[dict], layer: int | None) -> dict[str, float]:
    """Of the language model policy and of one layer; over the later layers, their mean."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["layer"] in (None, layer):
            found.setdefault(row["measure"], []).append(row["value"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _get_ordinal_suffix(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
