"""How a model was trained to be asked and to answer: `evaluation.json`, beside its weights.

`bupo train` writes it into a run's folder and into each checkpoint. Who asks the model later takes from it what is not given
otherwise. It holds texts and numbers only: nothing in it names a file, a server or code.
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
TEMPLATE_FILE = "chat_template.jinja"  # as a tokenizer saves it
MAX_SETTINGS_BYTES = 1 << 20  # bytes
SETTING_RANGES = {"max_new_tokens": POSITIVE_INTEGER, "temperature": POSITIVE, "top_p": "(0, 1]"}
INHERITED_OPTIONS = ("system_prompt", *SETTING_RANGES)

Options = TypeVar("Options")


@dataclass(frozen=True)
class TrainingPromptSettings:
    """How a run's rollouts were asked for and sampled.

    Attributes:
        system_prompt (`str`, *optional*): the system message of its problems.
        chat_template_kwargs (`dict`): arguments of the chat template, such as `enable_thinking`.
        max_new_tokens (`int`, *optional*), temperature, top_p (`float`): of the sampling.
        besides (`dict`): further settings of the sampling that were not the defaults, such as `top_k`. For people: evaluation
            samples from the whole policy.
        folder (`str`): where it was read.
        template (`str`, *optional*): of an adapter, the chat template that was saved beside it.
    """

    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    besides: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    template: str | None = None

    def write(self, folder: Path) -> None:
        """Into `evaluation.json`, in one piece."""
        values = {name: value for name, value in asdict(self).items() if name not in ("folder", "template")}
        write_json(
            folder / EVALUATION_FILE, json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **values}, default=str))
        )


def read_training_prompt_settings(model: Any, adapter: str | None = None) -> TrainingPromptSettings | None:
    """What the folder of an adapter, or else of a model, says of how it was trained; None where it says nothing.

    Raises:
        UserError: if it cannot be read, or holds what is no such setting.
    """
    for name in (adapter, model):
        if not isinstance(name, str) or name == EMBEDDED_MODEL:
            continue
        path, found = Path(name) / EVALUATION_FILE, False
        with suppress(OSError, ValueError):  # too long a name, or none: who loads the model says so
            found = path.exists()
        if found:
            return _add_adapter_template(_read_settings(path), path.parent) if name == adapter else _read_settings(path)
    return None


def _add_adapter_template(own: TrainingPromptSettings, folder: Path) -> TrainingPromptSettings:
    """With the template that lies beside an adapter, whose tokenizer is otherwise its base model's."""
    path = folder / TEMPLATE_FILE
    if not path.exists():
        return own
    try:
        return replace(own, template=_read_text(path))
    except (UnreadableFolderError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _read_text(path: Path) -> str:
    """Raises `Unreadable` or `ValueError` for what is no text of usual size in its own folder."""
    if not has_regular_file(path.parent, path.name):
        raise UnreadableFolderError(f"{path.name} is no regular file of its folder")
    return read_file_bytes(path.parent, path.name, MAX_SETTINGS_BYTES).decode()


def _read_settings(path: Path) -> TrainingPromptSettings:
    remedy = "mend it, or remove it and give the options"
    try:
        found = json.loads(_read_text(path))
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        known = [name for name in (*INHERITED_OPTIONS, "chat_template_kwargs", "besides") if name in found]
        own = TrainingPromptSettings(**{name: found[name] for name in known}, folder=str(path.parent))
        check_options(own, SETTING_RANGES)
        _check_template_kwargs(own.chat_template_kwargs)
        if not isinstance(own.besides, dict):
            raise ValueError(f"besides must be a mapping, got {abbreviate(own.besides)}")
    except (UnreadableFolderError, ValueError, TypeError, RecursionError) as error:  # a UserError is a ValueError
        raise UserError(f"{path} cannot be used ({str(error)[:300]}): {remedy}") from error
    return own


def _check_template_kwargs(options: Any) -> None:
    """Raises `ValueError` for what is no variable of a template: an argument of the call would change what it returns."""
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be a mapping, got {abbreviate(options)}")
    taken = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    for name in options:
        if not name.isidentifier() or name in taken:
            raise ValueError(f"chat_template_kwargs holds {abbreviate(name)}, which is no variable of a chat template")


@dataclass(frozen=True)
class PromptSettings:
    """How a model is asked, once it is settled which options are given, the run's own or the defaults.

    Attributes:
        own ([`TrainingPromptSettings`], *optional*): how the model was trained.
        taken (`tuple[str, ...]`): options that are the run's own.
        wanted (`str`, *optional*): the template that is given.
    """

    training_settings: TrainingPromptSettings | None = None
    inherited: tuple[str, ...] = ()
    template_name: str | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of the chat template; none of the run's for another template than the run's."""
        return (
            dict(self.training_settings.chat_template_kwargs)
            if self.training_settings and not self.template_name
            else {}
        )

    def set_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Give a tokenizer its template. Returns the choice, for people."""
        if self.training_settings and self.training_settings.template is not None and not self.template_name:
            tokenizer.chat_template = self.training_settings.template
        chosen, usual = set_chat_template(tokenizer, self.template_name), get_template_kwargs(tokenizer)
        if usual | self.template_kwargs == usual:
            return chosen
        return f"{chosen.removesuffix(', no thinking')}, with {json.dumps(self.template_kwargs, sort_keys=True)}"

    @property
    def metadata(self) -> dict[str, Any]:
        """For a summary's `meta`: where the settings came from, and which."""
        if not self.training_settings or not (self.inherited or self.template_kwargs):
            return {}
        values = {name: getattr(self.training_settings, name) for name in self.inherited}
        values |= {"chat_template_kwargs": self.template_kwargs} if self.template_kwargs else {}
        return {"as_trained": {"folder": self.training_settings.folder, **values}}

    @property
    def summary_line(self) -> str | None:
        """The same in a line for people; None where nothing came from a run."""
        if not self.metadata:
            return None
        assert self.training_settings
        values = {name: value for name, value in self.metadata["as_trained"].items() if name != "folder"}
        said = [f"{name} {abbreviate(value) if isinstance(value, str) else value}" for name, value in values.items()]
        said = [f"no {name}" if values[name] is None else words for name, words in zip(values, said, strict=True)]
        besides = ", ".join(f"{name} {value}" for name, value in self.training_settings.besides.items())
        more = f"; its rollouts also had {besides:.200}, which is left out" if besides else ""
        return f"as {self.training_settings.folder} was trained: {', '.join(said)}{more}"


def resolve_defaults(
    options: Options,
    own: TrainingPromptSettings | None,
    otherwise: Mapping[str, Any],
    first: Mapping[str, Any] | None = None,
) -> tuple[Options, PromptSettings]:
    """Options without those that are None, which stands for "not given".

    Args:
        options: a dataclass of options, with `chat_template`.
        own ([`TrainingPromptSettings`], *optional*): how the model was trained.
        otherwise (`dict`): what options are that neither are given nor the run's own.
        first (`dict`, *optional*): what comes before the run's own.
    """
    first, values, taken = first or {}, {}, []
    for name, usual in {**otherwise, **first}.items():
        if getattr(options, name) is not None:
            continue
        if name in first:
            values[name] = first[name]
        elif (
            own is not None
            and name in INHERITED_OPTIONS
            and (name == "system_prompt" or getattr(own, name) is not None)
        ):
            values[name] = getattr(own, name)
            taken.append(name)
        else:
            values[name] = usual
    wanted = getattr(options, "chat_template", None)
    return replace(options, **values), PromptSettings(own, tuple(taken), wanted)  # type: ignore[type-var]
