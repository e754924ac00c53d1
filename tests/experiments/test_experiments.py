"""The paper's figures and tables as runs: definitions follow the paper, command lines are valid, and finished runs are kept."""

import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from trl import ModelConfig

from bupo.analysis.options import AnalyzeOptions
from bupo.cli.main import main
from bupo.cli.parsing import parse_options
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.evaluation.options import EvalOptions
from bupo.experiments import experiment as experiments
from bupo.experiments.experiment import RECIPES_FOLDER, CommandRun, list_experiments, read_experiment, read_scales
from bupo.experiments.jobs import JobScheduler, RunPaths, get_run_state, remove_stale_run
from bupo.experiments.run import ReproduceOptions, estimate_reproduction, format_commands, plan_reproduction
from bupo.models.loading import EMBEDDED_MODEL
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions
from bupo.utils.errors import UserError
from tests.helpers.script_runs import child, starts

CLASSES = {"train": (TrainOptions, BuPOConfig, ModelConfig), "eval": (EvalOptions,), "analyze": (AnalyzeOptions,)}
SCALES = tuple(read_scales())
NAMES = list_experiments("embedded")


def place(name):
    return Path("runs") / name


def all_runs(scale):
    return plan_reproduction(["all"], ReproduceOptions(scale=scale)).runs


def test_every_figure_and_table_is_there():
    assert NAMES == (
        "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig12",
        "table1", "table2", "table3", "table5", "table7", "table9", "table10", "table11",
    )  # fmt: skip
    assert SCALES == ("embedded", "small", "paper", "tiny", "worlds")
    assert all(list_experiments(scale) == NAMES for scale in ("paper", "tiny")) and not set(
        list_experiments("worlds")
    ) & set(NAMES)
    assert set(list_experiments("small")) == {*NAMES, "compare"}


@pytest.mark.parametrize(("scale", "name"), [(scale, name) for scale in SCALES for name in list_experiments(scale)])
def test_a_name_is_whole_at_every_scale(name, scale):
    read = read_experiment(name, scale)
    assert read.title and read.cells and read.runs and (read.source or scale == "worlds")
    # Sharded runs have no probes: an analysis of their checkpoints follows.
    afterwards = {"analyze"} if (name, scale) == ("fig5", "paper") else set()
    assert {command for cell in read.cells for command in cell.runs} <= {
        *experiments.COMMANDS_BY_KIND[read.kind]
    } | afterwards
    names = [run.name for run in read.runs]
    assert len(set(names)) == len(names)
    for place, run in enumerate(read.runs):  # what is needed comes first
        assert run.needs is None or run.needs.name in names[:place]
    if scale == "paper":  # every number of the paper has a row of ours
        rows = {(cell.model, cell.row) for cell in read.cells}
        assert {(model, row) for model, known in read.paper_values.items() for row in known} <= rows


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_every_command_line_is_one(scale, monkeypatch):
    """The parsers and checks of the commands accept it, without the words of a launcher."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    seen = set()
    for run in all_runs(scale):
        words = run.get_arguments(place)
        command = words[words.index("bupo.cli.main") + 1 :]
        assert command[0] == run.command
        kind = (run.command, run.recipe, *sorted(set(run.options) - {"seed"}))
        if kind in seen:  # they differ in numbers only
            continue
        seen.add(kind)
        parsed = parse_options(CLASSES[run.command], [word for word in command[1:] if word != "small"], "bupo")
        if run.command != "train":
            parsed[0].check()
        elif "internal_steps" in run.options:
            assert parsed[1].internal_steps == run.options["internal_steps"]


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_a_name_is_one_run(scale):
    """Experiments share a run only if all its options are the same."""
    digests = {}
    for name in list_experiments(scale):
        for run in read_experiment(name, scale).runs:
            assert digests.setdefault(run.name, run.compute_digest()) == run.compute_digest()
    assert len(set(digests.values())) == len(digests)  # and no run has two names


def recipes_and_options(name, scale, command="train"):
    """Return the recipe and the options that the row adds, by (model, row)."""
    return {
        (cell.model, cell.row): (cell.runs[command].recipe, cell.options)
        for cell in read_experiment(name, scale).cells
        if command in cell.runs
    }


def test_table_2_is_the_papers():
    assert recipes_and_options("table2", "paper") == {
        ("Qwen3-4B", "30 of 300 rollout batches"): ("qwen3-4b/bupo", {}),
        ("Qwen3-4B", "50 of 300"): ("qwen3-4b/bupo", {"internal_steps": 50}),
        ("Qwen3-4B", "70 of 300"): ("qwen3-4b/bupo", {"internal_steps": 70}),
    }
    recipe = yaml.safe_load((RECIPES_FOLDER / "qwen3-4b/bupo.yaml").read_text())
    assert (recipe["internal_steps"], recipe["internal_layer"], recipe["max_steps"]) == (30, 6, 4 * 300)
    here = [options["internal_steps"] for _, options in recipes_and_options("table2", "embedded").values()]
    batches = yaml.safe_load((RECIPES_FOLDER / "cpu/embedded-bupo.yaml").read_text())["max_steps"] // 4
    assert here[:3] == [round(share * batches / 300) for share in (30, 50, 70)]


def test_table_3_is_the_papers():
    layers = {model: {} for model in ("Qwen3-4B", "Qwen3-8B", "OctoThinker-3B")}
    for (model, row), (recipe, options) in recipes_and_options("table3", "paper").items():
        named = yaml.safe_load((RECIPES_FOLDER / f"{recipe}.yaml").read_text())["internal_layer"]
        layers[model][row] = options.get("internal_layer", named)
    assert [list(rows.values()) for rows in layers.values()] == [[6, 26, 35], [6, 21, 35], [27, 16, 6]]


def test_table_1_is_every_method_of_every_model():
    methods = ["PPO", "REINFORCE++", "RLOO", "GRPO", "BuPO"]
    models = {
        "Qwen3-4B": "qwen3-4b",
        "Qwen3-8B": "qwen3-8b",
        "OctoThinker-3B": "octothinker-3b",
        "OctoThinker-8B": "octothinker-8b",
    }
    wanted = {(m, method): (f"{stem}/{method.lower()}", {}) for m, stem in models.items() for method in methods}
    assert recipes_and_options("table1", "paper") == wanted
    vanilla = [cell for cell in read_experiment("table1", "paper").cells if cell.row == "vanilla"]
    assert [cell.runs["eval"].options["model"] for cell in vanilla] == [
        yaml.safe_load((RECIPES_FOLDER / f"{stem}/bupo.yaml").read_text())["model"] for stem in models.values()
    ]


def test_table_10_is_of_three_seeds_as_the_papers():
    seeds = {scale: sorted({cell.seed for cell in read_experiment("table10", scale).cells}) for scale in SCALES[:4]}
    assert seeds["paper"] == [42, 43, 44] and seeds["embedded"] == seeds["small"] == [1, 2, 3]


def test_fewer_seeds_and_another_model():
    cells = read_experiment("table1", "embedded", model="models/mine.gguf", seeds=1).cells
    assert {(cell.model, cell.seed) for cell in cells} == {("mine", 1)}
    assert {cell.runs["train"].options["model"] for cell in cells if "train" in cell.runs} == {"models/mine.gguf"}
    assert {cell.runs["eval"].options.get("model") for cell in cells} == {"models/mine.gguf", None}


def test_the_problems_are_right():
    """By Python's own arithmetic; of the embedded model's form only those of its test split are among them."""
    for path in sorted(experiments.PROBLEMS_FOLDER.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["problem"] for row in rows}) == len(rows) >= 64 - 10
        for row in rows:
            question = re.search(r"[-+ 0-9]+(?= ?=?$)", row["problem"])[0]
            assert int(row["answer"]) == eval(question)
            if re.fullmatch(r"\d\d[+-]\d\d[+-]\d\d=?", row["problem"]):
                assert zlib.crc32(question.encode()) % 8 == 0
    assert len(list(experiments.PROBLEMS_FOLDER.glob("*.jsonl"))) == 8
    assert load_benchmarks([f"mine={path}"])["mine"].num_rows == len(rows)


def test_profiles_of_rates_are_what_their_rows_say():
    """The stored analysis, rounded; the same turned around and shuffled; their mean times the rate of the rows."""
    table = pd.read_csv(Path(__file__).parents[2] / "docs" / "results" / "layers.csv")
    agreement = table[table["measure"] == "top1_agreement"].set_index(["world", "layer"])["mean"]
    worlds = {name: words for name, words in read_scales()["worlds"]["models"].items() if "agreement" in words}
    assert set(worlds) == {cell.model for cell in read_experiment("rates", "worlds").cells}
    for name, words in worlds.items():
        rates, reversed_rates, shuffled = (json.loads(words[name]) for name in ("agreement", "reverse", "shuffled"))
        assert rates == pytest.approx(list(agreement[name].sort_index()), abs=0.005)
        assert reversed_rates == rates[::-1] and shuffled == random.Random(0).sample(rates, len(rates))
        assert words["mean_rate"] == pytest.approx(5e-5 * sum(rates) / len(rates), rel=2e-3)


def test_held_out_sums_are_not_trained_on():
    """Both files are what their tool writes."""
    trained, held_out = (
        {
            json.loads(line)["problem"]
            for line in (experiments.PROBLEMS_FOLDER / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("sums", "sums-held-out")
    )
    assert not trained & held_out
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_problems.py"))
    for name, rows in tool["problems"]().items():
        assert (experiments.PROBLEMS_FOLDER / f"{name}.jsonl").read_text() == tool["text"](rows)


def test_a_digest_is_of_what_decides(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES_FOLDER, recipes)
    first = CommandRun("a", "train", {"seed": 1}, recipe="cpu/embedded-bupo")
    before = first.compute_digest()
    monkeypatch.setattr(experiments, "RECIPES_FOLDER", recipes)
    path = recipes / "cpu" / "embedded-bupo.yaml"
    assert first.compute_digest() == before  # elsewhere, and with another comment
    path.write_text(f"# another comment\n{path.read_text()}")
    assert first.compute_digest() == before
    path.write_text(path.read_text().replace("epsilon: 0.2", "epsilon: 0.3"))
    assert first.compute_digest() != before
    assert (
        CommandRun("a", "train", {"seed": 2}, recipe="cpu/embedded-grpo").compute_digest()
        != CommandRun("a", "train", {"seed": 1}, recipe="cpu/embedded-grpo").compute_digest()
    )


def test_what_is_made_of_a_stale_run_is_stale(tmp_path, monkeypatch):
    """After a change of a recipe, its training and the evaluation of its weights are stale, and nothing else."""
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES_FOLDER, recipes)
    monkeypatch.setattr(experiments, "RECIPES_FOLDER", recipes)
    places, todo = RunPaths(tmp_path / "out"), plan_reproduction(["table10"], ReproduceOptions(seeds=1)).runs
    for run in todo:
        places.get_run_folder(run.name).mkdir(parents=True)
        places.get_record_path(run.name).write_text(
            json.dumps({"digest": run.compute_digest(), "finished": True, "seconds": 1.0})
        )
    path = recipes / "cpu" / "embedded-bupo.yaml"
    path.write_text(path.read_text().replace("epsilon: 0.2", "epsilon: 0.3"))
    for run in todo:
        remove_stale_run(run, places)
    states = {run.name: get_run_state(run, places) for run in todo}
    assert {name for name, state in states.items() if state == "to do"} == {name for name in states if "bupo" in name}
    assert len(states) == 4


def test_the_problems_of_an_evaluation_decide_it(tmp_path, monkeypatch):
    run = next(run for run in read_experiment("table9", "embedded").runs if run.command == "eval")
    before = run.compute_digest()
    shutil.copytree(experiments.PROBLEMS_FOLDER, tmp_path / "problems")
    monkeypatch.setattr(experiments, "PROBLEMS_FOLDER", tmp_path / "problems")
    assert run.compute_digest() == before
    with (tmp_path / "problems" / "differences.jsonl").open("a") as file:
        file.write('{"problem": "1-1", "answer": "0"}\n')
    assert run.compute_digest() != before


def test_figure_5_of_a_sharded_run_is_of_its_checkpoints():
    """The recipe saves these checkpoints, and the first one is at the end of phase 1."""
    cell = read_experiment("fig5", "paper").cells[0]
    recipe = yaml.safe_load((RECIPES_FOLDER / f"{cell.runs['train'].recipe}.yaml").read_text())
    _, *numbers, end = cell.runs["analyze"].options["model"]
    wanted = list(range(recipe["save_steps"], recipe["max_steps"], recipe["save_steps"]))
    assert [int(name.removeprefix("{run}/checkpoint-")) for name in numbers] == wanted and end == "{run}"
    assert wanted[0] == 4 * recipe["internal_steps"]
    words = cell.runs["analyze"].get_arguments(place)
    trained = place(cell.runs["train"].name)
    assert f"{trained}/checkpoint-120" in words and words[words.index("--rollouts") + 1] == f"{trained}/probes.jsonl"
    assert (
        cell.runs["train"].name == read_experiment("table2", "paper").cells[0].runs["train"].name
    )  # no further training


# -- children -------------------------------------------------------------------------------------------------------------


def test_runs_are_run_once_and_in_order(tmp_path):
    places, said, finished = RunPaths(tmp_path), [], []
    first = child("first")
    second = child("second", then="assert (folder.parent / 'first' / 'done').exists()", needs=first)
    JobScheduler(places, 2, said.append, lambda run: finished.append(run.name)).execute([second, first])
    assert finished == ["first", "second"] and [starts(places, name) for name in finished] == [1, 1]
    assert "hello from first" in places.get_log_path("first").read_text()
    assert places.read_seconds("first") > 0 and get_run_state(first, places) == "finished"
    JobScheduler(places, 1, said.append, lambda run: finished.append(run.name)).execute([first, second])
    assert finished == ["first", "second"] * 2 and starts(places, "first") == 1


def test_two_go_side_by_side(tmp_path):
    """Each waits until the other has started."""
    wait = "while not (folder.parent / '{}' / 'starts').exists(): time.sleep(0.01)"
    runs = [child("a", wait.format("b")), child("b", wait.format("a"))]
    JobScheduler(RunPaths(tmp_path), 2, lambda line: None, lambda run: None).execute(runs)
    assert all((tmp_path / "runs" / name / "done").exists() for name in "ab")


def test_a_run_that_fails_stops_only_what_needs_it(tmp_path):
    places, said, finished = RunPaths(tmp_path), [], []
    bad = child("bad", then="print('bupo: error: the reason', file=sys.stderr); sys.exit(2)")
    good = child("good")
    runs = [bad, child("of-bad", needs=bad), good, child("of-good", needs=good)]
    with pytest.raises(
        UserError, match=r"run bad failed \(2 runs in all\): exit status 2, the reason; its log is .*bad\.log"
    ):
        JobScheduler(places, 1, said.append, lambda run: finished.append(run.name)).execute(runs)
    assert finished == ["good", "of-good"] and starts(places, "of-bad") == 0
    assert get_run_state(bad, places) == "begun" and places.read_seconds("bad") is None


def test_what_cannot_be_drawn_stops_no_run(tmp_path):
    places, finished = RunPaths(tmp_path), []

    def draw(run):
        finished.append(run.name)
        if run.name == "a":
            raise UserError("a cannot be read")

    with pytest.raises(UserError, match="a cannot be read"):
        JobScheduler(places, 1, lambda line: None, draw).execute([child("a"), child("b")])
    assert finished == ["a", "b"]


@pytest.mark.parametrize("text", ['{"seconds": "x"}', "[]", '{"digest": "d", "finished": true, "seconds": null}', "{"])
def test_a_note_that_is_none_is_no_note(tmp_path, text):
    places = RunPaths(tmp_path)
    places.get_record_path("a").parent.mkdir(parents=True)
    places.get_record_path("a").write_text(text)
    assert get_run_state(child("a"), places) == "to do" and places.read_seconds("a") is None


def test_a_run_of_other_options_is_refused(tmp_path):
    places = RunPaths(tmp_path)
    JobScheduler(places, 1, lambda line: None, lambda run: None).execute([child("a")])
    with pytest.raises(UserError, match="was made with other options: choose another output, or --overwrite"):
        get_run_state(child("a", seed=2), places)


PARENT = """
import sys
sys.path.insert(0, {root!r})
import time
from pathlib import Path
from bupo.cli.exit_status import run_to_exit_status
from bupo.experiments.jobs import JobScheduler, RunPaths
from tests.helpers.script_runs import child
runs = [child("quick"), child("slow", then="(folder / 'pid').write_text(str(__import__('os').getpid())); time.sleep({seconds})")]
sys.exit(run_to_exit_status(lambda: JobScheduler(RunPaths(Path({folder!r})), 1, print, lambda run: None).execute(runs)))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_parent_that_is_killed(tmp_path, number, status):
    """Its children end with it, and the same call resumes: finished runs are not run again."""
    text = PARENT.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path), seconds=600)
    parent = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.PIPE)
    pid, deadline = tmp_path / "runs" / "slow" / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline and parent.poll() is None, parent.stderr.read()
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(60) == status
    while (
        Path(f"/proc/{pid.read_text()}").exists()
        and "Z" not in Path(f"/proc/{pid.read_text()}/stat").read_text().split()[2]
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    places, finished = RunPaths(tmp_path), []
    runs = [
        child("quick"),
        child("slow", then="(folder / 'pid').write_text(str(__import__('os').getpid())); time.sleep(600)"),
    ]
    assert [get_run_state(run, places) for run in runs] == ["finished", "begun"]
    places.get_record_path("slow").unlink()
    JobScheduler(places, 1, lambda line: None, lambda run: finished.append(run.name)).execute([runs[0], child("slow")])
    assert finished == ["quick", "slow"] and [starts(places, name) for name in finished] == [1, 2]


# -- the command ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", "table2", "fig3", "--dry_run", "true", "--jobs", "2"]) == 0
    shown = capsys.readouterr().out
    assert "table2" in shown and "train_cpu-embedded-bupo_internal_steps-5_seed-1" in shown
    assert "25 runs at scale embedded: about" in shown and "with 2 runs in parallel" in shown
    assert not list(tmp_path.iterdir())


def test_costs_are_of_what_is_left(tmp_path):
    todo = plan_reproduction(["table2"], ReproduceOptions(scale="paper", output=str(tmp_path)))
    rows, line = estimate_reproduction(todo, 1)
    assert line == "6 runs at scale paper: about 324 GPU hours" and rows[0]["cost"] == "324 GPU hours"  # 3 x (106 + 2)
    todo = plan_reproduction(["table2"], ReproduceOptions(output=str(tmp_path)))
    run = todo.runs[0]
    todo.paths.get_record_path(run.name).parent.mkdir(parents=True)
    todo.paths.get_run_folder(run.name).mkdir()
    todo.paths.get_record_path(run.name).write_text(
        json.dumps({"digest": run.compute_digest(), "finished": True, "seconds": 60.0})
    )
    trainings, evaluations = (sum(each.command == c for each in todo.runs) for c in ("train", "eval"))
    rows, line = estimate_reproduction(todo, 2)
    seconds = ((trainings - 1) * 60 + evaluations * 30) / 2  # of the scale, but where one has been measured
    assert (
        rows[0]["finished"] == "1"
        and line == f"24 runs at scale embedded: about {seconds / 60:.0f} min with 2 runs in parallel"
    )


def test_lines_are_the_commands():
    todo = plan_reproduction(["table2", "fig3"], ReproduceOptions(scale="paper"))
    lines = format_commands(todo, "lines").split("\n")
    assert len(lines) == len(todo.runs) == 10
    for line, run in zip(lines, sorted(todo.runs, key=lambda run: bool(run.needs)), strict=True):
        assert (
            line
            == f"{run.format_command(todo.paths.get_run_folder)} && echo {run.compute_digest()} > {todo.paths.get_done_path(run.name)}"
        )
    assert lines[0].startswith("accelerate launch --config_file ") and "qwen3-4b/bupo.yaml" in lines[0]


def test_slurm_runs_every_command_once(tmp_path):
    """A stand-in for sbatch runs each command of an array."""
    fake = tmp_path / "sbatch"
    fake.write_text(
        textwrap.dedent("""\
        #!/usr/bin/env bash
        echo "$@" >> "$LOG.options"
        for word in "$@"; do [[ $word == --array=0-* ]] && last=${word#--array=0-}; done
        cat > "$LOG.batch"
        for number in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$number bash "$LOG.batch" >> "$LOG" || exit 1; done
        echo 77
        """)
    )
    fake.chmod(0o755)
    script = tmp_path / "runs.sh"
    todo = plan_reproduction(["table2", "fig2"], ReproduceOptions(scale="embedded", output=str(tmp_path / "it's here")))
    for run in todo.runs:
        object.__setattr__(run, "launch", ("printf", "%s\\n", "--"))  # prints its words instead of running them
    script.write_text(format_commands(todo, "slurm"))
    for run in todo.runs:
        todo.paths.get_run_folder(run.name).mkdir(parents=True)
        assert get_run_state(run, todo.paths) == "to do"
    log = tmp_path / "log"
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "LOG": str(log)}
    done = subprocess.run(["bash", script, "--gres=gpu:8"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran = [part.split("\n") for part in log.read_text().strip("\n").split("--\n") if part.strip()]
    wanted = [
        run.get_arguments(todo.paths.get_run_folder)[3:] for run in sorted(todo.runs, key=lambda run: bool(run.needs))
    ]
    assert [[word for word in words if word] for words in ran] == wanted
    options = (tmp_path / "log.options").read_text().splitlines()
    assert {get_run_state(run, todo.paths) for run in todo.runs} == {"finished"}
    assert "--gres=gpu:8" in options[0] and "--dependency=afterany:77" in options[1] and "afterany" not in options[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fig3", "table2"])
def test_two_of_them_in_small(tmp_path, name, monkeypatch, capsys):
    """`--scale tiny`: from the command line to the page of the result."""
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", name, "--scale", "tiny", "--jobs", "2"]) == 0
    folder = tmp_path / "runs" / "reproduce" / "tiny" / name
    assert {"result.md", "result.json", "table.md", "table.csv", "data.csv"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "result.json").read_text())["digest"] == read_experiment(name, "tiny").compute_digest()
    started = {path: path.stat().st_mtime for path in (folder.parent / "runs").glob("*.log")}
    assert main(["reproduce", name, "--scale", "tiny"]) == 0  # nothing is run again
    assert started == {path: path.stat().st_mtime for path in (folder.parent / "runs").glob("*.log")}
    assert f"{EMBEDDED_MODEL}" in capsys.readouterr().out
