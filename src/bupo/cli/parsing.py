"""Command-line parser: TRL's, with one-line errors, flags with `_` or `-`, a YAML file by `--config`, and option aliases."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, get_origin

import yaml
from trl import TrlParser

from bupo.cli.help import format_command_help
from bupo.options.groups import FORMER_NAMES, OPTION_ALIASES, SUGGESTED_OPTIONS
from bupo.options.ranges import abbreviate, get_field_types, get_non_none_types
from bupo.utils.errors import UserError, wrap_library_errors
from bupo.utils.files import expand_user_path, open_regular_file

CONFIG_FLAG = "--config"
# options whose value may be a path: `~` is expanded, and the shell completes files
PATH_OPTIONS = {
    "output", "output_dir", "model", "model_name_or_path", "adapter", "dataset", "dataset_name", "eval_dataset", "rollouts",
    "chat_template", "folders", "table", "compare", "resume_from_checkpoint", "benchmarks", "eval_benchmarks", "logging_dir",
    "deepspeed", "chat_template_path", "vllm_model",
}  # fmt: skip
# Environment variables that a file may set: counts, switches and names. A variable that chooses a program, code, a library, a
# server, or a folder that one of these is read from is not allowed.
ALLOWED_VARIABLES = re.compile(
    r"CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|(HIP|ROCR|ASCEND_RT)_VISIBLE_DEVICES|"
    r"ZE_AFFINITY_MASK|PYTORCH_(CUDA_)?ALLOC_CONF|PYTORCH_ENABLE_MPS_FALLBACK|(OMP|MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|"
    r"TOKENIZERS_PARALLELISM|(HF_HUB|HF_DATASETS|TRANSFORMERS)_OFFLINE|HF_HUB_(DISABLE_[A-Z_]+|ENABLE_HF_TRANSFER|"
    r"DOWNLOAD_TIMEOUT|ETAG_TIMEOUT|VERBOSITY)|TRANSFORMERS_(VERBOSITY|NO_ADVISORY_WARNINGS)|TQDM_DISABLE|"
    r"WANDB_(PROJECT|ENTITY|NAME|NOTES|TAGS|MODE|RUN_GROUP|JOB_TYPE|DISABLED|SILENT|WATCH|LOG_MODEL)|"
    r"(MLFLOW_EXPERIMENT|MLFLOW_RUN|COMET_PROJECT|COMET_WORKSPACE|CLEARML_PROJECT|CLEARML_TASK|TRACKIO_PROJECT)(_NAME)?|"
    r"NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE|SHM_DISABLE|SOCKET_IFNAME|IB_HCA|TIMEOUT|P2P_LEVEL|NVLS_ENABLE|CUMEM_ENABLE)|"
    r"(TORCH_)?NCCL_(ASYNC_ERROR_HANDLING|BLOCKING_WAIT|ENABLE_MONITORING|HEARTBEAT_TIMEOUT_SEC)|GLOO_SOCKET_IFNAME|"
    r"TORCH_(DISTRIBUTED_DEBUG|SHOW_CPP_STACKTRACES|LOGS)|VLLM_(USE_V1|ATTENTION_BACKEND|LOGGING_LEVEL|"
    r"WORKER_MULTIPROC_METHOD|ALLOW_LONG_MAX_MODEL_LEN|ENABLE_V1_MULTIPROCESSING|USE_FLASHINFER_SAMPLER)|"
    r"(HF|HUGGING_FACE_HUB)_TOKEN|(WANDB|COMET)_API_KEY|BUPO_[A-Z0-9_]+"
)
# types that a YAML file may have for an option with a single value
SCALAR_TYPES = {
    int: (int, str),
    float: (int, float, str),
    bool: (bool, int, str),
    str: (str, int, float, bool, date),
}


class _Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)

    def format_help(self) -> str:
        return format_command_help(self.prog.split()[1], tuple(self.dataclass_types)) + "\n"


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys. The default loader drops the first of them silently."""

    def construct_mapping(self, node, deep=False):
        """Raise [`UserError`] for the second of two equal keys."""
        # A merge key `<<` may occur several times.
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if isinstance(key, yaml.ScalarNode) and any(key.value == other.value for other in keys[:index]):
                raise UserError(
                    f"{key.value} is given twice in {self.name} (line {key.start_mark.line + 1}): leave one out"
                )
        return super().construct_mapping(node, deep)


def parse_options(classes: Sequence[type], arguments: list[str], prog: str) -> tuple:
    """Return instances of the dataclasses from a command line and the YAML file of its `--config`.

    Raises:
        UserError: for an unknown flag or key, an option that is given under two names, an invalid value, or a file that is
            missing or malformed.
    """
    return parse_options_and_values(classes, arguments, prog)[0]


def parse_options_and_values(classes: Sequence[type], arguments: list[str], prog: str) -> tuple[tuple, dict[str, Any]]:
    """Return instances of the dataclasses and the values that the command line and the file set.

    Values that equal a default are included, because defaults may change between versions.

    Returns:
        `tuple[tuple, dict]`: the instances, and the values by field name; also `env`, if the file sets environment variables.
    """
    known = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    arguments, path = _split_config_flag(arguments)
    flags = _expand_flag_paths(_translate_flags(arguments, known))
    config, variables = _read_config(path, known) if path else ({}, {})
    parser = _Parser(list(classes), prog=prog, allow_abbrev=False)
    defaults = vars(parser.parse_known_args([])[0])
    with wrap_library_errors(
        str, ValueError, TypeError, AttributeError
    ):  # raised by a configuration that refuses a value
        unknown = parser.set_defaults_with_config(**_convert_types(config, classes)) if config else []
        namespace, rest = parser.parse_known_args(flags)
        unknown = [word for word in (*unknown, *rest) if word.startswith("--")] or rest
        if unknown:
            raise UserError(_suggest_option(unknown[0].removeprefix("--").partition("=")[0], known, prog))
        *parsed, _ = parser.parse_args_into_dataclasses(flags, True, look_for_args_file=False)
    named = config.keys() | {flag.removeprefix("--").partition("=")[0] for flag in flags}
    values = {name: value for name, value in vars(namespace).items() if name in named or value != defaults[name]}
    return tuple(parsed), values | ({"env": variables} if variables else {})


def _split_config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the command line without `--config FILE`, and the file or None."""
    rest, path, words = [], None, iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != CONFIG_FLAG:
            rest.append(word)
            continue
        if path is not None:
            raise UserError(f"{CONFIG_FLAG} is given twice: use one file, and flags that override it")
        path = value if equals else next(words, "")
        if not path:
            raise UserError(f"{CONFIG_FLAG} names no file: give the YAML file of a run")
    return rest, path


def _read_config(path: str, known: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options of a YAML file and its `env`. Set the environment variables of `env`, like TRL's parser."""
    path = expand_user_path(CONFIG_FLAG, path)
    try:
        handle = open_regular_file(Path(path))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"config file {path} cannot be read: it is not a regular file") from error
    try:
        with os.fdopen(handle, encoding="utf-8") as file:
            loader = _Loader(file)
            loader.name = path
            try:
                config = loader.get_single_data()
            finally:
                loader.dispose()
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid dates, numbers beyond Python's limit
        raise UserError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"config file {path} must contain a YAML mapping")
    variables = config.pop("env", {})
    if not isinstance(variables, dict):
        raise UserError(
            f"env of config file {path} must be a mapping of environment variables, got {abbreviate(variables)}"
        )
    variables = {str(name): str(value) for name, value in variables.items()}
    for name in variables:
        if not ALLOWED_VARIABLES.fullmatch(name):
            raise UserError(
                f"env of config file {path} sets {abbreviate(name)}, which could choose programs, code or servers: "
                "set it before the command"
            )
    with wrap_library_errors(f"env of config file {path} sets an invalid variable", ValueError, OSError):
        os.environ.update(variables)
    names = _translate_names(map(str, config), known)
    options = {name: _expand_option_path(name, value) for name, value in zip(names, config.values(), strict=True)}
    return options, variables


def _expand_flag_paths(flags: list[str]) -> list[str]:
    """Return a command line with `~` expanded in paths. The shell does not expand it after `=`."""
    expanded, option = [], ""
    for word in flags:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            expanded.append(f"--{option}={_expand_option_path(option, value)}" if equals else word)
        else:
            expanded.append(_expand_option_path(option, word))
    return expanded


def _expand_option_path(option: str, value: Any) -> Any:
    """Return the value of an option, with `~` expanded if it is a path."""
    if option not in PATH_OPTIONS:
        return value
    if isinstance(value, list):
        return [_expand_option_path(option, item) for item in value]
    if not isinstance(value, str) or "~" not in value:
        return value
    paths = value.split(",") if option in ("benchmarks", "eval_benchmarks") else [value]
    return ",".join(expand_user_path(option, path) for path in paths)


def _translate_flags(arguments: list[str], known: set[str]) -> list[str]:
    """Return a command line with the field names of the command's dataclasses as flags."""
    indices = [i for i, word in enumerate(arguments) if word.startswith("--") and len(word) > 2]
    parts = [arguments[i].removeprefix("--").partition("=") for i in indices]
    names = _translate_names((part[0] for part in parts), known)
    translated = list(arguments)
    for i, (_, equals, value), name in zip(indices, parts, names, strict=True):
        translated[i] = f"--{name}{equals}{value}"
    return translated


def _translate_names(words: Iterable[str], known: set[str]) -> list[str]:
    """Return the field name of each option name or alias. Warn about former names.

    Raises:
        UserError: if an option is given under two of its names.
    """
    names: list[str] = []
    spellings: dict[str, str] = {}
    for word in words:
        name = word.replace("-", "_")
        if name not in known and OPTION_ALIASES.get(name) in known:
            if name in FORMER_NAMES:
                print(f"bupo: warning: {name} is called {OPTION_ALIASES[name]} now", file=sys.stderr)
            name, word = OPTION_ALIASES[name], name
        elif name not in known:
            name = word
        first = spellings.setdefault(name, word.replace("-", "_"))
        if first != word.replace("-", "_"):
            raise UserError(f"{first} and {word} are both given and mean the same: leave one out")
        names.append(name)
    return names


def _convert_types(config: dict[str, Any], classes: Sequence[type]) -> dict[str, Any]:
    """Convert values of a YAML file to the types of the options: numbers to text, and a single value to a list.

    Raises:
        UserError: for a value of another type than the option's. Text is parsed later, as on a command line.
    """
    hints = {name: hint for cls in classes for name, hint in get_field_types(cls).items()}
    converted = {}
    for name, value in config.items():
        kinds = get_non_none_types(hints.get(name))
        takes_list = kinds != [None] and all(get_origin(kind) is list for kind in kinds)
        if takes_list and isinstance(value, str | int | float):
            value = [value]
        allowed = SCALAR_TYPES.get(kinds[0]) if len(kinds) == 1 else None
        is_bool_for_number = isinstance(value, bool) and kinds[0] in (int, float)
        if allowed and value is not None and (is_bool_for_number or not isinstance(value, allowed)):
            raise UserError(f"{name} must be one {kinds[0].__name__}, got {abbreviate(value)}")
        converted[name] = str(value) if kinds == [str] and isinstance(value, int | float | date) else value
    return converted


def _suggest_option(name: str, known: set[str], prog: str) -> str:
    name = name.replace("-", "_")
    names = known | {alias for alias, field in OPTION_ALIASES.items() if field in known and alias not in FORMER_NAMES}
    close = difflib.get_close_matches(name, sorted(names), n=1)
    if SUGGESTED_OPTIONS.get(name) in known:
        close = [SUGGESTED_OPTIONS[name]]
    return f"unknown option {name!r}" + (f": did you mean {close[0]!r}?" if close else f"; see {prog} --help")
