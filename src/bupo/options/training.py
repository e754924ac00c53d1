"""Options of the method, and the table of training options without effect on training. Importable without torch and TRL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import yaml

from bupo.options.groups import RunOptions
from bupo.options.ranges import (
    FRACTION,
    NON_NEGATIVE,
    NON_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    abbreviate,
    check_number,
    get_option_detail,
    option,
)
from bupo.utils.errors import UserError

InternalModule = Literal["layer", "attn", "ffn"]
InternalObjective = Literal["layer", "frozen_upper", "shuffled_vocab"]
InternalLens = Literal["raw", "final_norm"]
CriticBackbone = Literal["copy", "shared"]
LayerMultipliers = list[float] | dict[int, float]
DEFAULT_INTERNAL_STEPS = 20  # rollout batches of a first phase on a fixed layer; `auto` chooses its length


@dataclass
class MethodOptions:
    """The first phase, and the methods it is compared with.

    [`~bupo.BuPOConfig`] inherits them. The option `internal_early_stopping` is implemented by
    [`~bupo.training.callbacks.early_stopping.EarlyStoppingMonitor`], `eval_benchmarks` by
    [`~bupo.training.callbacks.benchmark_evaluation.BenchmarkCallback`], `fp32_master_weights` by [`bupo.training.precision`].
    """

    internal_layer: int | str | None = option(
        None,
        help="Layer l whose policy softmax(H^l E_u^T) the first phase optimises, counted from 1. `auto` measures the boundary "
        "layer on the first rollout batch, and stops before training if there is none. Required unless internal_steps is "
        "0.",
    )
    internal_steps: int | None = option(
        None,
        help="Length of the first phase (s_inter of the paper) in rollout batches: by default 20, with `auto` a tenth of the "
        "run and at most 30. 0 is no first phase.",
        range=NON_NEGATIVE_INTEGER,
    )
    internal_schedule: list | str | None = option(
        None,
        help="Stages of the first phase instead of internal_layer and internal_steps, such as [[6, 20], [12, 10]]: layer, "
        "rollout batches.",
    )
    internal_objective: InternalObjective = option(
        "layer",
        help="Objective of the first phase: the layer's policy (`layer`, eq. 9 of the paper), or as a control the language "
        "model policy with the layers above frozen (`frozen_upper`), or the layer's policy over a shuffled vocabulary, a "
        "target without information about the answer (`shuffled_vocab`).",
    )
    internal_fade_batches: int = option(
        0,
        help="Rollout batches after the first phase in which the layer's objective fades out in equal steps. 0 switches at "
        "once (eq. 10).",
        range=NON_NEGATIVE_INTEGER,
    )
    internal_loss_weight: float = option(
        0.0,
        help="Weight of the layer's objective in the loss after the first phase; with internal_steps 0, in the full run.",
        range="[0, 1)",
    )
    internal_module: InternalModule = option(
        "layer", help="The internal policy: that of the layer's output, of its attention or of its FFN (eq. 6)."
    )
    internal_lens: InternalLens = option(
        "raw",
        help="Map from the layer's states to the unembedding: none (`raw`, the paper's) or the model's final norm "
        "(`final_norm`, the logit lens).",
    )
    internal_early_stopping: bool = option(
        True, help="End a stage of the first phase early when it harms the model, and continue from its best weights."
    )
    probe_every: int | None = option(
        None,
        help="Rollout batches between two probes; by default as many as keep the probes at 3 %% of the FLOPs. 0: never.",
        range=NON_NEGATIVE_INTEGER,
        affects_training=False,
    )
    probe_answers: int = option(
        8, help="Answers of the probe set, taken from the first rollout batch.", range=POSITIVE_INTEGER
    )
    eval_benchmarks: list[str] | None = option(
        None,
        help="Benchmarks to evaluate during training, named as for bupo eval --benchmarks.",
        affects_training=False,
    )
    eval_every: int = option(
        10,
        help="Rollout batches between two of these evaluations; there is also one before and one after training.",
        range=POSITIVE_INTEGER,
        affects_training=False,
    )
    eval_k: int = option(
        4, help="Answers per problem in these evaluations.", range=POSITIVE_INTEGER, affects_training=False
    )
    eval_problems: int | None = option(
        None, help="Use the first N problems of each benchmark.", range=POSITIVE_INTEGER, affects_training=False
    )
    advantage_estimator: str = option("grpo", help="Estimator of advantages from rewards; grpo is TRL's.")
    critic_learning_rate: float = option(1e-5, help="Learning rate of PPO's critic (AdamW, constant).", range=POSITIVE)
    critic_backbone: CriticBackbone = option(
        "copy", help="Backbone of PPO's value head: a copy of the model, or the policy itself."
    )
    vf_coef: float = option(0.1, help="Weight of the value loss with a shared backbone.", range=POSITIVE)
    cliprange_value: float = option(0.5, help="Clip range of value updates in the value loss.", range=POSITIVE)
    gamma: float = option(1.0, help="Discount of GAE.", range=FRACTION)
    lam: float = option(1.0, help="Lambda of GAE.", range=FRACTION)
    frozen_up_to_layer: int | None = option(
        None, help="Freeze layers 1 to this one (a baseline of table 11).", range=POSITIVE_INTEGER
    )
    layer_lr_multipliers: list | str | dict | None = option(
        None,
        help="Multipliers of the learning rate: a list with one per layer, such as [0.1, 0.1, 1, 1], or a mapping from a layer "
        "to the multiplier of that layer and all above, such as {7: 0.1} (table 11). 0 freezes a layer, for the first layer "
        "also the embedding unless tied. In a mapping the final norm follows the last layer.",
    )
    fp32_master_weights: bool = option(
        True,
        help="Train the weights of a 16-bit model in fp32 and compute in 16 bits by autocast. False trains the 16-bit weights, "
        "which lose small updates.",
    )


# options of TRL and transformers by which two runs may differ and still train the same: logging, saving, evaluation, hardware
NON_TRAINING_OPTIONS = {
    "output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm", "debug", "do_train", "do_eval",
    "do_predict", "skip_memory_metrics", "torch_empty_cache_steps", "remove_unused_columns", "label_names",
    "num_completions_to_print", "restore_callback_states_from_checkpoint", "include_for_metrics", "use_cache",
    "auto_find_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "prediction_loss_only",
    "per_device_eval_batch_size", "cache_implementation", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "activation_checkpointing", "activation_checkpointing_kwargs", "use_cpu", "local_rank", "deepspeed", "accelerator_config",
    "parallelism_config", "tf32", "enable_jit_checkpoint", "ds3_gather_for_generation", "use_liger_kernel",
    "liger_kernel_config", "average_tokens_across_devices",
}  # fmt: skip
NON_TRAINING_PREFIXES = (
    "save_", "log_", "logging_", "eval_", "hub_", "push_to_hub", "trackio_", "dataloader_", "ddp_", "fsdp", "torch_compile",
    "num_generations_eval", "batch_eval", "bf16_full_eval", "fp16_full_eval", "use_vllm", "vllm_mode", "vllm_model_impl",
    "vllm_enable_sleep", "vllm_server", "vllm_group_port", "vllm_gpu", "vllm_tensor", "vllm_max_model", "use_transformers_",
    "transformers_continuous", "include_num_input_tokens", "full_determinism",
)  # fmt: skip
OWN_OPTIONS = {each.name: each for group in (RunOptions, MethodOptions) for each in fields(group)}


def affects_training(name: str) -> bool:
    """Return whether two runs that differ in this option only train differently. Unknown options count as affecting it."""
    if name in OWN_OPTIONS:
        return get_option_detail(OWN_OPTIONS[name], "affects_training")
    return name not in NON_TRAINING_OPTIONS and not name.startswith(NON_TRAINING_PREFIXES)


def parse_layer_lr_multipliers(value: Any) -> LayerMultipliers:
    """Return `layer_lr_multipliers` as a list of numbers, or as a mapping from layers, in ascending order, to numbers.

    Args:
        value (`list`, `dict` or `str`): the option; a text is read as YAML, which includes JSON.

    Raises:
        UserError: for a value of another form, or a layer or multiplier out of range.
    """
    name, multipliers = "layer_lr_multipliers", value
    if isinstance(value, str):
        try:
            multipliers = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            multipliers = None
    if isinstance(multipliers, list | tuple):
        return [_check_multiplier(multiplier) for multiplier in multipliers]
    if not isinstance(multipliers, dict) or not multipliers:
        raise UserError(
            f"{name} must be a list with a multiplier per layer, or a mapping such as {{7: 0.1}} from a layer to the "
            f"multiplier from there up, got {abbreviate(value)}"
        )
    by_layer = {}
    for layer, multiplier in multipliers.items():
        number = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
        check_number(name, number, POSITIVE_INTEGER, "a mapping from layers, counted from 1")
        by_layer[int(number)] = _check_multiplier(multiplier)
    return dict(sorted(by_layer.items()))


def _check_multiplier(value: Any) -> float:
    """Return a multiplier as a number; YAML reads `1e-1` as text."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    check_number("layer_lr_multipliers", number, NON_NEGATIVE)
    return float(number)


def expand_layer_lr_multipliers(multipliers: Sequence[float] | Mapping[int, float], num_layers: int) -> list[float]:
    """Return the multiplier of each layer, from the first to the last.

    Args:
        multipliers (`list` or `dict`): as [`parse_layer_lr_multipliers`] returns them.
        num_layers (`int`): number of layers of the model.
    """
    if not isinstance(multipliers, Mapping):
        return list(multipliers)
    expanded = [1.0] * num_layers
    for layer, multiplier in sorted(multipliers.items()):
        expanded[layer - 1 :] = [multiplier] * (num_layers - layer + 1)
    return expanded
