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

from bupo.models.metadata import model_meta
from bupo.models.residual_stream import ResidualStream, evaluating
from bupo.training.callbacks.early_stopping import Guard, restore, snapshot
from bupo.training.callbacks.failure_detection import Symptoms
from bupo.training.callbacks.probe_series import Dynamics
from bupo.training.callbacks.probes import ANSWER_TOKENS, Answers, default_cadence, probe
from bupo.training.config import BuPOConfig
from bupo.training.distributed import deepspeed
from bupo.training.distributed.fsdp2 import joined, parted, sharded_again, shards
from bupo.training.failure_messages import warn
from bupo.training.objective.advantages import BY_GROUP
from bupo.training.objective.auto_layer import TOKENS as BOUNDARY_TOKENS
from bupo.training.objective.auto_layer import boundary_layer, said_of_length, up_to
from bupo.training.objective.layer_parameters import moved_by
from bupo.training.objective.phases import Mixed, Schedule, recommended
from bupo.training.objective.policy_head import within
from bupo.utils.errors import UserError
from bupo.utils.files import make_folder, write_json

logger = get_logger(__name__)

BOUNDARY_FILE = "boundary.json"
# metrics of a rollout batch and of a pass that symptoms are told by
SAMPLED = ("reward", "reward_std", "frac_reward_zero_std", "completions/clipped_ratio", "completions/mean_length")
UPDATED = ("entropy", "kl", "kl_old")

Metrics = dict[str, list[float]]


class Watch:
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
        schedule ([`~bupo.training.objective.phases.Schedule`]): the first phase, as far as `auto` and the guard have decided it.
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
        self.schedule: Schedule = args.first_phase
        self.every = args.probe_every  # None: once the probe set is known
        self.guarding = args.internal_guard and bool(self.schedule.stages)
        meta: dict = {"seed": args.seed}
        if stream is None:
            self.every = 0
        else:
            name = stream.config.name_or_path or type(stream.model).__name__
            meta = model_meta(name, stream, args.internal_lens, args.temperature) | meta
        self.dynamics = Dynamics(args.output_dir, meta)
        self.answers: Answers = []
        self.guard, self.guarded = Guard(), 0  # of the stage in this place of the schedule
        self.kept: list[torch.Tensor] = []
        self.boundary: dict | None = None  # what `auto` found
        self.positions, self.symptoms = positions, Symptoms()
        self.updates: dict[str, list[float]] = {}  # of the rollout batch that is being trained on

    @property
    def stream(self) -> ResidualStream:
        """The model's, for what looks at layers."""
        assert self._stream is not None, "without a stream nothing looks at layers"
        return self._stream

    def mixed(self, rollout_batch: int) -> Mixed | None:
        """The layer that a rollout batch optimises besides the language model policy, and its weight; None where it optimises
        one policy."""
        weight = self.schedule.weight(rollout_batch, self.args.internal_handover, self.args.internal_mix)
        layer = self.schedule.stages[-1].layer if self.schedule.stages else self.args.internal_layer
        return Mixed(layer, weight) if isinstance(layer, int) and 0 < weight < 1 else None

    def optimised(self, rollout_batch: int) -> str:
        """Which policy a rollout batch optimises, in words."""
        stage = self.schedule.stage(rollout_batch)
        if stage is None:
            mixed = self.mixed(rollout_batch)
            return f"the whole policy and that of layer {mixed.layer}" if mixed else "the whole policy"
        layer = stage.layer or "auto"
        if self.args.internal_objective == "policy":
            return f"the whole policy, by layers up to {layer}"
        return f"the policy of layer {layer}"

    # -- around a rollout batch --------------------------------------------------------------------------------------

    def before_rollouts(self, rollout_batch: int, optimizer: torch.optim.Optimizer, metrics: Metrics) -> None:
        """Probe the weights that are about to sample, and end the stage if it has turned."""
        rows = self._probe(rollout_batch, metrics) if rollout_batch > 1 and self._due(rollout_batch) else []
        if not (self.guarding and self.guard.rewards and self.kept):
            return
        self._show_guard(rows)
        why = self.guard.turned()
        if why:
            self._go_back(rollout_batch, optimizer, why)
            metrics["internal/ended_by_guard"].append(1.0)
        place = self.schedule.place(rollout_batch)
        if why or place != self.guarded:  # the next stage has a record of its own
            self.guard, self.kept = Guard(), []
            self.guarded = self.guarded if place is None else place
            if place is not None and not why:  # else the weights are no longer those that were probed
                self._show_guard(rows)

    def _show_guard(self, rows: Sequence[dict]) -> None:
        """Give the guard what a probe says of the layer that it watches."""
        if rows and self.guarding and self.schedule.stages:
            values = _means(rows, self.schedule.stages[self.guarded].layer)
            self.guard.see_probe(values["perplexity"], values.get("kl", values["kl_language_model"]))

    def after_rollouts(self, rollout_batch: int, answers: Answers, rewards: torch.Tensor, metrics: Metrics) -> None:
        """Note what a rollout batch says of the weights that sampled it.

        Args:
            answers (`list`): of this process, one of each prompt first.
            rewards (`torch.Tensor` of shape `(answers,)`): of all processes, groups of a prompt one after another.
        """
        if not self.answers and self._keeps_answers:  # of the first rollout batch, if it has any
            self._choose_answers(answers)
            if self._due(rollout_batch):
                self._show_guard(self._probe(rollout_batch, metrics))
        if self._due(rollout_batch) and self.accelerator.is_main_process:
            rows = [("response_length", metrics["completions/mean_length"][-1])]
            rows += [("repetition", metrics["completions/repetition"][-1]), ("reward", metrics["reward"][-1])]
            self.dynamics.add(rollout_batch - 1, [_row(name, value) for name, value in rows if math.isfinite(value)])
        place = self.schedule.place(rollout_batch)
        if self.guarding and place is not None:
            self.guarded = place
            by_prompt = rewards.view(-1, self.args.num_generations).nanmean(1)
            by_prompt = by_prompt[~by_prompt.isnan()]
            error = (by_prompt.std() / math.sqrt(len(by_prompt))).item() if len(by_prompt) > 1 else math.inf
            reward = by_prompt.mean().item() if len(by_prompt) else math.nan
            if self.guard.see_rollouts(reward, error, metrics["completions/clipped_ratio"][-1]):
                take = deepspeed.snapshot if deepspeed.partitions(self.accelerator) else snapshot
                self.kept = take(self._moved(place))
        self._see_rollouts(rollout_batch, answers, rewards, metrics)

    def _see_rollouts(self, rollout_batch: int, answers: Answers, rewards: torch.Tensor, metrics: Metrics) -> None:
        longest = torch.tensor([max((len(prompt) for prompt, _ in answers), default=0)], device=rewards.device)
        seen = {name: metrics[name][-1] for name in SAMPLED}
        if self.args.advantage_estimator not in BY_GROUP:  # compares prompts too
            seen["frac_reward_zero_std"] = float(seen["reward_std"] == 0)
        seen["graded"] = rewards.isfinite().float().mean().item()
        seen["tokens"] = self.accelerator.gather(longest).max().item() + self.args.max_completion_length
        seen["positions"] = self.positions
        self._tell(self.symptoms.see_rollouts(seen), rollout_batch, seen, metrics)

    def after_pass(self, rollout_batch: int, measured: Mapping[str, list[float]], metrics: Metrics, last: bool) -> None:
        """Note what a forward and backward pass says of the updates.

        Args:
            measured (`dict`): the metrics, or nothing where the pass had no token to train on.
            metrics (`dict`): gets the symptoms.
            last (`bool`): whether it is the last pass over the rollout batch.
        """
        for name in UPDATED:
            if measured.get(name):
                self.updates.setdefault(name, []).append(measured[name][-1])
        if last:
            seen = {name: sum(values) / len(values) for name, values in self.updates.items()}
            self.updates = {}
            self._tell(self.symptoms.see_updates(seen) if seen else [], rollout_batch, seen, metrics)

    def _tell(self, news: list[str], rollout_batch: int, seen: dict[str, float], metrics: Metrics) -> None:
        """Log the symptoms that hold, and say what is new."""
        for name in self.symptoms.present:
            metrics[f"warning/{name}"].append(1.0)
        for name in news:
            batches = self.symptoms.in_a_row[name]
            warn(name, f"rollout batch {rollout_batch}", seen, batches, self.symptoms.rewarded, self.args)

    def after_training(self, rollout_batch: int, inside: bool) -> None:
        """Probe the last weights, whatever the cadence, but not `inside` a rollout batch.

        Raises:
            UserError: if no answer of the run has been graded: its model must not pass for a trained one.
        """
        if self.every and self.answers and not inside:
            self._probe(rollout_batch, None)
        if self.symptoms.never_graded:
            raise UserError(
                f"no answer of {self.symptoms.batches} rollout batches was graded, every reward was None, NaN or infinite: "
                "the model has learned nothing; look at what the reward function returns"
            )

    def decide(self, answers: Answers, updates: int) -> None:
        """`internal_layer: auto` of a run of so many updates, on the first rollout batch's answers of this process. Also
        written to `boundary.json`."""
        tokens, gather = BOUNDARY_TOKENS // self.accelerator.num_processes, gather_object
        if shards(self.accelerator):  # all have to run the same passes
            answers, gather = gather_object(up_to(answers, tokens)), list
            tokens = sum(len(answer) for _, answer in answers)
        lens, temperature = self.args.internal_lens, self.args.temperature

        def measured() -> dict:
            with evaluating(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return boundary_layer(self.stream, answers, lens, temperature, tokens=tokens, gather=gather)

        found = within(self.model, measured)
        batches = self.args.rollout_batches(updates)
        self.schedule = self.schedule.decided(found["boundary_layer"], recommended(batches))
        lengths = {"rollout_batches": batches, "recommended_steps": recommended(batches)}
        self.boundary = found | lengths | {"internal_steps": self.schedule.batches}
        self.accelerator.print(f"internal_layer auto: {found['explanation']}")
        self.accelerator.print(said_of_length(self.boundary))
        self._write_boundary()

    def _write_boundary(self) -> None:
        if self.boundary and self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            make_folder(folder)
            write_json(folder / BOUNDARY_FILE, self.boundary)

    # -- probes ------------------------------------------------------------------------------------------------------

    @property
    def _keeps_answers(self) -> bool:
        """Whether there is a probe set."""
        return self.every != 0

    def _choose_answers(self, answers: Answers) -> None:
        """The probe set: answers to different prompts, cut to a length, the same on every process."""
        share = math.ceil(self.args.probe_answers / self.accelerator.num_processes)
        mine = [(prompt, answer[:ANSWER_TOKENS]) for prompt, answer in answers[:share]]
        self.answers = gather_object(mine)[: self.args.probe_answers]
        if not self.answers:
            return
        layers = self._layers()
        if self.every is None:
            tokens = sum(len(prompt) + len(answer) for prompt, answer in answers)
            self.every = default_cadence(self.stream, self.answers, layers, tokens) if layers else 0
            self.every = broadcast_object_list([self.every])[0]
        if self._keeps_answers and self.accelerator.is_main_process:
            self.dynamics.write_answers(self.answers, self.decode)

    def _layers(self) -> list[int]:
        """The layers of the first phase, or, without one, the layer that is named all the same."""
        named = self.args.internal_layer
        return self.schedule.layers or ([named] if isinstance(named, int) else [])

    def _due(self, rollout_batch: int) -> bool:
        return bool(self.every and self.answers and (rollout_batch - 1) % self.every == 0)

    def _probe(self, rollout_batch: int, metrics: Metrics | None) -> list[dict]:
        """Measure, write, log."""
        started = perf_counter()
        layers = self._layers()

        def measured() -> list[dict]:
            with evaluating(self.stream.model), torch.autocast(self.accelerator.device.type, enabled=False):
                return probe(self.stream, self.answers, layers, self.args.internal_lens, self.args.temperature)

        rows = broadcast_object_list([within(self.model, measured)])[0]
        if self.accelerator.is_main_process:
            self.dynamics.add(rollout_batch - 1, rows)
        stage = self.schedule.stage(rollout_batch)
        layer = stage.layer if stage else (layers[-1] if layers else None)
        if metrics is not None:
            for name, value in _means(rows, layer).items():
                metrics[f"probe/{name}"].append(value)
            metrics["probe/time"].append(perf_counter() - started)
        return rows

    # -- guard -------------------------------------------------------------------------------------------------------

    def _moved(self, place: int) -> list[torch.nn.Parameter]:
        """Parameters that a stage moves, as this process holds them."""
        layer = self.schedule.stages[place].layer
        assert layer is not None, "the guard watches layers that are known"
        sharded_again(self.model)
        return moved_by(self.stream, layer, self.args.internal_lens == "final_norm", self.model)

    def _go_back(self, rollout_batch: int, optimizer, why: str) -> None:
        """Put the best weights back, and end the stage if it has not ended by itself."""
        stage, best = self.schedule.stages[self.guarded], self.guard.best + 1
        done = len(self.guard.rewards)
        moved = self._moved(self.guarded)
        if deepspeed.partitions(self.accelerator):
            deepspeed.restore(moved, self.kept, optimizer, stage.layer)
        else:
            restore(moved, self.kept, getattr(optimizer, "optimizer", optimizer))
        if self.schedule.place(rollout_batch) == self.guarded:
            self.schedule = self.schedule.cut_short(rollout_batch)
        self.accelerator.print(
            f"guard: {why}; layer {stage.layer} is left after {done} of {stage.batches} rollout batches, and the run goes on "
            f"from the weights that sampled the {best}{_suffix(best)}"
        )

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        """What a checkpoint must hold. Every process has to ask."""
        return {
            "schedule": self.schedule.state(),
            "every": self.every,
            "answers": [(list(prompt), list(answer)) for prompt, answer in self.answers],
            "guard": asdict(self.guard),
            "guarded": self.guarded,
            "kept": joined(self._moved(self.guarded), self.kept) if self.kept else [],
            "series": self.dynamics.state(),
            "boundary": json.dumps(self.boundary),
            "symptoms": self.symptoms.state(),
            "updates": self.updates,
        }

    def load(self, state: dict, rollout_batch: int) -> None:
        """Go on from a checkpoint's state. The options decide how often is probed, if they say."""
        self.schedule = Schedule.load(state["schedule"])
        self.every = state["every"] if self.args.probe_every is None else self.args.probe_every
        self.guarded = state["guarded"]
        guard = state["guard"] | {"rewards": [tuple(pair) for pair in state["guard"]["rewards"]]}
        self.guard, self.kept = Guard(**guard), []
        if state["kept"]:
            self.kept = parted(self._moved(self.guarded), state["kept"])
        self.symptoms, self.updates = Symptoms(**state["symptoms"]), state["updates"]
        kept = state["answers"] if self._keeps_answers else []
        self.answers = [(list(prompt), list(answer)) for prompt, answer in kept]
        if self.answers and self.accelerator.is_main_process:
            self.dynamics.load(state["series"])
            self.dynamics.write_answers(self.answers, self.decode)
        self.boundary = json.loads(state["boundary"])
        self._write_boundary()


def _row(measure: str, value: float) -> dict:
    return {"measure": measure, "layer": None, "later_layer": None, "value": value}


def _means(rows: Sequence[dict], layer: int | None) -> dict[str, float]:
    """Of the language model policy and of one layer; over the later layers, their mean."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["layer"] in (None, layer):
            found.setdefault(row["measure"], []).append(row["value"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _suffix(number: int) -> str:
    return "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
