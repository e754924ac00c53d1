"""A checkpoint's weights and moments are loaded whole, whatever names they are saved under, or refused before a run changes."""

import json
import shutil
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from bupo import BuPOConfig, BuPOTrainer, UserError
from bupo.models.loading import load_tokenizer
from tests.helpers.tiny_models import tiny_model

ROWS = Dataset.from_list([{"prompt": f"{n}+1"} for n in range(16)])
UP = "model.layers.1.mlp.up_proj.weight"


def reward(completion_ids, **columns):
    return [sum(token % 7 for token in ids) / (6.0 * max(1, len(ids))) for ids in completion_ids]


def trained(folder, family="llama", resume=None, phase=1, seed=0, **changes):
    """Train a tiny model, whose weights before a resume are those of a seed; return its state dict."""
    torch.manual_seed(seed)
    model = tiny_model(family, vocab_size=262)
    options: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    first: dict[str, Any] = {"internal_layer": 2, "internal_steps": 1} if phase == 1 else {"internal_steps": 0}
    adapter = changes.pop("peft_config", None)
    evaluation = {"eval_dataset": ROWS.select([0, 1])} if "eval_strategy" in changes else {}
    trainer = BuPOTrainer(
        model,
        reward,
        BuPOConfig(
            str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, report_to="none",
            per_device_eval_batch_size=4, **options | first | changes,
        ),
        train_dataset=ROWS,
        processing_class=load_tokenizer("embedded"),
        peft_config=adapter,
        **evaluation,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, {name: values.detach().clone() for name, values in trainer.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_weights_that_are_saved_under_other_names_are_resumed(family, phase, tmp_path):
    """The head of GPT-NeoX and the experts of mixtures kept the values of before the run, beside trained other weights."""
    _, whole = trained(tmp_path, family, phase=phase)
    trainer, again = trained(tmp_path, family, tmp_path / "checkpoint-2", phase)
    saved = set(load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    assert {name for name, _ in trainer.model.named_parameters()} - saved
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_the_best_model_is_loaded_under_other_names(tmp_path):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
    }
    trainer, ended = trained(tmp_path, "gpt_neox", **best)
    saved = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert torch.equal(ended["lm_head.weight"], saved["embed_out.weight"])


def changed(change):
    def make(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})

    return make


def state(name, change):
    def make(folder):
        path = folder / name
        values = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, weights_only=False)
        change(values)
        path.write_text(json.dumps(values)) if path.suffix == ".json" else torch.save(values, path)

    return make


def moments(change):
    return state("optimizer.pt", lambda values: change(values["state"][3]))


def random_numbers(**changes):
    return state("rng_state.pth", lambda values: values.update(changes))


def progress(**changes):
    return state("trainer_state.json", lambda values: values.update(changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (changed(lambda t: t.pop(UP)), f"its files lack 1 of the 39 tensors, such as {UP}"),
        (changed(lambda t: t.update({UP: t[UP][:3]})), rf"{UP} has the shape \(3, \d+\)"),
        (changed(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"{UP} is stored as I8"),
        (changed(lambda t: t.update({"other": t.pop(UP)})), f"its files lack 1 of the 39 tensors.*{UP}"),
        (moments(lambda s: s.update(exp_avg=torch.zeros(3))), r"optimizer.pt holds exp_avg \(3,\) of a parameter"),
        (moments(lambda s: s.update(exp_avg_sq="x")), "optimizer.pt holds exp_avg_sq str"),
        (state("optimizer.pt", lambda s: s["param_groups"][0].pop("betas")), "optimizer.pt lacks betas"),
        (state("scheduler.pt", lambda s: s.update(last_epoch="x")), "scheduler.pt is damaged: last_epoch is 'x'"),
        (random_numbers(cpu=torch.zeros(3, dtype=torch.uint8)), "its random numbers .* cannot be loaded: RuntimeError"),
        (random_numbers(python=(1, 2, 3)), "its random numbers .* cannot be loaded: ValueError"),
        (progress(global_step=3), "trainer_state.json counts 3 updates, and its bupo.pt 2 passes"),
        (progress(global_step=0), "trainer_state.json counts 0 updates"),
        (progress(train_batch_size="x"), "trainer_state.json cannot be read .*train_batch_size is 'x'"),
        (state("bupo.pt", lambda s: s.update(metrics={"reward": "xy"})), "bupo.pt is damaged: .* hold 'xy'"),
        (
            state("rollouts_0.pt", lambda s: s["counters"].update(since_log="x")),
            "rollouts_0.pt is damaged: .* hold 'x'",
        ),
    ],
    ids=[
        *("missing", "shape", "integers", "renamed", "moments", "text", "betas", "schedule", "random", "python"),
        *("other updates", "no updates", "batch", "metrics", "loss"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused(make, says, run, tmp_path):
    """Without a manifest, which tells changed files; a missing tensor used to keep its value of before the run."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    trained(tmp_path / "whole", resume=checkpoint)
    make(checkpoint)
    with pytest.raises(UserError, match=says) as error:
        trained(tmp_path / "other", resume=checkpoint)
    assert "\n" not in str(error.value)


def test_an_adapters_checkpoint_of_other_weights_is_refused(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    _, whole = trained(tmp_path / "run", peft_config=lora)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    _, again = trained(tmp_path / "again", resume=checkpoint, peft_config=lora)
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    first = min(tensors)
    save_file({name: x for name, x in tensors.items() if name != first}, file, {"format": "pt"})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][file.name]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"its files lack 1 of the \d+ tensors, such as {first}"):
        trained(tmp_path / "other", resume=checkpoint, peft_config=lora)
