"""The commands: what each is for, examples, and its options in groups. The terminal's help and the docs are made of it."""

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

MAX_INLINE_CHOICES = 6  # so many choices are told in the help's text, not beside the flag
INDENT, TEXT_COLUMN, MAX_WIDTH = 2, 30, 100
LIBRARY_NAMES = {"trl": "TRL's", "transformers": "transformers'"}
TYPE_PLACEHOLDERS = {int: "N", float: "X", bool: "true|false", dict: "JSON", list: "JSON"}


@dataclass(frozen=True)
class Command:
    """A command: what it is for, lines that can be typed with what they do, and what it takes without a flag."""

    summary: str
    examples: dict[str, str]
    positional_arguments: str = ""

    @property
    def sentence(self) -> str:
        """`about` by itself."""
        return f"{self.summary[0].upper()}{self.summary[1:]}."


COMMANDS = {
    "analyze": Command(
        "measure what every layer and module of a model decides",
        {
            "bupo analyze": "the embedded model, on its arithmetic",
            "bupo analyze --model Qwen/Qwen3-4B --preset paper": "as in the paper: all of MATH500",
            "bupo analyze --model runs/NAME/checkpoint-* --output runs/over-training": "checkpoints side by side",
        },
    ),
    "sample": Command(
        "sample text from an internal policy, and see every layer's word",
        {
            "bupo sample --layer 6 --prompt '57+23-41'": "by layer 6 of the embedded model",
            "bupo sample --model Qwen/Qwen3-4B --ffn 30 --lens final_norm --prompt Hello": "by an FFN, through the final norm",
        },
    ),
    "train": Command(
        "train a model by BuPO, or by the methods it is compared with",
        {
            "bupo train --config recipes/cpu/embedded-bupo.yaml": "two minutes on two CPU cores",
            "bupo train --config run.yaml --learning_rate 1e-6 --output runs/lower": "a file, and flags that override it",
            "bupo train --config run.yaml --resume_from_checkpoint true": "go on where a run was stopped",
        },
    ),
    "plan": Command(
        "say what a run will need and take, before any weight is loaded",
        {
            "bupo plan --config recipes/qwen3-4b/bupo.yaml --gpus 8 --gpu_memory 80": "on eight GPUs of 80 GB",
            "bupo plan --config recipes/cpu/embedded-bupo.yaml": "on this machine",
        },
    ),
    "demo": Command(
        "train the embedded model by BuPO on this machine and show what it gained",
        {"bupo demo --output runs/demo": "two minutes on two CPU cores"},
    ),
    "eval": Command(
        "measure avg@k, pass@k and majority@k on benchmarks",
        {
            "bupo eval --benchmarks arithmetic --size 256 --k 8": "the embedded model",
            "bupo eval --model runs/NAME --benchmarks math500:16,aime24:32": "asked as it was trained",
            "bupo eval --table runs/eval-A runs/eval-B": "methods by benchmarks",
        },
    ),
    "report": Command(
        "write one page over any runs", {"bupo report runs/*": "trainings, evaluations and analyses"}, " FOLDER ..."
    ),
    "reproduce": Command(
        "make the paper's figures and tables",
        {
            "bupo reproduce fig3 --scale embedded": "on two CPU cores",
            "bupo reproduce all --scale paper --dry_run true": "what it would run, and its GPU hours",
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
        takes (`str`): what stands behind the flag.
        default (`str`): as it is typed; empty where nothing is set.
        about (`str`): one or a few sentences, with the unit.
        choices (`tuple[str, ...]`): all that it may be, where that is a list of words.
        also (`str`): another name of it; empty where there is none.
    """

    name: str
    placeholder: str
    default: str
    help: str
    choices: tuple[str, ...]
    alias: str


def get_option_classes(command: str) -> tuple[type, ...]:
    """The dataclasses of a command's options."""
    return importlib.import_module(f"bupo.cli.{command}").OPTIONS


def group_options(classes: tuple[type, ...]) -> dict[str, list[Option]]:
    """Options by the title of the class that first has them; what only the command has comes first."""
    found: dict[str, list[Option]] = {}
    for each in classes:
        hints, mine = get_field_types(each), {field.name: field for field in fields(each) if field.init}
        for owner in each.__mro__:
            names = [name for name in get_annotations(owner) if name in mine]
            first = [name for name in names if owner is _find_declaring_class(each, name)]
            if first:
                found.setdefault(_get_group_title(owner), []).extend(
                    _make_option(mine[name], hints[name]) for name in first
                )
    return found


def _find_declaring_class(each: type, name: str) -> type:
    """The class that declares a field before those that give it another default."""
    return [owner for owner in each.__mro__ if name in get_annotations(owner)][-1]


def _get_group_title(owner: type) -> str:
    package = owner.__module__.split(".")[0]
    if package in LIBRARY_NAMES:
        return f"{LIBRARY_NAMES[package]} {owner.__name__.lstrip('_')}"
    return re.split(r"[.:;](?=\s|$)", owner.__doc__ or owner.__name__)[0].replace("`", "")


def _make_option(field: Field, hint: Any) -> Option:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    about = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
    choices = tuple(str(word) for word in field.metadata.get("choices") or _get_option_choices(hint))
    also = TRL_ALIASES[field.name] if field.name in BUPO_TO_TRL_NAMES.values() else ""
    if len(choices) > MAX_INLINE_CHOICES:
        about += f" One of {', '.join(choices)}."
    if also:
        about += f" Also --{also}."
    takes = "|".join(choices) if 0 < len(choices) <= MAX_INLINE_CHOICES else _get_placeholder(hint)
    return Option(field.name, takes, _format_default(default), about, choices, also)


def _get_option_choices(hint: Any) -> tuple:
    return tuple(word for kind in get_non_none_types(hint) for word in get_choices(kind))


def _get_placeholder(hint: Any) -> str:
    kinds = get_non_none_types(hint)
    items = {TYPE_PLACEHOLDERS.get(get_args(kind)[0], "WORD") for kind in kinds if get_origin(kind) is list}
    if items:
        return f"{'|'.join(sorted(items))} ..."
    return "|".join(dict.fromkeys(TYPE_PLACEHOLDERS.get(get_origin(kind) or kind, "TEXT") for kind in kinds))


def _format_default(default: Any) -> str:
    """As it is typed on a command line."""
    if default is None or default == "" or default is MISSING:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return " ".join(map(str, default))
    return str(getattr(default, "value", default))


def format_usage() -> str:
    """`bupo --help`."""
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
        "--traceback              show what lies behind an error",
    ]
    return "\n".join(lines)


def format_command_help(command: str, classes: tuple[type, ...]) -> str:
    """`bupo COMMAND --help`, as wide as the terminal."""
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    known = COMMANDS[command]
    lines = [f"usage: bupo {command}{known.positional_arguments} [--config FILE.yaml] [--option value ...]"]
    lines += ["", known.sentence, "", "Examples"]
    for line, what in known.examples.items():
        lines += [f"  {line}", f"      {what}"]
    lines += [
        "",
        "Options may stand in the YAML file of --config too; a flag overrides the file.",
        "[ ] holds the default.",
    ]
    for title, options in group_options(classes).items():
        lines += ["", title, *(row for option in options for row in _format_option(option, width))]
    return "\n".join(lines)


def _format_option(option: Option, width: int) -> list[str]:
    """A flag and what it takes, then its text in a column beside or below."""
    flag = f"{' ' * INDENT}--{option.name} {option.placeholder}"
    text = option.help + f" [{option.default}]" * bool(option.default)
    wrapped = textwrap.wrap(text, max(20, width - TEXT_COLUMN), break_long_words=False, break_on_hyphens=False)
    rows = [" " * TEXT_COLUMN + row for row in wrapped]
    if len(flag) < TEXT_COLUMN - 1 and rows:
        return [flag.ljust(TEXT_COLUMN) + rows[0].lstrip(), *rows[1:]]
    return [flag, *rows]
