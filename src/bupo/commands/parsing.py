"""TRL's parser, with one-line errors: flags with `_` or `-`, and a YAML file by `--config`."""

import difflib
from collections.abc import Sequence

import yaml
from trl import TrlParser

from bupo.errors import UserError


class _Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)


def parse(dataclasses: Sequence[type], arguments: list[str], prog: str) -> tuple:
    """Instances of the dataclasses from a command line and the YAML file it may name.

    Raises:
        UserError: for an unknown flag or key, a value of the wrong type or one that a configuration refuses, or a file
            that is missing or malformed.
    """
    parser = _Parser(list(dataclasses), prog=prog, allow_abbrev=False)
    try:
        *parsed, unknown_keys, unknown_flags = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"config file {error.filename} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"the config file is no valid YAML: {error}") from error
    except (ValueError, TypeError, AttributeError) as error:  # a configuration refuses a value
        raise UserError(str(error)) from error
    unknown = [word for word in (*unknown_keys, *unknown_flags) if word.startswith("--")] or unknown_flags
    if unknown:
        raise UserError(_did_you_mean(unknown[0].removeprefix("--").partition("=")[0], parser))
    return tuple(parsed)


def _did_you_mean(name: str, parser: TrlParser) -> str:
    known = [action.dest for action in parser._actions]
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"unknown option {name!r}" + (f": did you mean {close[0]!r}?" if close else f"; see {parser.prog} --help")
