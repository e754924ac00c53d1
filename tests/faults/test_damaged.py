"""Every file that a run leaves, damaged in every way, under every command that reads it: one line that names it, or no matter."""

import random
import shutil

import pytest

from bupo.cli.main import main
from tests.faults.harness import SHORT
from tests.helpers.damages import ANALYZE, EVAL, TRAIN, copied, damages_of, make_runs, seen

pytestmark = pytest.mark.faults

RESUME = [*TRAIN, "--max_steps", "3", "--resume_from_checkpoint", "run/checkpoint-2"]
CHECKPOINT = (
    "bupo.pt",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "rollouts_0.pt",
    "trainer_state.json",
    "options.json",
)
REPORT = ["report", "run", "ev", "an", "--output", "page.html"]
# by name: runs that are needed, the command, and the files that it reads
COMMANDS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "train on": ("run", RESUME, tuple(f"run/checkpoint-2/{name}" for name in CHECKPOINT)),
    "train on, listed": ("run", RESUME, ("run/checkpoint-2/manifest.json", "run/checkpoint-2/bupo.pt", "run/run.json")),
    "train finished": (
        "run",
        [*TRAIN, "--max_steps", "2", "--resume_from_checkpoint", "true"],
        ("run/finished.json", "run/metrics.jsonl"),
    ),
    "eval on": (
        "ev",
        [*EVAL, "--output", "ev"],
        ("ev/arithmetic/settings.json", "ev/arithmetic/samples.jsonl", "ev/run.json"),
    ),
    "eval kept": (
        "ev",
        [*EVAL, "--engine", "cached", "--output", "ev"],
        ("ev/arithmetic/settings.json", "ev/arithmetic/samples.jsonl"),
    ),
    "compare": (
        "ev",
        [*EVAL, "--compare", "ev", "--output", "other"],
        ("ev/summary.json", "ev/arithmetic/graded.parquet"),
    ),
    "table": ("ev", ["eval", "--table", "ev", "--output", "board"], ("ev/summary.json",)),
    "analyze on": (
        "an",
        [*ANALYZE, "--output", "an"],
        (
            "an/embedded/settings.json",
            "an/embedded/rollouts.jsonl",
            "an/embedded/raw/settings.json",
            "an/embedded/raw/answers.jsonl",
        ),
    ),
    "analyze answers": (
        "ev",
        ["analyze", "--rollouts", "ev/arithmetic", "--output", "other"],
        ("ev/arithmetic/samples.jsonl",),
    ),
    "analyze probes": (
        "run",
        ["analyze", "--rollouts", "run/probes.jsonl", "--output", "other"],
        ("run/probes.jsonl",),
    ),
    "sample": ("run", ["sample", "--model", "run", "--prompt", "1+1"], ("run/evaluation.json",)),
    "report": (
        "run ev an",
        REPORT,
        (
            *(
                f"run/{name}"
                for name in ("metrics.jsonl", "config.yaml", "run.json", "finished.json", "dynamics.parquet")
            ),
            "ev/summary.json",
            "ev/config.yaml",
            "an/summary.json",
            "an/layers.parquet",
        ),
    ),
}
CASES = [
    (name, file, damage) for name, (_, _, files) in COMMANDS.items() for file in files for damage in damages_of(file)
]
if SHORT:
    CASES = random.Random(36).sample(CASES, 40)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


@pytest.mark.parametrize(("command", "file", "damage"), CASES, ids=lambda value: value.replace("/", "-"))
def test_a_damaged_file_is_one_line(base, tmp_path, monkeypatch, capfd, command, file, damage):
    needed, words, _ = COMMANDS[command]
    copied(base, tmp_path, needed)
    monkeypatch.chdir(tmp_path)
    if command == "train on":
        (tmp_path / "run" / "checkpoint-2" / "manifest.json").unlink()
    damages_of(file)[damage](tmp_path / file)
    before = seen(tmp_path)
    status = main(list(words))
    captured = capfd.readouterr()
    assert not (tmp_path / file).with_name("exploded").exists()
    assert "Traceback" not in captured.err
    complaints = [line for line in captured.err.splitlines() if line.startswith("bupo: error: ")]
    if status == 0:  # the file is not needed, is written again, or is left out of a report
        assert not complaints
        return
    assert status == 2 and len(complaints) == 1, captured.err
    folder, name = file.split("/")[-2:]  # values that are whole but others are told by the folder that they are of
    other = f"{folder} holds" in complaints[0] or (folder in complaints[0] and "goes on with the same" in complaints[0])
    assert name in complaints[0] or other, complaints[0]
    assert len(complaints[0]) < 1000
    assert seen(tmp_path) == before


def test_all_of_a_report_is_left_out_by_name(base, tmp_path, monkeypatch, capsys):
    copied(base, tmp_path, "run ev an")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ev" / "summary.json").write_text('{"schema_version": 4, "meta"')
    shutil.copyfile(tmp_path / "ev" / "summary.json", tmp_path / "an" / "layers.parquet")
    assert main(REPORT) == 0
    left_out = next(line for line in capsys.readouterr().out.split("page:")[:1])
    assert "ev (summary.json" in left_out and "an (layers.parquet" in " ".join(left_out.split())
