"""`bupo COMMAND …`: finds the command and runs it."""

import importlib
import os
import sys
import warnings

import bupo
from bupo.commands.ending import ended
from bupo.commands.output import lasting_output
from bupo.text import shown

TRACEBACK = "--traceback"
COMMANDS = {
    "analyze": "measure what every layer and module of a model decides",
    "sample": "sample text from an internal policy: bupo sample --layer 6 --prompt '57+23-41'",
    "demo": "train the embedded model by BuPO on this machine and show what it gained",
    "eval": "measure avg@k and pass@k on benchmarks: bupo eval --model M --benchmarks math500,aime24 --k 16",
    "reproduce": "make the paper's figures and tables: bupo reproduce fig3 --scale embedded",
    "plan": "what a run will need and take, before you pay: bupo plan --config FILE.yaml --gpus 8 --gpu_memory 80",
    "report": "write one page over any runs: bupo report runs/*",
    "train": "train a model by BuPO or GRPO: bupo train --config FILE.yaml --any_grpo_flag value",
}


def usage() -> str:
    rows = [f"  {name:9} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bupo COMMAND [options]",
            "",
            bupo.__doc__,
            "",
            *rows,
            "",
            "bupo COMMAND --help lists a command's options; --traceback shows what lies behind an error",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    lasting_output()
    given = sys.argv[1:] if argv is None else argv
    argv = [word for word in given if word != TRACEBACK]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"bupo {bupo.__version__}")
        return 0
    name, *options = argv
    if name not in COMMANDS:
        print(f"bupo: error: unknown command {shown(repr(name))}: choose {', '.join(COMMANDS)}", file=sys.stderr)
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
