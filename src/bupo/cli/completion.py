"""`bupo completion SHELL`: a script that completes commands and their options."""

import argparse

import shtab

from bupo.cli.help import COMMANDS, get_option_classes, group_options
from bupo.cli.parsing import CONFIG_FLAG, PATH_OPTIONS
from bupo.experiments.experiment import EXPERIMENT_NAMES
from bupo.utils.errors import UserError

SHELLS = ("bash", "zsh")
USAGE = """usage: bupo completion SHELL

Print a script that completes commands and options by TAB, for bash or zsh. The script is static: no Python is started.

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
    """Return the commands and options as an argparse parser, for shtab. Command lines are parsed by TRL's parser."""
    parser = argparse.ArgumentParser("bupo")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary)
        _add_argument(subparser, CONFIG_FLAG, "YAML file of a run", ())
        for options in group_options(get_option_classes(name)).values():
            for option in options:
                choices = option.choices or (("true", "false") if option.placeholder == "true|false" else ())
                for spelling in filter(None, (option.name, option.alias)):
                    _add_argument(subparser, f"--{spelling}", option.help.split(". ")[0], choices)
        if name == "report":
            _add_argument(subparser, "folders", "run folders", ())
        if name == "reproduce":
            _add_argument(subparser, "names", "figures and tables", ("all", *EXPERIMENT_NAMES))
    commands.add_parser("completion", help="print a script that completes").add_argument("shell", choices=SHELLS)
    return parser


def _add_argument(command: argparse.ArgumentParser, flag: str, summary: str, choices: tuple[str, ...]) -> None:
    nargs = None if flag.startswith("--") else "*"
    argument = command.add_argument(flag, nargs=nargs, choices=choices or None, help=summary.replace("%", "%%"))
    if flag == CONFIG_FLAG or flag.removeprefix("--") in PATH_OPTIONS:
        argument.complete = shtab.FILE  # type: ignore[attr-defined]
