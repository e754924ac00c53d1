"""Checkpoints are whole or not there, the newest whole one is gone on with, and nothing that changes a run is taken over silently."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import ModelConfig

from bupo import BuPOConfig, TrainOptions, UserError
from bupo.training.callbacks import tensorboard_resume
from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.callbacks.nonfinite_updates import SkipNonFiniteUpdatesCallback
from bupo.training.checkpoints import integrity, selection
from bupo.training.checkpoints.integrity import find_damage, list_checkpoints
from bupo.training.checkpoints.resume import check_checkpoint_options, fingerprint_inputs, write_options
from bupo.training.checkpoints.selection import find_newest_intact_checkpoint
from bupo.training.checkpoints.writer import (
    STAGING_DIR,
    commit_node_checkpoint,
    delete_old_checkpoints,
    recover_interrupted_save,
)
from bupo.training.run import train
from bupo.training.run_directory import clear_run_directory
from bupo.training.trainer import BuPOTrainer
from tests.training.test_trainer import PROBLEMS, TOKENIZER, model_of, token_reward

ROWS = Dataset.from_dict({"prompt": PROBLEMS["prompt"], "answer": ["1"] * len(PROBLEMS)})
OPTIONS: dict = {
    **{"internal_layer": 2, "internal_steps": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2},
    **{"num_generations": 4, "max_completion_length": 5, "max_steps": 6, "learning_rate": 1e-3, "probe_every": 0},
    **{"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "report_to": "none", "seed": 0},
}


def run(folder, problems=ROWS, overwrite=False, model=None, reward=token_reward, callbacks=(), **changes):
    """A run of three rollout batches of two updates; what it says."""
    said: list[str] = []
    config = BuPOConfig(str(folder), **{**OPTIONS, **changes})
    train(
        model or model_of(),
        config,
        TrainOptions(overwrite=overwrite),
        tokenizer=TOKENIZER,
        problems=problems,
        reward_funcs=[reward],
        callbacks=callbacks,
        log=said.append,
    )
    return said


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Figures take as long as these runs: `make test-faults` compares them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "bupo.training.run.draw_figures",
            lambda folder, rows, title: (folder / "training.png").write_text(str(rows)),
        )
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run with checkpoints 2, 4 and 6, as it was just before it was marked as finished."""
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    (copy / "finished.json").unlink()
    return copy


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return all(torch.equal(weights(one)[name], weights(other)[name]) for name in weights(one))


FILES = [
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "bupo.pt"),
    *("rollouts_0.pt", "options.json", "manifest.json", "config.json", "training_args.bin"),
]


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_cut_or_altered_is_named(folder, name):
    checkpoint = folder / "checkpoint-6"
    path, content = checkpoint / name, (checkpoint / name).read_bytes()
    assert find_damage(checkpoint) is None
    place = len(content) // 2
    for harmed in (None, content[:place], content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]):
        path.unlink() if harmed is None else path.write_bytes(harmed)
        said: list[str] = []
        assert find_newest_intact_checkpoint(folder, said.append) == folder / "checkpoint-4"
        assert said[1:] == [f"resuming from {folder}/checkpoint-4"] and "checkpoint-6 is skipped: " in said[0]
        assert name in said[0] or name == "manifest.json"  # whose entry of another file is altered
        path.write_bytes(content)
    assert find_damage(checkpoint) is None


def test_the_one_before_a_damaged_checkpoint_is_gone_on_with(finished, folder):
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    (folder / "checkpoint-abc").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-6 cannot be resumed: optimizer.pt has 4 bytes, not "):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-6"))
    said = run(folder, resume_from_checkpoint=True, save_total_limit=2)
    assert any("checkpoint-6 is skipped: optimizer.pt has 4 bytes" in line for line in said)
    assert any(line == f"resuming from {folder}/checkpoint-4" for line in said)
    assert same(finished, folder) and find_damage(folder / "checkpoint-6") is None
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-abc",
    ]


def test_true_begins_where_there_is_no_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    (folder / STAGING_DIR / "checkpoint-2").mkdir(parents=True)  # as a kill in the first save leaves it
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step')
    said = run(folder, resume_from_checkpoint=True)
    assert f"{folder} holds no checkpoint yet: the run starts from the beginning" in said
    rows, expected = read_metrics(folder / "metrics.jsonl"), read_metrics(finished / "metrics.jsonl")
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in expected]
    assert same(finished, folder) and not (folder / STAGING_DIR).exists()


def test_a_folder_without_a_whole_checkpoint_is_not_begun_anew(folder):
    for path in list_checkpoints(folder):
        (path / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is intact: name one of them to resume from it all the same"
    ):
        run(folder, resume_from_checkpoint="true")
    run(folder, resume_from_checkpoint=str(folder / "checkpoint-6"))  # all needed files are there
    (folder / "checkpoint-6" / "manifest.json").unlink(missing_ok=True)
    (folder / "checkpoint-6" / "scheduler.pt").unlink()
    with pytest.raises(UserError, match=r"scheduler.pt is missing"):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_going_on_from_an_earlier_checkpoint_does_not_mix_two_runs(finished, folder, tmp_path):
    earlier = str(folder / "checkpoint-2")
    with pytest.raises(
        UserError, match=r"holds later checkpoints than .*checkpoint-2 \(checkpoint-4\): choose another"
    ):
        run(folder, resume_from_checkpoint=earlier)
    run(folder, resume_from_checkpoint=earlier, overwrite=True, max_steps=3)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    run(tmp_path / "elsewhere", resume_from_checkpoint=earlier)
    assert same(finished, tmp_path / "elsewhere")
    steps = [
        [row["step"] for row in read_metrics(path / "metrics.jsonl")] for path in (finished, tmp_path / "elsewhere")
    ]
    assert steps[0] == steps[1]


def test_going_on_from_another_runs_checkpoint_leaves_nothing_of_the_former(finished, folder, tmp_path):
    foreign = Path(shutil.copytree(finished / "checkpoint-4", tmp_path / "other" / "checkpoint-4"))
    with pytest.raises(UserError, match="holds a run"):
        run(folder, resume_from_checkpoint=str(foreign))
    (folder / "metrics.jsonl").write_text('{"step": 1, "former": 1}')
    run(folder, resume_from_checkpoint=str(foreign), overwrite=True)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-6"] and find_damage(foreign) is None
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 6]
    assert "former" not in (folder / "metrics.jsonl").read_text() and same(finished, folder)


def test_what_is_deleted_is_never_what_the_run_goes_on_from(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4", "old/checkpoint-6"):
        (tmp_path / "run" / name).mkdir(parents=True)
    clear_run_directory(tmp_path / "run", str(tmp_path / "run" / "old" / "checkpoint-6"))
    assert len(list_checkpoints(tmp_path / "run")) == 2
    (tmp_path / "elsewhere" / "checkpoint-6").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-6").symlink_to(tmp_path / "elsewhere" / "checkpoint-6")
    clear_run_directory(tmp_path / "run", str(tmp_path / "run" / "checkpoint-6"))
    assert len(list_checkpoints(tmp_path / "run")) == 3 and (tmp_path / "run" / "old" / "checkpoint-6").is_dir()
    clear_run_directory(tmp_path / "run", str(tmp_path / "elsewhere" / "checkpoint-6"))
    assert not list_checkpoints(tmp_path / "run") and (tmp_path / "elsewhere" / "checkpoint-6").is_dir()


FINISHED_OTHERWISE: list[tuple[dict, str]] = [
    ({"seed": 1}, "seed is 1, but 0 in .*run: resume with the same value"),
    ({"internal_steps": 1}, r"was made with the first phase \[\[2, 2\]\], and the options set \[\[2, 1\]\]"),
]


def test_a_finished_run_is_finished(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    said = run(copy, resume_from_checkpoint=True)
    assert said[1:] == [f"the run is finished: {copy} holds all of it, nothing more is trained"]
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    for path in list_checkpoints(copy):
        shutil.rmtree(path)
    assert run(copy, resume_from_checkpoint=True) == said  # also without checkpoints
    with pytest.raises(UserError, match="holds a finished run without checkpoints to resume from"):
        run(copy, resume_from_checkpoint=True, max_steps=8)
    for changes, message in FINISHED_OTHERWISE:
        with pytest.raises(UserError, match=message):
            run(copy, resume_from_checkpoint=True, **changes)


def test_what_was_left_undone_is_done(finished, folder):
    (folder / "model.safetensors").unlink()
    (folder / "training.png").unlink()
    kept = (folder / "checkpoint-6" / "manifest.json").read_bytes()
    said = run(folder, resume_from_checkpoint=True)
    assert "the run is finished: all 6 updates are done, nothing more is trained" in said
    assert same(finished, folder) and (folder / "finished.json").exists() and (folder / "training.png").exists()
    assert [path.name for path in list_checkpoints(folder)][-1] == "checkpoint-6"
    assert (folder / "checkpoint-6" / "manifest.json").read_bytes() == kept
    losses = [read_metrics(path / "metrics.jsonl")[-1]["train_loss"] for path in (finished, folder)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_finished_one(finished, tmp_path):
    common = {"max_steps": 8, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    run(tmp_path / "long", **common)
    run(tmp_path / "run", **{**common, "max_steps": 6})
    run(tmp_path / "run", **common, resume_from_checkpoint=True)
    assert same(tmp_path / "long", tmp_path / "run") and not same(finished, tmp_path / "run")
    linear = Path(shutil.copytree(finished, tmp_path / "linear"))  # the rate is that of the longer schedule at once
    run(linear, max_steps=12, resume_from_checkpoint=True)
    rates = [row["learning_rate"] for row in read_metrics(linear / "metrics.jsonl") if "learning_rate" in row]
    assert rates[6:] == pytest.approx([1e-3 * (12 - step) / 12 for step in range(6, 12)])


def namesake():
    def token_reward(completion_ids, **kwargs):
        return [0.0] * len(completion_ids)

    return token_reward


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, but 1.0 in "),
        ({"seed": 1}, "seed is 1, but 0 in "),
        ({"num_generations": 2}, "num_generations is 2, but 4 in "),
        ({"internal_lens": "final_norm"}, "internal_lens is final_norm, but raw in "),
        ({"internal_module": "ffn"}, "internal_module is ffn, but layer in "),
        ({"advantage_estimator": "rloo"}, "advantage_estimator is rloo, but grpo in "),
        ({"steps_per_generation": 4}, "completions per rollout batch is 16, but 8 in "),
        ({"problems": ROWS.select(range(32))}, "problems is 32 problems, SHA-256 .*, but 64 problems, SHA-256 "),
        ({"problems": ROWS.map(lambda row: {"prompt": row["prompt"] + "="})}, "problems is 64 problems"),
        ({"reward": lambda completion_ids, **k: token_reward(completion_ids)}, "reward_funcs is .*lambda"),
        ({"reward": namesake()}, r"namesake.<locals>.token_reward.*, but .*tests.training.test_trainer.token_reward"),
        ({"model": model_of(num_hidden_layers=3)}, "model is qwen3, 3 layers of 32, 262 tokens"),
        ({"internal_steps": 1}, r"was made with the first phase \[\[2, 2\]\], and the options set \[\[2, 1\]\]"),
    ],
)
def test_what_would_change_the_run_is_refused(folder, changes, message):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        run(folder, **changes, resume_from_checkpoint=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def trainer_on(folder, model, peft=None, **changes):
    args = BuPOConfig(str(folder), **{**OPTIONS, **changes})
    return BuPOTrainer(model, token_reward, args, train_dataset=ROWS, processing_class=TOKENIZER, peft_config=peft)


def other_model():
    """Of the same shape, with one weight that differs."""
    model = model_of()
    model.model.layers[3].mlp.up_proj.weight.data.add_(1e-3)
    return model


def test_weights_that_no_checkpoint_holds_are_told_apart(tmp_path):
    def lora():
        return LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")

    torch.manual_seed(1)
    write_options(trainer_on(tmp_path, model_of(), lora()), tmp_path)
    torch.manual_seed(2)  # the adapter's are in the checkpoint
    check_checkpoint_options(trainer_on(tmp_path, model_of(), lora()), tmp_path, print)
    with pytest.raises(UserError, match="the base model's weights is "):
        check_checkpoint_options(trainer_on(tmp_path, other_model(), lora()), tmp_path, print)
    trainer = trainer_on(tmp_path, model_of())
    trainer.ref_model = model_of()
    trainer.input_fingerprint = fingerprint_inputs(trainer)
    write_options(trainer, tmp_path)
    trainer.ref_model = other_model()
    trainer.input_fingerprint = fingerprint_inputs(trainer)
    with pytest.raises(UserError, match="the reference model's weights is "):
        check_checkpoint_options(trainer, tmp_path, print)
    trainer.args.sync_ref_model = True  # then they are in the checkpoint
    assert "the reference model's weights" not in fingerprint_inputs(trainer)


def test_the_models_dtype_is_that_of_the_one_given(tmp_path):
    trainer = trainer_on(tmp_path, model_of())
    trainer.model.bfloat16()  # as a wrapped one may say
    write_options(trainer, tmp_path)
    check_checkpoint_options(trainer_on(tmp_path, model_of()), tmp_path, print)


def test_options_that_are_kept_hold_no_secret(tmp_path):
    kwargs = {"token": "hf_secret", "revision": "main"}
    trainer = trainer_on(tmp_path, model_of())
    trainer.args.model_init_kwargs = kwargs
    write_options(trainer, tmp_path)
    kept = (tmp_path / "options.json").read_text()
    assert "hf_secret" not in kept and json.loads(kept)["model_init_kwargs"] == {"revision": "main"}
    kwargs["token"] = "hf_newer"
    check_checkpoint_options(trainer, tmp_path, print)


def test_a_lower_learning_rate_takes_effect_and_is_said(folder, capsys):
    shutil.rmtree(folder / "checkpoint-6")
    run(folder, learning_rate=1e-5, logging_steps=2, save_steps=1, resume_from_checkpoint=True)
    assert "learning_rate changes from 0.001 to 1e-05" in capsys.readouterr().out
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "learning_rate" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 6]  # the cadence of logs and checkpoints is free
    assert rows[-1]["learning_rate"] == pytest.approx(1e-5 / 6)
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{n}" for n in (2, 4, 5, 6)]
    state = torch.load(folder / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["lr"] == pytest.approx(1e-5 / 6)


def test_a_checkpoint_is_looked_at_and_compared_once(folder, monkeypatch, capsys):
    summed: list[str] = []
    real = integrity._hash_file
    monkeypatch.setattr(
        integrity, "_hash_file", lambda path: summed.append(f"{path.parent.name}/{path.name}") or real(path)
    )
    run(folder, learning_rate=1e-5, save_strategy="no", resume_from_checkpoint=True)
    assert summed and len(set(summed)) == len(summed) and all("checkpoint-6/" in name for name in summed)
    assert capsys.readouterr().out.count("learning_rate changes from 0.001 to 1e-05") == 1


def test_what_another_process_does_not_see_is_refused(folder, monkeypatch):
    checkpoint = folder / "checkpoint-6"
    selection.check_visible_to_all(checkpoint)
    monkeypatch.setattr(selection, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(integrity, "_hash_file", lambda path: pytest.fail("sums are the main process' business"))
    selection.check_visible_to_all(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(
        UserError, match=r"sees .*checkpoint-6 differently \(there is no such folder\): share output_dir"
    ):
        selection.check_visible_to_all(checkpoint)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("PytorchStreamWriter failed"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_former_checkpoints(tmp_path, monkeypatch, error):
    real, calls = torch.save, []

    def full(what, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and "optimizer" in str(path):
            calls.append(path)
            Path(path).write_bytes(b"half")
            raise error
        return real(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint-4 cannot be written .*resume with --resume_from_checkpoint true"):
        run(tmp_path / "run")
    assert calls and [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert find_damage(tmp_path / "run" / "checkpoint-2") is None and not (tmp_path / "run" / STAGING_DIR).exists()


def test_what_a_kill_leaves_is_removed_and_what_it_moved_is_put_back(folder):
    (folder / STAGING_DIR / "former").mkdir(parents=True)
    (folder / "checkpoint-6").rename(
        folder / STAGING_DIR / "former" / "checkpoint-6"
    )  # killed before the new one came in
    shutil.copytree(folder / "checkpoint-4", folder / STAGING_DIR / "checkpoint-8")
    recover_interrupted_save(folder)
    assert find_damage(folder / "checkpoint-6") is None and not (folder / STAGING_DIR).exists()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(("limit", "left"), [(None, [2, 4, 6]), (0, [2, 4, 6]), (-1, [2, 4, 6]), (2, [4, 6]), (1, [6])])
def test_a_limit_that_is_not_positive_is_none(tmp_path, limit, left):
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
    delete_old_checkpoints(tmp_path, limit, tmp_path / "checkpoint-6")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_another_node_leaves_what_the_main_process_has_moved(tmp_path, monkeypatch):
    """On a shared disk a node may see the written folder for a while after it was moved."""
    staged, place = tmp_path / STAGING_DIR / "checkpoint-2", tmp_path / "checkpoint-2"
    staged.mkdir(parents=True)
    (staged / "rng_state_1.pth").write_text("1")
    shutil.copytree(staged, place)
    (place / "trainer_state.json").write_text('{"global_step": 2}')
    commit_node_checkpoint(staged, place)
    assert (place / "trainer_state.json").exists() and staged.exists()
    commit_node_checkpoint(staged, tmp_path / "own" / "checkpoint-2")  # there is no such folder: as if it were gone
    shutil.rmtree(place)
    shutil.rmtree(tmp_path / STAGING_DIR)
    for content in ("1", "2"):  # its own disk, and again in the stead of its former part
        staged.mkdir(parents=True)
        (staged / "rng_state_1.pth").write_text(content)
        commit_node_checkpoint(staged, place)
        assert (place / "rng_state_1.pth").read_text() == content and not staged.exists()


def test_the_best_checkpoint_is_kept_pushed_and_loaded_from_its_place(tmp_path, monkeypatch):
    pushed: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, path: pushed.append((path, find_damage(Path(path)) is None))
    )
    args = BuPOConfig(
        str(tmp_path),
        **OPTIONS
        | {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward"}
        | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "greater_is_better": True},
    )
    some = PROBLEMS.select(range(1))
    model = model_of()
    trainer = BuPOTrainer(
        model, token_reward, args, train_dataset=PROBLEMS, eval_dataset=some, processing_class=TOKENIZER
    )
    scores = {2: 0.2, 4: 0.9, 6: 0.1}
    monkeypatch.setattr(trainer, "evaluate", lambda **k: {"eval_reward": scores[trainer.state.global_step]})
    args.push_to_hub = True
    trainer.train()
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), True) for step in (2, 4, 6)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-4"
    ]  # and transformers deletes the last, at the end
    saved = load_file(best / "model.safetensors")
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in saved.items())


def test_a_broken_line_of_metrics_drops_itself_only(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n7\n{"step": 3}\n{"ste')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 3}]
    assert [record.getMessage().split(", ")[1] for record in caplog.records] == [
        "line 2 is skipped: it cannot be read",
        "line 3 is skipped: it cannot be read",
    ]


class Stopped(TrainerCallback):
    """As a signal that a cluster sends: save at the end of the update, and stop."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True


@pytest.mark.slow
def test_a_run_that_is_stopped_inside_a_rollout_batch_goes_on(finished, tmp_path):
    folder = tmp_path / "run"
    run(folder, callbacks=[Stopped()])
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    assert not (folder / "finished.json").exists()
    run(folder, resume_from_checkpoint=True)
    assert same(finished, folder) and (folder / "finished.json").exists()
    rows = [
        [row.get("loss"), row.get("reward"), row.get("train_loss")] for row in read_metrics(folder / "metrics.jsonl")
    ]
    assert rows == [
        [row.get("loss"), row.get("reward"), row.get("train_loss")] for row in read_metrics(finished / "metrics.jsonl")
    ]


def test_updates_skipped_in_a_row_are_counted_on():
    counted, again = SkipNonFiniteUpdatesCallback(lambda: ""), SkipNonFiniteUpdatesCallback(lambda: "")
    counted.consecutive_skips = 2
    again.load(counted.state(), 1)
    assert again.consecutive_skips == 2


def test_tensorboards_events_go_on_in_their_folder(tmp_path, monkeypatch):
    """Also without TensorBoard: what its writer is asked for. Readers drop earlier events from `purge_step` on."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        tensorboard_resume,
        "_get_summary_writer_class",
        lambda: lambda log_dir, purge_step: asked.append((log_dir, purge_step)) or "writer",
    )
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.tb_writer = callback.logging_dir = None
    tensorboard_resume.resume_tensorboard([callback], tmp_path, 8)
    assert callback.tb_writer is None and not asked  # no events yet: transformers names a folder
    (tmp_path / "runs" / "Nov24_host").mkdir(parents=True)
    (tmp_path / "runs" / "Nov24_host" / "events.out.1").touch()
    tensorboard_resume.resume_tensorboard([callback], tmp_path, 8)
    assert callback.tb_writer == "writer" and asked == [(str(tmp_path / "runs" / "Nov24_host"), 9)]
    callback.tb_writer, callback.logging_dir = None, "/logs"
    tensorboard_resume.resume_tensorboard([callback], tmp_path, 0)
    assert asked[-1] == ("/logs", 0)


def test_a_finished_run_with_an_adapter_is_finished_too(tmp_path):
    changes = {"max_steps": 2, "internal_steps": 1, "logging_steps": 2, "save_strategy": "no"}
    loading = ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"])
    config = BuPOConfig(str(tmp_path / "run"), **{**OPTIONS, **changes})
    common: dict = {"tokenizer": TOKENIZER, "problems": ROWS, "reward_funcs": [token_reward]}
    first = train(model_of(), config, **common, loading=loading)
    config.resume_from_checkpoint = "true"
    done = train(model_of(), config, **common, loading=loading)
    expected = dict(first.model.named_parameters())
    assert done.schedule == first.schedule and done.metrics == first.metrics
    assert all(torch.equal(value, expected[name]) for name, value in done.model.named_parameters())
    assert any(value.any() for name, value in expected.items() if "lora_B" in name)
    with pytest.raises(UserError, match="the base model's weights is "):
        train(other_model(), config, **common, loading=loading)
    with pytest.raises(UserError, match=r"adapters is \[\], but \['default'\] in"):
        train(model_of(), config, **common)
