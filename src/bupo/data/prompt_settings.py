"""Prompt and sampling settings of a trained model: `evaluation.json`, next to its weights.

`bupo train` writes the file into the run's folder and each checkpoint. Evaluation, analysis and sampling read their defaults
from it. It holds texts and numbers only, and no names of files, servers or code.
"""

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from bupo.data.chat_templates import get_template_kwargs, set_chat_template
from bupo.models.loading import EMBEDDED_MODEL
from bupo.options.ranges import POSITIVE, POSITIVE_INTEGER, abbreviate, check_options
from bupo.utils.errors import UserError
from bupo.utils.files import write_json
from bupo.utils.safe_read import UnreadableFolderError, has_regular_file, read_file_bytes

EVALUATION_FILE, SCHEMA_VERSION = "evaluation.json", 1
TEMPLATE_FILE = "chat_template.jinja"  # written by `tokenizer.save_pretrained`
MAX_SETTINGS_BYTES = 1 << 20
SETTING_RANGES = {"max_new_tokens": POSITIVE_INTEGER, "temperature": POSITIVE, "top_p": "(0, 1]"}
INHERITED_OPTIONS = ("system_prompt", *SETTING_RANGES)

Options = TypeVar("Options")


@dataclass(frozen=True)
class TrainingPromptSettings:
    """Settings of a training run's prompts and rollouts.

    Attributes:
        system_prompt (`str`, *optional*): system message of the problems.
        chat_template_kwargs (`dict`): arguments of the chat template, such as `enable_thinking`.
        max_new_tokens (`int`, *optional*), temperature, top_p (`float`): sampling settings.
        other_sampling (`dict`): other sampling settings that were not the defaults, such as `top_k`. They are only reported:
            evaluation does not truncate the policy's distribution by them.
        folder (`str`): folder of the file.
        template (`str`, *optional*): the chat template that was saved next to an adapter.
    """

    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    other_sampling: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    template: str | None = None

    def write(self, folder: Path) -> None:
        """Write `evaluation.json` into a folder, atomically."""
        values = {name: value for name, value in asdict(self).items() if name not in ("folder", "template")}
        write_json(
            folder / EVALUATION_FILE, json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **values}, default=str))
        )


def read_training_prompt_settings(model: Any, adapter: str | None = None) -> TrainingPromptSettings | None:
    """Return the settings in the folder of an adapter, or else of a model; None if there are none.

    Raises:
        UserError: if the file cannot be read, or a setting is invalid.
    """
    for name in (adapter, model):
        if not isinstance(name, str) or name == EMBEDDED_MODEL:
            continue
        path, exists = Path(name) / EVALUATION_FILE, False
        with suppress(OSError, ValueError):  # a name too long or invalid is reported when the model is loaded
            exists = path.exists()
        if exists:
            settings = _read_settings(path)
            return _add_adapter_template(settings, path.parent) if name == adapter else settings
    return None


def _add_adapter_template(settings: TrainingPromptSettings, folder: Path) -> TrainingPromptSettings:
    """Add the template that is saved next to an adapter, since its tokenizer is loaded from the base model."""
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return settings
    try:
        return replace(settings, template=_read_text(path))
    except (UnreadableFolderError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    """Return a file's text. Raise `UnreadableFolderError` or `ValueError` if it is not a regular text file, or too large."""
    if not has_regular_file(path.parent, path.name):
        raise UnreadableFolderError(f"{path.name} is no regular file of its folder")
    return read_file_bytes(path.parent, path.name, MAX_SETTINGS_BYTES).decode()


def _read_settings(path: Path) -> TrainingPromptSettings:
    remedy = "repair it, or remove it and give the options"
    try:
        content = json.loads(_read_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
        names = [name for name in (*INHERITED_OPTIONS, "chat_template_kwargs", "other_sampling") if name in content]
        settings = TrainingPromptSettings(**{name: content[name] for name in names}, folder=str(path.parent))
        check_options(settings, SETTING_RANGES)
        _check_template_kwargs(settings.chat_template_kwargs)
        if not isinstance(settings.other_sampling, dict):
            raise ValueError(f"other_sampling must be a mapping, got {abbreviate(settings.other_sampling)}")
    except (UnreadableFolderError, ValueError, TypeError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{path} cannot be used ({str(error)[:300]}): {remedy}") from error
    return settings


def _check_template_kwargs(template_kwargs: Any) -> None:
    """Raise `ValueError` for a key that is not a variable of a template, such as an argument of `apply_chat_template`."""
    if not isinstance(template_kwargs, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping, got {abbreviate(template_kwargs)}")
    reserved = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    for name in template_kwargs:
        if not name.isidentifier() or name in reserved:
            raise ValueError(f"chat_template_kwargs holds {abbreviate(name)}, which is no variable of a chat template")


@dataclass(frozen=True)
class PromptSettings:
    """Prompt settings of a command, resolved from its options and the model's training settings.

    Attributes:
        training_settings ([`TrainingPromptSettings`], *optional*): settings that the model was trained with.
        inherited (`tuple[str, ...]`): options whose values come from `training_settings`.
        template_name (`str`, *optional*): the option `chat_template`.
    """

    training_settings: TrainingPromptSettings | None = None
    inherited: tuple[str, ...] = ()
    template_name: str | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template; empty if the template is not that of the training run."""
        if self.training_settings is None or self.template_name:
            return {}
        return dict(self.training_settings.chat_template_kwargs)

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Set a tokenizer's template, and return a label of the choice."""
        if self.training_settings and self.training_settings.template is not None and not self.template_name:
            tokenizer.chat_template = self.training_settings.template
        label, default_kwargs = set_chat_template(tokenizer, self.template_name), get_template_kwargs(tokenizer)
        if default_kwargs | self.template_kwargs == default_kwargs:
            return label
        return f"{label.removesuffix(', no thinking')}, with {json.dumps(self.template_kwargs, sort_keys=True)}"

    @property
    def metadata(self) -> dict[str, Any]:
        """Entry of a summary's `meta` with the inherited settings and their folder."""
        if not self.training_settings or not (self.inherited or self.template_kwargs):
            return {}
        values = {name: getattr(self.training_settings, name) for name in self.inherited}
        values |= {"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}
        return {"as_trained": {"folder": self.training_settings.folder, **values}}

    @property
    def summary_line(self) -> str | None:
        """One line with the inherited settings, or None without any."""
        if not self.metadata:
            return None
        assert self.training_settings
        values = {name: value for name, value in self.metadata["as_trained"].items() if name != "folder"}
        phrases = [
            f"no {name}" if value is None else f"{name} {abbreviate(value) if isinstance(value, str) else value}"
            for name, value in values.items()
        ]
        ignored = ", ".join(f"{name} {value}" for name, value in self.training_settings.other_sampling.items())
        suffix = f"; its rollouts also had {ignored:.200}, which is ignored" if ignored else ""
        return f"as {self.training_settings.folder} was trained: {', '.join(phrases)}{suffix}"


def resolve_defaults(
    options: Options,
    training_settings: TrainingPromptSettings | None,
    defaults: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Options, PromptSettings]:
    """Replace the options that are None (not given), and return the options and the prompt settings.

    The values come from `overrides`, else from the training settings, else from `defaults`.

    Args:
        options: a dataclass of options, with `chat_template`.
        training_settings ([`TrainingPromptSettings`], *optional*): settings that the model was trained with.
        defaults (`dict`): values with the lowest priority.
        overrides (`dict`, *optional*): values with a higher priority than the training settings.
    """
    overrides, values, inherited = overrides or {}, {}, []
    for name, default in {**defaults, **overrides}.items():
        if getattr(options, name) is not None:
            continue
        if name in overrides:
            values[name] = overrides[name]
        elif (
            training_settings is not None
            and name in INHERITED_OPTIONS
            and (name == "system_prompt" or getattr(training_settings, name) is not None)
        ):
            values[name] = getattr(training_settings, name)
            inherited.append(name)
        else:
            values[name] = default
    template_name = getattr(options, "chat_template", None)
    return replace(options, **values), PromptSettings(training_settings, tuple(inherited), template_name)  # type: ignore[type-var]
