"""Figures: they draw what stands in the tables, whatever a row lacks, and leave matplotlib's state alone."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from bupo.reports.figures import (
    draw_analysis_figures,
    draw_dynamics_figure,
    draw_guard_figure,
    draw_pass_figure,
    draw_training_figure,
)
from bupo.reports.figures.style import BLUE, GREEN, GREY, ORANGE, RED
from tests.helpers.figure_reading import drawn


def metrics(batches=6, first_phase=2):
    """Rows of a `metrics.jsonl`: two evaluations and, as at a run's end, one row of the whole run."""
    rows = []
    for batch in range(1, batches + 1):
        row = {"step": batch, "rollout_batch": float(batch), "phase": 1.0 if batch <= first_phase else 2.0}
        row |= {"reward": 0.1 * batch, "entropy": 1 / batch, "completions/mean_length": 10.0 + batch}
        rows.append(row | ({"internal/entropy": 0.5} if batch <= first_phase else {}))
    for batch in (0, batches):
        shares = {"eval/one/avg@4": 0.2 + 0.1 * batch, "eval/one/low": 0.1, "eval/one/high": 0.9}
        rows.append({"step": batch, "eval/rollout_batches": batch} | shares)
    return [*rows, {"step": batches, "train_loss": 0.1}]


def lines(axis):
    """Points of the lines that are drawn over data, as the axis holds them: not those that mark a place."""
    return [line.get_xydata().tolist() for line in axis.get_lines() if line.get_transform() == axis.transData]


def boxes(axis: Axes) -> list[tuple[float, float, float]]:
    """Left, width and height of what is drawn as a box: bars, and where phase 1 is shaded."""
    patches = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    return [(patch.get_x(), patch.get_width(), patch.get_height()) for patch in patches]


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_training_draws_the_rows(tmp_path):
    rows = metrics()
    figure = draw_training_figure(rows, tmp_path / "training.png", "a run")
    reward, entropy, length, evaluation = figure.axes
    assert figure.get_suptitle() == "a run"
    assert titles(figure) == ["reward", "entropy (nats per token)", "response length (tokens)", "avg@4 (%)"]
    batches = [row for row in rows if "rollout_batch" in row]
    for axis, name in ((reward, "reward"), (entropy, "entropy"), (length, "completions/mean_length")):
        assert lines(axis)[0] == [[row["rollout_batch"], row[name]] for row in batches]
        assert axis.get_xlabel() == "rollout batch"
    assert lines(entropy)[1] == [[1, 0.5], [2, 0.5]]
    assert [text.get_text() for text in entropy.get_legend().get_texts()] == ["language model policy", "layer policy"]
    assert lines(evaluation) == [[[0, 20], [6, pytest.approx(80)]]]
    assert [text.get_text() for text in reward.texts] == ["phase 1", "phase 2"]
    for axis in figure.axes:
        assert boxes(axis)[0][:2] == (0.5, 2)  # phase 1
    size, colours = drawn(tmp_path / "training.png")
    assert size == (2400, 510)
    assert colours[BLUE] > 1000 and colours[ORANGE] > 100


def test_training_without_phases_and_evaluations(tmp_path):
    rows = [row for row in metrics(first_phase=0) if "rollout_batch" in row]
    figure = draw_training_figure(rows, tmp_path / "training.pdf", "GRPO")
    assert len(figure.axes) == 3 and not any(axis.patches or axis.texts for axis in figure.axes)
    assert figure.axes[1].get_legend() is None
    assert (tmp_path / "training.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("lacking", ["reward", "entropy", "completions/mean_length", "phase", "internal/entropy"])
def test_training_draws_what_a_resumed_run_has(tmp_path, lacking):
    rows = metrics()
    del rows[1][lacking]
    rest = [row["rollout_batch"] for row in rows if "rollout_batch" in row and row is not rows[1]]
    reward, entropy, length, _ = draw_training_figure(rows, tmp_path / "training.png", "resumed").axes
    for axis, name in ((reward, "reward"), (entropy, "entropy"), (length, "completions/mean_length")):
        assert [x for x, _ in lines(axis)[0]] == (rest if name == lacking else [1, 2, 3, 4, 5, 6])
    assert len(lines(entropy)[1]) == (1 if lacking == "internal/entropy" else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 4, "train_loss": 0.1}],
        [{"rollout_batch": 1.0}],
        [{"rollout_batch": 1.0, "phase": 1.0, "reward": math.nan, "entropy": math.inf}],
        [{"eval/rollout_batches": 0}, {"eval/rollout_batches": 3, "eval/one/avg@4": 0.5}],
    ],
)
def test_no_figure_dies_of_what_is_missing(tmp_path, rows):
    draw_training_figure(rows, tmp_path / "training.png", "little")
    draw_guard_figure({"right-0": rows, "long-0": rows}, tmp_path / "guard.png")
    empty = pd.DataFrame({name: [] for name in ("rollout_batch", "measure", "layer", "later_layer", "value")})
    draw_dynamics_figure(empty, 0, tmp_path / "dynamics.png", "little")
    for name, size in (("guard", (1800, 510)), ("dynamics", (1800, 900))):
        assert drawn(tmp_path / f"{name}.png")[0] == size


def test_negative_rewards_are_in_sight(tmp_path):
    rows = [{"rollout_batch": batch, "reward": -1.0 - batch} for batch in (1, 2)]
    low, high = draw_training_figure(rows, tmp_path / "training.png", "").axes[0].get_ylim()
    assert low < -3 and high >= 1


def test_guard_draws_one_panel_a_kind_and_one_line_a_seed(tmp_path):
    runs = {f"{kind}-{seed}": metrics(first_phase=3) for kind in ("right", "long", "guarded") for seed in range(2)}
    del runs["long-1"][4]["reward"]
    figure = draw_guard_figure(runs, tmp_path / "guard.png")
    assert titles(figure)[1:] == ["four times too long", "four times too long, with early stopping"]
    for axis in figure.axes:
        assert len(lines(axis)) == 2
        ends = [line.get_xdata() for line in axis.get_lines() if line.get_linestyle() == ":"]
        assert ends == [[3.5, 3.5]] * 2
    assert [x for x, _ in lines(figure.axes[1])[1]] == [1, 2, 3, 4, 6]


def test_dynamics_draws_one_line_a_later_layer(tmp_path):
    rows = [
        {
            "rollout_batch": batch,
            "measure": measure,
            "layer": layer,
            "later_layer": later,
            "value": batch + (later or 0),
        }
        for batch in range(3)
        for measure, layer, laters in (("cosine", 5, (6, 7, 8)), ("perplexity", None, (None,)), ("kl", 3, (4,)))
        for later in laters
    ]
    figure = draw_dynamics_figure(pd.DataFrame(rows), 2, tmp_path / "dynamics.png", "a run")
    assert titles(figure) == ["cosine of $H^{5}$ with later layers", "perplexity of the probes"]  # not of layer 3
    cosine, perplexity = figure.axes
    assert lines(cosine) == [[[batch, batch + later] for batch in range(3)] for later in (6, 7, 8)]
    assert [text.get_text() for text in cosine.get_legend().get_texts()] == ["layer 6", "layer 8"]
    assert lines(perplexity) == [[[batch, batch] for batch in range(3)]]
    assert boxes(cosine)[0][:2] == (0, 2)  # phase 1


def test_pass_draws_both_runs(tmp_path):
    curves = {"one": {"1": 0.2, "2": 0.3, "4": 0.4}, "two": {"1": 0.5}}
    (axis,) = draw_pass_figure(curves, tmp_path / "pass.png", {"one": {"1": 0.1, "2": 0.2}}).axes
    assert [points for points in lines(axis) if points] == [[[1, 20], [2, 30], [4, 40]], [[1, 10], [2, 20]], [[1, 50]]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two", "compared with"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4"]
    size, colours = drawn(tmp_path / "pass.png")
    assert size == (825, 540)
    assert colours[BLUE] > 100 and colours[ORANGE] > 20 and colours[GREY] > 20


def layers_table(layers=4):
    """`layers.parquet` and `summary.json` of one model."""
    names = [f"entropy_{kind}" for kind in ("layer_input", "layer", "attn", "ffn")]
    names += ["d_entropy_attn", "d_entropy_ffn", "cosine_attn", "cosine_ffn", "kl_next", "kl_language_model"]
    rows = [
        {"model": "a", "measure": name, "layer": layer, "mean": layer + i / 9, "low": layer - 0.5, "high": layer + 2.0}
        for i, name in enumerate(names)
        for layer in range(1, layers + 1)
    ]
    model: dict = {"meta": {"label": "a", "lens": "raw"}, "stages": ["exploration", *["convergence"] * (layers - 1)]}
    model |= {"boundary_layer": 1, "similarity": np.eye(layers).tolist(), "kl": np.eye(layers).tolist()}
    return pd.DataFrame(rows), model


def test_analysis_draws_the_table(tmp_path):
    table, model = layers_table()
    figures = draw_analysis_figures(table, [model], tmp_path)
    values = {str(name): rows[["layer", "mean"]].to_numpy().tolist() for name, rows in table.groupby("measure")}
    (flow,) = figures["entropy_flow"].axes
    through = [[0, values["entropy_layer_input"][0][1]]]  # one line: H^0, then each layer's three
    for layer in range(1, 5):
        steps = zip(("attn", "ffn", "layer"), (2 / 3, 1 / 3, 0), strict=True)
        through += [[layer - ahead, values[f"entropy_{kind}"][layer - 1][1]] for kind, ahead in steps]
    np.testing.assert_allclose(lines(flow)[0], through)
    assert flow.get_title(loc="left") == "a  (raw lens)"
    attn, ffn = figures["entropy_change"].axes
    for axis, name in ((attn, "d_entropy_attn"), (ffn, "d_entropy_ffn")):
        bars = [[left + width / 2, height] for left, width, height in boxes(axis)[:4]]
        np.testing.assert_allclose(bars, values[name])
    assert ffn.get_title(loc="right") == "boundary layer 1"
    assert lines(figures["residual_cosine"].axes[0])[:2] == [values["cosine_attn"], values["cosine_ffn"]]
    kl, similarity, pairs = figures["kl_similarity"].axes[:3]
    assert lines(kl) == [values["kl_next"], values["kl_language_model"]] and kl.get_yscale() == "log"
    for axis, matrix in ((similarity, model["similarity"]), (pairs, model["kl"])):
        assert axis.images[0].get_array().tolist() == matrix
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{kind}" for name in figures for kind in ("png", "pdf")
    )
    size, colours = drawn(tmp_path / "entropy_change.png")
    assert size == (1800, 495)
    assert min(colours[colour] for colour in (GREEN, RED, ORANGE)) > 1000


def test_analysis_draws_what_there_is(tmp_path):
    table, model = layers_table(layers=1)
    model |= {"similarity": None, "kl": None, "boundary_layer": None}
    table = table[~table["measure"].isin(["entropy_attn", "cosine_ffn", "d_entropy_ffn"])]
    figures = draw_analysis_figures(table, [model, model], tmp_path)
    assert len(figures["kl_similarity"].axes) == 2  # the first panel of each model
    assert len(lines(figures["entropy_flow"].axes[1])[0]) == 3  # H^0, F^1 and H^1


PROGRAM = """
import sys
import bupo
assert not [name for name in sys.modules if name.startswith("matplotlib")]
import bupo.reports.figures, bupo.reports.evaluation_scores
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
matplotlib.use("svg")
bupo.reports.figures.draw_pass_figure({"one": {"1": 0.5}}, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules and matplotlib.get_backend() == "svg"
"""


def test_the_backend_is_the_users(tmp_path):
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "pass.png")], check=True)
    assert drawn(tmp_path / "pass.png")[0] == (825, 540)
