"""`bupo COMMAND …`: finds the command and runs it."""

import importlib
import os
import sys
import warnings

import bupo
from bupo.cli.exit_status import ended
from bupo.cli.help import COMMANDS, usage
from bupo.cli.process_exit import leave
from bupo.cli.stdout_guard import lasting_output
from bupo.utils import distributed_launch
from bupo.utils.errors import UserError
from bupo.utils.sanitize import shown

TRACEBACK = "--traceback"
ONE_PROCESS = (
    "analyze",
    "demo",
    "report",
    "reproduce",
)  # commands that write; `eval` refuses a launch with its own remedy
# what libraries draw bars by, as carriage returns, which a log file keeps; bupo's own are lines there
BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status. Without `argv`, run this process' own and end the process."""
    if argv is None:
        leave(_own(sys.argv[1:]))
    return _run(argv)


def _own(argv: list[str]) -> int:
    """Return the status that the interpreter would end with."""
    try:
        return _run(argv)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _run(given: list[str]) -> int:
    lasting_output()
    if line := distributed_launch.drop_leftovers():
        print(f"bupo: warning: {shown(line)}", file=sys.stderr)
    if not sys.stderr.isatty():
        for bars in BARS:
            os.environ.setdefault(bars, "1")
    argv = [word for word in given if word != TRACEBACK]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"bupo {bupo.__version__}")
        return 0
    name, *options = argv
    if name not in COMMANDS and name != "completion":
        print(
            f"bupo: error: unknown command {shown(repr(name))}: choose {', '.join(COMMANDS)}, completion",
            file=sys.stderr,
        )
        return 2
    if not _here():
        print("bupo: error: the working folder is gone: change to one that exists", file=sys.stderr)
        return 2
    # transformers warns its own callers of names it will rename
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return ended(lambda: _command(name, options), TRACEBACK in given)


def _command(name: str, options: list[str]) -> None:
    """Run a command.

    Raises:
        UserError: if several processes were launched for one that would do everything once in each of them.
    """
    if name in ONE_PROCESS and distributed_launch.several():
        raise UserError(
            f"bupo {name} is one process, and this is {distributed_launch.number() + 1} of {distributed_launch.place().size} by RANK and WORLD_SIZE: "
            "start it without a launcher, or unset them"
        )
    importlib.import_module(f"bupo.cli.{name}").run(options)


def _here() -> bool:
    """Whether the working folder exists: torch does not even load without one."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


if __name__ == "__main__":
    main()
