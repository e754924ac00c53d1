"""Exports of `import bupo`: typed, and without heavy imports before their first use."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import bupo

ROOT = Path(__file__).parents[2]


def loaded_by(code):
    """Modules of other processes after running some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_every_export_is_there():
    for name in bupo.__all__:
        assert getattr(bupo, name) is not None and name in dir(bupo)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        bupo.nothing  # noqa: B018


def test_every_export_is_typed(tmp_path):
    """No export is `Any` for users of the package."""
    names = [name for name in bupo.__all__ if not name.startswith("__")]
    (tmp_path / "use.py").write_text("import bupo\n\n" + "".join(f"reveal_type(bupo.{name})\n" for name in names))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "use.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert done.returncode == 0 and len(found) == len(names), done.stdout + done.stderr
    for name, revealed in zip(names, found, strict=True):
        assert revealed != "Any", name


def test_importing_is_light():
    assert not {"matplotlib", "torch", "trl", "transformers"} & loaded_by("import bupo")


@pytest.mark.slow
def test_no_room_for_training_is_imported_to_measure():
    loaded = loaded_by("import bupo.cli.analyze, bupo.cli.eval, bupo.cli.sample")
    assert not [name for name in loaded if name.startswith(("bupo.training", "trl.trainer"))]
