"""Check a wheel and an sdist: compare their files with git's, install the wheel alone and run its commands.

`make test-wheel` builds both into `dist/` and runs this. It is a script, not a pytest file, because it must run without the
development environment, which would hide a dependency or a data file that the wheel lacks. It imports the standard library
only. It needs the package index, about 1.5 GB of temporary disk space and a few minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

# Every module must import without the extras. An optional package is imported where it is used.
IMPORT_ALL = """
import importlib, pkgutil, sys, bupo
assert bupo.__file__.startswith(sys.prefix), f"imported from {bupo.__file__}, not from the wheel"
names = [module.name for module in pkgutil.walk_packages(bupo.__path__, "bupo.")]
for name in names:
    importlib.import_module(name)
print(f"imported {len(names)} modules")
"""

# The commands of a first session, each with the smallest amount of work, and the files that each must leave.
COMMANDS = (
    (
        "demo --output runs/demo --steps 2 --internal_steps 1 --problems 16",
        ("runs/demo/summary.json", "runs/demo/metrics.jsonl", "runs/demo/training.png", "runs/demo/model.safetensors"),
    ),
    (
        "analyze --model embedded --dataset arithmetic --size 4 --max_new_tokens 16 --output runs/analysis",
        ("runs/analysis/run.json", "runs/analysis/report.html"),
    ),
    ("report runs/demo runs/analysis --output runs/report.html", ("runs/report.html",)),
)


def main() -> None:
    """Check the distributions of one folder and exit with one line at the first fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with one wheel and one sdist, as `python -m build` leaves it")
    folder = parser.parse_args().folder
    wheel, sdist = single_file(folder, "*.whl"), single_file(folder, "*.tar.gz")
    check_files(wheel, sdist)
    with tempfile.TemporaryDirectory(prefix="bupo-wheel-") as temporary:
        environment, work = Path(temporary, "environment"), Path(temporary, "work")
        work.mkdir()
        install(wheel, environment)
        run_commands(environment, work, version=wheel.name.split("-")[1])
    print(f"{wheel.name} and {sdist.name}: passed")


def single_file(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that matches a pattern."""
    files = sorted(folder.glob(pattern))
    if len(files) != 1:
        sys.exit(f"{folder} must hold one {pattern}, but has {len(files)}: empty it, then build again (make dist)")
    return files[0]


def check_files(wheel: Path, sdist: Path) -> None:
    """Compare the package's files in both distributions with those that git tracks under `src`."""
    listing = subprocess.run(["git", "ls-files", "-z", "src"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = {name.removeprefix("src/") for name in listing.stdout.split("\0") if name}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    compare(wheel.name, {name for name in names if ".dist-info/" not in name}, tracked)
    with tarfile.open(sdist) as archive:
        members = [member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()]
    sources = {name.removeprefix("src/") for name in members if name.startswith("src/") and ".egg-info/" not in name}
    compare(sdist.name, sources, tracked)
    data = sum(not name.endswith(".py") for name in tracked)
    print(f"files of the package: {len(tracked)}, of which {data} are data")


def compare(name: str, packed: set[str], tracked: set[str]) -> None:
    """Exit with the files that one distribution lacks or has beyond those that git tracks."""
    if missing := sorted(tracked - packed):
        sys.exit(f"{name} lacks {len(missing)} files: {', '.join(missing)}. Add them to package-data in pyproject.toml")
    if extra := sorted(packed - tracked):
        sys.exit(f"{name} has {len(extra)} files that git does not track: {', '.join(extra)}. Track or remove them")


def install(wheel: Path, environment: Path) -> None:
    """Install the wheel without extras, at the versions of constraints.txt, into a new environment."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", torch], environment.parent)
    run([*pip, "install", "--quiet", "-c", CONSTRAINTS, wheel.resolve()], environment.parent)
    run([*pip, "check"], environment.parent)


def run_commands(environment: Path, work: Path, version: str) -> None:
    """Import every module and run the commands in an empty folder; exit where a file that they leave is absent."""
    bupo = environment / "bin" / "bupo"
    run([environment / "bin" / "python", "-c", IMPORT_ALL], work)
    printed = subprocess.run([bupo, "--version"], cwd=work, env=clean(), check=True, capture_output=True, text=True)
    if printed.stdout.split() != ["bupo", version]:
        sys.exit(f"`bupo --version` prints {printed.stdout.strip()!r}, but the wheel's version is {version}")
    for arguments, files in COMMANDS:
        run([bupo, *arguments.split()], work)
        if absent := [name for name in files if not (work / name).is_file() or not (work / name).stat().st_size]:
            sys.exit(f"`bupo {arguments}` did not write {', '.join(absent)}")
    summary = json.loads((work / "runs/demo/summary.json").read_text())
    if summary["problems"] != 16:
        sys.exit(f"`bupo demo` evaluated {summary['problems']} problems, not 16")
    page = (work / "runs/report.html").read_text()
    if absent := [name for name in ("demo", "analysis") if name not in page]:
        sys.exit(f"the page of `bupo report` does not name the runs {', '.join(absent)}")


def run(command: list, folder: Path) -> None:
    """Print a command, run it in a folder and exit with its line if it fails."""
    line = " ".join(str(word) for word in command if "\n" not in str(word))
    print(f"+ {line}", flush=True)
    status = subprocess.run(command, cwd=folder, env=clean(), stdin=subprocess.DEVNULL).returncode
    if status:
        sys.exit(f"exit status {status}: {line}")


def clean() -> dict[str, str]:
    """Return the environment variables without those by which Python would find modules outside the new environment."""
    prefixes = ("PYTHON", "VIRTUAL_ENV", "BUPO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return kept | {"PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
