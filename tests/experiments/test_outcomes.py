"""Outcomes of trainings: measures of runs by hand, p values against definitions, and the docs' page of stored tables."""

import itertools
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bupo.experiments.experiment import read_experiment
from bupo.experiments.jobs import RunPaths
from bupo.experiments.outputs import OUTPUT_MAKERS, FinishedExperiment
from bupo.experiments.outputs.outcomes import compare_outcomes, measure_outcome
from bupo.utils.statistics import adjust_holm, compute_paired_p_value
from tests.experiments.test_outputs import cells_of, experiment, made, output, scored, write

ROOT = Path(__file__).parents[2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_closed_testing(ps):
    """Adjusted: the largest Bonferroni p of any set of hypotheses that one belongs to."""
    for place, adjusted in enumerate(adjust_holm(ps)):
        sets = [s for n in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), n) if place in s]
        assert adjusted == pytest.approx(max(min(1.0, len(s) * min(ps[i] for i in s)) for s in sets))


def test_a_paired_p_value_by_hand():
    first, second = {1: 50.0, 2: 52.0, 3: 54.0, 4: 99.0}, {1: 53.0, 2: 56.0, 3: 59.0, 5: 0.0}
    t = 4 / (1 / math.sqrt(3))  # differences 3, 4, 5
    assert compute_paired_p_value(first, second) == pytest.approx(2 * stats.t.sf(t, 2))
    assert (
        compute_paired_p_value({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}) == 1
        and compute_paired_p_value({1: 1.0, 2: 2.0}, {1: 2.0, 2: 3.0}) == 0
    )


def write_training(folder, run, rewards, entropies, lengths):
    rows = [
        {"step": 4 * i, "rollout_batch": i, "reward": r, "entropy": e, "completions/mean_length": n}
        for i, (r, e, n) in enumerate(zip(rewards, entropies, lengths, strict=True), 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 80, "train_loss": 0.1}])
    write(folder, "metrics.jsonl", run, text)


def write_runs(folder, shares):
    for row, by_seed in shares.items():
        for seed, share in enumerate(by_seed, 1):
            rewards = [(i // 2) / 10 for i in range(20)]
            write_training(folder, f"train-{row}-{seed}", rewards, [1.0] * 18 + [0.3, 0.1], [10.0] * 18 + [20, 30])
            found = {"sums": scored(share, {"1": share, "16": 0.9}, k=16)}
            write(folder, "summary.json", f"eval-{row}-{seed}", {"benchmarks": found})


SHARES = {"GRPO": (0.50, 0.52, 0.54), "BuPO": (0.53, 0.56, 0.59), "PPO": (0.51, 0.50, 0.55)}


def test_the_measures_of_a_run_by_hand(tmp_path):
    write_runs(tmp_path, {"GRPO": (0.5,)})
    what = experiment("outcomes", ["GRPO"], seeds=(1,))
    found = measure_outcome(
        FinishedExperiment(what, lambda name: tmp_path / "runs" / name, lambda name: None), what.cells[0]
    )
    assert found == pytest.approx({
        **{f"curve {tenth}": 10.0 * (tenth - 1) for tenth in range(1, 11)},
        "area": 45, "reward": 90, "entropy": 0.2, "length": 25, "avg@k": 50, "pass@16": 90,
    })  # fmt: skip


def test_differences_are_told_apart_by_holms_p(tmp_path):
    """BuPO's p alone is 0.02; beside a second comparison it is 0.04, and beside a third it would not do."""
    write_runs(tmp_path, SHARES)
    rows = cells_of(made(tmp_path, experiment("outcomes", SHARES, draw={"against": "GRPO"})))
    p = 2 * stats.t.sf(4 * math.sqrt(3), 2)
    assert [row["p (Holm)"] for row in rows] == ["-", f"{2 * p:.2g}", "1"] and 2 * p < 0.05 < 3 * p
    assert [row["from zero"] for row in rows] == ["-", "significant", "not significant"]
    assert "paper" not in rows[0] and rows[1]["mean [95 %]"] == "56.0 [48.5, 63.5]"
    write_runs(tmp_path, {"RLOO": (0.5, 0.53, 0.55)})
    rows = cells_of(made(tmp_path, experiment("outcomes", [*SHARES, "RLOO"], draw={"against": "GRPO"})))
    assert (rows[1]["p (Holm)"], rows[1]["from zero"]) == (f"{3 * p:.2g}", "not significant")


def test_a_training_that_is_not_evaluated_is_compared_by_reward(tmp_path):
    write_runs(tmp_path, SHARES)
    what = experiment("curves", SHARES, draw={"measures": ["reward"]})
    finished = FinishedExperiment(what, lambda name: tmp_path / "runs" / name, lambda name: None)
    assert "avg@k" not in measure_outcome(finished, what.cells[0])
    assert OUTPUT_MAKERS["outcomes"](finished).tables[0].caption == "reward of the last tenth, in percent:"


def test_each_row_counts_its_own_seeds():
    """Stored runs may have more seeds of one method than of another."""
    what = experiment("outcomes", ["GRPO", "BuPO"], draw={"against": "GRPO"})
    found = {
        (what.cells[0].model, row): {
            seed: {"avg@k": 50.0 + seed, "area": 40.0 + seed, "curve 1": 40.0} for seed in range(1, seeds + 1)
        }
        for row, seeds in {"GRPO": 3, "BuPO": 2}.items()
    }
    tables = compare_outcomes(what, found).tables
    assert [[row["seeds"] for row in table.rows] for table in tables] == [["3", "2 of 3"], ["3", "2"], ["2"]]


def test_a_row_of_which_nothing_is_stored_says_so():
    what = experiment("outcomes", ["GRPO", "BuPO", "PPO"], draw={"against": "GRPO"}, seeds=(1, 2))
    found = {(what.cells[0].model, "GRPO"): {seed: {"avg@k": 50.0 + seed, "curve 1": 40.0} for seed in (1, 2)}}
    rows = compare_outcomes(what, found).tables[0].rows
    assert [(row["method"], row["seeds"]) for row in rows] == [("GRPO", "2"), ("BuPO", "not run"), ("PPO", "not run")]
    assert {row["mean [95 %]"] for row in rows[1:]} == {"-"}


def test_the_curves_are_the_tenths(tmp_path):
    write_runs(tmp_path, SHARES)
    figure = output(tmp_path, experiment("outcomes", SHARES)).figure
    line = figure.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == list(range(1, 11)) and list(line.get_ydata())[-1] == pytest.approx(90)
    assert len(figure.axes) == 1


def test_beside_the_curves_stands_what_they_are_over_the_other_rows():
    """Paired by seed: GRPO's own is zero, and a seed that GRPO lacks has none."""
    what = experiment("outcomes", ["GRPO", "BuPO"], draw={"against": "GRPO"})
    model = what.cells[0].model
    level = {"GRPO": {1: 40.0, 2: 60.0}, "BuPO": {1: 43.0, 2: 65.0, 3: 99.0}}
    found = {
        (model, row): {seed: {"avg@k": x, **{f"curve {t}": x + t for t in range(1, 11)}} for seed, x in seeds.items()}
        for row, seeds in level.items()
    }
    grpo, bupo = compare_outcomes(what, found).figure.axes[1].get_lines()[:2]
    assert np.asarray(grpo.get_ydata()) == pytest.approx([0] * 10)
    assert np.asarray(bupo.get_ydata()) == pytest.approx([4] * 10)


# -- the page of stored tables -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield runpy.run_path(str(ROOT / "tools" / "results_page.py"))
    finally:
        sys.path.remove(str(ROOT / "tools"))


def write_stored(root, seeds, gain=2.0):
    """Runs of the experiment `compare` in one world that have ended."""
    places = RunPaths(root)
    for cell in read_experiment("compare", "worlds", "embedded").cells:
        if cell.seed not in seeds:
            continue
        write(root, "run.json", cell.runs["train"].name, {"git": None})
        share = 0.5 + cell.seed / 1000 + (gain + cell.seed % 3) / 100 * (cell.row == "BuPO")
        write_training(root, cell.runs["train"].name, [0.5] * 20, [0.1] * 20, [25.0] * 20)
        found = {"arithmetic": scored(share, {"16": 0.9}, k=16)}
        write(root, "summary.json", cell.runs["eval"].name, {"benchmarks": found})
        for run in cell.runs.values():
            note = {"digest": run.compute_digest(), "finished": True, "seconds": 1}
            places.get_record_path(run.name).write_text(json.dumps(note))


@pytest.fixture
def docs(tmp_path, tool):
    write_stored(tmp_path, (11, 12))
    folder = tmp_path / "docs" / "results"
    tool["gather"](tmp_path, folder, "abc")
    pd.DataFrame(columns=["measure", "layer", "mean", "low", "high", "world"]).to_csv(
        folder / "layers.csv", index=False
    )
    return folder


@pytest.mark.slow
def test_the_page_says_what_the_stored_runs_say(docs, tool):
    tables = tool["Tables"](docs)
    text = "{gain compare embedded | BuPO}; {seeds compare}; {revisions of runs}\n\n{table compare}\n\n{figure compare}"
    text += "\n\n{more compare}\n\n{gain compare embedded | frozen up to l | less BuPO}; {mean compare embedded | GRPO}; {table compare@small}"
    page = tool["filled"](text, tables)
    gains = [2 + 11 % 3, 2 + 12 % 3]
    assert page.startswith(f"+{sum(gains) / 2:.1f} [") and "2 seeds); 11, 12; `abc`" in page
    assert f"{-sum(gains) / 2:.1f} [" in page and re.search(
        r"2 seeds\); 51\.\d \[.*\]; No run of it is stored yet\.$", page
    )
    assert re.search(r"<details markdown=.1.>\n<summary>.*\n\nOther measures:\n\n\|(.*\n)+\n</details>", page)
    assert "| BuPO |" in page and "| frozen up to l |" in page and "(results/compare.png)" in page
    assert (docs / "compare.png").stat().st_size < 60_000


def test_stored_runs_stay_and_others_are_added(docs, tool, tmp_path):
    before = pd.read_csv(docs / "runs.csv")
    for path in (tmp_path / "runs").glob("*seed-11*.json"):
        path.unlink()  # as on another machine
    write_stored(tmp_path, (12, 13), gain=9.0)
    tool["gather"](tmp_path, docs, "def")
    after = pd.read_csv(docs / "runs.csv")
    assert sorted(set(after["seed"])) == [11, 12, 13] and len(after) == len(before) * 3 // 2
    old = after[after["seed"] < 13].reset_index(drop=True)
    pd.testing.assert_frame_equal(old, before.sort_values(["run"]).reset_index(drop=True))
    assert set(after[after["seed"] == 13]["revision"]) == {"def"}


def test_what_is_compared_began_from_the_same_weights(docs, tool, tmp_path):
    """Seeds 11 and 12 of one base model; then of another, made again, GRPO of seed 12 and both methods of seed 13."""
    write_stored(tmp_path, (12, 13), gain=9.0)
    for path in (tmp_path / "runs").glob("train*seed-1[23]/run.json"):
        path.write_text(json.dumps({"git": None, "weights": "0123456789abcdef"}))
    tool["gather"](tmp_path, docs, "abc")
    stored = pd.read_csv(docs / "runs.csv", dtype=str)
    assert set(stored[stored["seed"] == "13"]["base"]) == {"01234567"} and len(stored) == 4 * 3
    other = stored[(stored["seed"] == "12") & (stored["base"] == "01234567")]
    keep = stored.drop(other.index[~other["run"].str.contains("grpo")])
    keep.to_csv(docs / "runs.csv", index=False)
    found = tool["Tables"](docs).found(read_experiment("compare", "worlds"))
    gains = {s: found["embedded", "BuPO"][s]["avg@k"] - each["avg@k"] for s, each in found["embedded", "GRPO"].items()}
    assert gains == pytest.approx({11: 2 + 11 % 3, 12: 2 + 12 % 3, 13: 9 + 13 % 3})


def test_runs_of_other_options_are_not_shown(docs, tool):
    table = pd.read_csv(docs / "runs.csv")
    table.assign(digest="another").to_csv(docs / "runs.csv", index=False)
    assert tool["Tables"](docs).found(read_experiment("compare", "worlds")) == {}


def test_a_method_less_grpo_in_every_base_model(tool):
    """Differences by seed, p values over the base models, and the mean over the worlds with all seeds, by hand."""
    module = sys.modules["contrasts"]

    def run(level, slope):
        return {"avg@k": level, "area": level, **{f"curve {tenth}": slope * tenth for tenth in range(1, 11)}}

    grpo = {seed: run(50.0 + seed, 10) for seed in (1, 2, 3)}
    found = {
        "worlds": {
            ("a", "GRPO"): grpo, ("a", "BuPO"): {seed: run(50.0 + seed + gain, 20) for seed, gain in ((1, 1), (2, 2), (3, 3))},
            ("b", "GRPO"): grpo, ("b", "BuPO"): {seed: run(50.0 + seed - 2, 10) for seed in (1, 2, 3)},
            ("c", "GRPO"): grpo, ("c", "BuPO"): {1: run(99.0, 10)},
            ("d", "GRPO"): grpo,
        },
        "small": {("e", "GRPO"): grpo, ("e", "BuPO"): {1: run(56.0, 10), 2: run(52.0, 10)}},
    }  # fmt: skip
    tables = SimpleNamespace(experiment=lambda name: "small" if "@" in name else "worlds", found=found.get)
    lines = [line.strip("| ").split(" | ") for line in module.contrasts_table(tables, "BuPO").splitlines()]
    rows = {line[0]: line for line in lines[2:]}
    assert list(rows) == ["a", "b", "c", "e", "mean of the 2 worlds with 3 seeds"]
    p = 2 * stats.t.sf(2 * math.sqrt(3), 2)  # of a: differences 1, 2, 3; b's is 0, e's 0.54
    assert rows["a"][2].startswith("+2.00 [-0.48") and [*rows["a"][3:5], rows["a"][8]] == [
        f"{2 * p:.2g}",
        "not significant",
        "3",
    ]
    assert [*rows["b"][3:5], rows["b"][8]] == ["< 0.001", "significant", "3"] and [*rows["c"][3:5], rows["c"][8]] == [
        "-",
        "1 seed",
        "1",
    ]
    assert rows["a"][6:8] == ["+30.0 [+30.0, +30.0]", "+10.0 [+10.0, +10.0]"] and rows["e"][6:8] == ["-", "-"]
    assert lines[-1][2].startswith("+0.00 [-1.24") and rows["e"][2].startswith("+2.50")
    mean, highest = (module.over_worlds(tables, f"BuPO | {part}") for part in ("end", "highest"))
    assert mean == lines[-1][2] and highest == "+4.5"


def test_runs_say_which_revision_made_them(docs, tool, tmp_path):
    """The revision is that of the checkout that a run was started in, or else the given one."""
    write_stored(tmp_path, (13, 14))
    here = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    for seed, revision in ((13, here), (14, "0123456789abcdef0123456789abcdef01234567")):  # the other: somebody's own
        for path in (tmp_path / "runs").glob(f"train*seed-{seed}/run.json"):
            path.write_text(json.dumps({"git": {"revision": revision, "dirty": False}}))
    tool["gather"](tmp_path, docs, "def")
    after = pd.read_csv(docs / "runs.csv", dtype=str).set_index("seed")["revision"]
    assert set(after["13"]) == {here[:7]} and set(after["14"]) == {"def"}


def test_gains_of_layers_are_of_the_same_seeds(tool):
    """Seed 3 is luck that one layer alone had: it must not tell that layer from the other."""
    levels = {
        ("a", "GRPO"): {1: 50, 2: 51, 3: 40}, ("a", "one"): {1: 51, 2: 52, 3: 60}, ("a", "two"): {1: 51, 2: 52},
        ("b", "one"): {1: 50}, ("c", "GRPO"): {1: 50}, ("c", "two"): {2: 50},
    }  # fmt: skip
    found = {key: {seed: {"avg@k": x} for seed, x in each.items()} for key, each in levels.items()}
    layers = {"GRPO": {}, "one": {"internal_layer": 1}, "two": {"internal_layer": 2}}
    cells = [SimpleNamespace(model=model, row=row, options=layers[row]) for model, row in found]
    tables = SimpleNamespace(experiment=lambda name: SimpleNamespace(cells=cells), found=lambda experiment: found)
    table = sys.modules["gains"].gains(tables, "depth", "avg@k")
    assert table[["world", "layer", "gain", "seeds"]].values.tolist() == [["a", 1, 1.0, 2], ["a", 2, 1.0, 2]]


def test_a_rank_correlation_within_worlds(tool):
    """The mean over worlds of each world's own: levels of worlds do not count."""
    gains = runpy.run_path(str(ROOT / "tools" / "gains.py"))
    rows = [("a", x, g) for x, g in ((1, 1), (2, 2), (3, 3))] + [("b", x, g) for x, g in ((11, -1), (12, -2), (13, -3))]
    table = pd.DataFrame(rows, columns=["world", "depth", "gain"])
    assert gains["_within"](table, "depth") == pytest.approx(0)
    assert gains["_within"](table[table["world"] == "b"], "depth") == pytest.approx(-1)


def test_a_p_of_orders_within_worlds(tool):
    """All 3! times 3! orders of two worlds: those whose mean rank correlation is as far from zero."""
    gains = runpy.run_path(str(ROOT / "tools" / "gains.py"))
    rows = [("a", x, g) for x, g in ((1, 1), (2, 2), (3, 3))] + [("b", x, g) for x, g in ((11, 6), (12, 5), (13, 7))]
    table = pd.DataFrame(rows, columns=["world", "depth", "gain"])
    orders = list(itertools.permutations((1, 2, 3)))
    all_orders = [
        np.mean([stats.spearmanr((1, 2, 3), one).statistic, stats.spearmanr((1, 2, 3), other).statistic])
        for one in orders
        for other in orders
    ]
    exact = np.mean([abs(value) >= gains["_within"](table, "depth") - 1e-9 for value in all_orders])
    assert gains["_permuted_p"](table, "depth") == pytest.approx(exact, abs=0.02)


@pytest.mark.slow
def test_the_docs_page_is_fresh(tool, monkeypatch, capsys):
    """docs/results.md is what its command would write of the tables in docs/results."""
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        tool["main"]()
    assert ended.value.code == 0, capsys.readouterr().out
