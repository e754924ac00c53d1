"""Where a run's numbers come from: what was asked for, by which versions, from which source."""

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
# of the name of an option, or of an environment variable; per_token and eos_token are none
SECRET_NAME = re.compile(r"(?:^|[_-])(?:(?<!(?:per|eos|bos|pad)[_-])token|key|secret|password)$", re.IGNORECASE)
SECRET_IN_JSON = re.compile(  # of JSON in an option
    r"""((?:token|key|secret|password)["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}]+)""", re.IGNORECASE
)
URL_CREDENTIALS = re.compile(r"(://)[^/\s@]+@")  # user:password@
BUPO_OPTION_NAMES = {theirs: ours for ours, theirs in BUPO_TO_TRL_NAMES.items()}
ONE_TIME_OPTIONS = (
    "overwrite",
    "resume_from_checkpoint",
)  # asked for this time only: the same run started again deletes nothing


def record_run(
    folder: str | Path,
    command: str,
    given: dict[str, Any],
    objects: Sequence[str] = (),
    trained: dict[str, Any] | None = None,
) -> None:
    """Write `config.yaml`, which starts the same run again, and `run.json`, what it ran on, into the run's folder.

    Secrets (names that end in `token`, `key`, `secret` or `password`, and the user of an address) are left out. What
    `run.json` noted of earlier runs in the folder is kept.

    Args:
        folder (`Path`): of the run.
        command (`str`): such as `analyze`.
        given (`dict`): the options that were given, and the environment variables of a file, `env`.
        objects (`list[str]`, *optional*): names of what was given as Python objects, which no file can hold.
        trained (`dict`, *optional*): the problems, how many and their checksum, and the weights that a training begins from.
    """
    folder = Path(folder)
    make_folder(folder)
    line, here = redact_command_line(sys.orig_argv), os.getcwd()  # paths may be relative to it
    head = f"bupo {command} --config {shlex.quote(str(folder / CONFIG_FILE))} starts this run again, in {here}"
    if objects:
        head = f"{', '.join(objects)} came from Python: the rest of the run's options are"
    write_text(
        folder / CONFIG_FILE,
        f"# {collapse_whitespace(head)}\n# started by: {collapse_whitespace(line)}\n{_format_options(given)}",
    )
    run = {
        "schema_version": 1,
        "command": command,
        "command_line": line,
        "folder": here,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": get_versions(),
        "git": get_git_state(),
        **(trained or {}),
        "earlier": _read_earlier_runs(folder / RUN_FILE),
    }
    write_json(folder / RUN_FILE, run)


def _format_options(given: dict[str, Any]) -> str:
    """The options of a run as YAML, in bupo's words."""
    values = {
        BUPO_OPTION_NAMES.get(name, name): value
        for name, value in _to_yaml_value(given).items()
        if name not in ONE_TIME_OPTIONS
    }
    if not values:
        return "{}\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.safe_dump(values, sort_keys=False)  # U+2028 and the like end a line of YAML: as escapes


def get_versions() -> dict[str, str | None]:
    """Of this package, of what computes its numbers, and of Python."""
    found: dict[str, str | None] = {"bupo": VERSION}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version()}


def get_git_state() -> dict[str, Any] | None:
    """Revision of the working folder's git repository, and whether a tracked file differs from it. None outside of one."""
    revision = _query_git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {
        "revision": revision,
        "dirty": bool(_query_git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")),
    }


def _get_program_path() -> str:
    """Return the absolute folders of the path as this process found it; a relative one would be the working folder."""
    return os.pathsep.join(
        place for place in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(place)
    )


GIT_PROGRAM = shutil.which("git", path=_get_program_path())  # before a file or a run may have changed the environment
# a repository that somebody sent may name programs, which git would run: none of them is
_SAFE_GIT_SETTINGS = (
    "core.fsmonitor=false",
    f"core.hooksPath={os.devnull}",
    "core.sshCommand=false",
    "core.pager=cat",
    "protocol.allow=never",
)


def _query_git(*arguments: str) -> str | None:
    """Return what git prints, without any program that the repository's own configuration names; None where it fails."""
    listed = _run_git("config", "--null", "--name-only", "--show-scope", "--get-regexp", r"^filter\.")
    words = (listed or "").split("\0")
    drivers = [name for scope, name in zip(words[::2], words[1::2], strict=False) if scope in ("local", "worktree")]
    return _run_git(
        *(word for name in drivers for word in ("-c", f"{name}={'false' * name.endswith('.required')}")), *arguments
    )


def _run_git(*arguments: str) -> str | None:
    if GIT_PROGRAM is None:
        return None
    settings = [word for setting in _SAFE_GIT_SETTINGS for word in ("-c", setting)]
    command = [GIT_PROGRAM, "--no-optional-locks", "--no-pager", *settings, *arguments]
    environment = os.environ | {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
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
    return done.stdout.strip() if done.returncode == 0 else None


def redact_command_line(words: list[str]) -> str:
    """A command line that may be shown: secrets are replaced by stars."""
    shown, hidden = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and bool(SECRET_NAME.search(flag))
        if hidden and not word.startswith("--"):
            word = "***"
        elif secret and equals:
            word = f"{flag}=***"
        hidden = secret and not equals
        shown.append(shlex.quote(_redact_text(word)))
    return collapse_whitespace(" ".join(shown))


def _redact_text(text: str) -> str:
    """Without the secrets of a mapping in JSON and of an address; any other text, such as a prompt, as it is."""
    text = URL_CREDENTIALS.sub(r"\1***@", text)
    return SECRET_IN_JSON.sub(r'\1"***"', text) if "{" in text[:1] or "={" in text else text


def _drop_secrets_from_text(text: str) -> str:
    """As `_hidden`, for a run that is started again: a secret is left out, for stars would be sent as one."""
    text = URL_CREDENTIALS.sub(r"\1", text)
    if not text.startswith("{") or not SECRET_IN_JSON.search(text):
        return text
    try:
        return json.dumps(_to_yaml_value(json.loads(text)))
    except ValueError:  # no JSON: whoever reads it will say so
        return _redact_text(text)


def drop_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A mapping, and those inside it, without what is secret by its name."""
    kept = {name: value for name, value in values.items() if not SECRET_NAME.search(str(name))}
    return {name: drop_secrets(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _to_yaml_value(value: Any) -> Any:
    """As YAML knows it."""
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
    """The runs that a folder has seen before this one, the last first."""
    try:
        last = read_json(path, {"earlier": (list, NONE_TYPE)})
    except DamagedFileError:  # none, or what is no longer readable: it is replaced, as `config.yaml` is
        return []
    return [{name: value for name, value in last.items() if name != "earlier"}, *(last.get("earlier") or [])]
