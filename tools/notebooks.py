"""Run the notebooks of the docs and store their outputs: `python tools/notebooks.py [NAME ...]`; `--check` only runs them.

They run in a temporary folder, so that their files do not enter the repository.
"""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
LONGEST = 180  # seconds of a notebook


def executed(path: Path, longest: float = LONGEST) -> tuple[nbformat.NotebookNode, float]:
    """Run a notebook and return it with its outputs and its seconds.

    Raises:
        CellExecutionError: if a cell fails.
        CellTimeoutError: if a cell takes longer than `longest`.
    """
    notebook, started = nbformat.read(path, as_version=4), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=longest, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times differ between runs
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; by default all")
    parser.add_argument("--check", action="store_true", help="do not store outputs")
    args = parser.parse_args()
    for path in [NOTEBOOKS / f"{name}.ipynb" for name in args.names] or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook, seconds = executed(path)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        if not args.check:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
