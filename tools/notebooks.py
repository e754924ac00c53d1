"""Run the docs' notebooks anew and keep their outputs: `python tools/notebooks.py [NAME ...]`; with --check they are only run.

They run in a folder that is thrown away, so that what they write is not the repository's.
"""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
LONGEST = 180  # seconds that a notebook may take


def executed(path: Path, longest: float = LONGEST) -> tuple[nbformat.NotebookNode, float]:
    """A notebook with the outputs of a run from top to bottom, and its seconds.

    Raises:
        CellExecutionError: where a cell fails.
        CellTimeoutError: where one takes longer than a whole notebook may.
    """
    notebook, started = nbformat.read(path, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=longest, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which no two runs have in common
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; by default all")
    parser.add_argument("--check", action="store_true", help="keep no outputs")
    args = parser.parse_args()
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in args.names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook, seconds = executed(path)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        if not args.check:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
