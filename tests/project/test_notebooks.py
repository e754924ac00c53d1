"""Run the notebooks of the docs, and check that their stored outputs are complete."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.external
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    notebook, seconds = tool.executed(path, 5 * tool.LONGEST)  # other tests run in parallel
    assert seconds < 5 * tool.LONGEST
    kept = tool.nbformat.read(path, as_version=4)
    for cell, before in zip(notebook.cells, kept.cells, strict=True):
        if cell.cell_type == "code":  # outputs are stored, without warnings
            assert [output.output_type for output in cell.outputs] == [output.output_type for output in before.outputs]
            assert not any(output.get("name") == "stderr" for output in cell.outputs), cell.outputs


def test_there_are_two():
    assert len(NOTEBOOKS) == 2
