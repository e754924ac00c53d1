"""`bupo completion SHELL`: a script that completes commands and their options."""

import argparse

import shtab

from bupo.commands.catalogue import COMMANDS, groups, options_of
from bupo.errors import UserError

SHELLS = ("bash", "zsh")
FILES = ("config", "output", "model", "dataset", "rollouts", "eval_dataset", "chat_template", "folders")


def run(arguments: list[str]) -> None:
    """Print the script. It is static: to complete, a shell starts no Python."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UserError(f"completion takes one shell, {' or '.join(SHELLS)}, got {' '.join(arguments) or 'none'}")
    print(shtab.complete(parser(), arguments[0]))


def parser() -> argparse.ArgumentParser:
    """The commands and options as shtab reads them; bupo's own parser stays TRL's."""
    whole = argparse.ArgumentParser("bupo")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        each = commands.add_parser(name, help=command.about)
        _add(each, "config", "", "YAML file of a run")
        for options in groups(options_of(name)).values():
            for option in options:
                _add(each, option.name, option.takes, option.about.split(". ")[0])
    return whole


def _add(command: argparse.ArgumentParser, name: str, takes: str, about: str) -> None:
    words = takes.split("|")
    choices = words if len(words) > 1 and not takes.isupper() else None
    added = command.add_argument(f"--{name}", choices=choices, help=about.replace("%", "%%"))
    if name in FILES:
        added.complete = shtab.FILE  # type: ignore[attr-defined]
