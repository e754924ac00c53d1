"""examples/bottom_up.py, the method in one file, against the trainer: the same losses and weights from the same answers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from bupo import BuPOConfig, BuPOTrainer, load_model, load_problems, load_tokenizer
from tests.training.test_phase_objectives import inputs_of

FILE = Path(__file__).resolve().parents[2] / "examples" / "bottom_up.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("bottom_up", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bottom_up"] = module  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bottom_up"]


def right(completions, answer, **kwargs):
    """The example's reward, as TRL calls one."""
    reward = sys.modules["bottom_up"].compute_reward
    return [reward(found[-1]["content"], gold) for found, gold in zip(completions, answer, strict=True)]


def trainer_of(folder, internal_steps):
    """On the embedded model, with the example's numbers: 2 rollout batches of 4 prompts with 8 answers, 4 updates each."""
    args = BuPOConfig(
        str(folder),
        internal_layer=5, internal_steps=internal_steps, internal_early_stopping=False,
        epsilon=0.2, delta=10.0, beta=0.0, loss_type="dapo", max_grad_norm=1.0,
        per_device_train_batch_size=8, steps_per_generation=4, num_generations=8, max_steps=8, max_completion_length=24,
        learning_rate=1e-3, lr_scheduler_type="constant", gradient_checkpointing=False,
        report_to="none", save_strategy="no", bf16=False, use_cpu=True,
    )  # fmt: skip
    problems = load_problems("arithmetic", size=32)
    return BuPOTrainer(
        load_model("embedded"), right, args, train_dataset=problems, processing_class=load_tokenizer("embedded")
    )


def padded(parts, name, left):
    """`(N, T)`: a tensor of a rollout batch's parts, with zeros on the side where they are padded."""
    width = max(part[name].size(1) for part in parts)
    gaps = [width - part[name].size(1) for part in parts]
    pad = torch.nn.functional.pad
    return torch.cat([pad(part[name], (gap, 0) if left else (0, gap)) for part, gap in zip(parts, gaps, strict=True)])


def rollouts_of(example, model, parts, layer):
    """Return the rollout batch of the trainer's loss in the example's form, with the example's old log-probs."""
    prompts, answers = (padded(parts, f"{name}_ids", name == "prompt") for name in ("prompt", "completion"))
    masks = [padded(parts, f"{name}_mask", name == "prompt") for name in ("prompt", "completion")]
    ids, mask = torch.cat([prompts, answers], 1), torch.cat(masks, 1)
    answered = torch.cat([torch.zeros_like(masks[0]), masks[1]], 1)[:, 1:]
    with torch.no_grad():
        old = example.compute_log_probs(model, ids, mask, layer)
    return example.Rollouts(ids, mask, answered, torch.cat([part["advantages"] for part in parts]), old)


@pytest.mark.slow
@pytest.mark.parametrize("internal_steps", [0, 1, 2])
def test_losses_and_weights_are_the_trainers(tmp_path, example, internal_steps):
    trainer = trainer_of(tmp_path, internal_steps)
    inputs, losses = inputs_of(trainer), []

    def kept(model, part, inner=trainer.compute_micro_batch_loss):
        losses.append(inner(model, part))
        return losses[-1]

    trainer.compute_micro_batch_loss = kept
    trainer.train()
    model = load_model("embedded").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=trainer.args.weight_decay)
    found = []
    for batch in range(2):
        layer = example.get_optimized_layer(batch, 5, internal_steps)
        rollouts = rollouts_of(example, model, inputs[4 * batch : 4 * batch + 4], layer)
        found += example.update(model, optimizer, rollouts, layer, torch.arange(len(rollouts.ids)))
    assert len(losses) == 8 and max(abs(float(loss)) for loss in losses) > 1e-2
    torch.testing.assert_close(torch.tensor(found), torch.stack(losses).detach(), atol=1e-5, rtol=0)
    start, theirs = load_model("embedded").state_dict(), trainer.model.state_dict()
    for name, mine in model.state_dict().items():  # Adam's step of a gradient that is nearly zero is of either sign
        ours, other = (mine - start[name]).flatten(), (theirs[name] - start[name]).flatten()
        assert (not ours.any() and not other.any()) or torch.cosine_similarity(ours, other, 0) > 0.999, name


def test_advantages_are_the_trainers(tmp_path, example):
    """Rewards differ within some groups and are equal in others."""
    trainer, seen = trainer_of(tmp_path, 0), []

    def rollout(inputs, inner=trainer.generate_rollouts):
        tensors = inner(inputs)
        texts = trainer.processing_class.batch_decode(tensors["completion_ids"], skip_special_tokens=True)
        rewards = [example.compute_reward(text, row["answer"]) for text, row in zip(texts, inputs, strict=True)]
        seen.append((torch.tensor(rewards), tensors["advantages"].clone()))
        return tensors

    trainer.generate_rollouts = rollout
    trainer.train()
    assert any(0 < rewards.mean() < 1 for rewards, _ in seen)
    for rewards, theirs in seen:
        torch.testing.assert_close(example.compute_advantages(rewards), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("text", "reward"),
    [(r"57+23=80;80-41=39;\boxed{39}", 1.0), (r"\boxed{-39}", 0.0), (r"\boxed{39} or so", 0.0), ("39", 0.0), ("", 0.0)],
)
def test_its_reward_is_of_the_boxed_number(example, text, reward):
    assert example.compute_reward(text, "39") == reward


@pytest.mark.slow
def test_it_runs_and_refuses_a_layer_it_cannot_read(example, monkeypatch, capsys):
    """Two rollout batches; and the last layer, whose state transformers gives behind the final norm."""
    monkeypatch.setattr(sys, "argv", [str(FILE), "--batches", "2", "--internal_batches", "1"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert "layer 5" in lines[0] and "full model" in lines[1] and len(lines) == 2
    monkeypatch.setattr(sys, "argv", [str(FILE), "--layer", "8"])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    assert "--layer must be 1 to 7, got 8" in capsys.readouterr().err


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) <= 200
