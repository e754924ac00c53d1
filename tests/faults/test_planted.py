"""Links and pipes in the place of everything that a command writes, and output folders that vanish at any of its writes."""

import os
import random
import shutil
from pathlib import Path

import pytest

import bupo.utils.files
from bupo.cli.main import main
from tests.faults.harness import SHORT
from tests.helpers.damages import ANALYZE, EVAL, TRAIN, copied, make_runs, seen

pytestmark = pytest.mark.faults

# by run: the command that writes into it once more
AGAIN = {
    "run": [*TRAIN, "--max_steps", "3", "--resume_from_checkpoint", "true"],
    "ev": [*EVAL, "--output", "ev"],
    "an": [*ANALYZE, "--per_token", "true", "--output", "an"],
}
NAMES = {
    "run": (
        "_bupo.lock _saving _saving/former _saving/checkpoint-3 checkpoint-2 checkpoint-3 config.yaml config.yaml.part run.json "
        "metrics.jsonl metrics.jsonl.part probes.jsonl dynamics.parquet dynamics.parquet.part finished.json training.png "
        "training.png.part dynamics.png README.md README.md.part model.safetensors config.json tokenizer.json evaluation.json runs"
    ),
    "ev": (
        "_bupo.lock config.yaml run.json run.json.part summary.json summary.json.part table.csv table.csv.part table.md report.html "
        "pass_at_k.png pass_at_k.png.part arithmetic arithmetic/settings.json arithmetic/samples.jsonl arithmetic/graded.parquet "
        "arithmetic/graded.parquet.part"
    ),
    "an": (
        "_bupo.lock config.yaml summary.json views.json views.json.part layers.parquet report.html figures "
        "figures/entropy_flow.png figures/entropy_flow.pdf.part embedded embedded/settings.json embedded/rollouts.jsonl embedded/raw "
        "embedded/raw/answers.jsonl embedded/raw/tokens.parquet embedded/raw/tokens.parquet.part"
    ),
}
PLANTED = [
    (run, name, kind) for run, names in NAMES.items() for name in names.split() for kind in ("link", "pipe", "dangling")
]
VANISHING = [(run, number, how) for run in AGAIN for number in range(1, 25) for how in ("deleted", "renamed")]
if SHORT:
    PLANTED, VANISHING = random.Random(35).sample(PLANTED, 24), random.Random(37).sample(VANISHING, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


def complaint(capfd) -> list[str]:
    """Return the error lines; there must be no traceback."""
    err = capfd.readouterr().err
    assert "Traceback" not in err, err
    return [line for line in err.splitlines() if line.startswith("bupo: error: ")]


@pytest.mark.parametrize(("run", "name", "kind"), PLANTED, ids=lambda value: str(value).replace("/", "-"))
def test_nothing_elsewhere_is_written_or_deleted(base, tmp_path, monkeypatch, capfd, run, name, kind):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir()
    elsewhere.mkdir()
    copied(base, work, run)
    monkeypatch.chdir(work)
    place = work / run / name
    place.parent.mkdir(parents=True, exist_ok=True)
    target = elsewhere / "target"
    if os.path.lexists(place):
        shutil.move(place, target)  # what was there goes on being read, if links are followed
    elif "." in place.name and not place.name.startswith("checkpoint"):
        target.write_text("precious")
    else:
        (target / "checkpoint-1").mkdir(parents=True)
        (target / "checkpoint-1" / "precious").write_text("precious")
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(target if kind == "link" else elsewhere / "nothing")
    before = seen(elsewhere)
    status = main(list(AGAIN[run]))
    lines = complaint(capfd)
    assert seen(elsewhere) == before
    assert (status, len(lines)) in ((0, 0), (2, 1)), lines


@pytest.mark.parametrize(("run", "number", "how"), VANISHING, ids=str)
def test_a_folder_that_vanishes_at_a_write(base, tmp_path, monkeypatch, capfd, run, number, how):
    copied(base, tmp_path, run)
    monkeypatch.chdir(tmp_path)
    check, calls = bupo.utils.files.check_guarded_folder, []

    def vanishing(path: Path) -> None:
        calls.append(path)
        if len(calls) == number:
            shutil.rmtree(run) if how == "deleted" else os.rename(run, "other")
        check(path)

    monkeypatch.setattr(bupo.utils.files, "check_guarded_folder", vanishing)
    status = main(list(AGAIN[run]))
    lines = complaint(capfd)
    if len(calls) < number:
        assert status == 0
        return
    assert status == 2 and len(lines) == 1 and "was deleted or renamed while it was written" in lines[0], lines
    assert not (tmp_path / run).exists()
