"""`bupo completion SHELL`: a script that completes commands and their options."""

import argparse

import shtab

from bupo.cli.help import COMMANDS, get_option_classes, group_options
from bupo.experiments.experiment import EXPERIMENT_NAMES
from bupo.utils.errors import UserError

SHELLS = ("bash", "zsh")
COMPLETED_PATH_OPTIONS = {
    "config", "output", "output_dir", "model", "model_name_or_path", "adapter", "dataset", "rollouts", "eval_dataset",
    "chat_template", "folders", "table", "compare", "resume_from_checkpoint",
}  # fmt: skip
USAGE = """usage: bupo completion SHELL

Print a script that completes commands and options by TAB, for bash or zsh. It is static: completing starts no Python.

  eval "$(bupo completion bash)"                                    # in ~/.bashrc
  autoload -U compinit && compinit; eval "$(bupo completion zsh)"   # in ~/.zshrc"""


def run(arguments: list[str]) -> None:
    """Print the script."""
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
        return
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(f"completion takes one shell, {' or '.join(SHELLS)}, got {' '.join(arguments) or 'none'}")
    print(shtab.complete(build_parser(), arguments[0]))


def build_parser() -> argparse.ArgumentParser:
    """The commands and options as shtab reads them; bupo's own parser stays TRL's."""
    whole = argparse.ArgumentParser("bupo")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        each = commands.add_parser(name, help=command.summary)
        _add_argument(each, "--config", "YAML file of a run", ())
        for options in group_options(get_option_classes(name)).values():
            for option in options:
                choices = option.choices or (("true", "false") if option.placeholder == "true|false" else ())
                for spelling in filter(None, (option.name, option.alias)):
                    _add_argument(each, f"--{spelling}", option.help.split(". ")[0], choices)
        if name == "report":
            _add_argument(each, "folders", "run folders", ())
        if name == "reproduce":
            _add_argument(each, "names", "figures and tables", ("all", *EXPERIMENT_NAMES))
    commands.add_parser("completion", help="print a script that completes").add_argument("shell", choices=SHELLS)
    return whole


def _add_argument(command: argparse.ArgumentParser, flag: str, about: str, choices: tuple[str, ...]) -> None:
    several = None if flag.startswith("--") else "*"
    added = command.add_argument(flag, nargs=several, choices=choices or None, help=about.replace("%", "%%"))
    if flag.removeprefix("--") in COMPLETED_PATH_OPTIONS:
        added.complete = shtab.FILE  # type: ignore[attr-defined]
