"""Runs of `bupo reproduce` that are scripts of a few lines, for tests of how children are kept. It imports nothing that is slow."""

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


def child(name, then="", needs=None, **options):  # needs: a child
    script = CHILD.format(then=then)
    return CommandRun(name, "train", options, needs=needs, launch=(sys.executable, "-c", script))


def starts(places, name):
    path = places.folder(name) / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0
