"""One table of methods and benchmarks: its numbers are computed by hand."""

import csv
import json

import pytest

from bupo.cli.main import main
from bupo.reports.scoreboard import build_scoreboard, pivot_scoreboard, strip_seed_suffix


def summary(k=16, problems=2, **scores):
    found = {
        name: {"avg@k": score, "k": k, "problems": problems, "pass@k": {str(k): score}}
        for name, score in scores.items()
    }
    return {"schema_version": 4, "meta": {}, "benchmarks": found, "harness": {}}


SEEDS = (("bupo", summary(a=0.50, b=0.20)), ("bupo", summary(a=0.60, b=0.40)), ("bupo", summary(a=0.70, b=0.30)))


def test_means_deviations_and_intervals():
    board = build_scoreboard([*SEEDS, ("grpo", summary(a=0.25, b=0.75))]).set_index(["method", "benchmark"])
    a = board.loc[("bupo", "a")]
    assert (a["mean"], a["sd"], a["seeds"]) == (pytest.approx(60), pytest.approx(10), 3)
    assert (a["low"], a["high"]) == pytest.approx((60 - 24.8414, 60 + 24.8414), abs=1e-3)  # 4.30265 x 10 / sqrt(3)
    average = board.loc[("bupo", "average")]  # of 35, 50 and 50
    assert (average["mean"], average["sd"]) == (pytest.approx(45), pytest.approx(75**0.5))
    alone = board.loc[("grpo", "average")]
    assert (alone["mean"], alone["seeds"]) == (pytest.approx(50), 1) and alone["sd"] != alone["sd"]
    assert pivot_scoreboard(board.reset_index()) == [
        {"method": "bupo", "seeds": "3", "a avg@16": "60.00 ± 10.00", "b avg@16": "30.00 ± 10.00", "average": "45.00 ± 8.66"},
        {"method": "grpo", "seeds": "1", "a avg@16": "25.00", "b avg@16": "75.00", "average": "50.00"},
    ]  # fmt: skip


def test_a_method_that_lacks_a_benchmark_has_no_average():
    board = build_scoreboard([("one", summary(a=0.5, b=0.1)), ("two", summary(b=0.3))])
    assert pivot_scoreboard(board)[1] == {"method": "two", "a avg@16": "", "b avg@16": "30.00", "average": ""}
    assert "average" not in pivot_scoreboard(build_scoreboard([("one", summary(a=0.5))]))[0]


def test_what_cannot_be_compared():
    for other in (summary(k=4, a=0.5), summary(problems=3, a=0.5)):
        with pytest.raises(ValueError, match=r"a has .* and 2 of 16 before: a table needs equal problems and answers"):
            build_scoreboard([("one", summary(a=0.5)), ("two", other)])
    with pytest.raises(ValueError, match="there is no benchmark"):
        build_scoreboard([("one", summary())])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("eval-bupo-seed3", "eval-bupo"),
        ("bupo-s12", "bupo"),
        ("bupo_seed_1", "bupo"),
        ("qwen3-4b", "qwen3-4b"),
        ("s1", "s1"),
    ],
)
def test_the_method_is_the_name_without_its_seed(name, method):
    assert strip_seed_suffix(name) == method


def test_from_the_command_line(tmp_path, capsys):
    for name, (_, found) in zip(("@bupo|-seed1", "@bupo|-seed2", "other"), SEEDS, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(found))
    folders = [str(tmp_path / "@bupo|-seed1"), str(tmp_path / "@bupo|-seed2"), f"GRPO={tmp_path / 'other'}"]
    assert main(["eval", "--table", *folders]) == 0
    out = capsys.readouterr().out
    assert "55.00 ± 7.07" in out and "GRPO" in out and len(list(tmp_path.iterdir())) == 3  # nothing is written
    assert main(["eval", "--table", *folders, "--output", str(tmp_path / "table")]) == 0
    lines = (tmp_path / "table" / "scoreboard.md").read_text().splitlines()
    assert lines[0] == "| method | seeds | a avg@16 | b avg@16 | average |" and lines[3].startswith(
        "| GRPO | 1 | 70.00 |"
    )
    assert lines[2] == r"| @bupo\| | 2 | 55.00 ± 7.07 | 30.00 ± 14.14 | 42.50 ± 10.61 |"
    with (tmp_path / "table" / "scoreboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["benchmark"] for row in rows] == ["a", "b", "average"] * 2
    assert (rows[0]["method"], rows[0]["k"], rows[2]["k"], float(rows[0]["mean"])) == (
        "'@bupo|",
        "16",
        "",
        pytest.approx(55),
    )
    capsys.readouterr()
    for words, message in (
        ([str(tmp_path)], "holds no finished evaluation"),
        ([*folders, "--model", "embedded"], "table shows finished evaluations and evaluates nothing: leave out model"),
    ):
        assert main(["eval", "--table", *words]) == 2
        assert message in capsys.readouterr().err
