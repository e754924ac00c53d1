"""Entry point of `bupo COMMAND …`."""

import importlib
import os
import sys
import warnings

import bupo
from bupo.cli.exit_status import run_to_exit_status
from bupo.cli.help import COMMANDS, format_usage
from bupo.cli.process_exit import exit_process
from bupo.cli.stdout_guard import guard_standard_streams
from bupo.utils import distributed_launch
from bupo.utils.errors import UserError
from bupo.utils.sanitize import sanitize_message

TRACEBACK_FLAG = "--traceback"
# Commands that write files. `eval` refuses a launch with a remedy for it.
SINGLE_PROCESS_COMMANDS = ("analyze", "demo", "report", "reproduce")
# Progress bars of libraries draw carriage returns, which would fill a log file. bupo logs lines instead.
PROGRESS_BAR_VARIABLES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit status. Without `argv`, run `sys.argv` and end the process."""
    if argv is None:
        exit_process(_get_process_status(sys.argv[1:]))
    return _run_command_line(argv)


def _get_process_status(argv: list[str]) -> int:
    """Return the status that the interpreter would end with."""
    try:
        return _run_command_line(argv)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _run_command_line(arguments: list[str]) -> int:
    guard_standard_streams()
    if line := distributed_launch.drop_leftover_variables():
        print(f"bupo: warning: {sanitize_message(line)}", file=sys.stderr)
    if not sys.stderr.isatty():
        for bars in PROGRESS_BAR_VARIABLES:
            os.environ.setdefault(bars, "1")
    argv = [word for word in arguments if word != TRACEBACK_FLAG]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"bupo {bupo.__version__}")
        return 0
    name, *options = argv
    if name not in COMMANDS and name != "completion":
        print(
            f"bupo: error: unknown command {sanitize_message(repr(name))}: choose {', '.join(COMMANDS)}, completion",
            file=sys.stderr,
        )
        return 2
    if not _has_working_folder():
        print("bupo: error: the working folder no longer exists: change to one that exists", file=sys.stderr)
        return 2
    # transformers warns about names that its own code uses and will rename
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return run_to_exit_status(lambda: _run_command(name, options), TRACEBACK_FLAG in arguments)


def _run_command(name: str, options: list[str]) -> None:
    """Run a command.

    Raises:
        UserError: if several processes were launched for a command that needs one.
    """
    if name in SINGLE_PROCESS_COMMANDS and distributed_launch.is_distributed():
        process, processes = distributed_launch.get_rank() + 1, distributed_launch.get_process_info().world_size
        raise UserError(
            f"bupo {name} is one process, and this is {process} of {processes} by RANK and WORLD_SIZE: "
            "start it without a launcher, or unset them"
        )
    importlib.import_module(f"bupo.cli.{name}").run(options)


def _has_working_folder() -> bool:
    """Return True if the working folder exists. torch cannot be imported without one."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


if __name__ == "__main__":
    main()
