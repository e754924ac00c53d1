"""`bupo COMMAND …`: finds the command and runs it."""

import importlib
import os
import sys
import warnings

import bupo
from bupo.commands.catalogue import COMMANDS, usage
from bupo.commands.ending import ended
from bupo.commands.output import lasting_output
from bupo.text import shown

TRACEBACK = "--traceback"
# what libraries draw bars by, as carriage returns, which a log file keeps; bupo's own are lines there
BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    lasting_output()
    if not sys.stderr.isatty():
        for bars in BARS:
            os.environ.setdefault(bars, "1")
    given = sys.argv[1:] if argv is None else argv
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
    return ended(lambda: importlib.import_module(f"bupo.commands.{name}").run(options), TRACEBACK in given)


def _here() -> bool:
    """Whether the working folder exists: torch does not even load without one."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
