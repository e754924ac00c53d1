"""The benchmarks of speed run and report their measurements."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import growth, step, update
from benchmarks.result import Result, Table, Target, middle, ratios
from benchmarks.turns import FIRST, PUBLISHED, SECOND, TRL, Job, Update, made_up, published_scores, trainers
from bupo.models.internal_policy import InternalPolicies
from tests.helpers.tiny_models import random_ids, tiny_model

ROOT = Path(__file__).parents[2]
TINY = growth.TINY | {"vocab_size": 262}


@pytest.fixture(scope="module")
def page():
    """Return the namespace of tools/speed_page.py."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "speed_page.py")))


def updates_of(seconds, gradient=1.0, entropy=2.0):
    parts = {part: value for part in ("update", "scoring", "sampling", "grading", "total") for value in (seconds,)}
    memory = {"update": int(seconds * 1e9), "scoring": 1, "total": 1, "passes": 1}
    return Update(parts, memory, entropy, 8.0, {"layers.0.weight": np.array([gradient, -2.0])})


def test_rollouts_share_a_prompt_by_group():
    made = made_up(5, [2, 3, 4, 5], group=2, vocabulary=200)
    assert [len(answer) for answer in made.answers] == [2, 3, 4, 5] and made.tokens == 4 * 5 + 14
    assert made.prompts[0] == made.prompts[1] != made.prompts[2] == made.prompts[3]
    assert made == made_up(5, [2, 3, 4, 5], group=2, vocabulary=200)


def test_lengths_are_log_normal_and_cut():
    drawn = update.lengths(4096)
    assert min(drawn) == update.SHORTEST and max(drawn) == update.LONGEST
    assert 0.9 < np.median(drawn) / update.MEDIAN < 1.1
    assert update.lengths(32) == update.lengths(32)


def test_the_published_way_gives_the_layers_log_probs_and_the_models_entropies():
    model, ids = tiny_model("llama"), random_ids()
    policies = InternalPolicies(model)
    with torch.no_grad():
        log_probs, entropies = published_scores(model, ids, torch.ones_like(ids), keep=4, layer=2)
        assert (log_probs - policies.layer(2).log_probs(ids)[:, -4:]).abs().max() < 1e-5
        assert (entropies - policies.language_model.entropy(ids)[:, -5:-1]).abs().max() < 1e-5


def test_variants_that_do_other_work_are_no_comparison():
    done = {TRL: updates_of(2.0), SECOND: updates_of(1.0), FIRST: updates_of(1.0), PUBLISHED: updates_of(4.0)}
    assert update.same_work(done) == 0
    with pytest.raises(AssertionError, match="do not do the same work"):
        update.same_work(done | {SECOND: updates_of(1.0, gradient=1.1)})
    with pytest.raises(AssertionError, match="do not do the same work"):
        update.same_work(done | {FIRST: updates_of(1.0, entropy=2.1)})


def test_ratios_are_of_one_round_and_targets_are_met_or_missed():
    done = {
        TRL: [updates_of(2.0), updates_of(4.0), updates_of(10.0)],
        FIRST: [updates_of(0.2), updates_of(0.4), updates_of(3.0)],
        SECOND: [updates_of(1.0), updates_of(2.0), updates_of(5.0)],
    }
    assert ratios([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]
    assert middle([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    first, second = update.targets_of("equal", done)
    assert first.measured == pytest.approx(0.1) and first.met
    assert second.measured == 0.5 and not second.met
    assert second.line() == {
        "target": "equal answers: phase 2, of TRL's time", "at most": "0.28x", "measured": "0.50x", "": "missed",
    }  # fmt: skip
    assert update.table_of("", done).rows[1]["of TRL's"] == "0.10 (0.10 to 0.30)"
    assert [(target.measured, target.met) for target in step.targets_of(done)] == [
        (pytest.approx(0.1), True), (0.5, True), (0.5, True),
    ]  # fmt: skip


def test_a_clock_counts_the_outer_part():
    clock, now = step.Clock(), iter(range(100))
    inner = clock.timed(lambda: None, step.MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.time, "perf_counter", lambda: next(now))
        clock.timed(inner, step.SAMPLING)()  # begins at 0, the inner part at 1, ends at 2
        inner()
    assert dict(clock.seconds) == {step.SAMPLING: 2, step.MODEL: 1}


def test_the_rest_is_what_no_part_is():
    table, rest = step.small_table([{"total": 10.0, step.MODEL: 5.0, step.SAMPLING: 3.0, step.GRADING: 0.5}], "")
    assert rest == pytest.approx(0.15)
    assert [row["of the step, %"] for row in table.rows] == ["50", "30", "5", "15"]


def test_growth_is_told_from_end_to_end_and_drawn(tmp_path):
    points = [
        growth.Point(panel, x, variant, seconds=x * (1 + place), passes=5e6)
        for panel, xs in (("answer", growth.ANSWERS), ("layer", (1, 5)), ("prompt", growth.SHARES), ("group", (1, 16)))
        for x in xs
        for place, variant in enumerate(growth.ALL)
    ]
    points += [growth.Point("vocabulary", x, name, 1.0, 5e6) for x in growth.VOCABULARIES for name in growth.ALL]
    rows = growth.table_of(points).rows
    assert rows[0] == {
        "from one end to the other": "time, answers of 8 to 256 tokens", **dict.fromkeys(growth.ALL, "32.00x"),
    }  # fmt: skip
    assert rows[-1][FIRST] == "1.00x"
    growth.figure(points, tmp_path / "growth.png", 10)
    assert (tmp_path / "growth.png").stat().st_size > 20_000


def test_the_page_is_made_of_the_results(tmp_path, page):
    made = Result(
        "python -m benchmarks.update", "a model", [Table("Times", [{"": "TRL", "s": "2"}])], machine="a machine"
    )
    made.targets = [Target("phase 1", 0.1, 0.14)]
    made.write(tmp_path / "results" / "update.json")
    docs, written = tmp_path, tmp_path / "speed_tables.md"
    written.write_text("# Speed\n\nBefore\n\n<!-- update -->\n<!-- end -->\n\nAfter\n")
    page.copy(tmp_path / "results", docs)
    assert page.stale(docs)
    written.write_text(page.filled(docs))
    text = written.read_text()
    assert "| TRL | 2 |" in text and "| phase 1 | 0.14x | 0.10x | met |" in text and text.endswith("\n\nAfter\n")
    assert [fault.rsplit("/")[-1] for fault in page.stale(docs)] == [
        "step.json is missing", "growth.json is missing", "speed.png is missing",
    ]  # fmt: skip
    (docs / "images").mkdir()
    for path in ("speed/step.json", "speed/growth.json", "images/speed.png"):
        (docs / path).touch()
    assert not page.stale(docs)
    written.write_text(text.replace("0.10x", "0.01x"))
    assert page.stale(docs)


def test_profiles_are_shown_of_what_is_missed(tmp_path, page):
    made = Result("", "", targets=[Target("phase 1", 0.1, 0.14)], profiles={"phase 1": "aten::mm"}, machine="")
    for most, shown in ((0.14, False), (0.05, True)):
        made.targets[0].most = most
        made.write(tmp_path / "update.json")
        assert ("aten::mm" in page.block(json.loads((tmp_path / "update.json").read_text()))) is shown


def test_the_docs_page_is_what_its_results_give(page):
    assert page.stale(ROOT / "docs") == []


def test_the_docs_name_commands_that_there_are():
    text = (ROOT / "docs" / "speed.md").read_text()
    named = set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert named == {"update", "step", "growth"} and "make benchmark-speed" in text
    assert re.search(r"^benchmark-speed:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_trainers_take_turns_and_do_the_same_work(tmp_path):
    """The update's benchmark runs from end to end in four processes on a model of two layers."""
    result = update.benchmark(TINY, 1, 262, rounds=1, long_rounds=1, profiled=True, threads=1)
    assert [len(table.rows) for table in result.tables] == [4, 2, 3] and len(result.targets) == 6
    assert max(result.raw[lengths]["largest_difference"] for lengths in ("equal", "unequal")) < update.SAME
    assert all("aten::" in text for text in result.profiles.values()) and len(result.profiles) == 4
    for of in result.raw["equal"][FIRST]:
        seconds = of["seconds"]
        parts = sum(seconds[part] for part in ("sampling", "grading", "scoring", "update"))
        assert parts == pytest.approx(seconds["total"]) and of["tokens"] == update.ROWS * update.ANSWER
    result.write(tmp_path / "update.json")
    assert json.loads((tmp_path / "update.json").read_text())["targets"][0]["at most"] == "0.14x"


@pytest.mark.slow
def test_a_rollout_batch_of_the_embedded_model_is_measured():
    result = step.benchmark("embedded", layer=5, rounds=1, small=1, threads=1, profiled=True)
    assert [row[""] for row in result.tables[0].rows] == [TRL, FIRST, SECOND]
    assert all(float(row["sampling, s"]) >= 0 for row in result.tables[0].rows)
    shares = [float(row["of the step, %"].split()[0]) for row in result.tables[1].rows]
    assert 98 <= sum(shares) <= 102 and len(result.tables[2].rows) > 3
    assert len(result.targets) == 4 and list(result.profiles) == [FIRST, SECOND]


@pytest.mark.slow
def test_growth_is_measured_of_every_panel():
    series = growth.series_of(TINY, 1, (1, 2), 262)["layer"]
    with trainers((FIRST,), 1) as running:
        points = series.measured(running, (FIRST,), rounds=1)
        points += growth.in_vocabulary(running, (300,), 1, (FIRST,))
    assert [(p.panel, p.x) for p in points] == [("layer", 1), ("layer", 2), ("vocabulary", 300)]
    assert all(p.seconds > 0 for p in points)


@pytest.mark.slow
def test_what_fails_in_a_process_is_told():
    with trainers((TRL,), 1) as running, pytest.raises(RuntimeError, match="TRL: Traceback"):
        list(running.run({TRL: Job("nowhere", (1,), rows=8)}))
