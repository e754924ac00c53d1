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

from bupo.options.groups import OUR_WORDS
from bupo.run_files.reading import NULL, Damaged, read_json
from bupo.utils.files import make_folder, write_json, write_text
from bupo.utils.sanitize import one_line
from bupo.version import VERSION

CONFIG_FILE, RUN_FILE = "config.yaml", "run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "math-verify")
# of the name of an option, or of an environment variable; per_token and eos_token are none
SECRET = re.compile(r"(?:^|[_-])(?:(?<!(?:per|eos|bos|pad)[_-])token|key|secret|password)$", re.IGNORECASE)
SECRET_IN_TEXT = re.compile(  # of JSON in an option
    r"""((?:token|key|secret|password)["']?\s*:\s*)("[^"]*"|'[^']*'|[^\s,}]+)""", re.IGNORECASE
)
USER_IN_ADDRESS = re.compile(r"(://)[^/\s@]+@")  # user:password@
SHORT = {theirs: ours for ours, theirs in OUR_WORDS.items()}
ONCE = ("overwrite", "resume_from_checkpoint")  # asked for this time only: the same run started again deletes nothing


def note_run(
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
    line, here = command_line(sys.orig_argv), os.getcwd()  # paths may be relative to it
    head = f"bupo {command} --config {shlex.quote(str(folder / CONFIG_FILE))} starts this run again, in {here}"
    if objects:
        head = f"{', '.join(objects)} came from Python: the rest of the run's options are"
    write_text(folder / CONFIG_FILE, f"# {one_line(head)}\n# started by: {one_line(line)}\n{_options(given)}")
    run = {
        "schema_version": 1,
        "command": command,
        "command_line": line,
        "folder": here,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_state(),
        **(trained or {}),
        "earlier": _earlier(folder / RUN_FILE),
    }
    write_json(folder / RUN_FILE, run)


def _options(given: dict[str, Any]) -> str:
    """The options of a run as YAML, in bupo's words."""
    values = {SHORT.get(name, name): value for name, value in _plain(given).items() if name not in ONCE}
    if not values:
        return "{}\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return yaml.safe_dump(values, sort_keys=False)  # U+2028 and the like end a line of YAML: as escapes


def versions() -> dict[str, str | None]:
    """Of this package, of what computes its numbers, and of Python."""
    found: dict[str, str | None] = {"bupo": VERSION}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version()}


def git_state() -> dict[str, Any] | None:
    """Revision of the working folder's git repository, and whether a tracked file differs from it. None outside of one."""
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {
        "revision": revision,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")),
    }


def _programs() -> str:
    """Return the absolute folders of the path as this process found it; a relative one would be the working folder."""
    return os.pathsep.join(
        place for place in os.environ.get("PATH", os.defpath).split(os.pathsep) if os.path.isabs(place)
    )


GIT = shutil.which("git", path=_programs())  # before a file or a run may have changed the environment
# a repository that somebody sent may name programs, which git would run: none of them is
_HARMLESS = (
    "core.fsmonitor=false",
    f"core.hooksPath={os.devnull}",
    "core.sshCommand=false",
    "core.pager=cat",
    "protocol.allow=never",
)


def _git(*arguments: str) -> str | None:
    """Return what git prints, without any program that the repository's own configuration names; None where it fails."""
    listed = _run_git("config", "--null", "--name-only", "--show-scope", "--get-regexp", r"^filter\.")
    words = (listed or "").split("\0")
    drivers = [name for scope, name in zip(words[::2], words[1::2], strict=False) if scope in ("local", "worktree")]
    return _run_git(
        *(word for name in drivers for word in ("-c", f"{name}={'false' * name.endswith('.required')}")), *arguments
    )


def _run_git(*arguments: str) -> str | None:
    if GIT is None:
        return None
    settings = [word for setting in _HARMLESS for word in ("-c", setting)]
    command = [GIT, "--no-optional-locks", "--no-pager", *settings, *arguments]
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


def command_line(words: list[str]) -> str:
    """A command line that may be shown: secrets are replaced by stars."""
    shown, hidden = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and bool(SECRET.search(flag))
        if hidden and not word.startswith("--"):
            word = "***"
        elif secret and equals:
            word = f"{flag}=***"
        hidden = secret and not equals
        shown.append(shlex.quote(_hidden(word)))
    return one_line(" ".join(shown))


def _hidden(text: str) -> str:
    """Without the secrets of a mapping in JSON and of an address; any other text, such as a prompt, as it is."""
    text = USER_IN_ADDRESS.sub(r"\1***@", text)
    return SECRET_IN_TEXT.sub(r'\1"***"', text) if "{" in text[:1] or "={" in text else text


def _without_secrets(text: str) -> str:
    """As `_hidden`, for a run that is started again: a secret is left out, for stars would be sent as one."""
    text = USER_IN_ADDRESS.sub(r"\1", text)
    if not text.startswith("{") or not SECRET_IN_TEXT.search(text):
        return text
    try:
        return json.dumps(_plain(json.loads(text)))
    except ValueError:  # no JSON: whoever reads it will say so
        return _hidden(text)


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A mapping, and those inside it, without what is secret by its name."""
    kept = {name: value for name, value in values.items() if not SECRET.search(str(name))}
    return {name: without_secrets(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _plain(value: Any) -> Any:
    """As YAML knows it."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items() if not SECRET.search(str(name))}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float) or value is None:
        return value
    return _without_secrets(str(value))


def _earlier(path: Path) -> list[dict]:
    """The runs that a folder has seen before this one, the last first."""
    try:
        last = read_json(path, {"earlier": (list, NULL)})
    except Damaged:  # none, or what is no longer readable: it is replaced, as `config.yaml` is
        return []
    return [{name: value for name, value in last.items() if name != "earlier"}, *(last.get("earlier") or [])]
