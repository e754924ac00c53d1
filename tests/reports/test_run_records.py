"""Folders into records, records into groups of seeds, groups into the paper's tables: by numbers computed by hand."""

import csv
import dataclasses
import io
import json
import math
import os
import shutil

import pandas as pd
import pytest

from bupo.reports.paper_tables import SeedStatistic, build_paper_tables
from bupo.reports.run_records import AnalysisRecord, EvaluationRecord, TrainingRecord, read_run, read_runs
from bupo.reports.run_settings import (
    ASSUMED_STEPS,
    DEFAULT_CONFIG,
    DEMO_CONFIG,
    ESTIMATOR_NAMES,
    parse_run_settings,
)
from bupo.reports.seed_comparison import get_benchmark_names, group_runs
from bupo.training.config import DEFAULT_INTERNAL_STEPS, BuPOConfig
from bupo.training.demo import DemoOptions
from bupo.training.objective.advantages import ESTIMATORS as TRAINED_BY
from bupo.utils.safe_read import UnreadableFolderError
from bupo.utils.statistics import compute_paired_difference, compute_seed_statistics
from tests.helpers.made_runs import BUPO, GRPO, analyze, evaluate, probed, train


@pytest.fixture
def runs(tmp_path):
    """A folder `runs` in the folder that commands were started in."""
    return tmp_path / "runs"


def read(kind, folder):
    """The run that a folder holds, of the kind that it must be."""
    run = read_run(folder)
    assert isinstance(run, kind)
    return run


def groups_of(*folders):
    found, left_out = read_runs(folders)
    assert left_out == []
    return group_runs(found)


def table(number, *folders):
    (found,) = [t for t in build_paper_tables(groups_of(*folders)) if t.number == number]
    return found


def texts(found):
    """By the row's name and the column's head."""
    return {cells[0]: dict(zip(found.columns[1:], map(str, cells[1:]), strict=True)) for _, cells in found.rows}


# -- what a run was asked for


def test_defaults_are_those_of_training():
    plain = BuPOConfig("x", internal_layer=1).to_dict() | {"internal_layer": None}
    assert {name: plain[name] for name in DEFAULT_CONFIG} == DEFAULT_CONFIG and ASSUMED_STEPS == DEFAULT_INTERNAL_STEPS
    demo = dataclasses.asdict(DemoOptions())
    assert {name: demo[name] for name in DEMO_CONFIG if name != "model"} == {
        n: v for n, v in DEMO_CONFIG.items() if n != "model"
    }
    assert ESTIMATOR_NAMES.keys() == TRAINED_BY.keys()


def test_runs_that_differ_in_logging_only_have_the_same_settings():
    free = {
        "save_steps": 3,
        "eval_benchmarks": ["math500"],
        "report_to": "none",
        "probe_every": 2,
        "ddp_backend": "gloo",
    }
    plain = {"model": "m", "internal_layer": 5}
    assert parse_run_settings(plain | free, "train") == parse_run_settings(plain, "train")
    assert parse_run_settings(plain | {"probe_answers": 4}, "train") != parse_run_settings(plain, "train")


@pytest.mark.parametrize(
    ("options", "method", "name"),
    [
        ({"internal_steps": 0}, "GRPO", "GRPO"),
        ({"internal_layer": 5}, "BuPO", "BuPO, layer 5 for 20 batches"),
        ({"internal_layer": "6", "internal_steps": "30"}, "BuPO", "BuPO, layer 6 for 30 batches"),
        ({"internal_layer": "auto", "internal_steps": 4}, "BuPO", "BuPO, layer auto for 4 batches"),
        ({"internal_layer": "auto"}, "BuPO", "BuPO, layer auto"),
        ({"internal_schedule": [[3, 5], [5, 6]]}, "BuPO", "BuPO, layer 3 for 5, layer 5 for 6 batches"),
        ({"internal_schedule": "[[3, 5]]"}, "BuPO", "BuPO, layer 3 for 5 batches"),
        ({"internal_schedule": "[[3"}, "GRPO", "GRPO"),
        (
            {"internal_layer": 5, "internal_lens": "final_norm"},
            "BuPO, final norm",
            "BuPO, final norm, layer 5 for 20 batches",
        ),
        (
            {"internal_layer": 5, "internal_module": "attn"},
            "BuPO, ATTN policy",
            "BuPO, ATTN policy, layer 5 for 20 batches",
        ),
        ({"internal_steps": 0, "internal_lens": "final_norm"}, "GRPO", "GRPO"),
        ({"internal_steps": 0, "frozen_up_to_layer": 5}, "GRPO, layers 1 to 5 frozen", "GRPO, layers 1 to 5 frozen"),
        (
            {"internal_steps": 0, "layer_lr_multipliers": {6: 0.1}},
            "GRPO, 0.1x above layer 5",
            "GRPO, 0.1x above layer 5",
        ),
        ({"internal_steps": 0, "advantage_estimator": "ppo"}, "PPO", "PPO"),
        (
            {"internal_layer": 5, "internal_objective": "frozen_upper"},
            "GRPO, upper layers frozen in phase 1",
            "GRPO, upper layers frozen in phase 1, layer 5 for 20 batches",
        ),
        (
            {"internal_layer": 5, "internal_objective": "shuffled_vocab", "advantage_estimator": "rloo"},
            "BuPO with RLOO, shuffled vocabulary",
            "BuPO with RLOO, shuffled vocabulary, layer 5 for 20 batches",
        ),
        ({"internal_steps": 0, "internal_objective": "frozen_upper"}, "GRPO", "GRPO"),
        (
            {"internal_layer": 5, "internal_fade_batches": "20", "internal_loss_weight": 0.1},
            "BuPO, fade over 20 batches, layer objective with weight 0.1",
            "BuPO, fade over 20 batches, layer objective with weight 0.1, layer 5 for 20 batches",
        ),
        (
            {"internal_layer": 5, "internal_steps": 0, "internal_loss_weight": "1e-1", "internal_lens": "final_norm"},
            "GRPO, layer objective with weight 0.1, final norm",
            "GRPO, layer objective with weight 0.1, final norm, layer 5",
        ),
        (
            {"internal_layer": 5, "internal_steps": 0, "internal_fade_batches": 4},
            "GRPO, fade over 4 batches",
            "GRPO, fade over 4 batches, layer 5",
        ),
        ({"internal_layer": 5, "internal_steps": 0, "internal_loss_weight": 0}, "GRPO", "GRPO"),
        (
            {"internal_steps": 0, "layer_lr_multipliers": [0.1, "1e-1", 1, 0]},
            "GRPO, rates 0.1 for 1 to 2, 1 for 3, 0 for 4",
            "GRPO, rates 0.1 for 1 to 2, 1 for 3, 0 for 4",
        ),
        (
            {"internal_layer": 5, "advantage_estimator": "rloo"},
            "BuPO with RLOO",
            "BuPO with RLOO, layer 5 for 20 batches",
        ),
    ],
)
def test_a_setting_has_a_name(options, method, name):
    setting, seed = parse_run_settings({"model": "m", **options}, "train")
    assert (setting.method, setting.description, seed) == (method, name, 42)


def test_the_controls_are_compared_with_grpo_of_the_same_options():
    """Each is a setting of its own, and what it is compared with is the run without it."""
    plain = {"model": "m", "learning_rate": 1e-4, "internal_steps": 0}
    controls: list[dict] = [
        {"internal_steps": 9, "internal_layer": 5, "internal_objective": "frozen_upper"},
        {"internal_steps": 9, "internal_layer": 5, "internal_objective": "shuffled_vocab"},
        {"internal_layer": 5, "internal_loss_weight": 0.1},
        {"internal_layer": 5, "internal_loss_weight": 0.2},
        {"internal_layer": 4, "internal_loss_weight": 0.2},
        {"internal_layer": 5, "internal_fade_batches": 3},
        {"layer_lr_multipliers": [0, 1]},
        {"layer_lr_multipliers": [0, 0.5]},
    ]
    grpo, settings = (
        parse_run_settings(plain, "train")[0],
        [parse_run_settings(plain | each, "train")[0] for each in controls],
    )
    assert len({grpo, *settings}) == 1 + len(controls)
    assert all(setting.baseline == grpo for setting in settings)


def test_two_spellings_are_one_setting():
    first = parse_run_settings(
        {"model": "m", "learning_rate": "1e-4", "internal_steps": 0, "output": "a", "save_steps": 7}, "train"
    )
    other = parse_run_settings(
        {"model_name_or_path": "m", "learning_rate": 0.0001, "internal_steps": 0, "output_dir": "b", "seed": 42},
        "train",
    )
    assert first == other
    assert parse_run_settings({"model": "m", "learning_rate": 2e-4, "internal_steps": 0}, "train") != first
    assert parse_run_settings({"output": "runs/demo"}, "demo")[0].description == "BuPO, layer 5 for 10 batches"


def test_numbers_that_differ_in_a_late_digit_are_two_settings():
    def of(**options):
        return parse_run_settings({"model": "m"} | options, "train")[0]

    assert dict(of(shuffle_seed=20250101).other_options) == {"shuffle_seed": "20250101"}
    assert of(shuffle_seed=20250101) == of(shuffle_seed="20250101") == of(shuffle_seed=20250101.0)
    assert of(shuffle_seed=20250101) != of(shuffle_seed=20250102)
    assert of(learning_rate=0.1234567) != of(learning_rate=0.1234568)
    assert of(learning_rate=0.1 + 0.2) == of(learning_rate="3e-1")


# -- folders


def test_a_training_run(runs):
    run = read(TrainingRecord, probed(train(runs / "a", 3, BUPO)))
    assert (run.seed, run.first_phase, run.batches, run.is_finished, run.setting.layer_label) == (3, 3, 6, True, "5")
    assert run.series["reward"] == {batch: pytest.approx(0.1 * batch) for batch in range(1, 7)}
    assert run.series["internal/entropy"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert run.dynamics["cosine", 5, 7] == {0: 7.0, 2: 7.2, 4: 7.4} and run.dynamics["perplexity", 0, 0][4] == 2.0


def test_several_logs_of_a_batch_are_averaged_and_broken_lines_left_out(runs):
    folder = train(runs / "a", 1, batches=1, reward=lambda batch: 0.5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"rollout_batch": 1, "reward": 0.7}\n{"rollout_batch": 2, "rew\n[1]\n7\n\x00\n{"rollout_batch": NaN, "reward": 1}\n'
        )
        file.write(
            '{"rollout_batch": 3, "reward": NaN, "entropy": 1e400, "loss": "0.1"}\n{"rollout_batch": 4, "reward": 0.9}\n'
        )
        file.write(
            '{"rollout_batch": 1e300, "reward": 0.1}\n{"rollout_batch": true, "reward": 0.2}\n{"eval/rollout_batches": 4, '
        )
        file.write('"eval/a/avg@4": 0.5, "eval/a/low": 0.4}')
    run = read(TrainingRecord, folder)
    assert run.series["reward"] == {1: pytest.approx(0.6), 4: 0.9}
    assert run.series["eval/a/avg@4"] == {4: 0.5} and "eval/a/low" not in run.series and "loss" not in run.series


def test_an_evaluation_finds_the_run_that_it_is_of(runs):
    run = read(EvaluationRecord, evaluate(runs / "eval", "runs/a", math=80))
    assert run.model_path == runs / "a" and run.scores["math", "avg@10", 10].value == pytest.approx(0.8)
    assert run.pass_curves == {("math", "10 answers each", 10): {1: pytest.approx(0.8), 10: pytest.approx(0.8)}}


def test_runs_that_have_moved_find_each_other(runs, tmp_path):
    train(runs / "a", 1)
    evaluate(runs / "eval", "runs/a", math=80)
    evaluate(runs / "absolute", runs / "a", math=80)
    elsewhere = tmp_path / "another" / "place"
    shutil.move(runs, elsewhere / "runs")
    for name in ("eval", "absolute"):
        assert read(EvaluationRecord, elsewhere / "runs" / name).model_path == elsewhere / "runs" / "a"
    assert read(EvaluationRecord, evaluate(elsewhere / "runs" / "hub", "Qwen/Qwen3-4B", math=1)).model_path.parts[
        -2:
    ] == (
        "Qwen",
        "Qwen3-4B",
    )


def test_an_analysis(runs):
    run = read(AnalysisRecord, analyze(runs / "layers", "embedded", "runs/a/checkpoint-8"))
    before, after = run.models
    assert (before.model, after.model_path) == ("embedded", runs / "a" / "checkpoint-8")
    assert before.curves["d_entropy_ffn"][:2] == [(1.0, 0.9, 1.1), (0.75, 0.65, 0.85)]
    assert len(after.curves["d_entropy_attn"]) == 8 and "kl_next" not in after.curves


def unreadable(folder, name):
    """A folder that is none of these, by what is wrong with it."""
    if name == "cut-summary":
        evaluate(folder, "embedded", math=50)
        (folder / "summary.json").write_text('{"schema_version": 4, "meta": {"mod')
    elif name == "no-config":
        train(folder, 1)
        (folder / "config.yaml").unlink()
    elif name == "python-config":
        train(folder, 1)
        (folder / "config.yaml").write_text("seed: !!python/object/apply:os.getcwd []\n")
    elif name == "nothing-done":
        train(folder, 1, batches=0)
    elif name == "cut-layers":
        analyze(folder, "embedded")
        (folder / "layers.parquet").write_bytes((folder / "layers.parquet").read_bytes()[:200])
    elif name == "other-columns":
        pd.DataFrame({"model": ["0-m"], "mean": [1.0]}).to_parquet(analyze(folder, "embedded") / "layers.parquet")
    elif name == "deep":
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text("[" * 100_000)
    elif name == "above":
        train(folder / "a", 1)
    else:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("x")
    return folder


REASONS = {
    "cut-summary": "summary.json cannot be read",
    "no-config": "config.yaml is missing",
    "python-config": "config.yaml cannot be read",
    "nothing-done": "no rollout batch is done",
    "cut-layers": "layers.parquet cannot be read",
    "other-columns": "layers.parquet cannot be read",
    "deep": "summary.json cannot be read",
    "above": "holds run folders: give above/*",
    "notes": "no run",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_run_is_left_out_with_its_reason(name, runs):
    good, bad = train(runs / "a", 1), unreadable(runs / name, name)
    found, left_out = read_runs([good, bad, good])
    assert [run.folder for run in found] == [good] and left_out == [(str(bad), REASONS[name])]


def test_only_regular_files_of_the_folder_are_read(runs, tmp_path):
    """A pipe would hang, and a link would show what lies elsewhere."""
    (tmp_path / "secret.yaml").write_text("internal_steps: 0\nmodel: of-another-folder\n")
    folder = train(runs / "linked", 1)
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(UnreadableFolderError, match=r"config.yaml is missing"):
        read_run(folder)
    for name in ("metrics.jsonl", "summary.json"):
        (runs / name).mkdir()
        os.mkfifo(runs / name / name)
        with pytest.raises(UnreadableFolderError, match="no run"):
            read_run(runs / name)
    (tmp_path / "link").symlink_to(train(runs / "whole", 2))  # a folder may well be given by a link
    assert read(TrainingRecord, tmp_path / "link").seed == 2


def test_a_number_without_end_is_read_past(runs):
    """Python writes no whole number of more than 4300 digits."""
    folder = train(runs / "a", 1)
    with (folder / "config.yaml").open("a") as file:
        file.write(f"shuffle_seed: 0x{'f' * 6000}\n? 0x{'f' * 6000}\n: 1\n")
    assert dict(read(TrainingRecord, folder).setting.other_options)["shuffle_seed"] == "…"


# -- over seeds


def test_runs_are_joined_over_seeds_and_evaluations_with_them(runs):
    folders = [
        train(runs / f"{name}{seed}", seed, options) for name, options in (("b", BUPO), ("g", GRPO)) for seed in (1, 2)
    ]
    folders += [evaluate(runs / f"eval-{n}", f"runs/{n}", math=80) for n in ("b1", "b2", "g1")]
    folders += [
        evaluate(runs / "vanilla", "embedded", math=30),
        evaluate(runs / "eval-c", "runs/b1/checkpoint-8", math=70),
    ]
    folders += [analyze(runs / "layers", "embedded", "runs/b1")]
    found = {group.name: group for group in groups_of(*folders)}
    assert list(found) == ["vanilla", "GRPO", "BuPO, layer 5 for 3 batches", "BuPO, layer 5 for 3 batches (update 8)"]
    bupo = found["BuPO, layer 5 for 3 batches"]
    assert bupo.seeds == [1, 2] and list(bupo.layers) == [1] and list(found["vanilla"].layers) == [None]
    (scores,) = bupo.scores.values()
    assert sorted(scores) == [1, 2]


def test_dynamics_are_the_runs_own_or_those_of_an_analysis(runs):
    folders = [probed(train(runs / "a", 1, BUPO)), train(runs / "b", 2, BUPO)]
    folders += [
        probed(analyze(runs / f"of-{n}", "embedded", f"runs/{n}/checkpoint-4", f"runs/{n}"), (8,)) for n in "ab"
    ]
    (group,) = [group for group in groups_of(*folders) if group.name == "BuPO, layer 5 for 3 batches"]
    later = {seed: sorted(key[2] for key in found if key[0] == "kl") for seed, found in group.dynamics.items()}
    assert later == {1: [6, 7, 8], 2: [8]}


def test_what_else_differs_is_named(runs):
    folders = [train(runs / f"r{n}", 1, GRPO, learning_rate=rate) for n, rate in enumerate((1e-4, 1e-5))]
    folders += [train(runs / "r3", 1, GRPO, beta=0.1)]
    names = [group.name for group in groups_of(*folders)]
    assert names == [
        "GRPO, beta 0.1, learning_rate 0.0001",
        "GRPO, no beta, learning_rate 0.0001",
        "GRPO, no beta, learning_rate 1e-05",
    ]
    folders = [train(runs / "m1", 1, GRPO), train(runs / "m2", 1, GRPO, model="/models/deep/other")]
    assert [group.name for group in groups_of(*folders)] == ["other: GRPO", "embedded: GRPO"]


def test_benchmarks_of_other_sampling_are_other_columns(runs):
    folders = [evaluate(runs / n, "embedded", math=right) for n, right in (("a", 10), ("b", 20), ("c", 30))]
    for folder, change in zip(folders, ({}, {"temperature": 0.6}, {}), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        summary["meta"] |= change
        (folder / "summary.json").write_text(json.dumps(summary))
    (group,) = groups_of(*folders)
    assert sorted(get_benchmark_names([group]).values()) == [
        "math avg@10, temperature 0.6",
        "math avg@10, temperature 1.0",
    ]
    by_name = {name: group.scores[b][None].value for b, name in get_benchmark_names([group]).items()}
    assert by_name["math avg@10, temperature 1.0"] == pytest.approx(0.2)  # two evaluations of one model: their mean
    assert group.name == "as given"


def test_curves_of_other_problems_or_answers_are_their_own_and_repeated_ones_are_averaged(runs):
    asked = {"a": (128, 64, 0.1, 0.5), "b": (512, 8, 0.2, 0.6), "c": (128, 64, 0.3, 0.8), "d": (128, 8, 0.4, 0.4)}
    folders = [evaluate(runs / name, "embedded", math=10) for name in asked]
    for folder, (problems, k, first, last) in zip(folders, asked.values(), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        summary["benchmarks"]["math"] |= {"problems": problems, "k": k, "pass@k": {"1": first, str(k): last}}
        (folder / "summary.json").write_text(json.dumps(summary))
    (group,) = groups_of(*folders)
    names = get_benchmark_names([group], "pass_curves")
    assert {name: group.pass_curves[benchmark][None] for benchmark, name in names.items()} == {
        "math, 128 problems, 64 answers each": {1: pytest.approx(0.2), 64: pytest.approx(0.65)},
        "math, 512 problems, 8 answers each": {1: 0.2, 8: 0.6},
        "math, 128 problems, 8 answers each": {1: 0.4, 8: 0.4},
    }


# -- the paper's tables


def scored(runs, name, options, **by_seed):
    """Runs of a setting, with their evaluations: `s1=(80, 60)` are the scores of seed 1 on math and aime."""
    folders = []
    for seed, (math_score, aime) in by_seed.items():
        folders.append(train(runs / f"{name}-{seed}", int(seed[1:]), options))
        folders.append(evaluate(runs / f"eval-{name}-{seed}", f"runs/{name}-{seed}", math=math_score, aime=aime))
    return folders


def test_table_1_and_10(runs):
    folders = scored(runs, "g", GRPO, s1=(70, 50), s2=(74, 54), s3=(72, 46))
    folders += scored(runs, "b", BUPO, s1=(80, 50), s2=(82, 58), s3=(87, 48), s4=(60, 60))
    folders += [evaluate(runs / "vanilla", "embedded", math=30, aime=10)]
    one = texts(table(1, *folders))
    # seeds 70, 74, 72: mean 72, sd 2, t(2) = 4.3027: half 4.968; average of the two benchmarks by seed: 60, 64, 59
    assert one["GRPO"]["math avg@10"] == "72.0 [67.0, 77.0] n=3"
    assert one["GRPO"]["average"] == "61.0 [54.4, 67.6] n=3"
    # 30 of 100: three problems of ten are always solved. Student's over problems: 30 ± 2.262 x 48.3 / sqrt(10)
    assert one["vanilla"]["math avg@10"] == "30.0 [0.0, 64.6] n=1"
    ten = texts(table(10, *folders))
    bupo = ten["BuPO, layer 5 for 3 batches"]
    assert ten["GRPO"] | {"seeds": "1, 2, 3"} == ten["GRPO"] and "vanilla" not in ten
    assert bupo["seeds"] == "1, 2, 3, 4" and bupo["math avg@10"] == "77.2 ± 11.9 n=4"  # 77.25, even digit
    # paired over seeds 1 to 3: 10, 8, 15: mean 11, sd 3.606, half 8.957
    assert bupo["math avg@10, minus GRPO"] == "+11.0 [2.0, 20.0] n=3"
    grpo, own = {1: 70.0, 2: 74.0, 3: 72.0}, {1: 80.0, 2: 82.0, 3: 87.0, 4: 60.0}
    found = table(10, *folders)
    (cells,) = [cells for group, cells in found.rows if group.setting.stages]
    difference = cells[found.columns.index("math avg@10, minus GRPO")].statistics
    assert dataclasses.astuple(difference) == pytest.approx(dataclasses.astuple(compute_paired_difference(grpo, own)))


def test_equal_scores_differ_by_nothing(runs):
    """Which is a number: only GRPO's own row has none."""
    folders = scored(runs, "g", GRPO, s1=(0, 10), s2=(0, 10)) + scored(runs, "b", BUPO, s1=(0, 10), s2=(0, 20))
    ten = texts(table(10, *folders))
    assert ten["BuPO, layer 5 for 3 batches"]["math avg@10, minus GRPO"] == "+0.0 [0.0, 0.0] n=2"
    assert ten["GRPO"]["math avg@10, minus GRPO"] == "None"


def test_tables_2_3_5_and_11(runs):
    folders = scored(runs, "g", GRPO, s1=(70, 50))
    for steps, right in ((3, 80), (6, 40), (9, 10)):
        folders += scored(
            runs, f"b{steps}", BUPO | {"internal_steps": steps, "internal_early_stopping": steps != 9}, s1=(right, 50)
        )
    folders += scored(runs, "l3", BUPO | {"internal_layer": 3}, s1=(60, 50))
    folders += scored(runs, "norm", BUPO | {"internal_lens": "final_norm"}, s1=(75, 50))
    folders += scored(runs, "f", GRPO | {"frozen_up_to_layer": 5}, s1=(55, 50))
    folders += scored(runs, "s", GRPO | {"layer_lr_multipliers": {6: 0.1}}, s1=(58, 50))
    folders += scored(runs, "rate", GRPO | {"learning_rate": 0.5}, s1=(1, 1))  # alike in nothing

    def column(number, head):
        found = table(number, *folders)
        names = [cells[found.columns.index(head)] if head else cells[0] for _, cells in found.rows]
        return names, [round(cells[found.columns.index("math avg@10")].statistics.mean) for _, cells in found.rows]

    assert column(2, "batches") == (["0", "3", "6", "9"], [70, 80, 40, 10])
    assert column(3, "layer") == (["none", "3", "5"], [70, 60, 80])
    assert column(5, "lens") == (["none", "raw", "final norm"], [70, 80, 75])
    names, values = column(11, None)
    assert values[:3] == [70, 55, 58] and "GRPO, layers 1 to 5 frozen" in names and len(values) == 8
    assert [t.number for t in build_paper_tables(groups_of(*folders[:2]))] == [
        1
    ]  # where nothing differs there is no other


def test_evaluations_while_training_stand_in(runs):
    """Where no run was evaluated otherwise: what it began with, and its end."""
    folders = [train(runs / f"g{seed}", seed) for seed in (1, 2)]
    for folder, (before, after) in zip(folders, ((0.3, 0.8), (0.4, 0.9)), strict=True):
        with (folder / "metrics.jsonl").open("a") as file:
            for batch, share in ((0, before), (3, 0.1), (6, after)):
                file.write(json.dumps({"eval/rollout_batches": batch, "eval/sums/avg@4": share}) + "\n")
    head = "sums avg@4, sampled while training"
    found = texts(table(1, *folders))
    assert found["GRPO"][head].startswith("85.0 [") and found["vanilla"][head].startswith("35.0 [")
    folders.append(evaluate(runs / "eval", "runs/g1", math=50))
    assert list(texts(table(1, *folders))["GRPO"]) == ["math avg@10"]


def test_a_table_as_a_file(runs):
    folders = [*scored(runs, "g", GRPO, s1=(70, 50), s2=(74, 54)), evaluate(runs / "eval-h", "@SUM(1)|<b>", math=3)]
    found = table(1, *folders)
    frame = found.to_dataframe()
    rows = list(csv.DictReader(io.StringIO(frame.to_csv(index=False))))
    assert len(rows) == 4 and rows[0]["column"] == "math avg@10" and float(rows[0]["mean"]) == 72
    assert math.isclose(frame["low"][0], compute_seed_statistics([70.0, 74.0]).low)
    lines = found.to_markdown().splitlines()
    assert len(lines) == 4 and "| 72.0 [46.6, 97.4] n=2 |" in lines[2]
    assert r"@SUM(1)\|\<b\>" in lines[3] and rows[3]["method"].startswith("'@SUM")


def test_a_number_says_what_its_interval_is():
    assert str(SeedStatistic({1: 50.0}, problems=(40.0, 60.0))) == "50.0 [40.0, 60.0] n=1"
    assert str(SeedStatistic({1: 50.0})) == "50.0 n=1" and str(SeedStatistic({1: 50.0}, "sd")) == "50.0 n=1"
    assert str(SeedStatistic({1: -1.0, 2: 3.0}, "difference")) == "+1.0 [-24.4, 26.4] n=2"
