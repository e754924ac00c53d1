"""TRL's parser, with one-line errors: flags with `_` or `-`, a YAML file by `--config`, and words that mean the same."""

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
# options that are a path, or may be one
PATH_OPTIONS = {
    "output", "output_dir", "model", "model_name_or_path", "adapter", "dataset", "dataset_name", "eval_dataset", "rollouts",
    "chat_template", "folders", "table", "compare", "resume_from_checkpoint", "benchmarks", "eval_benchmarks", "logging_dir",
    "deepspeed", "chat_template_path", "vllm_model",
}  # fmt: skip
# environment variables that a file may set: counts, switches and names, but none that chooses a program, code, a library, a
# server or a folder that one of these is read from
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
# what a YAML file may give where an option is one value
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
    """YAML, but for a key that is given twice: the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        """Raises [`UserError`] for the second of two keys."""
        merged = [
            key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"
        ]  # may be given again: that is its use
        for place, key in enumerate(merged):
            if isinstance(key, yaml.ScalarNode) and any(key.value == other.value for other in merged[:place]):
                raise UserError(
                    f"{key.value} is given twice in {self.name} (line {key.start_mark.line + 1}): leave one out"
                )
        return super().construct_mapping(node, deep)


def parse_options(classes: Sequence[type], arguments: list[str], prog: str) -> tuple:
    """Instances of the dataclasses from a command line and the YAML file it may name.

    Raises:
        UserError: for an unknown flag or key, one that is given under two names, a value of the wrong type or one that a
            configuration refuses, or a file that is missing or malformed.
    """
    return parse_options_and_values(classes, arguments, prog)[0]


def parse_options_and_values(classes: Sequence[type], arguments: list[str], prog: str) -> tuple[tuple, dict[str, Any]]:
    """As `parse`, and besides what the flags and the file named, as it was read, be it a default: defaults may change.

    Returns:
        `tuple[tuple, dict]`: the instances, and values by the dataclasses' own names; `env`, if the file sets variables.
    """
    known = {field.name for each in classes for field in dataclasses.fields(each) if field.init}
    arguments, path = _split_config_flag(arguments)
    flags = _expand_flag_paths(_translate_flags(arguments, known))
    config, variables = _read_config(path, known) if path else ({}, {})
    parser = _Parser(list(classes), prog=prog, allow_abbrev=False)
    defaults = vars(parser.parse_known_args([])[0])
    with wrap_library_errors(str, ValueError, TypeError, AttributeError):  # a configuration refuses a value
        unknown = parser.set_defaults_with_config(**_convert_types(config, classes)) if config else []
        namespace, rest = parser.parse_known_args(flags)
        unknown = [word for word in (*unknown, *rest) if word.startswith("--")] or rest
        if unknown:
            raise UserError(_suggest_option(unknown[0].removeprefix("--").partition("=")[0], known, prog))
        *parsed, _ = parser.parse_args_into_dataclasses(flags, True, look_for_args_file=False)
    named = config.keys() | {flag.removeprefix("--").partition("=")[0] for flag in flags}
    given = {name: value for name, value in vars(namespace).items() if name in named or value != defaults[name]}
    return tuple(parsed), given | ({"env": variables} if variables else {})


def _split_config_flag(arguments: list[str]) -> tuple[list[str], str | None]:
    """The command line without its `--config FILE`, and the file."""
    rest, path, words = [], None, iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != CONFIG_FLAG:
            rest.append(word)
            continue
        if path is not None:
            raise UserError(f"{CONFIG_FLAG} is given twice: a run has one file, and flags beside it")
        path = value if equals else next(words, "")
        if not path:
            raise UserError(f"{CONFIG_FLAG} names no file: give the YAML file of a run")
    return rest, path


def _read_config(path: str, known: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options of a YAML file, and its `env`, which sets environment variables, as TRL's parser does."""
    path = expand_user_path(CONFIG_FLAG, path)
    try:
        handle = open_regular_file(Path(path))
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"config file {path} cannot be read: it is no regular file") from error
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that are none, numbers beyond Python's limit
        raise UserError(f"the config file {path} is no valid YAML: {error}") from error
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
                f"env of config file {path} sets {abbreviate(name)}, which a file may not, for it could choose programs, code or "
                "servers: set it before the command"
            )
    with wrap_library_errors(f"env of config file {path} sets what no environment can hold", ValueError, OSError):
        os.environ.update(variables)
    names = _translate_names(map(str, config), known)
    return {
        name: _expand_option_path(name, value) for name, value in zip(names, config.values(), strict=True)
    }, variables


def _expand_flag_paths(flags: list[str]) -> list[str]:
    """A command line whose paths have no `~`, wherever it stands: behind `=` no shell expands it."""
    found, option = [], ""
    for word in flags:
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            found.append(f"--{option}={_expand_option_path(option, value)}" if equals else word)
        else:
            found.append(_expand_option_path(option, word))
    return found


def _expand_option_path(option: str, value: Any) -> Any:
    """The value of an option, without the `~` of a path."""
    if option not in PATH_OPTIONS:
        return value
    if isinstance(value, list):
        return [_expand_option_path(option, item) for item in value]
    if not isinstance(value, str) or "~" not in value:
        return value
    names = value.split(",") if option in ("benchmarks", "eval_benchmarks") else [value]
    return ",".join(expand_user_path(option, name) for name in names)


def _translate_flags(arguments: list[str], known: set[str]) -> list[str]:
    """A command line in the words of the command's own dataclasses."""
    places = [i for i, word in enumerate(arguments) if word.startswith("--") and len(word) > 2]
    words = [arguments[i].removeprefix("--").partition("=") for i in places]
    flags = list(arguments)
    for i, (_, equals, value), name in zip(places, words, _translate_names((w[0] for w in words), known), strict=True):
        flags[i] = f"--{name}{equals}{value}"
    return flags


def _translate_names(words: Iterable[str], known: set[str]) -> list[str]:
    """Each word, or what the command calls it. Says so where it was a name of ours before.

    Raises:
        UserError: if an option is given under two of its names.
    """
    names: list[str] = []
    said: dict[str, str] = {}
    for word in words:
        name = word.replace("-", "_")
        if name not in known and OPTION_ALIASES.get(name) in known:
            if name in FORMER_NAMES:
                print(f"bupo: warning: {name} is called {OPTION_ALIASES[name]} now", file=sys.stderr)
            name, word = OPTION_ALIASES[name], name
        elif name not in known:
            name = word
        before = said.setdefault(name, word.replace("-", "_"))
        if before != word.replace("-", "_"):
            raise UserError(f"{before} and {word} are both given and mean the same: leave one out")
        names.append(name)
    return names


def _convert_types(config: dict[str, Any], classes: Sequence[type]) -> dict[str, Any]:
    """In the types of the options: text where one is text, and a list of one where it takes a list and the file gives a word.

    Raises:
        UserError: for a value that is no number or text where an option is one; text is read as on a command line.
    """
    hints = {name: hint for each in classes for name, hint in get_field_types(each).items()}
    found = {}
    for name, value in config.items():
        kinds = get_non_none_types(hints.get(name))
        lists = kinds != [None] and all(get_origin(kind) is list for kind in kinds)
        if lists and isinstance(value, str | int | float):
            value = [value]
        allowed = SCALAR_TYPES.get(kinds[0]) if len(kinds) == 1 else None
        whole = not (isinstance(value, bool) and kinds[0] in (int, float)) if allowed else True
        if allowed and value is not None and not (isinstance(value, allowed) and whole):
            raise UserError(f"{name} must be one {kinds[0].__name__}, got {abbreviate(value)}")
        found[name] = str(value) if kinds == [str] and isinstance(value, int | float | date) else value
    return found


def _suggest_option(name: str, known: set[str], prog: str) -> str:
    name = name.replace("-", "_")
    words = known | {word for word, ours in OPTION_ALIASES.items() if ours in known and word not in FORMER_NAMES}
    close = (
        [SUGGESTED_OPTIONS[name]]
        if SUGGESTED_OPTIONS.get(name) in known
        else difflib.get_close_matches(name, sorted(words), n=1)
    )
    return f"unknown option {name!r}" + (f": did you mean {close[0]!r}?" if close else f"; see {prog} --help")
