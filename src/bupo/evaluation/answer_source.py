"""Sources of an evaluation's answers: a model with its engine, or the cached answers in a folder."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from bupo.data.prompt_settings import PromptSettings
from bupo.evaluation.options import EvalOptions
from bupo.generation.seeded_sampling import Engine, TransformersEngine
from bupo.generation.vllm_engines import ServerEngine, VllmEngine
from bupo.models.generation_settings import read_eos_token_ids
from bupo.models.internal_policy import InternalPolicies
from bupo.models.loading import (
    ModelLimits,
    check_layers_exist,
    compute_weight_fingerprint,
    get_model_limits,
    load_on_device,
    load_tokenizer,
)
from bupo.models.metadata import get_model_metadata, get_model_name
from bupo.run_files.reading import DamagedFileError
from bupo.run_files.result_cache import SETTINGS_FILE, read_settings
from bupo.utils.errors import UserError
from bupo.version import VERSION

METADATA_KEYS = ("model", "revision", "adapter")  # recorded only; the weights' fingerprint identifies the model
SAMPLING_KEYS = ("system_prompt", "temperature", "top_p", "max_new_tokens", "seed")
# settings of cached answers that are copied into the summary when they are graded again
SUMMARY_KEYS = ("weights", "served", "engine", "dtype", "layer", "lens", "template", *SAMPLING_KEYS, *METADATA_KEYS)


class EvaluatedModel:
    """Model under evaluation, with its sampling engine, cache settings and metadata.

    Args:
        model (`str` or `PreTrainedModel`): a name, or a loaded model.
        options ([`EvalOptions`]): options of loading and sampling, with all defaults resolved.
        prompt_settings ([`~bupo.data.prompt_settings.PromptSettings`]): chat template and its arguments.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): tokenizer of a loaded model.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer with the chosen template.
        template_kwargs (`dict`): additional arguments of the template.
        engine (`Engine`): engine that samples.
        cache_settings, metadata (`dict`): settings that an answer depends on, and further facts recorded with them.
        meta (`dict`): model, template, sampling, versions.
        max_length (`int`): the model's context length; 0 if it is not known.
        limits ([`~bupo.models.loading.ModelLimits`]): limits of the model's input, as far as known.
    """

    def __init__(
        self,
        model: str | nn.Module,
        options: EvalOptions,
        prompt_settings: PromptSettings,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        name = model if isinstance(model, str) else get_model_name(model)
        if options.adapter and not isinstance(model, str):
            raise UserError("adapter is for a model that is given by its name: put it on the loaded model yourself")
        if isinstance(model, str) and options.engine == "transformers":
            check_layers_exist(name, {"layer": options.layer}, **options.get_loading_kwargs())
        if tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)  # its template is set below
        elif isinstance(model, str):
            tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
        else:
            raise UserError("tokenizer is not set: a loaded model needs its tokenizer")
        self.tokenizer, self.template_kwargs = tokenizer, prompt_settings.template_kwargs
        sampling = {"engine": options.engine, "template": prompt_settings.set_template(tokenizer)}
        sampling |= {name: getattr(options, name) for name in SAMPLING_KEYS}
        self.engine: Engine
        self.max_length, self.limits = 0, ModelLimits()
        if options.engine == "transformers":
            model_settings = self._load_transformers(name, model, options)
        else:
            if not isinstance(model, str):
                raise UserError(f"engine {options.engine} takes a model by its name, not a loaded one")
            model_settings = self._connect_vllm(name, options)
        layer = {"layer": options.layer} | ({"lens": options.lens} if options.layer is not None else {})
        self.cache_settings: dict[str, Any] = model_settings | sampling | layer
        self.metadata = {name: self.meta.get(name) for name in METADATA_KEYS if name not in model_settings}
        self.meta |= sampling | {"layer": options.layer} | ({"preset": options.preset} if options.preset else {})
        self.meta |= prompt_settings.metadata

    def _load_transformers(self, name: str, model: str | nn.Module, options: EvalOptions) -> dict[str, Any]:
        """Load the model with transformers; return the settings that identify it."""
        loaded = (
            model
            if isinstance(model, nn.Module)
            else load_on_device(
                model, options.dtype, options.device_map, options.adapter, **options.get_loading_kwargs()
            )
        )
        policies = InternalPolicies(loaded, lens=options.lens, temperature=options.temperature or 1.0)
        stream = policies.stream
        self.engine = TransformersEngine(
            stream.model,
            self.tokenizer,
            *options.sampling_settings,
            policy=None if options.layer is None else policies.layer(options.layer),
            batch_size=options.batch_size,
        )
        self.limits = get_model_limits(stream.model.config)
        self.max_length = self.limits.context_length or 0
        self.meta = get_model_metadata(name, stream, options.lens, options.sampling_settings[1], options.revision)
        self.meta |= {"weights": compute_weight_fingerprint(stream.model), "adapter": options.adapter}
        return {name: self.meta[name] for name in ("dtype", "weights")}

    def _connect_vllm(self, name: str, options: EvalOptions) -> dict[str, Any]:
        """Connect to vLLM or a server; return the settings that identify the model, which is known by name only."""
        sampling = options.sampling_settings
        eos_token_ids = read_eos_token_ids(name, self.tokenizer, **options.get_loading_kwargs())
        known: dict[str, Any] = {"model": name, "revision": options.revision}
        if options.engine == "server":
            server = ServerEngine(
                str(options.server), *sampling, eos_token_ids, max_concurrent_requests=options.batch_size
            )
            self.engine, known["served"] = server, server.model
        else:
            self.engine = VllmEngine(
                name, *sampling, eos_token_ids, dtype=options.dtype, **options.get_loading_kwargs()
            )
            known["dtype"] = options.dtype
        self.meta = known | {"adapter": None, "versions": {"bupo": VERSION}}
        return known


def read_cached_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a benchmark's cached answers.

    Raises:
        UserError: if there are no answers, or their settings cannot be read.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"{folder} holds no answers to grade: {SETTINGS_FILE} is missing")
    settings = read_settings(folder, "answers")
    for name in ("problems", "prompt"):
        if name not in settings:
            raise UserError(
                f"{folder / SETTINGS_FILE} has no {name}, which the answers belong to: choose another output"
            )
    if not isinstance(settings["prompt"], str) or not settings["problems"]:
        raise DamagedFileError(folder / SETTINGS_FILE, "prompt is not a string, or problems is empty")
    return settings


def read_cached_system_prompt(folder: Path) -> str | None:
    """Return the system message of the cached answers in an evaluation's folder, if it is recorded."""
    for path in sorted(folder.glob(f"*/{SETTINGS_FILE}")):
        with suppress(UserError):  # raised again when the benchmark is graded
            system_prompt = read_settings(path.parent, "answers").get("system_prompt")
            return system_prompt if isinstance(system_prompt, str) else None
    return None


def read_cached_metadata(folder: Path, labels: list[str]) -> dict[str, Any]:
    """Return the model and sampling settings of the cached answers in a folder.

    Raises:
        UserError: if they are not recorded, or differ between the benchmarks.
    """
    by_benchmark = []
    for label in labels:
        settings = read_cached_settings(folder / label)
        by_benchmark.append({name: settings[name] for name in SUMMARY_KEYS if name in settings})
    if any(settings != by_benchmark[0] for settings in by_benchmark):
        raise UserError(f"the benchmarks in {folder} were answered with different settings: grade one at a time")
    defaults = {"model": "not recorded", "template": "not recorded"}
    return defaults | (by_benchmark[0] if by_benchmark else {}) | {"versions": {"bupo": VERSION}}
