"""Logs may hold anything: None, NaN, infinite numbers, texts, or lack a name. Card, figures, console, files and reports take it."""

import io
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import TrainerControl, TrainerState

from bupo import TrainOptions, report_runs, train
from bupo.reports.figures import draw_training_figure
from bupo.run_files.names import METRICS_FILE
from bupo.training import model_card
from bupo.training.callbacks.console import ConsoleCallback
from bupo.training.callbacks.metrics_file import MetricsFileCallback, read_metrics
from bupo.utils.log_values import format_number, get_number
from tests.helpers import made_runs
from tests.training.test_trainer import config, model_of, trainer_of

NAMES = (
    "reward", "reward_std", "entropy", "internal/entropy", "internal/layer", "completions/mean_length", "phase", "rollout_batch",
    "completions/ungraded_ratio", "clip_ratio/region_mean", "loss", "grad_norm", "eval_reward", "eval_loss", "eval_rollout_batches",
    "eval_a/avg@4", "eval_a/low", "eval_a/high", "eval_a/strict", "probe/perplexity", "warning/nothing_graded",
)  # fmt: skip
ODD = st.sampled_from(
    [None, math.nan, math.inf, -math.inf, 1e300, -1e16, "", "nan", "a|b\n[c](d)", True, [1.0], {"a": 1}, 10**400]
)
LOGS = st.dictionaries(st.sampled_from(NAMES), st.one_of(ODD, st.floats(-5, 5), st.integers(0, 9)), max_size=12)
HISTORY = st.lists(LOGS, min_size=1, max_size=5)


def test_numbers_are_finite_and_anything_else_is_a_dash():
    assert [get_number(value) for value in (1, 0.5, True, "1", None, math.nan, math.inf, 1e16)] == [1.0, 0.5] + [
        None
    ] * 6
    assert (
        format_number(0.25) == "0.250"
        and format_number(25, ".1f", " %") == "25.0 %"
        and format_number(math.nan) == format_number("x") == "-"
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return trainer_of(model_of(num_hidden_layers=2), config(tmp_path_factory.mktemp("run")))


@settings(max_examples=60)
@given(HISTORY)
def test_the_card_takes_any_log(trainer, history):
    trainer.state.log_history = history
    text = model_card.render_model_card(trainer, "run", None, [])
    table = [line for line in text.partition("## Results")[2].splitlines() if line.startswith("|")]
    assert not {"nan", "inf", "None", "1e+16"} & {cell.strip() for line in table for cell in line.split("|")}


@settings(max_examples=60)
@given(HISTORY)
def test_the_console_takes_any_log(history):
    written = io.StringIO()
    lines = ConsoleCallback(Console(file=written, width=80, force_terminal=False))
    state, control = TrainerState(is_world_process_zero=True, max_steps=9), TrainerControl()
    lines.on_train_begin(None, state, control)
    try:
        for logs in history:
            lines.on_log(None, state, control, logs=logs)
        lines.console.print(lines.render())
    finally:
        lines.close()
    assert "nan" not in written.getvalue() and "inf" not in written.getvalue()


@pytest.mark.slow
@settings(max_examples=12)
@given(HISTORY)
def test_files_figures_and_the_report_take_any_log(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("logs")
    run = made_runs.train(folder / "runs" / "run", 1, batches=1)
    writer, state = MetricsFileCallback(run), TrainerState(is_world_process_zero=True, global_step=1)
    for logs in history:
        writer.on_log(None, state, None, logs=logs)
    for line in (run / METRICS_FILE).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    draw_training_figure(read_metrics(run / METRICS_FILE), run / "training.png", "a run")
    report_runs([run], folder / "report.html")


UNGRADED = {"first": (1,), "last": (4,), "in the middle": (2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("batches", UNGRADED.values(), ids=UNGRADED)
@pytest.mark.parametrize("steps", [0, 2], ids=["phase2", "phase1"])
def test_a_run_with_ungraded_batches_is_saved_shown_and_reported(tmp_path, batches, steps):
    """With checkpoints, the model, its card and its figures, as `bupo train` writes them, and a report over it."""
    number_of = iter(range(1, 9))

    def reward(completion_ids, **kwargs):
        ungraded = next(number_of) in batches
        return [None if ungraded else float(len(set(ids))) for ids in completion_ids]

    args = config(
        tmp_path / "run", max_steps=4, steps_per_generation=1, save_strategy="steps", save_steps=1, logging_steps=None,
        internal_steps=steps, internal_layer=1 if steps else None,
    )  # fmt: skip
    written = io.StringIO()
    lines = ConsoleCallback(Console(file=written, width=80))
    run = train("embedded", args, TrainOptions(dataset="arithmetic", size=16), reward_funcs=[reward], callbacks=[lines])
    cards = {n: (run.folder / f"checkpoint-{n}" / "README.md").read_text() for n in range(1, 5)} | {
        5: (run.folder / "README.md").read_text()
    }
    for last, text in cards.items():
        rows = {
            line.split(" | ")[0].strip("| "): line.split(" | ")[1]
            for line in text.splitlines()
            if line.startswith("| ")
        }
        for batch in {1, min(last, 4)}:
            assert (rows[str(batch)] == "not graded") == (batch in batches), (last, rows)
    rewards = [row.get("reward") for row in run.metrics if "rollout_batch" in row]
    assert [value is None for value in rewards] == [batch in batches for batch in range(1, 5)]
    assert (run.folder / "training.png").exists()
    assert sum(" reward - " in line for line in written.getvalue().splitlines()) == len(batches)
    found = report_runs([run.folder], tmp_path / "report.html")
    (group,) = found.groups
    assert sorted(group.runs[0].series["reward"]) == [batch for batch in range(1, 5) if batch not in batches]
