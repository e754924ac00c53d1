"""Record of a run: its options (`config.yaml`), and its versions and git revision (`run.json`)."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from bupo.options.groups import BUPO_TO_TRL_NAMES
from bupo.run_files.reading import NONE_TYPE, DamagedFileError, read_json
from bupo.utils.files import make_folder, write_json, write_text
from bupo.utils.sanitize import collapse_whitespace
from bupo.version import VERSION

CONFIG_FILE, RUN_FILE = "config.yaml", "run.json"
RECORDED_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
# names of options and environment variables that hold secrets; per_token and eos_token do not
SECRET_NAME = re.compile(r"(?:^|[_-])(?:(?<!(?:per|eos|bos|pad)[_-])token|key|secret|password)$", re.IGNORECASE)
SECRET_IN_JSON = re.compile(  # in an option whose value is JSON
    r"""((?:token|key|secret|password)["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}]+)""", re.IGNORECASE
)
URL_CREDENTIALS = re.compile(r"(://)[^/\s@]+@")  # user:password@
BUPO_OPTION_NAMES = {trl_name: bupo_name for bupo_name, trl_name in BUPO_TO_TRL_NAMES.items()}
ONE_TIME_OPTIONS = ("overwrite", "resume_from_checkpoint")  # not recorded: a run that is started again deletes nothing


def record_run(
    folder: str | Path,
    command: str,
    options: dict[str, Any],
    python_arguments: Sequence[str] = (),
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write `config.yaml`, which starts the same run again, and `run.json`, which describes its environment, into its folder.

    Secrets are left out: values whose names end in `token`, `key`, `secret` or `password`, and the user of a URL. Entries of
    earlier runs in `run.json` are preserved.

    Args:
        folder (`Path`): the run's folder.
        command (`str`): such as `analyze`.
        options (`dict`): the given options, and the environment variables of a configuration file, `env`.
        python_arguments (`list[str]`, *optional*): names of the arguments given as Python objects, which no file can hold.
        metadata (`dict`, *optional*): more entries of `run.json`, such as the number and checksum of the problems.
    """
    folder = Path(folder)
    make_folder(folder)
    command_line = redact_command_line(sys.orig_argv)
    working_folder = os.getcwd()  # the options may hold relative paths
    config_path = shlex.quote(str(folder / CONFIG_FILE))
    header = f"bupo {command} --config {config_path} starts this run again, in {working_folder}"
    if python_arguments:
        header = f"{', '.join(python_arguments)} came from Python: the rest of the run's options are"
    header = f"# {collapse_whitespace(header)}\n# started by: {collapse_whitespace(command_line)}\n"
    write_text(folder / CONFIG_FILE, header + _format_options(options))
    run = {
        "schema_version": 1,
        "command": command,
        "command_line": command_line,
        "folder": working_folder,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": get_versions(),
        "git": get_git_state(),
        **(metadata or {}),
        "earlier": _read_earlier_runs(folder / RUN_FILE),
    }
    write_json(folder / RUN_FILE, run)


def _format_options(options: dict[str, Any]) -> str:
    """Return the options of a run as YAML, under bupo's names."""
    values = {
        BUPO_OPTION_NAMES.get(name, name): value
        for name, value in _to_yaml_value(options).items()
        if name not in ONE_TIME_OPTIONS
    }
    if not values:
        return "{}\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.safe_dump(values, sort_keys=False)  # escaped: U+2028 and others end a line of YAML


def get_versions() -> dict[str, str | None]:
    """Return the versions of this package, of the `RECORDED_PACKAGES` (None if not installed) and of Python."""
    versions: dict[str, str | None] = {"bupo": VERSION}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"python": platform.python_version()}


def get_git_state() -> dict[str, Any] | None:
    """Return the revision of the working folder's git repository, and whether tracked files differ from it.

    Return None outside a repository.
    """
    revision = _query_git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {
        "revision": revision,
        "dirty": bool(_query_git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")),
    }


def _get_program_path() -> str:
    """Return the absolute folders of `PATH`. Relative ones would depend on the working folder."""
    return os.pathsep.join(
        folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(folder)
    )


GIT_PROGRAM = shutil.which("git", path=_get_program_path())  # before a file or a run can change the environment
# the configuration of a foreign repository may name programs that git would run: these settings disable them
_SAFE_GIT_SETTINGS = (
    "core.fsmonitor=false",
    f"core.hooksPath={os.devnull}",
    "core.sshCommand=false",
    "core.pager=cat",
    "protocol.allow=never",
)


def _query_git(*arguments: str) -> str | None:
    """Return the output of git, or None if it fails. No program that the repository's configuration names is run."""
    filters = _run_git("config", "--null", "--name-only", "--show-scope", "--get-regexp", r"^filter\.")
    fields = (filters or "").split("\0")  # scope, name, scope, name, ...
    names = [name for scope, name in zip(fields[::2], fields[1::2], strict=False) if scope in ("local", "worktree")]
    disabling = [word for name in names for word in ("-c", f"{name}={'false' * name.endswith('.required')}")]
    return _run_git(*disabling, *arguments)


def _run_git(*arguments: str) -> str | None:
    if GIT_PROGRAM is None:
        return None
    settings = [word for setting in _SAFE_GIT_SETTINGS for word in ("-c", setting)]
    command = [GIT_PROGRAM, "--no-optional-locks", "--no-pager", *settings, *arguments]
    environment = os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def redact_command_line(words: list[str]) -> str:
    """Return a command line as one line, with secrets replaced by stars."""
    redacted, follows_secret_flag = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        is_secret = flag.startswith("--") and bool(SECRET_NAME.search(flag))
        if follows_secret_flag and not word.startswith("--"):
            word = "***"
        elif is_secret and equals:
            word = f"{flag}=***"
        follows_secret_flag = is_secret and not equals
        redacted.append(shlex.quote(_redact_text(word)))
    return collapse_whitespace(" ".join(redacted))


def _redact_text(text: str) -> str:
    """Replace the secrets of a URL and of a JSON mapping by stars. Other text, such as a prompt, stays unchanged."""
    text = URL_CREDENTIALS.sub(r"\1***@", text)
    return SECRET_IN_JSON.sub(r'\1"***"', text) if "{" in text[:1] or "={" in text else text


def _drop_secrets_from_text(text: str) -> str:
    """Remove the secrets that [`_redact_text`] replaces: when a run is started again, stars would be used as the secret."""
    text = URL_CREDENTIALS.sub(r"\1", text)
    if not text.startswith("{") or not SECRET_IN_JSON.search(text):
        return text
    try:
        return json.dumps(_to_yaml_value(json.loads(text)))
    except ValueError:  # invalid JSON, which is reported when the option is parsed
        return _redact_text(text)


def drop_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping, and the mappings in it, without the entries whose names are those of secrets."""
    public = {name: value for name, value in values.items() if not SECRET_NAME.search(str(name))}
    return {name: drop_secrets(value) if isinstance(value, dict) else value for name, value in public.items()}


def _to_yaml_value(value: Any) -> Any:
    """Return a value with the types of YAML, without secrets."""
    if isinstance(value, Enum):
        return _to_yaml_value(value.value)
    if isinstance(value, dict):
        return {str(name): _to_yaml_value(item) for name, item in value.items() if not SECRET_NAME.search(str(name))}
    if isinstance(value, list | tuple):
        return [_to_yaml_value(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return _drop_secrets_from_text(str(value))


def _read_earlier_runs(path: Path) -> list[dict]:
    """Return the entries of earlier runs in a folder, the latest first."""
    try:
        latest = read_json(path, {"earlier": (list, NONE_TYPE)})
    except DamagedFileError:  # missing or unreadable: the file is replaced, like `config.yaml`
        return []
    return [{name: value for name, value in latest.items() if name != "earlier"}, *(latest.get("earlier") or [])]
