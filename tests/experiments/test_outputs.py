"""Outputs of finished runs: numbers against values computed by hand, lines against the written rows."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bupo.experiments.experiment import (
    COMMANDS_BY_KIND,
    Cell,
    CommandRun,
    Experiment,
    list_experiments,
    read_experiment,
)
from bupo.experiments.outputs import OUTPUT_MAKERS, FinishedExperiment
from bupo.experiments.outputs.curves import MEASURES as CURVES
from bupo.experiments.outputs.layers import MEASURES as LAYERS
from bupo.experiments.result_page import make_result
from bupo.utils.errors import UserError
from tests.helpers.figure_reading import drawn

ROOT = Path(__file__).parents[2]
NAMES = list_experiments("embedded")
MODEL, PAPERS = "embedded", "Qwen3-4B"


def experiment(kind, rows, seeds=(1, 2, 3), printed=None, draw=None, options=None):
    """One model; a run of each command of the kind for every row and seed."""
    cells = []
    for row in rows:
        for seed in seeds:
            own = (options or {}).get(row, {})
            runs = {
                name: CommandRun(f"{name}-{row}-{seed}", name, {**own, "seed": seed}) for name in COMMANDS_BY_KIND[kind]
            }
            cells.append(Cell(MODEL, row, seed, own, runs))
    return Experiment(
        "table1", "A title", "table 1", kind, "embedded", "a scale", printed or {}, draw or {}, tuple(cells)
    )


def write(folder, name, run, content):
    place = folder / "runs" / run
    place.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pd.DataFrame):
        content.to_parquet(place / name)
    else:
        (place / name).write_text(content if isinstance(content, str) else json.dumps(content))


def made(folder, what, seconds=None):
    result = make_result(what, lambda name: folder / "runs" / name, folder / "out", (seconds or {}).get)
    assert sorted(path.name for path in result.folder.iterdir()) == sorted([*result.files, "result.json"])
    return result


def drawn_and_made(folder, what):
    """Return the figure and the written result."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        kind = OUTPUT_MAKERS[what.kind]
        patch.setitem(OUTPUT_MAKERS, what.kind, lambda finished: kept.append(kind(finished)) or kept[0])
        result = made(folder, what)
    return kept[0].figure, result


def output(folder, what):
    return OUTPUT_MAKERS[what.kind](FinishedExperiment(what, lambda name: folder / "runs" / name, lambda name: None))


def cells_of(result, table=0):
    """The cells of a Markdown table, by column."""
    lines = (result.folder / "table.md").read_text().split("\n\n")[1 + 2 * table].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def scored(share, passed=None, k=8):
    return {"k": k, "avg@k": share, "pass@k": passed or {"1": share}}


def write_scores(folder, shares):
    """Evaluations by row, of the benchmark `sums`, or of several."""
    for row, by_seed in shares.items():
        for seed, share in enumerate(by_seed, 1):
            found = share if isinstance(share, dict) else {"sums": scored(share)}
            write(folder, "summary.json", f"eval-{row}-{seed}", {"benchmarks": found})


# by hand: means 52 and 56, deviations 2 and 3, differences 3, 4, 5; Student's 0.975 quantile of two degrees is 4.302653
SHARES = {"GRPO": (0.50, 0.52, 0.54), "BuPO": (0.53, 0.56, 0.59)}


def test_scores_by_hand(tmp_path):
    write_scores(tmp_path, SHARES)
    printed = {PAPERS: {"GRPO": 55.08, "BuPO": 58.51}, "Qwen3-8B": {"GRPO": 64.23}}
    options = {"BuPO": {"internal_layer": 5}}
    result = made(tmp_path, experiment("scores", SHARES, printed=printed, draw={"against": "GRPO"}, options=options))
    grpo, bupo = result.rows
    assert [row["ours"] for row in result.rows] == pytest.approx([52, 56]) and bupo["measure"] == "sums, avg@8"
    assert [row["ours_sd"] for row in result.rows] == pytest.approx([2, 3])
    assert (grpo["ours_low"], grpo["ours_high"]) == pytest.approx((52 - 4.968276, 52 + 4.968276), abs=1e-5)
    assert (bupo["difference"], bupo["difference_sd"]) == pytest.approx((4, 1))
    assert (bupo["difference_low"], bupo["difference_high"]) == pytest.approx((1.515862, 6.484138), abs=1e-5)
    assert (
        grpo["difference"] is None
        and grpo["verdict"] is None
        and bupo["by_seed"] == pytest.approx({"1": 53, "2": 56, "3": 59})
    )
    assert cells_of(result)[1] == {
        "method": "BuPO", "options": r"internal_layer 5", "paper, Qwen3-4B": "58.51 (+3.43)", "paper, Qwen3-8B": "-",
        "ours [95 %]": "56.0 [48.5, 63.5]", "sd": "3.0", "seeds": "3", "less GRPO [95 %]": "+4.0 [+1.5, +6.5]",
        "from zero": "significant", "direction": "as in the paper", "scale": "embedded",
    }  # fmt: skip
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert list(table["paper Qwen3-4B"]) == [55.08, 58.51] and list(table["ours"]) == pytest.approx([52, 56])
    data = pd.read_csv(tmp_path / "out" / "data.csv")
    assert list(data["value"]) == pytest.approx([50, 52, 54, 53, 56, 59]) and list(data["seed"]) == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("bupo", "printed", "verdict", "direction"),
    [
        ((0.53, 0.56, 0.59), {"GRPO": 58.0, "BuPO": 55.0}, "significant", "opposite to the paper"),
        ((0.53, 0.52, 0.50), {"GRPO": 55.0, "BuPO": 58.0}, "not significant", "-"),
        ((0.53, 0.56, 0.59), {"BuPO": {"gain over GRPO": 1.83}}, "significant", "as in the paper"),
        ((0.53, 0.56, 0.59), {}, "significant", "-"),
    ],
)
def test_a_difference_in_words(tmp_path, bupo, printed, verdict, direction):
    write_scores(tmp_path, SHARES | {"BuPO": bupo})
    what = experiment("scores", SHARES, printed={PAPERS: printed}, draw={"against": "GRPO"})
    last = cells_of(made(tmp_path, what))[1]
    assert (last["from zero"], last["direction"]) == (verdict, direction)
    if "gain over GRPO" in str(printed):
        assert last["paper, Qwen3-4B"] == "(+1.83)"


def test_papers_that_differ_have_no_direction(tmp_path):
    write_scores(tmp_path, SHARES)
    printed = {"one": {"GRPO": 1.0, "BuPO": 2.0}, "two": {"GRPO": 2.0, "BuPO": 1.0}}
    result = made(tmp_path, experiment("scores", SHARES, printed=printed, draw={"against": "GRPO"}))
    assert cells_of(result)[1]["direction"] == "the paper's models differ"


def test_a_model_of_the_paper_stands_beside_its_own_number(tmp_path):
    write_scores(tmp_path, SHARES)
    printed = {MODEL: {"GRPO": 54.00}, "other": {"GRPO": 1.0}}
    first = cells_of(made(tmp_path, experiment("scores", SHARES, printed=printed)))[0]
    assert first["paper"] == "54.00" and "paper, other" not in first


def test_one_seed_has_no_interval(tmp_path):
    write_scores(tmp_path, SHARES)
    result = made(tmp_path, experiment("scores", SHARES, seeds=(1,), draw={"against": "GRPO"}))
    last = cells_of(result)[1]
    assert (
        last["ours [95 %]"] == "53.0"
        and last["sd"] == "-"
        and last["paper"] == "-"
        and last["seeds"] == "1: no interval"
    )
    assert last["less GRPO [95 %]"] == "+3.0" and last["from zero"] == "1 seed: no interval"
    assert result.rows[1]["ours_low"] is None and any("One seed, 1:" in note for note in result.notes)


def test_several_benchmarks_have_an_average_or_a_column(tmp_path):
    shares = {row: [{"a": scored(s), "b": scored(s + 0.2, k=32)} for s in by_seed] for row, by_seed in SHARES.items()}
    write_scores(tmp_path, shares)
    result = made(tmp_path, experiment("scores", SHARES, draw={"by_seed": True}))
    assert [row["measure"] for row in result.rows] == ["a, avg@8"] * 2 + ["b, avg@32"] * 2 + ["average"] * 2
    assert cells_of(result)[0]["ours [95 %]"].startswith("62.0 [")  # of 52 and 72
    assert cells_of(result, 1)[1]["b, avg@32"].startswith("76.0 [")
    assert cells_of(result, 2)[1] == {
        "method": "BuPO", "seed 1": "63.0", "seed 2": "66.0", "seed 3": "69.0", "mean": "66.0", "sd": "3.0",
    }  # fmt: skip
    chosen = made(tmp_path, experiment("scores", SHARES, draw={"column": "b"}))
    assert cells_of(chosen)[0]["ours [95 %]"].startswith("72.0 [")


def test_the_harness_counts_too(tmp_path):
    for seed in (1, 2):
        harness = {"arc": {"score": 0.5 + 0.1 * seed, "metric": "acc"}}
        write(tmp_path, "summary.json", f"eval-GRPO-{seed}", {"benchmarks": {}, "harness": harness})
    rows = made(tmp_path, experiment("scores", ["GRPO"], seeds=(1, 2))).rows
    assert [(row["measure"], row["ours"]) for row in rows] == [("arc, acc", pytest.approx(65))]


def write_training(folder, rows, seeds=(1, 2), batches=20, first=5):
    """Reward rises by 0.01 a batch from 0.1 a row and 0.02 a seed."""
    for number, row in enumerate(rows):
        for seed in seeds:
            lines = [
                {
                    "rollout_batch": float(b), "phase": 1.0 if b <= first * number else 2.0,
                    "reward": 0.1 * number + 0.02 * seed + 0.01 * b, "entropy": 1 / b, "completions/mean_length": 10.0,
                }
                for b in range(1, batches + 1)
            ] + [{"step": 80, "train_runtime": 100.0 * seed}]  # fmt: skip
            write(folder, "metrics.jsonl", f"train-{row}-{seed}", "".join(json.dumps(line) + "\n" for line in lines))


def lines_of(axis):
    return {line.get_label(): line.get_xydata() for line in axis.get_lines() if line.get_transform() == axis.transData}


def test_curves_draw_every_row_with_its_band(tmp_path):
    write_training(tmp_path, ["GRPO", "BuPO"])
    what = experiment("curves", ["GRPO", "BuPO"], (1, 2), draw={"measures": ["reward", "entropy"], "against": "GRPO"})
    figure, result = drawn_and_made(tmp_path, what)
    reward, entropy = figure.axes
    lines = lines_of(reward)
    assert list(lines) == ["GRPO", "BuPO"] and set(lines_of(entropy)) == {"GRPO", "BuPO"}
    batches = np.arange(1, 21)
    np.testing.assert_allclose(lines["BuPO"], np.stack([batches, 0.13 + 0.01 * batches], 1))
    half = 12.706205 * 0.02 / 2  # Student's of one degree; two seeds 0.02 apart
    for number, collection in enumerate(reward.collections):
        edges = collection.get_paths()[0].vertices
        at_first = edges[np.isclose(edges[:, 0], 1), 1]
        assert (at_first.min(), at_first.max()) == pytest.approx(
            (0.04 + 0.1 * number - half, 0.04 + 0.1 * number + half)
        )
    assert [text.get_text() for text in reward.texts] == ["◂ phase 1"]
    assert any(line.get_xdata()[0] == 5.5 for line in reward.get_lines())  # the end of BuPO's
    bupo = next(row for row in result.rows if row["measure"] == "reward" and row["row"] == "BuPO")
    assert bupo["ours"] == pytest.approx(0.13 + 0.195) and bupo["before"] == pytest.approx(
        0.13 + 0.015
    )  # two of 20 batches
    assert bupo["difference"] == pytest.approx(0.1) and bupo["verdict"] == "significant"
    assert drawn(tmp_path / "out" / "figure.png")[0][0] > 1000 and "Phase 1 of BuPO (embedded) takes 5" in str(
        result.notes
    )


def test_long_curves_are_running_means(tmp_path):
    write_training(tmp_path, ["GRPO"], batches=50)
    what = experiment("curves", ["GRPO"], (1, 2), draw={"measures": ["reward"]})
    found = output(tmp_path, what)
    (axis,) = found.figure.axes
    line = lines_of(axis)["GRPO"]
    assert line[0, 1] == pytest.approx(0.03 + 0.02) and line[10, 1] == pytest.approx(
        0.03 + 0.11
    )  # of batches 1 to 3, 9 to 13
    assert axis.get_xlabel() == "rollout batch (running mean of 5)"
    assert found.data["value"].iloc[0] == pytest.approx(0.03)  # the data are as they were logged


def write_analysis(folder):
    names = [*LAYERS["entropy_flow"], *LAYERS["entropy_change"], *LAYERS["residual_cosine"]]
    rows = [
        {
            "model": "x",
            "measure": name,
            "layer": layer,
            "mean": layer - 2.0,
            "std": 1.0,
            "low": layer - 2.5,
            "high": layer - 1.5,
        }
        for name in names
        for layer in (1, 2, 3, 4)
    ]
    summary = {
        "meta": {"label": "x", "lens": "raw", "answers": 9, "seconds": 3.0},
        "stages": ["exploration", "exploration", "integration", "convergence"],
        "boundary_layer": 2, "paper_boundary_layer": 3, "pattern": "progressive", "verdict": "progressive: so",
        "ranges": {"exploration": [1, 2], "integration": [3, 3], "convergence": [4, 4]}, "explanation": "layer 2 is",
    }  # fmt: skip
    write(folder, "layers.parquet", "analyze--1", pd.DataFrame(rows))
    write(folder, "summary.json", "analyze--1", {"models": [summary]})


@pytest.mark.parametrize(
    ("figure", "drawn_lines"), [("entropy_flow", 1), ("entropy_change", 0), ("residual_cosine", 2)]
)
def test_layers_are_drawn_with_the_stages(tmp_path, figure, drawn_lines):
    write_analysis(tmp_path)
    printed = {PAPERS: {"": {"exploration": "1-6", "boundary layer": 6}}}
    what = experiment("layers", [""], (1,), printed=printed, draw={"figure": figure})
    figure_drawn, result = drawn_and_made(tmp_path, what)
    curves_drawn = [line for line in figure_drawn.axes[0].get_lines() if len(line.get_xdata()) >= 4]
    assert len([line for line in curves_drawn if line.get_linestyle() == "-"]) == drawn_lines
    if figure == "entropy_change":
        assert len([bar for bar in figure_drawn.axes[1].patches if bar.get_width() == 0.8]) >= 4
    shown = {row["layers"]: row for row in cells_of(result)}
    assert shown["exploration"]["paper, Qwen3-4B"] == "1-6" and shown["exploration"]["ours"] == "1-2 of 4"
    assert shown["integration"]["paper, Qwen3-4B"] == "-" and shown["integration"]["ours"] == "3 of 4"
    assert [shown[name]["ours"] for name in shown if "boundary" in name] == ["2 of 4", "3 of 4"]
    assert [row["mean"] for row in result.rows[:1]] == [dict.fromkeys(LAYERS[figure], -0.5)]
    assert "embedded is progressive: so. Layer 2 is." in result.notes[0]
    data = pd.read_csv(tmp_path / "out" / "data.csv")
    assert set(data["measure"]) == set(LAYERS[figure]) and set(data["model"]) == {"embedded"}


def write_dynamics(folder, seeds=(1, 2)):
    for seed in seeds:
        rows = []
        for batch in (0, 5, 10):
            rows += [(batch, "cosine", 5, later, 0.1 * later + 0.01 * batch + 0.02 * seed) for later in (6, 7, 8)]
            rows += [(batch, "kl", 5, later, 1.0 * later) for later in (6, 7, 8)]
            rows += [
                (batch, "d_entropy_layer", 5, None, 0.5),
                (batch, "perplexity", None, None, 2.0),
                (batch, "reward", None, None, 1.0),
            ]
        table = pd.DataFrame(rows, columns=["rollout_batch", "measure", "layer", "later_layer", "value"])
        write(
            folder, "dynamics.parquet", f"train-BuPO-{seed}", table.astype({"layer": "Int64", "later_layer": "Int64"})
        )


def test_dynamics_have_four_panels_and_a_line_a_later_layer(tmp_path):
    write_training(tmp_path, ["GRPO", "BuPO"])
    write_dynamics(tmp_path)
    what = experiment("dynamics", ["BuPO"], (1, 2))
    figure, result = drawn_and_made(tmp_path, what)
    axes = figure.axes
    assert [len(lines_of(axis)) for axis in axes] == [3, 1, 1, 3]
    np.testing.assert_allclose(lines_of(axes[0])["layer 7"], [[0, 0.73], [5, 0.78], [10, 0.83]])
    assert all(any(line.get_xdata()[0] == 5 for line in axis.get_lines()) for axis in axes)  # the end of phase 1
    rows = {row["measure"]: row for row in result.rows}
    assert rows["cosine with layer 8"]["before"] == pytest.approx(0.83) and rows["cosine with layer 8"][
        "ours"
    ] == pytest.approx(0.93)
    assert rows["perplexity"]["ours"] == 2 and "reward" not in rows


def test_passes_draw_a_curve_a_row_and_a_panel_a_benchmark(tmp_path):
    curve = {"1": 0.2, "2": 0.3, "4": 0.5, "8": 0.6}
    for number, row in enumerate(["GRPO", "BuPO"]):
        for seed in (1, 2):
            found = {k: share + 0.1 * number + 0.01 * seed for k, share in curve.items()}
            write(
                tmp_path,
                "summary.json",
                f"eval-{row}-{seed}",
                {"benchmarks": {"a": scored(0, found), "b": scored(0, curve)}},
            )
    what = experiment("passes", ["GRPO", "BuPO"], (1, 2), draw={"against": "GRPO"})
    figure, result = drawn_and_made(tmp_path, what)
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["a: pass@K (%)", "b: pass@K (%)"]
    np.testing.assert_allclose(lines_of(axes[0])["BuPO"], [[1, 31.5], [2, 41.5], [4, 61.5], [8, 71.5]])
    result = made(tmp_path, what)
    assert (
        cells_of(result)[1]["pass@8"].startswith("71.5 [") and cells_of(result, 2)[1]["pass@1"] == "20.0 [20.0, 20.0]"
    )
    assert cells_of(result, 1)[0]["pass@1"] == "+10.0 [+10.0, +10.0]: significant"


def test_cost_by_hand(tmp_path):
    printed = {PAPERS: {"BuPO": {"analysis, seconds": 209, "training, seconds": 47520, "share, percent": 0.44}}}
    what = experiment("cost", ["BuPO"], (1, 2), printed=printed)
    times = {"analyze-BuPO-1": 5.0, "analyze-BuPO-2": 5.0, "train-BuPO-1": 100.0, "train-BuPO-2": 250.0}
    result = made(tmp_path, what, times)
    assert [row["ours"] for row in result.rows] == pytest.approx([5, 175, 3.5])  # of 5 % and 2 %
    assert [row["paper, Qwen3-4B"] for row in cells_of(result)] == ["209", "47520", "0.44"]


def test_cost_of_runs_made_elsewhere_is_what_they_noted(tmp_path):
    write_training(tmp_path, ["BuPO"])
    for seed in (1, 2):
        write(tmp_path, "summary.json", f"analyze-BuPO-{seed}", {"models": [{"meta": {"seconds": 3.0}}]})
    result = made(tmp_path, experiment("cost", ["BuPO"], (1, 2)))
    assert [row["ours"] for row in result.rows] == pytest.approx([3, 150, 2.25])
    assert "on another machine" in result.notes[0]


def test_the_page_says_what_it_is(tmp_path):
    write_scores(tmp_path, SHARES)
    result = made(tmp_path, experiment("scores", SHARES))
    page = (result.folder / "result.md").read_text()
    for text in (
        "# Table 1: A title",
        "In the paper: table 1.",
        "`embedded`: a scale",
        "other models",
        "Seeds 1, 2, 3.",
    ):
        assert text in page
    told = json.loads((result.folder / "result.json").read_text())
    assert (
        told["digest"] == experiment("scores", SHARES).compute_digest()
        and told["versions"]["bupo"]
        and "folder" not in told
    )


def break_(folder, run, name, text):
    path = folder / "runs" / run / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)


@pytest.mark.parametrize(
    ("kind", "run", "name", "text"),
    [
        ("scores", "eval-BuPO-2", "summary.json", None),
        ("scores", "eval-BuPO-2", "summary.json", "{half"),
        ("scores", "eval-BuPO-2", "summary.json", '{"benchmarks": {"sums": {"k": 8}}}'),
        ("scores", "eval-BuPO-2", "summary.json", '{"benchmarks": {}}'),
        ("passes", "eval-BuPO-2", "summary.json", '{"benchmarks": {"sums": {}}}'),
        ("curves", "train-BuPO-1", "metrics.jsonl", None),
        ("curves", "train-BuPO-1", "metrics.jsonl", '{"rollout_batch": 1.0, "reward": 1.0}\nnot a row\n'),
        ("curves", "train-BuPO-1", "metrics.jsonl", '{"step": 1}\n'),
        ("curves", "train-BuPO-1", "metrics.jsonl", '{"rollout_batch": 1.0}\n'),
        ("dynamics", "train-BuPO-1", "dynamics.parquet", "no parquet"),
        ("cost", "train-BuPO-1", "metrics.jsonl", '{"step": 1}\n'),
    ],
)  # fmt: skip
def test_a_bad_folder_is_one_line_that_names_the_run(tmp_path, kind, run, name, text):
    write_scores(tmp_path, SHARES)
    write_training(tmp_path, ["GRPO", "BuPO"])
    write_dynamics(tmp_path)
    for seed in (1, 2):
        write(tmp_path, "summary.json", f"analyze-BuPO-{seed}", {"models": [{"meta": {"seconds": 3.0}}]})
    what = experiment(kind, ["BuPO"], (1, 2), draw={"measures": ["reward"]})
    output(tmp_path, what)
    break_(tmp_path, run, name, text)
    with pytest.raises(UserError, match=f"^run {run}.*{name}.*remove .*{run} and start again$") as error:
        made(tmp_path, what)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_every_experiment_can_be_drawn():
    """The outputs support all options of the experiments."""
    assert set(OUTPUT_MAKERS) == set(COMMANDS_BY_KIND)
    for name in NAMES:
        for scale in ("embedded", "paper"):
            what = read_experiment(name, scale)
            rows = {cell.row for cell in what.cells}
            assert what.output_options.keys() <= {"against", "column", "by_seed", "measures", "figure"}, name
            assert what.output_options.get("against") in {None, *rows}
            assert set(what.output_options.get("measures", [])) <= set(CURVES)
            assert what.kind != "layers" or what.output_options["figure"] in LAYERS
            if scale == "paper":
                assert {row for printed in what.paper_values.values() for row in printed} <= rows, name


# -- the page in the docs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "paper_page.py"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tool):
    """Results, and a page of them, that are as they should be."""
    root = tmp_path_factory.mktemp("results")
    for name in NAMES:
        what = read_experiment(name, "tiny")
        folder = root / "tiny" / name
        folder.mkdir(parents=True)
        (folder / "table.md").write_text(f"Caption:\n\n| of {name} |\n| --- |\n| 1 |\n")
        files = ["table.md"]
        if name.startswith("fig"):
            noise = np.random.default_rng(0).integers(0, 255, (30, 150, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((1100, 200) if name == "fig2" else (150, 30)).save(folder / "figure.png")
            files.append("figure.png")
        told = {key: getattr(what, key) for key in ("name", "title", "source", "scale", "about")}
        told |= {
            "digest": what.compute_digest(),
            "versions": {"bupo": "1"},
            "notes": ["shared", f"own {name}"],
            "files": files,
        }
        row = {"row": "BuPO", "against": "GRPO", "verdict": "significant", "direction": "opposite to the paper"}
        told["rows"] = [row | {"paper_difference": {"Qwen3-4B": 3.43 if name == "table1" else None}}]
        (folder / "result.json").write_text(json.dumps(told))
    tool["copy"](root / "tiny", root / "docs")
    (root / "docs" / "paper.md").write_text(tool["page"](root / "docs"))
    return root


@pytest.fixture
def docs(whole, tmp_path):
    return shutil.copytree(whole, tmp_path, dirs_exist_ok=True) / "docs"


@pytest.mark.slow
def test_the_paper_page_holds_every_name(docs, tool):
    assert tool["stale"](docs) == []
    page = (docs / "paper.md").read_text()
    for name in NAMES:
        assert f"| of {name} |" in page and f"- own {name}\n" in page
        assert (f"(paper/{name}.png)" in page) == name.startswith("fig")
    assert page.count("opposite to the paper") == 1 and "\n| Table 1 | GRPO | - | BuPO | - | - |\n" in page
    assert page.count("shared") == 1 and "bupo reproduce all --scale tiny" in page
    assert max(path.stat().st_size for path in docs.rglob("*.png")) <= 60_000


@pytest.mark.slow
def test_a_stale_paper_page_is_told(docs, tool):
    page, result = docs / "paper.md", docs / "paper" / "fig3.json"
    page.write_text(page.read_text().replace("| 1 |", "| 2 |", 1))
    (fault,) = tool["stale"](docs)
    assert "paper.md is not what" in fault
    kept = result.read_text()
    result.write_text(kept.replace(json.loads(kept)["digest"], "another"))
    (docs / "paper" / "fig7.json").unlink()
    assert [fault.split(" in ")[0].split(":")[0] for fault in tool["stale"](docs)] == [
        "fig3 is stale",
        "fig7 is missing",
    ]


def test_a_missing_result_leaves_the_page_alone(docs, tool, tmp_path):
    (tmp_path / "tiny" / "table7" / "result.json").unlink()
    with pytest.raises(UserError, match="no result of table7"):
        tool["copy"](tmp_path / "tiny", docs)
    assert (docs / "paper" / "table7.json").exists()


def test_the_docs_paper_page_is_fresh(tool):
    """docs/paper.md is what its command would write, from runs of the experiments and recipes as they stand."""
    if not (ROOT / "docs" / "paper").exists():
        pytest.skip("docs/paper does not exist")
    assert tool["stale"](ROOT / "docs") == []
