"""`bupo.plan`: memory, FLOPs and time of a run, before any weights are loaded."""

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

DEFAULT_PROMPT_TOKENS = 256  # if no local data set is given
MAX_MEASURED_PROMPTS = 256  # prompts of a data set that are tokenised
MEAN_LENGTH_SHARE = 0.5  # mean tokens of an answer, as a share of the longest


@dataclass(frozen=True)
class PhasePlan:
    """Successive rollout batches that optimise the same policy.

    Attributes:
        layer (`int`, *optional*): layer of phase 1; `None` in phase 2.
        batches (`int`, *optional*): rollout batches; `None` if the run's length is not known.
        trained_parameters (`int`): parameters that an update changes.
        flops ([`Flops`]): FLOPs of a device and rollout batch.
        memory ([`MemoryEstimate`]): bytes of a device by part.
        seconds ([`RolloutBatchSeconds`]): time of a rollout batch.
        auxiliary_layer (`int`, *optional*): layer whose auxiliary objective is added in phase 2.
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
    """Memory, FLOPs and time of a run.

    Attributes:
        model (`str`), sizes ([`ModelSizes`]): the trained model and its parameter counts.
        hardware ([`PlanOptions`]): the devices.
        num_completions (`int`): answers of a rollout batch on all devices.
        group_size (`int`): answers to one prompt.
        updates (`float`): optimizer updates of a rollout batch.
        phases (`list[PhasePlan]`): in their order.
        vllm_shortage (`str`, *optional*): message if vLLM has no room for one answer.
        advice ([`MemoryAdvice`], *optional*): changes to make if a device is too small.
        assumptions (`list[str]`): every assumed value, one line each.
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
        """Memory in bytes that a device must have."""
        return max(phase.memory.bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.hardware.device_bytes and not self.vllm_shortage

    @property
    def seconds(self) -> float | None:
        """Time of all rollout batches, or None if it is not known."""
        totals = [(phase.batches, phase.seconds.total) for phase in self.phases]
        known = [batches * total for batches, total in totals if batches is not None and total is not None]
        return sum(known) if len(known) == len(totals) else None


def plan(
    model: str,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    *,
    loading: ModelConfig | None = None,
    hardware: PlanOptions | None = None,
) -> Plan:
    """Count parameters, FLOPs, memory and time of a run of [`bupo.train`] from its options and the model's configuration.

    Args:
        model (`str`): a name as for [`load_model`]; its weights are not needed.
        config ([`BuPOConfig`]), options ([`TrainOptions`], *optional*): the run's options.
        loading (`ModelConfig`, *optional*): how the model is loaded.
        hardware ([`PlanOptions`], *optional*): devices, rates and lengths. If `config` sets `generation_batch_size`, each
            device samples as many answers as this process would.

    Raises:
        UserError: for a model, a layer or a sharding that the run would refuse.
    """
    options, hardware = options or TrainOptions(), hardware or PlanOptions()
    run, length_notes = _resolve_planned_run(model, config, options, loading, hardware)
    batches, batch_notes = _count_rollout_batches(config, options, hardware)
    parts, phase_notes = _plan_targets(run, batches)
    phases = [_plan_phase(run, target, length) for target, length in parts]
    assumptions = [
        *hardware.describe_rates(run.is_half_precision),
        *length_notes,
        *batch_notes,
        *phase_notes,
        *_describe_assumptions(run),
    ]
    result = Plan(
        model=model,
        sizes=run.sizes,
        hardware=hardware,
        num_completions=run.num_completions * hardware.num_processes,
        group_size=config.num_generations,
        updates=run.num_updates,
        phases=phases,
        vllm_shortage=describe_vllm_shortage(run),
        advice=None,
        assumptions=assumptions,
    )
    if result.bytes <= hardware.device_bytes:
        return result
    return replace(result, advice=suggest_changes(run, [target for target, _ in parts]))


def resolve_planned_run(
    model: str,
    config: BuPOConfig,
    options: TrainOptions | None = None,
    loading: ModelConfig | None = None,
    hardware: PlanOptions | None = None,
) -> PlannedRun:
    """Return the run that a plan counts. Arguments as for [`plan`]."""
    return _resolve_planned_run(model, config, options or TrainOptions(), loading, hardware or PlanOptions())[0]


def _resolve_planned_run(
    model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig | None, hardware: PlanOptions
) -> tuple[PlannedRun, list[str]]:
    """Check the options; return the planned run and notes on the assumed lengths."""
    loading = loading or ModelConfig()
    hardware.check()
    options.check()
    _check_loading(loading)
    pretrained_config = check_named_layers(model, config, loading)
    if hardware.resolved_sharding.startswith("zero"):
        check_deepspeed(config)
    meta_model = build_meta_model(model, pretrained_config, config, loading)
    mean, longest, notes = _estimate_lengths(model, config, options, loading, hardware)
    return PlannedRun(config, hardware, loading, meta_model, count_parameters(meta_model), mean, longest), notes


def _plan_phase(run: PlannedRun, target: PhaseTarget, batches: int | None) -> PhasePlan:
    flops = count_flops(run, *target)
    return PhasePlan(
        layer=target.layer,
        batches=batches,
        trained_parameters=run.count_trained_parameters(target.layer),
        flops=flops,
        memory=compute_peak_memory(run, *target),
        seconds=estimate_seconds(run, target.layer, flops),
        auxiliary_layer=target.auxiliary_layer,
    )


def _check_loading(loading: ModelConfig) -> None:
    """Raise [`UserError`] for invalid loading options before the model is looked up."""
    check_options(loading, MODEL_RANGES)
    if loading.dtype is not None:
        check_choice("dtype", loading.dtype, DTYPES)
    if loading.load_in_4bit or loading.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit: a plan does not count quantised weights: leave the option out")


def _estimate_lengths(
    model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig, hardware: PlanOptions
) -> tuple[SequenceLengths, SequenceLengths, list[str]]:
    """Return the mean and the longest lengths of texts, and notes on what was assumed."""
    longest_answer = config.max_completion_length
    prompt_lengths = _measure_prompts(model, config, options, loading) if hardware.prompt_tokens is None else None
    notes = []
    if hardware.prompt_tokens is not None:
        prompt = longest = hardware.prompt_tokens
    elif prompt_lengths:
        prompt, longest = round(sum(prompt_lengths) / len(prompt_lengths)), max(prompt_lengths)
        notes.append(
            f"{prompt} tokens a prompt, the longest {longest}: the first {len(prompt_lengths)} of {options.dataset}"
        )
    else:
        prompt = longest = DEFAULT_PROMPT_TOKENS
        notes.append(f"{prompt} tokens a prompt: assumed, the data set is not read (--prompt_tokens)")
    limit = options.max_prompt_tokens
    if limit is not None:
        prompt, longest = min(prompt, limit), (min(longest, limit) if prompt_lengths else limit)
    answer = hardware.answer_tokens or max(1, round(MEAN_LENGTH_SHARE * longest_answer))
    if hardware.answer_tokens is None:
        notes.append(f"{answer} tokens an answer on average: half of the longest, {longest_answer} (--answer_tokens)")
    elif answer > longest_answer:
        raise UserError(f"answer_tokens is {answer}, and max_new_tokens allows {longest_answer}: give as many or fewer")
    notes.append(f"memory is for prompts of {longest} and answers of {longest_answer} tokens, all in one micro-batch")
    return SequenceLengths(prompt, answer), SequenceLengths(longest, longest_answer), notes


def _measure_prompts(model: str, config: BuPOConfig, options: TrainOptions, loading: ModelConfig) -> list[int] | None:
    """Return the tokens of each of the first prompts of a procedural or local data set; None for one of the hub."""
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
        needs_answers=False,
    )
    tokenizer = load_tokenizer(model, **get_pretrained_kwargs(config, loading))
    kwargs = config.chat_template_kwargs or {}
    return [len(tokenize_prompt(tokenizer, prompt, **kwargs)) for prompt in problems["prompt"]]


def _count_rollout_batches(
    config: BuPOConfig, options: TrainOptions, hardware: PlanOptions
) -> tuple[int | None, list[str]]:
    """Return the rollout batches of a run, or None if the options do not determine them, and notes."""
    if config.max_steps > 0:
        return config.count_rollout_batches(config.max_steps), []
    if options.size is None:
        return None, ["the run's length is not known: it has no max_steps, and the data set no size"]
    answers = config.per_device_train_batch_size * config.steps_per_generation * hardware.num_processes
    prompts = answers // config.num_generations
    return max(1, int(config.num_train_epochs * (options.size // max(1, prompts)))), []


def _plan_targets(run: PlannedRun, batches: int | None) -> tuple[list[tuple[PhaseTarget, int | None]], list[str]]:
    """Return the policies that the run optimises, each with its rollout batches, and notes. The layer of `auto` is assumed."""
    config, notes = run.config, []
    planned: list[tuple[PhaseTarget, int | None]] = []
    layer = config.internal_layer if isinstance(config.internal_layer, int) else None
    for stage in config.phase_schedule.stages:
        layer, length = stage.layer, stage.batches
        if layer is None:
            layer = max(1, run.sizes.layers // 2)
            notes.append(f"internal_layer auto: the middle layer, {layer}, is assumed; the run measures it")
        if length is None:
            length = recommend_first_phase_batches(batches) if batches else None
        planned.append((PhaseTarget(layer), length))
    if config.has_auxiliary_objective:
        planned.append(
            (PhaseTarget(None, layer), None if config.internal_loss_weight else config.internal_fade_batches)
        )
    if not config.internal_loss_weight:
        planned.append((PhaseTarget(None), None))
    return _limit_to_run_length(planned, batches), notes


def _limit_to_run_length(
    planned: list[tuple[PhaseTarget, int | None]], remaining: int | None
) -> list[tuple[PhaseTarget, int | None]]:
    """Cut the phases to the run's length; a phase without a length lasts to the end."""
    phases = []
    for target, length in planned:
        if remaining is not None:
            length = remaining if length is None else min(length, remaining)
            remaining -= length
        if length != 0:
            phases.append((target, length))
    return phases


def _describe_assumptions(run: PlannedRun) -> list[str]:
    """Return notes on packing, sampling and everything that is not counted."""
    config = run.config
    notes = [
        "rows are packed: a prompt is computed once for the answers that share a micro-batch"
        if run.is_packed
        else "rows are not packed: each is computed with its prompt, and padded to the longest"
    ]
    if config.use_vllm and config.vllm_mode == "server":
        notes.append("sampling takes no time here: vLLM's server has separate GPUs")
    notes.append(
        "not counted: grading, probes (at most 3 % of the FLOPs), evaluation, checkpoints, CUDA's own memory (about 1 GB a "
        "GPU) and memory that its allocator cannot use; communication is part of the assumed rate"
    )
    return notes
