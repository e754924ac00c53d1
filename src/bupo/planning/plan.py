"""`bupo.plan`: what a run will need and take, before any weights are loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from trl import ModelConfig

from bupo.data.chat_templates import tokenize_prompt
from bupo.data.problems import FILE_FORMATS, is_procedural, load_problems
from bupo.models.loading import load_tokenizer
from bupo.options.groups import DTYPES
from bupo.options.ranges import check_choice, check_options
from bupo.planning.advice import MemoryAdvice, suggest_changes
from bupo.planning.flops import Flops, count_flops
from bupo.planning.memory import MemoryEstimate, compute_peak_memory
from bupo.planning.micro_batches import SequenceLengths
from bupo.planning.model_sizes import ModelSizes, build_meta_model, count_parameters
from bupo.planning.options import PlanOptions
from bupo.planning.planned_run import PhaseTarget, PlannedRun
from bupo.planning.runtime import RolloutBatchSeconds, describe_vllm_shortage, estimate_seconds
from bupo.training.config import BuPOConfig
from bupo.training.objective.phases import recommend_first_phase_batches
from bupo.training.train_data import TrainOptions
from bupo.training.validation.arguments import check_deepspeed, check_named_layers, get_pretrained_kwargs
from bupo.training.validation.option_ranges import MODEL_RANGES
from bupo.utils.errors import UserError

DEFAULT_PROMPT_TOKENS = 256  # where no data set is at hand
MAX_MEASURED_PROMPTS = 256  # prompts of a data set
MEAN_LENGTH_SHARE = 0.5  # an answer's tokens in the mean


@dataclass(frozen=True)
class PhasePlan:
    """Some rollout batches that optimise the same.

    Attributes:
        layer (`int`, *optional*): of the first phase's stage; None is the second phase.
        batches (`int`, *optional*): rollout batches; None where the run's length is not known.
        trained (`int`): parameters that move.
        flops ([`Flops`]): of a device and rollout batch.
        memory ([`MemoryEstimate`]): bytes of a device by part.
        seconds ([`RolloutBatchSeconds`]): of a rollout batch.
        besides (`int`, *optional*): a layer whose objective is mixed into the second phase's.
    """

    layer: int | None
    batches: int | None
    trained_parameters: int
    flops: Flops
    memory: MemoryEstimate
    seconds: RolloutBatchSeconds
    auxiliary_layer: int | None = None

    @property
    def name(self) -> str:
        if self.layer is not None:
            return f"phase 1, layer {self.layer}"
        return "phase 2" if self.auxiliary_layer is None else f"phase 2 + layer {self.auxiliary_layer}"


@dataclass(frozen=True)
class Plan:
    """What a run will need and take.

    Attributes:
        model (`str`), sizes ([`ModelSizes`]): what is trained.
        on ([`PlanOptions`]): the devices.
        answers, group (`int`), updates (`float`): of a rollout batch of all devices, answers, those to one prompt, and updates.
        phases (`list[PhasePlan]`): in their order.
        sampler (`str`, *optional*): what is said where vLLM has no room for one answer.
        advice ([`MemoryAdvice`], *optional*): what to change, where a device is too small.
        assumptions (`list[str]`): all that was not given.
    """

    model: str
    sizes: ModelSizes
    hardware: PlanOptions
    num_completions: int
    group_size: int
    updates: float
    phases: list[PhasePlan]
    vllm_shortage: str | None
    advice: MemoryAdvice | None
    assumptions: list[str]

    @property
    def bytes(self) -> float:
        """That a device must hold."""
        return max(phase.memory.bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.hardware.device_bytes and not self.vllm_shortage

    @property
    def seconds(self) -> float | None:
        """Of all rollout batches."""
        totals = [(phase.batches, phase.seconds.total) for phase in self.phases]
        known = [batches * total for batches, total in totals if batches is not None and total is not None]
        return sum(known) if len(known) == len(totals) else None


def plan(
    model: str,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    *,
    loading: ModelConfig | None = None,
    on: PlanOptions | None = None,
) -> Plan:
    """Count parameters, FLOPs, memory and time of a run of [`bupo.train`] from its options and the model's configuration.

    Args:
        model (`str`): as of [`load_model`]; its weights are not looked for.
        config ([`BuPOConfig`]), options ([`TrainOptions`], *optional*), loading (`ModelConfig`, *optional*): of the run.
        on ([`PlanOptions`], *optional*): devices, rates and lengths. Of a `generation_batch_size` that `config` was given, each
            of them has as many answers as the configuration's own process would.

    Raises:
        UserError: for what the run would refuse of a model, a layer or a sharding.
    """
    options, on = options or TrainOptions(), on or PlanOptions()
    setting, said = _resolve_planned_run(model, config, options, loading, on)
    batches, said_length = _count_rollout_batches(config, options, on)
    parts, said_stages = _plan_targets(setting, batches)
    phases = [_plan_phase(setting, target, length) for target, length in parts]
    assumed = [
        *on.describe_rates(setting.is_half_precision),
        *said,
        *said_length,
        *said_stages,
        *_describe_assumptions(setting),
    ]
    size = (setting.num_completions * on.num_processes, config.num_generations, setting.num_updates)
    found = Plan(model, setting.sizes, on, *size, phases, describe_vllm_shortage(setting), None, assumed)
    targets = [target for target, _ in parts]
    return replace(found, advice=suggest_changes(setting, targets)) if found.bytes > on.device_bytes else found


def resolve_planned_run(
    model: str,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    loading: ModelConfig | None = None,
    on: PlanOptions | None = None,
) -> PlannedRun:
    """What a plan counts from. Arguments as of [`plan`]."""
    return _resolve_planned_run(model, config, options or TrainOptions(), loading, on or PlanOptions())[0]


def _resolve_planned_run(
    model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig | None, on: PlanOptions
) -> tuple[PlannedRun, list[str]]:
    """And what was assumed of lengths."""
    loading = loading or ModelConfig()
    on.check()
    options.check()
    _check_loading(loading)
    read = check_named_layers(model, config, loading)
    if on.resolved_sharding.startswith("zero"):
        check_deepspeed(config)
    made = build_meta_model(model, read, config, loading)
    mean, longest, said = _estimate_lengths(model, config, options, loading, on)
    return PlannedRun(config, on, loading, made, count_parameters(made), mean, longest), said


def _plan_phase(setting: PlannedRun, target: PhaseTarget, batches: int | None) -> PhasePlan:
    layer, counted = target.layer, count_flops(setting, *target)
    times = estimate_seconds(setting, layer, counted)
    return PhasePlan(
        layer,
        batches,
        setting.count_trained_parameters(layer),
        counted,
        compute_peak_memory(setting, *target),
        times,
        target.auxiliary_layer,
    )


def _check_loading(loading: ModelConfig) -> None:
    """What a run refuses of how a model is loaded, before it looks for one."""
    check_options(loading, MODEL_RANGES)
    if loading.dtype is not None:
        check_choice("dtype", loading.dtype, DTYPES)
    if loading.load_in_4bit or loading.load_in_8bit:
        raise UserError(
            "load_in_4bit and load_in_8bit: a plan counts no quantised weights; leave it out to plan without"
        )


def _estimate_lengths(
    model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, on: PlanOptions
) -> tuple[SequenceLengths, SequenceLengths, list[str]]:
    """Of texts in the mean and at their longest, and what was assumed of them."""
    most = config.max_completion_length
    found = _measure_prompts(model, config, options, loading) if on.prompt_tokens is None else None
    said = []
    if on.prompt_tokens is not None:
        prompt = longest = on.prompt_tokens
    elif found:
        prompt, longest = round(sum(found) / len(found)), max(found)
        said.append(f"{prompt} tokens a prompt, the longest {longest}: the first {len(found)} of {options.dataset}")
    else:
        prompt = longest = DEFAULT_PROMPT_TOKENS
        said.append(f"{prompt} tokens a prompt: assumed, the data set is not looked at (--prompt_tokens)")
    limit = options.max_prompt_tokens
    if limit is not None:
        prompt, longest = min(prompt, limit), (min(longest, limit) if found else limit)
    answer = on.answer_tokens or max(1, round(MEAN_LENGTH_SHARE * most))
    if on.answer_tokens is None:
        said.append(f"{answer} tokens an answer in the mean: half of the longest, {most} (--answer_tokens)")
    elif answer > most:
        raise UserError(f"answer_tokens is {answer}, and max_new_tokens allows {most}: give as many or fewer")
    said.append(f"memory is for prompts of {longest} and answers of {most} tokens, all in one micro-batch")
    return SequenceLengths(prompt, answer), SequenceLengths(longest, most), said


def _measure_prompts(model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig) -> list[int] | None:
    """Tokens of the first prompts of a data set that is made, or a file. One of the hub is not asked for."""
    name = options.dataset
    if name is None or not (is_procedural(name) or Path(name).suffix in FILE_FORMATS):
        return None
    problems = load_problems(
        name,
        options.split,
        config=options.dataset_config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        system_prompt=options.system_prompt,
        size=min(options.size or MAX_MEASURED_PROMPTS, MAX_MEASURED_PROMPTS),
        seed=config.seed,
        needs_answers=False,  # only the prompts are looked at
    )
    tokenizer = load_tokenizer(model, **get_pretrained_kwargs(config, loading))
    kwargs = config.chat_template_kwargs or {}
    return [len(tokenize_prompt(tokenizer, prompt, **kwargs)) for prompt in problems["prompt"]]


def _count_rollout_batches(config: BuPOConfig, options: TrainOptions, on: PlanOptions) -> tuple[int | None, list[str]]:
    """Rollout batches of a run, if its options tell."""
    if config.max_steps > 0:
        return config.count_rollout_batches(config.max_steps), []
    if options.size is None:
        return None, ["the run's length is not known: it has no max_steps, and the data set no size"]
    answers = config.per_device_train_batch_size * config.steps_per_generation * on.num_processes
    prompts = answers // config.num_generations
    return max(1, int(config.num_train_epochs * (options.size // max(1, prompts)))), []


def _plan_targets(setting: PlannedRun, batches: int | None) -> tuple[list[tuple[PhaseTarget, int | None]], list[str]]:
    """What the run optimises and for how many rollout batches, as far as it comes; what `auto` chooses is assumed."""
    config, said = setting.config, []
    planned: list[tuple[PhaseTarget, int | None]] = []
    layer = config.internal_layer if isinstance(config.internal_layer, int) else None
    for stage in config.phase_schedule.stages:
        layer, length = stage.layer, stage.batches
        if layer is None:
            layer = max(1, setting.sizes.layers // 2)
            said.append(f"internal_layer auto: the middle layer, {layer}; the run will measure its own")
        if length is None:
            length = recommend_first_phase_batches(batches) if batches else None
        planned.append((PhaseTarget(layer), length))
    if config.has_auxiliary_objective:
        planned.append(
            (PhaseTarget(None, layer), None if config.internal_loss_weight else config.internal_fade_batches)
        )
    if not config.internal_loss_weight:
        planned.append((PhaseTarget(None), None))
    return _limit_to_run_length(planned, batches), said


def _limit_to_run_length(
    planned: list[tuple[PhaseTarget, int | None]], left: int | None
) -> list[tuple[PhaseTarget, int | None]]:
    """Those of a run of so many rollout batches; one without a length lasts to the end."""
    found = []
    for target, length in planned:
        if left is not None:
            length = left if length is None else min(length, left)
            left -= length
        if length != 0:
            found.append((target, length))
    return found


def _describe_assumptions(setting: PlannedRun) -> list[str]:
    """What the numbers leave out, and what no option tells."""
    config, found = setting.config, []
    found.append(
        "rows are packed: a prompt is computed once for the answers that share a micro-batch"
        if setting.is_packed
        else "rows are not packed: each is computed with its prompt, and padded to the longest"
    )
    if config.use_vllm and config.vllm_mode == "server":
        found.append("sampling takes no time here: vLLM's server has GPUs of its own")
    found.append(
        "not counted: grading, probes (3 % of the arithmetic at most), evaluation, checkpoints, and of memory CUDA's own "
        "(some 1 GB a GPU) and what its allocator cannot use; communication lies in the stated rate"
    )
    return found
