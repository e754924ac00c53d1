"""Settings of a run, parsed from its `config.yaml`, by which runs are grouped, compared and named."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from bupo.options.groups import TRL_ALIASES
from bupo.options.training import (
    DEFAULT_INTERNAL_STEPS,
    LayerMultipliers,
    MethodOptions,
    affects_training,
    parse_layer_lr_multipliers,
)
from bupo.reports.table_files import is_oversized
from bupo.utils.errors import UserError
from bupo.utils.sanitize import escape_text

# options with a field in RunSettings, and their defaults in bupo train and bupo demo
PARSED_OPTIONS = {
    *("advantage_estimator", "internal_layer", "internal_steps", "internal_schedule", "internal_objective"),
    *("internal_fade_batches", "internal_loss_weight", "internal_module", "internal_lens", "internal_early_stopping"),
    *("frozen_up_to_layer", "layer_lr_multipliers"),
}
DEFAULT_CONFIG: dict[str, Any] = {
    each.name: each.default for each in fields(MethodOptions) if each.name in PARSED_OPTIONS
}
DEFAULT_CONFIG["seed"] = 42  # transformers'
ASSUMED_STEPS = DEFAULT_INTERNAL_STEPS  # where config.yaml sets none
DEMO_CONFIG: dict[str, Any] = {"model": "embedded", "internal_layer": 5, "internal_steps": 10, "seed": 0}
ESTIMATOR_NAMES = {"grpo": "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++", "ppo": "PPO"}
OBJECTIVE_NAMES = {"frozen_upper": "upper layers frozen in phase 1", "shuffled_vocab": "shuffled vocabulary"}
VANILLA = "vanilla"
IGNORED_KEYS = ("env", "config")  # keys of a config.yaml that are no options
MAX_TEXT_LENGTH = 60  # characters of a value in a name


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run without its seed; or of a model that was not trained by these runs.

    Attributes:
        model (`str`): initial model.
        estimator (`str`): GRPO, RLOO, REINFORCE++ or PPO; a label for a model that is not trained.
        stages (`tuple`): layer (a number or `auto`) and planned rollout batches of each stage of phase 1; 0 if `auto` chooses
            the length.
        module, lens, has_early_stopping: settings of phase 1; defaults if there is none.
        objective (`str`): objective of phase 1.
        auxiliary_layer (`str`), fade_batches (`int`), auxiliary_weight (`float`): layer of the auxiliary objective in phase 2
            if there is no phase 1, rollout batches over which it fades out, and its constant weight.
        frozen_up_to_layer (`int`, *optional*): layers 1 to this one are frozen.
        upper_lr_multiplier (`tuple`, *optional*): layer, and factor of the learning rate above it.
        layer_lr_multipliers (`str`): factors of the learning rate by layer, such as `0.1 for 1 to 4, 1 for 5 to 8`.
        other_options (`tuple`): all other options that affect training, as names and texts.
        snapshot (`str`): evaluated state, if not the final model: `update 16`, `policy of layer 6`.
    """

    model: str
    estimator: str
    stages: tuple[tuple[str, int], ...] = ()
    module: str = "layer"
    lens: str = "raw"
    has_early_stopping: bool = True
    objective: str = "layer"
    auxiliary_layer: str = ""
    fade_batches: int = 0
    auxiliary_weight: float = 0.0
    frozen_up_to_layer: int | None = None
    upper_lr_multiplier: tuple[int, float] | None = None
    layer_lr_multipliers: str = ""
    other_options: tuple[tuple[str, str], ...] = ()
    snapshot: str = ""

    @property
    def method(self) -> str:
        """Name such as `BuPO` or `GRPO, layers 1 to 5 frozen`, without layer and length of phase 1."""
        words = [self.estimator]
        if self.stages and self.objective != "frozen_upper":
            words = ["BuPO" if self.estimator == "GRPO" else f"BuPO with {self.estimator}"]
        words += [OBJECTIVE_NAMES.get(self.objective, self.objective)] * (self.objective != "layer")
        words += [f"fade over {self.fade_batches} batch{'es' * (self.fade_batches > 1)}"] * bool(self.fade_batches)
        words += [f"layer objective with weight {self.auxiliary_weight:g}"] * bool(self.auxiliary_weight)
        words += ["final norm"] * (self.lens == "final_norm")
        words += [f"{self.module.upper()} policy"] * (self.module != "layer")
        words += [f"layers 1 to {self.frozen_up_to_layer} frozen"] * (self.frozen_up_to_layer is not None)
        if self.upper_lr_multiplier:
            words.append(f"{self.upper_lr_multiplier[1]:g}x above layer {self.upper_lr_multiplier[0]}")
        words += [f"rates {self.layer_lr_multipliers}"] * bool(self.layer_lr_multipliers)
        return ", ".join(words)

    @property
    def layer_label(self) -> str:
        """Layers of phase 1, or the auxiliary objective's layer; empty if there is none."""
        return ", ".join(dict.fromkeys(layer for layer, _ in self.stages)) or self.auxiliary_layer

    @property
    def first_phase_batches(self) -> int:
        """Planned length of phase 1 in rollout batches."""
        return sum(batches for _, batches in self.stages)

    @property
    def description(self) -> str:
        """Method, stages of phase 1 and snapshot."""
        stages = [f"layer {layer}" + f" for {batches}" * bool(batches) for layer, batches in self.stages]
        stages += [f"layer {self.auxiliary_layer}"] * bool(self.auxiliary_layer)
        return (
            ", ".join([self.method, *stages])
            + " batches" * bool(self.first_phase_batches)
            + (f" ({self.snapshot})" if self.snapshot else "")
        )

    @property
    def baseline(self) -> "RunSettings":
        """GRPO with the same options, the baseline of phase 1 and of the methods in table 11."""
        plain = RunSettings(self.model, "GRPO", other_options=self.other_options, snapshot=self.snapshot)
        return self if self.estimator == VANILLA else plain


def parse_run_settings(config: Mapping[str, Any], command: str) -> tuple[RunSettings, int]:
    """Parse the `config.yaml` of `bupo train` or `bupo demo` into settings and seed.

    Args:
        config (`dict`): content of the file.
        command (`str`): `demo` selects the demo's defaults.
    """
    options = {TRL_ALIASES.get(name, name): value for name, value in config.items()}
    values = DEFAULT_CONFIG | (DEMO_CONFIG if command == "demo" else {}) | options
    known = {*DEFAULT_CONFIG, *DEMO_CONFIG, *IGNORED_KEYS}
    other_options = {
        name: _format_value(value) for name, value in options.items() if name not in known and affects_training(name)
    }
    estimator = _format_value(values["advantage_estimator"])
    setting = RunSettings(
        model=_format_value(values.get("model") or "a model from Python", 200),
        estimator=ESTIMATOR_NAMES.get(estimator, estimator),
        stages=_parse_stages(values),
        frozen_up_to_layer=_parse_int(values["frozen_up_to_layer"]),
        other_options=tuple(sorted(other_options.items())),
    )
    if values["layer_lr_multipliers"] is not None:
        setting = _add_lr_multipliers(setting, values["layer_lr_multipliers"])
    setting = _add_auxiliary_objective(setting, values)
    if setting.stages or setting.auxiliary_layer:
        module, lens = _format_value(values["internal_module"]), _format_value(values["internal_lens"])
        setting = replace(setting, module=module, lens=lens, objective=_format_value(values["internal_objective"]))
    if setting.stages:
        setting = replace(
            setting, has_early_stopping=_format_value(values["internal_early_stopping"]).lower() != "false"
        )
    return setting, _parse_int(values["seed"]) or 0


def _add_auxiliary_objective(setting: RunSettings, values: Mapping[str, Any]) -> RunSettings:
    """Add the settings of an auxiliary objective in phase 2."""
    fade_batches, weight = (
        _parse_int(values["internal_fade_batches"]) or 0,
        _parse_float(values["internal_loss_weight"]),
    )
    weight = weight if math.isfinite(weight) else 0.0
    layer = "" if values["internal_layer"] is None else _format_value(values["internal_layer"])
    if not (fade_batches or weight) or not (setting.stages or layer):
        return setting
    return replace(
        setting, auxiliary_layer="" if setting.stages else layer, fade_batches=fade_batches, auxiliary_weight=weight
    )


def _add_lr_multipliers(setting: RunSettings, value: Any) -> RunSettings:
    """Return the settings with the option `layer_lr_multipliers`."""
    try:
        multipliers = parse_layer_lr_multipliers(value)
    except UserError:
        return replace(setting, layer_lr_multipliers=_format_value(value))
    if isinstance(multipliers, dict) and len(multipliers) == 1:  # table 11
        ((first, multiplier),) = multipliers.items()
        return replace(setting, upper_lr_multiplier=(first - 1, multiplier))
    return replace(setting, layer_lr_multipliers=_describe_lr_multipliers(multipliers))


def _describe_lr_multipliers(multipliers: LayerMultipliers) -> str:
    """Return the multipliers by layer, such as `0.1 for 1 to 2, 1 for 3`."""
    if isinstance(multipliers, dict):
        return _format_value(", ".join(f"{_format_value(rate)} from {layer} up" for layer, rate in multipliers.items()))
    words, last = [], 0
    for multiplier, same in groupby(map(_format_value, multipliers)):
        first, last = last + 1, last + len(list(same))
        words.append(f"{multiplier} for {first}" + f" to {last}" * (last > first))
    return _format_value(", ".join(words))


def _parse_stages(values: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Parse the stages of phase 1; empty if they cannot be read."""
    schedule = values["internal_schedule"]
    if schedule is not None:
        try:
            pairs = json.loads(schedule) if isinstance(schedule, str) else schedule
            stages = tuple((str(_parse_int(layer)), _parse_int(batches) or 0) for layer, batches in pairs)
        except (ValueError, TypeError, RecursionError):
            return ()
        return stages[:20]
    steps, layer = _parse_int(values["internal_steps"]), values["internal_layer"]
    if layer is None or (steps is not None and steps <= 0):
        return ()
    if steps is None:
        steps = 0 if layer == "auto" else ASSUMED_STEPS
    return ((_format_value(layer), steps),)


def _parse_int(value: Any) -> int | None:
    """Parse an integer or its text; return None for anything else."""
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        return None
    return number if number is not None and abs(number) < 1 << 40 else None


def _parse_float(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def _format_value(value: Any, longest: int = MAX_TEXT_LENGTH) -> str:
    """Format a value for a name. Equal numbers give equal texts, also `1e-6`, which YAML reads as text.

    Long texts are cut and end with a digest.
    """
    integer = _parse_int(value)
    if integer is not None:
        return str(integer)
    if not isinstance(value, bool):
        try:
            return f"{float(value):.15g}"  # all digits that a float preserves
        except (ValueError, TypeError, OverflowError):
            pass
    full_text = "…" if is_oversized(value) else str(value)
    text = escape_text(" ".join(full_text[: 4 * longest].split()))
    if len(text) <= longest and len(full_text) <= 4 * longest:
        return text
    return f"{text[: longest - 9]}…{hashlib.sha256(full_text.encode(errors='replace')).hexdigest()[:8]}"
