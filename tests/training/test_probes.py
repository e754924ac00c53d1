"""Probes against the analysis, early stopping on runs that fail, and the automatic layer on constructed models."""

import json
import math
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from bupo import BuPOTrainer, UserError
from bupo.analysis import results as analysis_report
from bupo.analysis.checkpoint_series import CheckpointSeries, find_checkpoint_series, write_checkpoint_series
from bupo.analysis.measures import MEASURES, measure_completions
from bupo.analysis.results import AnalysisReport
from bupo.cli.main import main
from bupo.models.residual_stream import ResidualStream
from bupo.run_files.provenance import record_run
from bupo.training.callbacks import probes as probes_module
from bupo.training.callbacks.early_stopping import (
    MAX_CLIPPED_INCREASE,
    MAX_KL_RATIO,
    MAX_PERPLEXITY_RATIO,
    EarlyStoppingMonitor,
)
from bupo.training.callbacks.probes import compute_repetition, get_default_probe_interval, probe_layers
from bupo.training.objective import auto_layer, phases
from bupo.training.objective.phases import recommend_first_phase_batches
from tests.analysis.test_measures import ROLLOUTS
from tests.cli.test_commands import flags
from tests.helpers.tiny_models import tiny_model
from tests.training.test_trainer import PROBLEMS, TOKENIZER, config, model_of, snapshot, trainer_of

# -- probes ----------------------------------------------------------------------------------------------------------


def value(rows, name, layer=None, later=None):
    (row,) = [r for r in rows if (r["measure"], r["layer"], r["later_layer"]) == (name, layer, later)]
    return row["value"]


@pytest.mark.parametrize(("lens", "temperature"), [("raw", 1.0), ("final_norm", 0.7)])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "gpt2"])
def test_probes_are_the_analysis(monkeypatch, family, lens, temperature):
    """Each series equals `measure_completions`, which streams the vocabulary in fp64 and has a naive fp64 test."""
    monkeypatch.setattr(probes_module, "ROWS_PER_CHUNK", 7)  # several chunks of rows
    monkeypatch.setattr(probes_module, "MAX_STATE_ELEMENTS", 4000)  # several forward passes
    stream = ResidualStream(tiny_model(family))
    layers = [1, 3]
    rows = probe_layers(stream, ROLLOUTS, layers, lens, temperature)
    found = list(
        measure_completions(ResidualStream(tiny_model(family).double()), ROLLOUTS, lens, temperature, pairs=True)
    )
    tokens = sum(answer.num_tokens for answer in found)

    def mean(of):
        return sum(of(answer) for answer in found) / tokens

    near: dict = {"rel": 1e-5, "abs": 1e-5}
    assert value(rows, "entropy") == pytest.approx(mean(lambda a: a.entropy.sum()), **near)
    assert value(rows, "perplexity") == pytest.approx(math.exp(-mean(lambda a: a.log_probs.sum())), **near)
    for layer in layers:
        for name in ("entropy_layer", "d_entropy_layer", "kl_language_model"):
            assert name in MEASURES
            expected = mean(lambda a, name=name, layer=layer: a.values[name][layer - 1].sum())
            assert value(rows, name, layer) == pytest.approx(expected, **near), (name, layer)
        for later in range(layer + 1, 5):
            for name, matrix in (("kl", "kl"), ("cosine", "similarity")):
                expected = mean(lambda a, m=matrix, x=layer - 1, y=later - 1: getattr(a, m)[x, y])
                assert value(rows, name, layer, later) == pytest.approx(expected, **near), (name, layer, later)
    assert len(rows) == 2 + 2 * 3 + 2 * (3 + 1)


KEYS = ["rollout_batch", "measure", "layer", "later_layer"]
OF_ROLLOUTS = ("response_length", "repetition", "reward")


def probed(folder):
    """Return the series of a folder that are measured on the probe set, by measure."""
    table = pd.read_parquet(folder / "dynamics.parquet").sort_values(KEYS)
    assert list(table.columns) == [*KEYS, "value"]
    assert [str(table[name].dtype) for name in (*KEYS[::2], "later_layer", "value")] == [
        "int64",
        "Int64",
        "Int64",
        "float64",
    ]
    return table[~table["measure"].isin(OF_ROLLOUTS)].reset_index(drop=True)


@pytest.fixture(scope="module")
def probed_run(tmp_path_factory):
    """Run with a checkpoint and a probe after each rollout batch."""
    run = tmp_path_factory.mktemp("probed") / "run"
    options = {"internal_layer": 5, "max_steps": 8, "probe_every": 1, "save_strategy": "steps", "save_steps": 2}
    assert main(["train", *flags(run, learning_rate=1e-3, internal_steps=2, **options)]) == 0
    return run


@pytest.mark.slow
def test_the_analysis_of_a_runs_checkpoints_is_its_series(tmp_path, probed_run, capsys, monkeypatch):
    """Figure 5 from checkpoints: the same table as the run's probes, from the initial model to the finished run."""
    monkeypatch.setattr(analysis_report, "draw_analysis_figures", lambda *args: (tmp_path / "out" / "figures").mkdir())
    run, out = probed_run, tmp_path / "out"
    models = ["embedded", str(run / "checkpoint-6"), str(run / "checkpoint-2"), str(run)]
    options = ["--rollouts", str(run / "probes.jsonl"), "--output", str(out)]
    assert main(["analyze", "--model", *models, *options]) == 0
    assert "dynamics.parquet" in capsys.readouterr().out
    mine, its = probed(run), probed(out)
    assert sorted(mine["rollout_batch"].unique()) == [0, 1, 2, 3, 4]
    mine = mine[mine["rollout_batch"] != 2].reset_index(drop=True)
    assert len(mine) == 4 * (2 + 3 + 2 * 3)
    pd.testing.assert_frame_equal(mine, its, rtol=1e-5, atol=1e-5)
    for _, part in mine.groupby(KEYS[1:], dropna=False):
        assert part["value"].nunique() == 4  # else the comparison would be empty
    figures = [out / "figures" / f"dynamics.{kind}" for kind in ("png", "pdf")]
    assert all(path.stat().st_size > 10_000 for path in figures)
    meta = json.loads(pq.read_schema(out / "dynamics.parquet").metadata[b"meta"])
    assert meta["lens"] == "raw" and meta["run"] == str(run)
    write_checkpoint_series(report := AnalysisReport((), out), None)  # as by another analysis in the same folder
    assert report.dynamics is None and not any(path.exists() for path in figures)


def test_which_models_are_a_runs_and_of_which_layer(tmp_path, probed_run):
    run, twin = probed_run, tmp_path / "twin"
    first, last, end = (str(run / name) for name in ("checkpoint-2", "checkpoint-8", ""))
    found = find_checkpoint_series(["embedded", first, last, end], None, tmp_path)
    assert found == CheckpointSeries(run, [0, 1, 4, 4], [5], 2)
    assert find_checkpoint_series([last, first], 7, tmp_path).layers == [7]
    shutil.copytree(run / "checkpoint-2", twin / "checkpoint-2")
    (twin / "checkpoint-2" / "manifest.json").write_text("of another run")
    foreign = str(twin / "checkpoint-2")
    (tmp_path / "checkpoint-4").mkdir()
    for names, why in {
        (first,): "there is one model",
        ("embedded", "embedded"): "embedded is none",
        (first, last, "other"): "other is none",
        (first, str(tmp_path / "checkpoint-4")): "checkpoint-4 is none",
        (first, foreign): "these are of several",
    }.items():
        assert find_checkpoint_series(names, None, tmp_path) is None
        with pytest.raises(UserError, match=f"layer 5 is for checkpoints of one run, .*{why}: leave it out"):
            find_checkpoint_series(names, 5, tmp_path)
    with pytest.raises(UserError, match=r"layer: layer 9 does not exist: .* has layers 1 to 8"):
        find_checkpoint_series([first, last], 9, tmp_path)
    with pytest.raises(UserError, match=f"output {run} is the run that is analysed"):
        find_checkpoint_series([first, last], None, run)
    for name in ("bupo.pt", "trainer_state.json"):  # of another trainer; without a checkpoint
        (twin / "checkpoint-2" / name).unlink()
        assert find_checkpoint_series([foreign, foreign], None, tmp_path) is None


def test_inside_a_rollout_batch_and_without_a_first_phase(tmp_path):
    """A checkpoint series follows the weights; a GRPO run has the series of the layer in its options."""
    args = config(
        tmp_path / "run", internal_steps=0, internal_layer=3, max_steps=6, save_strategy="steps", save_steps=3
    )
    trainer_of(model_of(), args).train()
    names = [str(tmp_path / "run" / f"checkpoint-{step}") for step in (3, 6)]
    record_run(tmp_path / "run", "train", {"internal_layer": 3})
    assert find_checkpoint_series(names, None, tmp_path) == CheckpointSeries(tmp_path / "run", [0.75, 1.5], [3], 0)


def test_a_run_keeps_and_logs_its_series(probed_run):
    meta = json.loads(pq.read_schema(probed_run / "dynamics.parquet").metadata[b"meta"])
    assert meta["lens"] == "raw" and meta["layers"] == 8 and meta["versions"]["bupo"]
    logs = [json.loads(line) for line in (probed_run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logs if "rollout_batch" in row]
    assert all({"probe/entropy", "probe/perplexity", "probe/kl", "probe/cosine", "probe/time"} <= set(r) for r in steps)


def test_a_resumed_run_continues_its_series(tmp_path):
    common = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 1e-3, "probe_every": 1}
    trainer_of(model_of(), config(tmp_path, **common)).train()
    whole = pd.read_parquet(tmp_path / "dynamics.parquet")
    whole[whole["rollout_batch"] <= 1].to_parquet(tmp_path / "dynamics.parquet")  # as after a kill at step 6
    trainer_of(model_of(), config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    resumed = pd.read_parquet(tmp_path / "dynamics.parquet")
    pd.testing.assert_frame_equal(whole, resumed, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_resumed_at_a_batchs_end_has_no_row_twice(tmp_path):
    common = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, "probe_every": 1}
    trainer_of(model_of(), config(tmp_path, **common)).train()
    whole = pd.read_parquet(tmp_path / "dynamics.parquet")
    moved = config(tmp_path / "moved", **common)  # into another folder: the probe set is in the checkpoint
    trainer_of(model_of(), moved).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    whole[whole["rollout_batch"] <= 1].to_parquet(tmp_path / "dynamics.parquet")  # as after a kill in the second batch
    trainer_of(model_of(), config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    keys = ["rollout_batch", "measure", "layer", "later_layer"]
    resumed, elsewhere = (pd.read_parquet(folder / "dynamics.parquet") for folder in (tmp_path, tmp_path / "moved"))
    for table in (whole, resumed, elsewhere):
        assert not table.duplicated(keys).any()
    ordered = [table.sort_values(keys).reset_index(drop=True) for table in (whole, resumed)]
    pd.testing.assert_frame_equal(*ordered, atol=1e-5, rtol=1e-5)
    assert set(elsewhere["rollout_batch"]) == {0, 1, 2, 3} and (tmp_path / "moved" / "probes.jsonl").exists()


def test_the_last_weights_are_probed_whatever_the_cadence(tmp_path):
    trainer_of(model_of(), config(tmp_path / "a", max_steps=16, probe_every=3)).train()
    assert set(pd.read_parquet(tmp_path / "a" / "dynamics.parquet")["rollout_batch"]) == {0, 3, 4}
    trainer_of(model_of(), config(tmp_path / "b", max_steps=14, probe_every=1)).train()  # ends inside a batch
    table = pd.read_parquet(tmp_path / "b" / "dynamics.parquet")
    assert set(table["rollout_batch"]) == {0, 1, 2, 3}
    assert not table.duplicated(["rollout_batch", "measure", "layer", "later_layer"]).any()


def test_probes_leave_training_as_it_was(tmp_path):
    """Probes leave the parameters equal to the bit: they change no random number, gradient or mode."""
    with_probes, without = model_of(), model_of()
    trainer_of(with_probes, config(tmp_path / "a", probe_every=1, max_steps=12, internal_early_stopping=False)).train()
    trainer_of(without, config(tmp_path / "b", probe_every=0, max_steps=12, internal_early_stopping=False)).train()
    assert not (tmp_path / "b" / "dynamics.parquet").exists()
    for a, b in zip(with_probes.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_without_a_first_phase_is_probed_at_the_layer_it_names(tmp_path):
    trainer_of(model_of(), config(tmp_path, internal_steps=0, internal_layer=3, max_steps=4)).train()
    table = pd.read_parquet(tmp_path / "dynamics.parquet")
    assert set(table["layer"].dropna()) == {3} and {"kl", "response_length"} <= set(table["measure"])


def test_cadence_follows_the_arithmetic():
    stream = ResidualStream(model_of())
    answers = [([5] * 10, [6] * 10)] * 8
    assert get_default_probe_interval(stream, answers, [2], 10**9) == 1
    often, seldom = (get_default_probe_interval(stream, answers, [2], n) for n in (2_000, 200))
    assert often > 1 and seldom == pytest.approx(10 * often, abs=10)
    assert get_default_probe_interval(stream, answers, [4], 200) < seldom  # fewer layers above it


def test_repetition():
    assert compute_repetition([[1, 2, 3, 4]]) == 0
    assert compute_repetition([[1, 2, 3]]) == 0  # no 4-gram
    assert compute_repetition([[7] * 8]) == pytest.approx(1 - 1 / 5)
    assert compute_repetition([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3, 4]]) == pytest.approx(0.5 * (1 - 4 / 5))


# -- guard -----------------------------------------------------------------------------------------------------------


def fed(rewards, error=0.02, capped=0.0, perplexity=lambda i: 1.2, kl=lambda i: 5.0):
    """Return the monitor after these rollout batches, and the number of batches until it stops."""
    guard, first = EarlyStoppingMonitor(), None
    for i, reward in enumerate(rewards):
        guard.record_probe(perplexity(i), kl(i))
        if guard.get_stop_reason() and first is None:
            first = i
        guard.record_rollouts(reward, error, capped if i else 0.0)
    return guard, first


def test_early_stopping_keeps_a_healthy_phase():
    rising = [0.2 + 0.02 * i for i in range(40)]
    assert fed(rising)[1] is None
    noisy = [0.5 + 0.02 * math.sin(3 * i) for i in range(40)]
    assert fed(noisy)[1] is None
    # an improving policy moves away from its first completions without a reason to stop
    assert fed(rising, perplexity=lambda i: 1.2 * 1.1**i, kl=lambda i: 5 * 1.1**i)[1] is None


def test_early_stopping_detects_a_falling_reward_and_keeps_the_best_weights():
    rewards = [0.2, 0.4, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.4, 0.2, 0.1, 0.0, 0.0]
    guard, first = fed(rewards)
    assert guard.best_batch == 7  # the last of the best five in a row
    assert 9 <= first <= 11
    assert "the reward fell from 0.7" in guard.get_stop_reason()
    assert fed(rewards, error=0.5)[1] is None  # within the standard error


def test_early_stopping_detects_truncated_answers_and_rising_kl():
    flat = [0.5] * 6 + [0.49] * 6
    guard, _ = fed(flat, capped=MAX_CLIPPED_INCREASE + 0.1)
    assert "are cut at max_completion_length" in guard.get_stop_reason()
    guard, _ = fed(flat, perplexity=lambda i: 1.2 if i < 9 else 1.3 * MAX_PERPLEXITY_RATIO)
    assert "perplexity of the probes rose from 1.2" in guard.get_stop_reason()
    guard, _ = fed(flat, kl=lambda i: 5.0 if i < 9 else 5.1 * MAX_KL_RATIO)
    assert "KL to later layers of the probes rose from 5" in guard.get_stop_reason()


class RewardByBatch:
    """A reward with a fixed mean for each rollout batch."""

    __name__ = "by_batch"

    def __init__(self, means):
        self.means, self.calls = means, 0

    def __call__(self, completions, **kwargs):
        mean = self.means[min(self.calls, len(self.means) - 1)]
        self.calls += 1
        return [mean + 0.01 * (i % 4) + 0.1 * (i // 4 % 2) for i in range(len(completions))]


FALLING = [0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]


def guarded_run(folder, model, resume=None, **changes):
    options = {"internal_steps": 20, "max_steps": 56, "learning_rate": 1e-3, "probe_every": 2, **changes}
    calls = 0 if resume is None else int(resume.rpartition("-")[2]) // 4 + bool(int(resume.rpartition("-")[2]) % 4)
    reward = RewardByBatch(FALLING)
    reward.calls = calls
    trainer = BuPOTrainer(model, reward, config(folder, **options), train_dataset=PROBLEMS, processing_class=TOKENIZER)
    sampled = {}
    real = trainer.generate_rollouts

    def note(inputs):
        output = real(inputs)
        sampled[trainer.rollout_batch] = snapshot(model)
        return output

    trainer.generate_rollouts = note
    trainer.train(resume_from_checkpoint=resume)
    return trainer, sampled


def test_early_stopping_ends_phase_one_and_restores_the_best_weights(tmp_path, capsys):
    trainer, sampled = guarded_run(tmp_path, model_of())
    rows = [row for row in trainer.state.log_history if "phase" in row]
    last = max(row["rollout_batch"] for row in rows if row["phase"] == 1)
    assert 8 <= last <= 10
    assert trainer.phase_controller.schedule.stages[0].batches == last
    ended = [row["rollout_batch"] for row in rows if "internal/stopped_early" in row]
    assert ended == [last + 1]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("early stopping:")]
    assert (
        f"the stage on layer 2 ends after {last:.0f} of 20 rollout batches" in line
        and "weights that sampled the 7th" in line
    )
    for name, kept in sampled[7].items():  # the weights of the next batch equal those of the best to the bit
        assert torch.equal(kept, sampled[last + 1][name]), name
    assert any(not torch.equal(kept, sampled[last][name]) for name, kept in sampled[7].items())


def test_without_early_stopping_phase_one_continues(tmp_path):
    trainer, _ = guarded_run(tmp_path, model_of(), internal_early_stopping=False)
    assert {row["phase"] for row in trainer.state.log_history if "phase" in row} == {1}


# inside a rollout batch, before early stopping
@pytest.mark.slow
@pytest.mark.parametrize("stop", [30, pytest.param(34, marks=pytest.mark.slow)])
def test_a_resumed_run_keeps_the_state_of_early_stopping(tmp_path, stop):
    whole, resumed = model_of(), model_of(seed=5)
    saving = {"save_strategy": "steps", "save_steps": stop}
    first, _ = guarded_run(tmp_path, whole, **saving)
    second, _ = guarded_run(tmp_path, resumed, resume=str(tmp_path / f"checkpoint-{stop}"), **saving)
    assert first.phase_controller.schedule == second.phase_controller.schedule != first.args.phase_schedule
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_early_stopping_ends_a_stage_and_the_next_one_begins(tmp_path):
    trainer, _ = guarded_run(tmp_path, model_of(), internal_layer=None, internal_schedule=[[1, 20], [3, 2]])
    rows = [row for row in trainer.state.log_history if "phase" in row]
    layers = [row.get("internal/layer") for row in rows if row["step"] % 4 == 0]
    ends = layers.index(3)
    assert layers[:ends] == [1] * ends and layers[ends : ends + 3] == [3, 3, None] and ends <= 10


def test_a_stage_is_judged_by_its_own_layer(tmp_path, capsys):
    """Layers 3 and 1 differ from later layers by different amounts: a change of layer is not a rise of the KL."""
    options = {"internal_layer": None, "internal_schedule": [[3, 7], [1, 3]], "max_steps": 48, "learning_rate": 1e-7}
    reward = RewardByBatch([0.9, *[0.89] * 20])
    args = config(tmp_path, probe_every=1, **options)
    trainer = BuPOTrainer(model_of(), reward, args, train_dataset=PROBLEMS, processing_class=TOKENIZER)
    trainer.train()
    assert trainer.phase_controller.schedule == args.phase_schedule and "early stopping:" not in capsys.readouterr().out


# -- internal_layer: auto --------------------------------------------------------------------------------------------


def built(scales):
    """Build a model with tiny FFN writes (a flat policy, exploration) or huge ones (a sharp policy, convergence)."""
    model = model_of()
    with torch.no_grad():
        for block, scale in zip(model.model.layers, scales, strict=True):
            block.mlp.down_proj.weight *= scale
    return model


@pytest.mark.parametrize("clear", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_auto_finds_a_clear_boundary(tmp_path, capsys, clear):
    model = built([1e-3] * clear + [40.0] * (4 - clear))
    args = config(tmp_path, internal_layer="auto", max_steps=12, learning_rate=1e-3)
    trainer = trainer_of(model, args)
    trainer.train()
    assert trainer.phase_controller.schedule.layers == [clear]
    rows = [row for row in trainer.state.log_history if "phase" in row]
    assert [row.get("internal/layer") for row in rows] == [clear] * 8 + [None] * 4
    printed = capsys.readouterr().out
    assert f"internal_layer auto: layer {clear} is the last" in printed
    assert (
        "internal_steps: 2 as given; recommended are 1, a tenth of the run's 3 rollout batches, 30 at most" in printed
    )
    found = json.loads((tmp_path / "boundary.json").read_text())
    assert found["boundary_layer"] == clear and len(found["layers"]) == 4
    assert all(low <= mean <= high for mean, low, high in found["layers"])
    assert [found[name] for name in ("internal_steps", "recommended_steps", "rollout_batches")] == [2, 1, 3]


@pytest.mark.parametrize(
    ("batches", "steps"), [(1, 1), (4, 1), (15, 2), (50, 5), (200, 20), (300, 30), (310, 30), (5000, 30)]
)
def test_a_recommended_length_is_a_tenth_of_the_run_and_thirty_at_most(batches, steps):
    assert recommend_first_phase_batches(batches) == steps < 50  # of the paper's 300, 50 harm (table 2)


@pytest.mark.parametrize(
    "length", [pytest.param({"max_steps": 12}, marks=pytest.mark.slow), {"max_steps": -1, "num_train_epochs": 12 / 64}]
)
def test_auto_takes_the_recommended_length_unless_one_is_given(tmp_path, capsys, monkeypatch, length):
    """Three rollout batches, by updates or by epochs; with a share of two thirds."""
    monkeypatch.setattr(phases, "FIRST_PHASE_SHARE", 2 / 3)
    args = config(tmp_path, internal_layer="auto", internal_steps=None, learning_rate=1e-3, **length)
    trainer = trainer_of(built([1e-3, 1e-3, 40.0, 40.0]), args)
    trainer.train()
    assert trainer.phase_controller.schedule == phases.PhaseSchedule((phases.Stage(2, 2),))
    rows = [row for row in trainer.state.log_history if "phase" in row]
    assert [row.get("internal/layer") for row in rows[::4]] == [2, 2, None]
    assert "internal_steps: 2, a tenth of the run's 3 rollout batches" in capsys.readouterr().out
    found = json.loads((tmp_path / "boundary.json").read_text())
    assert [found[name] for name in ("internal_steps", "recommended_steps", "rollout_batches")] == [2, 2, 3]


def test_auto_is_the_run_with_the_layer_named(tmp_path):
    named, auto = (built([1e-3, 1e-3, 40.0, 40.0]) for _ in range(2))
    trainer_of(named, config(tmp_path / "a", internal_layer=2, max_steps=12, learning_rate=1e-3)).train()
    trainer_of(auto, config(tmp_path / "b", internal_layer="auto", max_steps=12, learning_rate=1e-3)).train()
    for a, b in zip(named.parameters(), auto.parameters(), strict=True):
        assert torch.equal(a, b)


def test_auto_stops_before_training_where_there_is_no_boundary(tmp_path):
    model = built([40.0] * 4)
    before = snapshot(model)
    trainer = trainer_of(model, config(tmp_path, internal_layer="auto"))
    with pytest.raises(
        UserError, match=r"the FFNs only converge.*dH_FFN in nats by layer: 1: -.*choose internal_layer"
    ):
        trainer.train()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert trainer.state.global_step == 0


def test_auto_stops_where_resamples_disagree(tmp_path, monkeypatch):
    monkeypatch.setattr(
        auto_layer,
        "classify_stages",
        lambda sums: {"boundary_layer": 2, "boundary_shares": {2: 0.6, 4: 0.4}, "explanation": "", "stages": []},
    )
    trainer = trainer_of(model_of(), config(tmp_path, internal_layer="auto"))
    with pytest.raises(UserError, match=r"ambiguous: of the resamples, layer 2 in 60 %, 4 in 40 %.*\(1 to 4\)"):
        trainer.train()


def test_a_resumed_auto_run_keeps_its_layer(tmp_path):
    common = {
        "internal_layer": "auto",
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 6,
        "learning_rate": 1e-3,
    }
    whole, resumed = built([1e-3, 1e-3, 40.0, 40.0]), model_of(seed=5)
    trainer_of(whole, config(tmp_path, **common)).train()
    trainer = trainer_of(resumed, config(tmp_path, **common))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.phase_controller.schedule.stages[0].layer == 2
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_auto_on_the_embedded_model(tmp_path, capsys):
    arguments = flags(
        tmp_path / "run",
        internal_layer="auto",
        per_device_train_batch_size=128,
        num_generations=8,
        steps_per_generation=1,
    )
    assert main(["train", *arguments, "--max_steps", "1", "--dataset_size", "16"]) == 0
    assert "internal_layer auto: layer 5 is the last whose dH_FFN is positive beyond doubt" in capsys.readouterr().out
