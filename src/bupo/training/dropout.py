"""Dropout in training, which is off by default: sampling, scoring and updates then use one policy.

The ratio of an update compares log-probs of two forward passes. With dropout, each pass draws another mask: ratios do
not start at 1, and are clipped before anything is learned.
"""

from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bupo.training.config import BuPOConfig

logger = get_logger(__name__)

RELATIVE_TOLERANCE = 1e-3  # of two equal passes, because a GPU may change the order of a sum
NOISE_MODULES = ("dropout", "droppath", "stochasticdepth")  # parts of the names of modules with a rate `p`
TRIAL_ROWS, TRIAL_TOKENS = 8, 16  # of a trial pass; some noise drops full rows
RATE_NAME_PARTS = ("drop", "jitter")  # parts of the names of noise rates


class ConfigWithoutDropout:
    """View of a configuration without dropout, for the modules of a model. The configuration itself, which is saved, stays."""

    def __init__(self, config: PretrainedConfig):
        self.__dict__["config"] = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # `copy` looks them up before `config` is set
            raise AttributeError(name)
        value = getattr(self.__dict__["config"], name)
        return 0.0 if _is_dropout_rate(name, value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["config"], name, value)


def _is_dropout_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and value > 0 and any(part in name.lower() for part in RATE_NAME_PARTS)


def disable_dropout_in_model(model: nn.Module) -> dict[str, float]:
    """Set all dropout rates of a model to 0: of dropout modules, of other modules' attributes and of their
    configurations.

    Args:
        model (`nn.Module`): with its adapters.

    Returns:
        `dict[str, float]`: the largest rate that was turned off, by name.
    """
    disabled: dict[str, float] = {}

    def record(name: str, rate: float) -> None:
        disabled[name] = max(rate, disabled.get(name, 0.0))

    for path, module in model.named_modules():
        if any(part in type(module).__name__.lower() for part in NOISE_MODULES):  # torch's, and those of adapters
            rate = getattr(module, "p", 0.0)
            if isinstance(rate, float | int) and rate > 0:
                record(
                    next(word for word in reversed(path.split(".")) if word != "default" and not word.isdigit()), rate
                )
                module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_dropout_rate(name, value):
                record(name, value)
                setattr(module, name, 0.0)
            elif isinstance(value, dict) and any(part in name for part in RATE_NAME_PARTS):  # rates by adapter name
                for adapter in [adapter for adapter, rate in value.items() if _is_dropout_rate(name, rate)]:
                    record(name, value[adapter])
                    value[adapter] = 0.0
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            rates = {name: value for name, value in config.to_dict().items() if _is_dropout_rate(name, value)}
            if rates:
                for name, value in rates.items():
                    record(name, value)
                module.config = ConfigWithoutDropout(config)
    return disabled


@torch.no_grad()
def is_forward_random(model: nn.Module, ids: torch.Tensor) -> bool:
    """Return whether two passes over the same tokens in training mode differ by more than rounding.

    Args:
        model (`nn.Module`): with all its parameters on this process.
        ids (`torch.Tensor` of shape `(1, T)`): tokens.
    """
    ids = ids[:, :TRIAL_TOKENS].repeat(TRIAL_ROWS, 1)
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
            first, second = (model(input_ids=ids, use_cache=False).logits.float() for _ in range(2))
    finally:
        for module, training in modes:
            module.training = training
    return bool((first - second).abs().max() > RELATIVE_TOLERANCE * first.abs().max())


def apply_dropout_option(model: nn.Module, args: BuPOConfig, ids: torch.Tensor) -> None:
    """Turn a model's dropout off, unless `disable_dropout` is false, and warn if passes still differ.

    Args:
        model (`nn.Module`): the policy with its adapters, with all its parameters on this process.
        args ([`~bupo.BuPOConfig`]): of the run.
        ids (`torch.Tensor` of shape `(1, T)`): tokens of a trial pass.
    """
    if args.disable_dropout is not False:
        disabled = disable_dropout_in_model(model)
        if disabled and args.disable_dropout is None:
            rates = ", ".join(f"{name} {rate:g}" for name, rate in sorted(disabled.items()))
            logger.warning(
                f"dropout is turned off ({rates}): with it ratios would not start at 1; disable_dropout true says the same "
                "without this line, disable_dropout false keeps it"
            )
    if is_forward_random(model, ids):
        remedy = "leave disable_dropout out" if args.disable_dropout is False else "look at the model's code"
        logger.warning(
            f"the model's passes are random while it trains (dropout, noise): old and new log-probs differ before anything is "
            f"learned, ratios do not start at 1, and may be clipped; {remedy}"
        )
    if args.neftune_noise_alpha:
        logger.warning(
            f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise to the embeddings in each pass: ratios do not start "
            "at 1, and may be clipped; leave it out"
        )
