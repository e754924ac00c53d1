"""What the first phase may optimise instead of the layer's policy, and how it gives over to the second: on tiny models."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bupo import BuPOConfig, UserError
from bupo.commands.parsing import parse
from bupo.training.setup import check_arguments
from tests.test_methods import logged
from tests.test_trainer import RatioWatch, assert_only_below, changed, config, model_of, snapshot, trainer_of

BIG = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "gradient_accumulation_steps": 1}


class Gradients(TrainerCallback):
    """Gradients of each update, as they come to the optimizer; None where there is none."""

    def __init__(self):
        self.of_update = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.of_update.append(
            {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}
        )


def gradients_of(trainer):
    """Train, and give the gradients of each update."""
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    return watch.of_update


def inputs_of(trainer):
    """The micro-batches that the trainer's loss will see, filled as it trains."""
    seen = []

    def loss_of(model, inputs, inner=trainer.loss):
        seen.append(dict(inputs))
        return inner(model, inputs)

    trainer.loss = loss_of
    return seen


def double_log_probs(model, inputs, layer=None, order=None):
    """`(B, C)` of the answers by plain float64 matrix products on transformers' own hidden states; `order` is of the rows."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    weight = model.lm_head.weight if order is None else model.lm_head.weight[order]
    logits = out.logits if layer is None else out.hidden_states[layer] @ weight.T
    every = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).squeeze(2)
    return every[:, -inputs["completion_ids"].size(1) :]


def token_mean(log_probs, inputs):
    """Eq. 9 or 10 at a ratio of 1, token by token (`loss_type` dapo, one update a rollout batch)."""
    weighted = inputs["advantages"][:, None] * log_probs * inputs["completion_mask"]
    return -weighted.sum() / inputs["completion_mask"].sum()


# -- the language model policy's objective, by the lower layers only --------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_policys_objective_moves_the_layers_up_to_l_and_nothing_else(tmp_path, tied, accumulated):
    model = model_of(tie_word_embeddings=tied)
    before = snapshot(model)
    pieces = {"gradient_accumulation_steps": accumulated}
    args = config(tmp_path, internal_objective="policy", max_steps=8 // accumulated, **pieces)
    trainer = trainer_of(model, args)
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert args.weight_decay > 0
    assert_only_below(changed(before, model), before, 2)
    assert [row["phase"] for row in watch.rows] == [1] * 8 and logged(trainer, "phase") == [1] * (8 // accumulated)
    assert logged(trainer, "internal/layer") == [2] * (8 // accumulated)
    assert not logged(trainer, "internal/entropy")
    assert watch.rows[0]["log_ratio"] < 1e-5 and watch.rows[4]["log_ratio"] < 1e-5


def test_after_it_the_whole_policy_moves(tmp_path):
    model = model_of()
    before = snapshot(model)
    trainer_of(model, config(tmp_path, internal_objective="policy", max_steps=12)).train()
    assert changed(before, model) == set(before)


def test_its_gradients_are_the_whole_policys(tmp_path):
    """Against float64 by hand, and against plain GRPO on the same rollouts: the same up to l and None above."""
    common = {"max_steps": 1, "max_grad_norm": 0.0, **BIG}
    trainer = trainer_of(model_of(), config(tmp_path / "a", internal_objective="policy", **common))
    seen = inputs_of(trainer)
    (found,) = gradients_of(trainer)
    plain = config(tmp_path / "b", internal_layer=None, internal_steps=0, **common)
    (whole,) = gradients_of(trainer_of(model_of(), plain))
    exact = model_of().double()
    token_mean(double_log_probs(exact, seen[0]), seen[0]).backward()
    assert_only_below({name for name, gradient in found.items() if gradient is not None}, found, 2)
    for name, parameter in exact.named_parameters():
        if found[name] is not None:
            assert torch.equal(found[name], whole[name]), name
            torch.testing.assert_close(found[name].double(), parameter.grad, atol=1e-6, rtol=1e-3, msg=name)
            assert found[name].abs().max() > 1e-4


def test_clipping_sees_what_moves_only(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="policy", max_steps=1, **BIG))
    (gradients,) = gradients_of(trainer)  # after clipping to 1
    clipped = torch.stack([g.norm() for g in gradients.values() if g is not None]).norm().item()
    assert logged(trainer, "grad_norm")[0] > 1 and clipped == pytest.approx(1.0, abs=1e-4)


def test_what_the_policys_objective_says(tmp_path):
    """At the first update nothing has moved, and the entropy is that of the policy in force."""
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="policy", max_steps=4))
    trainer.train()
    plain = trainer_of(model_of(), config(tmp_path / "b", internal_layer=None, internal_steps=0, max_steps=4))
    plain.train()
    for name in ("kl_old", "entropy", "loss", "clip_ratio/region_mean"):
        assert logged(trainer, name)[0] == logged(plain, name)[0]
    assert logged(trainer, "kl_old")[0] < 1e-10 < logged(trainer, "kl_old")[1]
    assert "the whole policy, by layers up to 2" in trainer.where(1)


def test_deepspeed_is_refused_the_policys_objective(tmp_path):
    args = config(tmp_path, internal_objective="policy")

    class Plugin:
        zero_stage, deepspeed_config = 2, {}

    args.deepspeed_plugin = Plugin()
    with pytest.raises(UserError, match="internal_objective policy drops gradients above the layer"):
        check_arguments(model_of(), args, None)


# -- a vocabulary in a random order ------------------------------------------------------------------------------------


def test_permuted_log_probs_are_the_layers_over_a_permuted_unembedding(tmp_path):
    """Old ones and new ones, and the gradient, against float64 with the matrix' rows exchanged."""
    args = config(tmp_path, internal_objective="permuted", max_steps=1, num_iterations=2, max_grad_norm=0.0, **BIG)
    trainer = trainer_of(model_of(), args)
    seen = inputs_of(trainer)
    (found,) = gradients_of(trainer)
    order = torch.randperm(262, generator=torch.Generator().manual_seed(args.seed))
    exact = model_of().double()
    expected = double_log_probs(exact, seen[0], 2, order)
    mask = seen[0]["completion_mask"].bool()
    torch.testing.assert_close(seen[0]["old_per_token_logps"].double()[mask], expected[mask], atol=1e-4, rtol=1e-5)
    other = double_log_probs(exact, seen[0], 2)
    assert (other - expected)[mask].abs().min() > 1e-3  # another target altogether
    token_mean(expected, seen[0]).backward()
    assert_only_below({name for name, gradient in found.items() if gradient is not None}, found, 2)
    for name, parameter in exact.named_parameters():
        if found[name] is not None:
            torch.testing.assert_close(found[name].double(), parameter.grad, atol=2e-5, rtol=2e-3, msg=name)


def test_permuted_ratios_start_at_one_and_phase_two_is_the_whole_policys(tmp_path):
    trainer = trainer_of(model_of(), config(tmp_path, internal_objective="permuted", max_steps=12))
    watch = RatioWatch().attach(trainer)
    trainer.train()
    assert [row["phase"] for row in watch.rows] == [1] * 8 + [2] * 4
    assert all((row["log_ratio"] < 1e-5) == (place % 4 == 0) for place, row in enumerate(watch.rows))
    layer = trainer_of(model_of(), config(tmp_path / "b", max_steps=1))
    layer.train()
    for name in ("internal/entropy", "entropy"):  # an order changes no entropy
        assert logged(trainer, name)[0] == logged(layer, name)[0]


def test_a_permuted_reference_is_permuted_too(tmp_path):
    model_of().save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    trainer = trainer_of(model, config(tmp_path, internal_objective="permuted", beta=0.1, max_steps=12))
    trainer.train()
    kls = logged(trainer, "kl")
    assert abs(kls[0]) < 1e-6 < kls[1] and len(kls) == 12


@pytest.mark.parametrize("objective", ["policy", "permuted"])
def test_a_resumed_control_is_the_uninterrupted_one(tmp_path, objective):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": 6, "internal_objective": objective}
    whole, resumed = model_of(), model_of(seed=5)
    trainer_of(whole, config(tmp_path, **common)).train()
    trainer_of(resumed, config(tmp_path, **common)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = config(tmp_path, **{**common, "internal_objective": "layer"})
    with pytest.raises(UserError, match=f"internal_objective is layer, but {objective} in"):
        trainer_of(model_of(), other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# -- options -----------------------------------------------------------------------------------------------------------


def test_options_on_the_command_line_and_in_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("internal_layer: 2\nreport_to: none\ninternal_objective: permuted\n")
    line = ["--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "o")]
    (read,) = parse((BuPOConfig,), line, "bupo train")
    assert read.internal_objective == "permuted"
    (read,) = parse((BuPOConfig,), [*line, "--internal_objective", "policy"], "bupo train")
    assert read.internal_objective == "policy" and copy.copy(read).internal_objective == "policy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"internal_objective": "random"}, "internal_objective must be layer, policy or permuted, got 'random'"),
        (
            {"internal_objective": "policy", "internal_module": "ffn"},
            "internal_objective policy optimises no internal policy, and internal_module is ffn: leave one out",
        ),
    ],
)
def test_bad_options_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **changes)
