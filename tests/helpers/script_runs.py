"""Runs of `bupo reproduce` that are short scripts, for tests of the scheduler. Nothing slow is imported."""

import sys

from bupo.experiments.experiment import CommandRun

CHILD = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("start\\n")
print("hello from", folder.name)
{then}
(folder / "done").write_text("done")
"""


def child(name, then="", needs=None, **options):
    """Return a run of a script that executes `then`, after the run `needs`."""
    script = CHILD.format(then=then)
    return CommandRun(name, "train", options, needs=needs, launch=(sys.executable, "-c", script))


def starts(paths, name):
    """Return the number of times that a run was started."""
    path = paths.get_run_folder(name) / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0
