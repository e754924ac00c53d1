"""Where an evaluation's answers come from: a model and its engine, or the answers that a folder holds."""

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

METADATA_KEYS = ("model", "revision", "adapter")  # for people, where the weights tell models apart
SAMPLING_KEYS = ("system_prompt", "temperature", "top_p", "max_new_tokens", "seed")
# of the settings in a benchmark's folder, what stands in the summary of answers that are graded again
SUMMARY_KEYS = ("weights", "served", "engine", "dtype", "layer", "lens", "template", *SAMPLING_KEYS, *METADATA_KEYS)


class EvaluatedModel:
    """The model: what samples, what its answers depend on, and what must stand beside the numbers.

    Args:
        model (`str` or `PreTrainedModel`): a name, or a loaded model.
        options ([`EvalOptions`]): how it is loaded and sampled, all of it settled.
        asking ([`~bupo.data.prompt_settings.PromptSettings`]): its template, and which options are the run's own.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of a loaded model.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): with the template that was chosen.
        template_options (`dict`): arguments of the template besides the usual ones.
        engine (`Engine`): samples.
        settings, noted (`dict`): what an answer depends on, and what is noted beside it.
        meta (`dict`): model, template, sampling, versions.
        context (`int`): the longest sequence that the model was made for; 0 where it is not known here.
        limits ([`~bupo.models.loading.ModelLimits`]): the texts that it can read, where that is known.
    """

    def __init__(
        self,
        model: str | nn.Module,
        options: EvalOptions,
        asking: PromptSettings,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        name = model if isinstance(model, str) else get_model_name(model)
        if options.adapter and not isinstance(model, str):
            raise UserError("adapter is for a model that is given by its name: put it on the loaded model yourself")
        if isinstance(model, str) and options.engine == "transformers":
            check_layers_exist(name, {"layer": options.layer}, **options.get_loading_kwargs())
        if tokenizer is not None:
            tokenizer = copy.deepcopy(tokenizer)  # it is given a template
        elif isinstance(model, str):
            tokenizer = load_tokenizer(name, **options.get_loading_kwargs())
        else:
            raise UserError("tokenizer is not set: a loaded model needs its tokenizer beside it")
        self.tokenizer, self.template_kwargs = tokenizer, asking.template_kwargs
        chosen = {"engine": options.engine, "template": asking.set_template(tokenizer)}
        chosen |= {name: getattr(options, name) for name in SAMPLING_KEYS}
        self.engine: Engine
        self.max_length, self.limits = 0, ModelLimits()
        if options.engine == "transformers":
            known = self._load_transformers(name, model, options)
        else:
            if not isinstance(model, str):
                raise UserError(f"engine {options.engine} takes a model by its name, not a loaded one")
            known = self._connect_vllm(name, options)
        layer = {"layer": options.layer} | ({"lens": options.lens} if options.layer is not None else {})
        self.cache_settings: dict[str, Any] = known | chosen | layer
        self.metadata = {name: self.meta.get(name) for name in METADATA_KEYS if name not in known}
        self.meta |= chosen | {"layer": options.layer} | ({"preset": options.preset} if options.preset else {})
        self.meta |= asking.metadata

    def _load_transformers(self, name: str, model: str | nn.Module, options: EvalOptions) -> dict[str, Any]:
        """By transformers: the weights are seen. Returns what answers depend on."""
        opened = (
            model
            if isinstance(model, nn.Module)
            else load_on_device(
                model, options.dtype, options.device_map, options.adapter, **options.get_loading_kwargs()
            )
        )
        policies = InternalPolicies(opened, lens=options.lens, temperature=options.temperature or 1.0)
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
        """By vLLM or a server, where only names are seen. Returns what answers depend on."""
        sampling = options.sampling_settings
        ends = read_eos_token_ids(name, self.tokenizer, **options.get_loading_kwargs())
        known: dict[str, Any] = {"model": name, "revision": options.revision}
        if options.engine == "server":
            server = ServerEngine(str(options.server), *sampling, ends, max_concurrent_requests=options.batch_size)
            self.engine, known["served"] = server, server.model
        else:
            self.engine = VllmEngine(name, *sampling, ends, dtype=options.dtype, **options.get_loading_kwargs())
            known["dtype"] = options.dtype
        self.meta = known | {"adapter": None, "versions": {"bupo": VERSION}}
        return known


def read_cached_settings(folder: Path) -> dict[str, Any]:
    """The settings of a benchmark's answers, which will only be graded.

    Raises:
        UserError: if there are none.
    """
    if not (folder / SETTINGS_FILE).is_file():
        raise UserError(f"{folder} holds no answers to grade: {SETTINGS_FILE} is missing")
    settings = read_settings(folder, "answers")
    for name in ("problems", "prompt"):
        if name not in settings:
            raise UserError(
                f"{folder / SETTINGS_FILE} does not say which {name} the answers are of: choose another output"
            )
    if not isinstance(settings["prompt"], str) or not settings["problems"]:
        raise DamagedFileError(folder / SETTINGS_FILE, "prompt is no text, or problems is empty")
    return settings


def read_cached_system_prompt(folder: Path) -> str | None:
    """The system message of the answers that an evaluation's folder holds, where it is noted."""
    for path in sorted(folder.glob(f"*/{SETTINGS_FILE}")):
        with suppress(UserError):  # told of when its benchmark is graded
            found = read_settings(path.parent, "answers").get("system_prompt")
            return found if isinstance(found, str) else None
    return None


def read_cached_metadata(folder: Path, labels: list[str]) -> dict[str, Any]:
    """What the answers that a folder holds were made with.

    Raises:
        UserError: if it is not noted, or differs between the benchmarks.
    """
    found = []
    for label in labels:
        settings = read_cached_settings(folder / label)
        found.append({name: settings[name] for name in SUMMARY_KEYS if name in settings})
    if any(settings != found[0] for settings in found):
        raise UserError(f"the benchmarks in {folder} were answered with different settings: grade one at a time")
    return (
        {"model": "not noted", "template": "not noted"} | (found[0] if found else {}) | {"versions": {"bupo": VERSION}}
    )
