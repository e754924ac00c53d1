"""The configuration of a run: GRPOConfig and what BuPO adds."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from trl import GRPOConfig

from bupo.models.internal_policy import Lens
from bupo.options.ranges import NON_NEGATIVE, POSITIVE_INTEGER, check_choice, check_number
from bupo.run_files.provenance import drop_secrets
from bupo.training.objective.advantages import CRITIC_ESTIMATORS, ESTIMATORS
from bupo.training.objective.phases import PhaseSchedule, Stage
from bupo.training.trl_internals import get_accepted_values
from bupo.training.validation.option_ranges import check_training_options
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

InternalModule = Literal["layer", "attn", "ffn"]
InternalObjective = Literal["layer", "frozen_upper", "shuffled_vocab"]
CriticBackbone = Literal["copy", "shared"]
AUTO, DEFAULT_INTERNAL_STEPS = "auto", 20


@dataclass
class BuPOConfig(GRPOConfig):
    """The first phase, and the methods it is compared with: what [`~bupo.BuPOTrainer`] has besides [`~trl.GRPOConfig`].

    All of GRPOConfig's options are here too. It differs from its defaults in three entries: one log a rollout batch, no
    dropout, and without an accelerator `use_cpu` and no `bf16`, so that a CPU trains in fp32, alone or under a launcher.

    Parameters:
        internal_layer (`int` or `"auto"`, *optional*):
            Layer l whose policy `softmax(H^l E_u^T)` the first phase optimises, counted from 1. `auto` measures the
            boundary layer on the first rollout batch, and stops before training where there is none. Required unless
            `internal_steps` is 0.
        internal_steps (`int`, *optional*):
            Length of the first phase (s_inter of the paper), in rollout batches, whatever the number of optimizer
            updates a batch is used for. 0 is no first phase. By default 20, and with `internal_layer` `auto` what is
            recommended for the run's length ([`~bupo.training.objective.phases.recommend_first_phase_batches`]).
        internal_schedule (`list[list[int]]`, *optional*):
            A first phase of several stages, `[[layer, rollout batches], ...]`, instead of the two above.
        internal_objective (`str`, *optional*, defaults to `"layer"`):
            What the first phase optimises: the layer's policy (`layer`, the paper's eq. 9), or for comparison the language
            model policy with all above the layer kept still (`frozen_upper`), or the layer's policy over a vocabulary in a
            random order, a target that says nothing of the answer (`shuffled_vocab`).
        internal_fade_batches (`int`, *optional*, defaults to `0`):
            Rollout batches after the first phase in which the loss passes over in equal steps from the objective of the last
            layer to the language model policy's. 0 is the paper's eq. 10, which changes at once.
        internal_loss_weight (`float`, *optional*, defaults to `0.0`):
            Weight that the layer's objective keeps in the loss after the first phase, at least; with `internal_steps` 0, in
            the whole run.
        internal_module (`str`, *optional*, defaults to `"layer"`):
            The internal policy: the layer's, or that of its attention's or FFN's write (`attn`, `ffn`; eq. 6).
        internal_lens (`str`, *optional*, defaults to `"raw"`):
            What stands between the layer's states and the unembedding: nothing (`raw`, the paper's) or the model's
            final norm (`final_norm`, the logit lens).
        internal_early_stopping (`bool`, *optional*, defaults to `True`):
            End a stage of the first phase early when it harms the model, and go on from its best weights
            ([`~bupo.training.callbacks.early_stopping.EarlyStoppingMonitor`]).
        probe_every (`int`, *optional*):
            Rollout batches between two probes. By default as often as 3 % of a batch's arithmetic allows while
            there is a layer to look at; 0 is never.
        probe_answers (`int`, *optional*, defaults to `8`):
            Answers of the probe set, taken from the first rollout batch.
        eval_benchmarks (`list[str]`, *optional*):
            Benchmarks to evaluate on while the run goes, as `bupo eval --benchmarks` names them
            ([`~bupo.training.callbacks.benchmark_evaluation.BenchmarkCallback`]).
        eval_every (`int`, *optional*, defaults to `10`):
            Rollout batches between two of these evaluations; there is one before training and one after it too.
        eval_k (`int`, *optional*, defaults to `4`), eval_problems (`int`, *optional*):
            Answers a problem, and the first so many problems of each benchmark.
        advantage_estimator (`str`, *optional*, defaults to `"grpo"`):
            `grpo` (TRL's), `rloo`, `reinforce++` or `ppo`.
        critic_backbone (`str`, *optional*, defaults to `"copy"`):
            PPO's value head stands on a copy of the model (`copy`), or on the policy's own states (`shared`).
        vf_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the value loss in the policy's, with a shared backbone.
        critic_learning_rate, cliprange_value, gamma, lam (`float`, *optional*, defaults to `1e-5`, `0.5`, `1.0`, `1.0`):
            PPO's critic and its advantages.
        frozen_up_to_layer (`int`, *optional*):
            Freeze layers 1 to this (a baseline of table 11).
        slow_above_layer (`int`, *optional*), slow_factor (`float`, *optional*, defaults to `0.1`):
            Train the layers above this, and the final norm, at `slow_factor` times the learning rate (table 11).
        layer_rates (`list[float]`, *optional*):
            A factor of the learning rate for each layer, from the first to the last, instead of these three. 0 keeps a layer
            still, and the first one's also the embedding, where it is not the unembedding too.
        fp32_master_weights (`bool`, *optional*, defaults to `True`):
            Keep what trains of a model in 16 bits in fp32, and compute in its 16 bits by autocast
            ([`bupo.training.precision`]). False trains the 16-bit weights, in which small updates are lost.
        disable_dropout (`bool`, *optional*):
            By default dropout is off, with a warning if there was any: ratios start at 1. False keeps it.
        logging_steps (`float`, *optional*):
            Optimizer updates between two logs. By default those of one rollout batch, so that every log holds a reward
            and one phase.
    """

    internal_layer: int | str | None = field(
        default=None,
        metadata={"help": "Layer whose policy the first phase optimises, counted from 1, or `auto`."},
    )
    internal_steps: int | None = field(
        default=None,
        metadata={
            "help": "Length of the first phase (s_inter) in rollout batches: by default 20, with `auto` a tenth of the run "
            "and 30 at most. 0 is no first phase."
        },
    )
    internal_schedule: list | str | None = field(
        default=None,
        metadata={"help": "Stages of the first phase, such as [[6, 20], [12, 10]]: layer, rollout batches."},
    )
    internal_objective: InternalObjective = field(
        default="layer",
        metadata={
            "help": "What the first phase optimises: the layer's policy, or as a control the language model policy with all "
            "above the layer kept still (`frozen_upper`), or the layer's over a shuffled vocabulary (`shuffled_vocab`).",
            "choices": get_args(InternalObjective),
        },
    )
    internal_fade_batches: int = field(
        default=0,
        metadata={"help": "Rollout batches after the first phase in which the layer's objective fades out."},
    )
    internal_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight that the layer's objective keeps after the first phase, below 1."}
    )
    internal_module: InternalModule = field(
        default="layer",
        metadata={
            "help": "The internal policy: the layer's, its attention's or its FFN's.",
            "choices": get_args(InternalModule),
        },
    )
    internal_lens: Lens = field(
        default="raw",
        metadata={
            "help": "What stands between the layer's states and the unembedding: nothing (`raw`) or the model's final "
            "norm (`final_norm`).",
            "choices": ["raw", "final_norm"],
        },
    )
    internal_early_stopping: bool = field(
        default=True,
        metadata={"help": "End the first phase early when it harms the model, and go on from its best weights."},
    )
    probe_every: int | None = field(
        default=None,
        metadata={"help": "Rollout batches between two probes; by default as 3 %% of the arithmetic allows. 0: never."},
    )
    probe_answers: int = field(default=8, metadata={"help": "Answers of the probe set."})
    eval_benchmarks: list[str] | None = field(
        default=None,
        metadata={"help": "Evaluate on these while the run goes: names as of bupo eval --benchmarks."},
    )
    eval_every: int = field(default=10, metadata={"help": "Rollout batches between two of these evaluations."})
    eval_k: int = field(default=4, metadata={"help": "Answers a problem in them."})
    eval_problems: int | None = field(default=None, metadata={"help": "The first so many problems of each."})
    advantage_estimator: str = field(
        default="grpo",
        metadata={"help": "How rewards become advantages.", "choices": list(ESTIMATORS)},
    )
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "AdamW's of PPO's critic, constant."})
    critic_backbone: CriticBackbone = field(
        default="copy",
        metadata={
            "help": "PPO's value head: on a copy of the model, or on the policy's own.",
            "choices": get_args(CriticBackbone),
        },
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss with a shared backbone."})
    cliprange_value: float = field(default=0.5, metadata={"help": "Largest change of a value that its loss rewards."})
    gamma: float = field(default=1.0, metadata={"help": "Discount of GAE."})
    lam: float = field(default=1.0, metadata={"help": "Lambda of GAE."})
    frozen_up_to_layer: int | None = field(default=None, metadata={"help": "Freeze layers 1 to this."})
    slow_above_layer: int | None = field(
        default=None, metadata={"help": "Train the layers above this at slow_factor times the learning rate."}
    )
    slow_factor: float = field(default=0.1, metadata={"help": "For slow_above_layer."})
    layer_rates: list[float] | None = field(
        default=None,
        metadata={"help": "A factor of the learning rate for each layer, from the first on; 0 keeps it still."},
    )
    fp32_master_weights: bool = field(
        default=True,
        metadata={
            "help": "Train a 16-bit model's weights in fp32, and compute in its 16 bits by autocast. False: the 16-bit "
            "weights themselves, in which small updates are lost."
        },
    )
    disable_dropout: bool | None = field(
        default=None,
        metadata={"help": "Dropout while training: off by default, with a warning if there was any; false keeps it."},
    )
    logging_steps: float | None = field(
        default=None,
        metadata={"help": "Log every X optimizer updates; by default once a rollout batch."},
    )

    def __copy__(self) -> "BuPOConfig":
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        """What `training_args.bin` of a checkpoint holds: no token."""
        return drop_secrets(self.__dict__)

    def __post_init__(self):
        self._parse_strings()
        check_training_options(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate looks for CPU processes under a launcher only when told
            self.dataloader_pin_memory = False
            self.bf16 = bool(self.bf16)  # type: ignore[has-type]
        self._check_layer_rates()
        self._check_internal_phase()
        self._check_method()
        once_a_rollout = self.logging_steps is None
        if once_a_rollout:
            self.logging_steps = 1
        with wrap_library_errors(_describe_refusal):
            super().__post_init__()
        micro_steps = self.steps_per_generation * self.num_iterations
        if (
            self.phase_schedule.stages or self.internal_fade_batches
        ) and micro_steps % self.gradient_accumulation_steps:
            raise UserError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide the {micro_steps} "
                "micro-batches of a rollout batch (steps_per_generation x num_iterations): an update would mix two phases"
            )
        if once_a_rollout:
            self.logging_steps = max(
                1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps
            )

    def _parse_strings(self) -> None:
        """Values as a command line and a YAML file give them, in the types that are looked for later."""
        layer = self.internal_layer
        if isinstance(layer, str) and layer.removeprefix("-").isdecimal():
            self.internal_layer = int(layer)
        scale = self.scale_rewards  # type: ignore[has-type]
        self.scale_rewards = {"true": "group", "false": "none"}.get(str(scale).lower(), scale)
        for name in ("temperature", "repetition_penalty"):  # transformers refuses 2 for 2.0, once it samples
            if type(getattr(self, name)) is int:
                setattr(self, name, float(getattr(self, name)))
        if isinstance(self.resume_from_checkpoint, bool):  # type: ignore[has-type]  # from Python
            self.resume_from_checkpoint = str(self.resume_from_checkpoint).lower()  # type: ignore[has-type]
        if self.top_k == -1 and not self.use_vllm:  # type: ignore[has-type]
            self.top_k = 0  # off: -1 is vLLM's word for it

    @property
    def first_phase(self): return self.phase_schedule  # TEMPORARY

    @property
    def phase_schedule(self) -> PhaseSchedule:
        """The stages that the options ask for. A layer and a length that `auto` has still to choose are None."""
        if self.internal_schedule is not None:
            return PhaseSchedule.parse(self.internal_schedule)
        if self.internal_steps == 0:
            return PhaseSchedule()
        if self.internal_layer == AUTO:
            return PhaseSchedule((Stage(None, self.internal_steps),))
        steps = DEFAULT_INTERNAL_STEPS if self.internal_steps is None else self.internal_steps
        return PhaseSchedule((Stage(cast(int, self.internal_layer), steps),))

    @property
    def has_auxiliary_objective(self) -> bool:
        """Whether rollout batches are to optimise a layer's policy and the language model policy at once."""
        return bool(self.internal_fade_batches or self.internal_loss_weight)

    def count_rollout_batches(self, updates: int) -> int:
        """The rollout batches that so many optimizer updates take."""
        return math.ceil(updates * self.gradient_accumulation_steps / (self.steps_per_generation * self.num_iterations))

    def _check_internal_phase(self) -> None:
        if self.internal_layer not in (None, AUTO):
            check_number("internal_layer", self.internal_layer, POSITIVE_INTEGER, "a layer from 1 up, or auto")
        if self.internal_schedule is not None and self.internal_layer is not None:
            raise UserError(
                "both internal_schedule and internal_layer are set: a schedule names its layers, leave internal_layer out"
            )
        if self.internal_schedule is not None:
            stages = PhaseSchedule.parse(self.internal_schedule).stages
            self.internal_schedule = [[stage.layer, stage.batches] for stage in stages]
        elif self.internal_steps != 0 and self.internal_layer is None:
            raise UserError(
                "internal_layer is not set: choose the layer whose policy the first phase optimises (1 to the model's "
                "number of layers, or auto), or set internal_steps to 0 for no first phase"
            )
        elif self.internal_steps == 0 and self.internal_layer == AUTO:
            raise UserError(
                "internal_layer auto chooses the layer of a first phase, and internal_steps is 0: leave one out"
            )
        self._check_first_phase()

    def _check_first_phase(self) -> None:
        if self.internal_objective == "frozen_upper" and self.internal_module != "layer":
            raise UserError(
                f"internal_objective frozen_upper optimises no internal policy, and internal_module is {self.internal_module}: leave "
                "one out"
            )
        if self.has_auxiliary_objective:
            self._check_auxiliary_objective()
        named = [self.internal_layer] if self.has_auxiliary_objective and isinstance(self.internal_layer, int) else []
        lowest = min([*self.phase_schedule.layers, *named], default=None)
        if lowest and self.frozen_up_to_layer and self.frozen_up_to_layer >= lowest:
            raise UserError(
                f"frozen_up_to_layer={self.frozen_up_to_layer} leaves the first phase on layer {lowest} no layer to train"
            )
        if lowest and self.layer_rates and not any(self.layer_rates[:lowest]):
            raise UserError(
                f"layer_rates leaves the first phase on layer {lowest} no layer to train: all up to it are 0"
            )
        # layers above l have no gradient in the first phase, which DDP must be told to expect
        if self.phase_schedule.stages and self.ddp_find_unused_parameters is None:  # type: ignore[has-type]
            self.ddp_find_unused_parameters = True

    def _check_layer_rates(self) -> None:
        if self.layer_rates is None:
            return
        for rate in self.layer_rates:
            check_number("layer_rates", rate, NON_NEGATIVE)
        for name in ("frozen_up_to_layer", "slow_above_layer"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"both layer_rates and {name} are set: layer_rates has a factor for each layer, leave {name} out"
                )

    def _check_auxiliary_objective(self) -> None:
        """Refuse what cannot stand in one loss with a layer's objective."""
        option = "internal_fade_batches" if self.internal_fade_batches else "internal_loss_weight"
        if not self.phase_schedule.stages and self.internal_layer is None:
            raise UserError(f"{option}={getattr(self, option)} needs a layer: set internal_layer, or leave it out")
        if self.internal_objective == "frozen_upper":
            raise UserError(
                f"internal_objective frozen_upper optimises no internal policy, which {option} adds: leave one out"
            )
        if self.advantage_estimator in CRITIC_ESTIMATORS:
            raise UserError(
                f"{option} adds a second policy's loss, and advantage_estimator {self.advantage_estimator} has the critic of "
                "one: leave one out"
            )
        if self.use_adaptive_entropy:
            raise UserError(
                f"use_adaptive_entropy follows the entropy of one policy, and {option} trains two: leave one out"
            )

    def _check_method(self) -> None:
        for name in ("loss_type", "importance_sampling_level"):
            if words := get_accepted_values(name):  # any, where they are not known
                check_choice(name, getattr(self, name), words)
        if self.sync_ref_model and self.beta == 0:
            raise UserError(
                "sync_ref_model true needs a reference model, and beta is 0: set beta above 0, or leave it out"
            )
        if self.advantage_estimator in CRITIC_ESTIMATORS and self.fp16:
            raise UserError(
                f"advantage_estimator {self.advantage_estimator} has no loss scaling for its critic: use bf16 or neither, "
                "not fp16"
            )
        if ESTIMATORS[self.advantage_estimator] is not None:
            self._check_non_grpo_estimator()

    def _check_non_grpo_estimator(self) -> None:
        """Refuse what only GRPO's estimator, TRL's, looks at."""
        if self.scale_rewards not in ("group", True):
            raise UserError(
                f"scale_rewards={self.scale_rewards!r} is grpo's: advantage_estimator {self.advantage_estimator} does not "
                "use it"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise UserError(
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} is grpo's: advantage_estimator "
                f"{self.advantage_estimator} sums weighted rewards"
            )


def _describe_refusal(error: Exception) -> str:
    """TRL's words for what it refuses, and what other libraries say under it."""
    return (
        str(error)
        if isinstance(error, ValueError) and str(error)
        else f"the run cannot be set up: {summarize_error(error)}"
    )
