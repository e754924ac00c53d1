"""Commands with their purpose, examples and grouped options: the source of the terminal's help and of the docs."""

import importlib
import re
import shutil
import textwrap
from dataclasses import MISSING, Field, dataclass, fields
from inspect import get_annotations
from typing import Any, get_args, get_origin

import bupo
from bupo.options.groups import BUPO_TO_TRL_NAMES, TRL_ALIASES
from bupo.options.ranges import get_choices, get_field_types, get_non_none_types

MAX_INLINE_CHOICES = 6  # longer lists of choices go into the help text, not beside the flag
INDENT, TEXT_COLUMN, MAX_WIDTH = 2, 30, 100
LIBRARY_NAMES = {"trl": "TRL's", "transformers": "transformers'"}
TYPE_PLACEHOLDERS = {int: "N", float: "X", bool: "true|false", dict: "JSON", list: "JSON"}


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        summary (`str`): its purpose, without capital and full stop.
        examples (`dict[str, str]`): command lines and their descriptions.
        positional_arguments (`str`): for the usage line.
    """

    summary: str
    examples: dict[str, str]
    positional_arguments: str = ""

    @property
    def sentence(self) -> str:
        """The summary as a sentence."""
        return f"{self.summary[0].upper()}{self.summary[1:]}."


COMMANDS = {
    "analyze": Command(
        "measure entropy and predictions of every layer and module of a model",
        {
            "bupo analyze": "the embedded model, on its arithmetic",
            "bupo analyze --model Qwen/Qwen3-4B --preset paper": "as in the paper: all of MATH500",
            "bupo analyze --model runs/NAME/checkpoint-* --output runs/over-training": "checkpoints side by side",
        },
    ),
    "sample": Command(
        "sample text from an internal policy and show every layer's most likely tokens",
        {
            "bupo sample --layer 6 --prompt '57+23-41'": "from layer 6 of the embedded model",
            "bupo sample --model Qwen/Qwen3-4B --ffn 30 --lens final_norm --prompt Hello": "from an FFN, with the logit lens",
        },
    ),
    "train": Command(
        "train a model by BuPO, or by a method that it is compared with",
        {
            "bupo train --config recipes/cpu/embedded-bupo.yaml": "two minutes on two CPU cores",
            "bupo train --config run.yaml --learning_rate 1e-6 --output runs/lower": "a file and flags that override it",
            "bupo train --config run.yaml --resume_from_checkpoint true": "resume an interrupted run",
        },
    ),
    "plan": Command(
        "estimate parameters, FLOPs, memory and time of a run before loading weights",
        {
            "bupo plan --config recipes/qwen3-4b/bupo.yaml --gpus 8 --gpu_memory 80": "on eight GPUs of 80 GB",
            "bupo plan --config recipes/cpu/embedded-bupo.yaml": "on this machine",
        },
    ),
    "demo": Command(
        "train the embedded model by BuPO on this machine and show its gain",
        {"bupo demo --output runs/demo": "two minutes on two CPU cores"},
    ),
    "eval": Command(
        "measure avg@k, pass@k and majority@k on benchmarks",
        {
            "bupo eval --benchmarks arithmetic --size 256 --k 8": "the embedded model",
            "bupo eval --model runs/NAME --benchmarks math500:16,aime24:32": "with the prompt settings of its training",
            "bupo eval --table runs/eval-A runs/eval-B": "a table of methods and benchmarks",
        },
    ),
    "report": Command(
        "write one page about any runs", {"bupo report runs/*": "trainings, evaluations and analyses"}, " FOLDER ..."
    ),
    "reproduce": Command(
        "make the paper's figures and tables",
        {
            "bupo reproduce fig3 --scale embedded": "on two CPU cores",
            "bupo reproduce all --scale paper --dry_run true": "its runs and their GPU hours",
        },
        " NAME ...",
    ),
}
COMMAND_GROUPS = {
    "Look inside": ("analyze", "sample"),
    "Train": ("train", "plan", "demo"),
    "Measure and compare": ("eval", "report", "reproduce"),
}


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        name (`str`): without dashes.
        placeholder (`str`): text after the flag.
        default (`str`): in the syntax of the command line; empty for None.
        help (`str`): one or a few sentences, with the unit.
        choices (`tuple[str, ...]`): allowed values, or empty.
        alias (`str`): another name of the option, or empty.
    """

    name: str
    placeholder: str
    default: str
    help: str
    choices: tuple[str, ...]
    alias: str


def get_option_classes(command: str) -> tuple[type, ...]:
    """Return the dataclasses of a command's options."""
    return importlib.import_module(f"bupo.cli.{command}").OPTIONS


def group_options(classes: tuple[type, ...]) -> dict[str, list[Option]]:
    """Return options by the title of the class that declares them. Options of the command itself come first."""
    groups: dict[str, list[Option]] = {}
    for options_class in classes:
        hints = get_field_types(options_class)
        init_fields = {field.name: field for field in fields(options_class) if field.init}
        for owner in options_class.__mro__:
            names = [name for name in get_annotations(owner) if name in init_fields]
            declared = [name for name in names if owner is _find_declaring_class(options_class, name)]
            if declared:
                groups.setdefault(_get_group_title(owner), []).extend(
                    _make_option(init_fields[name], hints[name]) for name in declared
                )
    return groups


def _find_declaring_class(options_class: type, name: str) -> type:
    """Return the class that first declares a field. Subclasses may only change its default."""
    return [owner for owner in options_class.__mro__ if name in get_annotations(owner)][-1]


def _get_group_title(owner: type) -> str:
    package = owner.__module__.split(".")[0]
    if package in LIBRARY_NAMES:
        return f"{LIBRARY_NAMES[package]} {owner.__name__.lstrip('_')}"
    return re.split(r"[.:;](?=\s|$)", owner.__doc__ or owner.__name__)[0].replace("`", "")


def _make_option(field: Field, hint: Any) -> Option:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    choices = tuple(str(word) for word in field.metadata.get("choices") or _get_option_choices(hint))
    alias = TRL_ALIASES[field.name] if field.name in BUPO_TO_TRL_NAMES.values() else ""
    if len(choices) > MAX_INLINE_CHOICES:
        text += f" One of {', '.join(choices)}."
    if alias:
        text += f" Also --{alias}."
    placeholder = "|".join(choices) if 0 < len(choices) <= MAX_INLINE_CHOICES else _get_placeholder(hint)
    return Option(field.name, placeholder, _format_default(default), text, choices, alias)


def _get_option_choices(hint: Any) -> tuple:
    return tuple(word for kind in get_non_none_types(hint) for word in get_choices(kind))


def _get_placeholder(hint: Any) -> str:
    kinds = get_non_none_types(hint)
    items = {TYPE_PLACEHOLDERS.get(get_args(kind)[0], "WORD") for kind in kinds if get_origin(kind) is list}
    if items:
        return f"{'|'.join(sorted(items))} ..."
    return "|".join(dict.fromkeys(TYPE_PLACEHOLDERS.get(get_origin(kind) or kind, "TEXT") for kind in kinds))


def _format_default(default: Any) -> str:
    """Return a default in the syntax of the command line."""
    if default is None or default == "" or default is MISSING:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(getattr(default, "value", default))


def format_usage() -> str:
    """Return the text of `bupo --help`."""
    lines = ["usage: bupo COMMAND [--option value ...]", ""]
    lines += [bupo.__doc__ or ""]
    for purpose, names in COMMAND_GROUPS.items():
        lines += ["", purpose, *(f"  {name:11}{COMMANDS[name].summary}" for name in names)]
    lines += ["", "Examples", *(f"  {next(iter(command.examples))}" for command in COMMANDS.values())]
    lines += [
        "",
        "bupo COMMAND --help      a command's options, with examples, defaults and units",
        "bupo completion SHELL    a script that completes commands and options: bash or zsh",
        "bupo --version",
        "--traceback              show the stack trace of an error",
    ]
    return "\n".join(lines)


def format_command_help(command: str, classes: tuple[type, ...]) -> str:
    """Return the text of `bupo COMMAND --help`, as wide as the terminal."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    entry = COMMANDS[command]
    lines = [f"usage: bupo {command}{entry.positional_arguments} [--config FILE.yaml] [--option value ...]"]
    lines += ["", entry.sentence, "", "Examples"]
    for line, description in entry.examples.items():
        lines += [f"  {line}", f"      {description}"]
    lines += [
        "",
        "Options may also be set in the YAML file of --config; a flag overrides the file.",
        "Defaults are in brackets [ ].",
    ]
    for title, options in group_options(classes).items():
        lines += ["", title, *(row for option in options for row in _format_option(option, width))]
    return "\n".join(lines)


def _format_option(option: Option, width: int) -> list[str]:
    """Return the lines of an option: the flag and its placeholder, and the help text in a column beside or below."""
    flag = f"{' ' * INDENT}--{option.name} {option.placeholder}"
    text = option.help + f" [{option.default}]" * bool(option.default)
    wrapped = textwrap.wrap(text, max(20, width - TEXT_COLUMN), break_long_words=False, break_on_hyphens=False)
    rows = [" " * TEXT_COLUMN + row for row in wrapped]
    if len(flag) < TEXT_COLUMN - 1 and rows:
        return [flag.ljust(TEXT_COLUMN) + rows[0].lstrip(), *rows[1:]]
    return [flag, *rows]
