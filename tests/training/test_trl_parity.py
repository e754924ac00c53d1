"""BuPOTrainer against GRPOTrainer: options and arguments of TRL, in both phases."""

import copy
import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import GRPOConfig, GRPOTrainer

from bupo import BuPOConfig, BuPOTrainer, InternalPolicies, UserError
from tests.helpers.tiny_models import FAMILY_CONFIGS, MOE, SIZES
from tests.helpers.trl_table import ARGUMENTS, ELSEWHERE, OPTIONS, REFUSED, TRAINS
from tests.training.test_trainer import PROBLEMS, TOKENIZER, changed, model_of, snapshot, token_reward

ROOT = Path(__file__).parents[2]
FEW = PROBLEMS.select(range(4))


def options(folder, **changes):
    """Return options for two updates a rollout batch of two prompts with four completions each."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **changes,
    }


def small(**changes):
    return model_of(num_hidden_layers=2, **changes)


def grpo(model, folder, reward=token_reward, *, problems=FEW, options_=None, **kwargs):
    """Make a GRPOTrainer."""
    args = GRPOConfig(**options(folder, **(options_ or {})))
    kwargs = {"train_dataset": problems, "processing_class": TOKENIZER, **kwargs}
    trainer = GRPOTrainer(model, reward, args, **kwargs)
    trainer.train()
    return trainer


def bupo(model, folder, reward=token_reward, *, problems=FEW, options_=None, phases=(), **kwargs):
    """Make a BuPOTrainer; without `phases`, it has no first phase."""
    phases = phases or {"internal_steps": 0}
    args = BuPOConfig(**options(folder, **{**phases, **(options_ or {})}))
    kwargs = {"train_dataset": problems, "processing_class": TOKENIZER, **kwargs}
    trainer = BuPOTrainer(model, reward, args, **kwargs)
    trainer.train()
    return trainer


FIRST: dict = {"internal_layer": 1, "internal_steps": 9, "internal_early_stopping": False, "probe_every": 0}


PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.1,
}  # Adam amplifies a gradient of rounding errors, such as that of key biases


def assert_same(mine, theirs, exact=False, atol=5e-5):
    """Check that parameters are equal. The two heads sum in another order, which Adam's first steps amplify."""
    mine, theirs = dict(mine.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        torch.testing.assert_close(
            parameter,
            theirs[name],
            atol=0 if exact else atol,
            rtol=0 if exact else 1e-3,
            msg=name,
        )


def assert_first_phase(before, model, layer=1):
    """Check that parameters up to the layer moved, and none above."""
    moved = changed(before, model)
    assert moved
    for name in moved:
        number = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        assert number is None or int(number[1]) < layer, name
        assert number or "norm" not in name, name


# -- what a sampler says -------------------------------------------------------------------------------------------------


def unshifted(row, place):
    return 0.0


class Sampler:
    """A `rollout_func` with fixed random completions, and the language model policy's log-probs plus an offset by token."""

    def __init__(self, model, shift=unshifted):
        self.model, self.shift, self.rows = model, shift, 0

    def __call__(self, prompts, trainer):
        generator = torch.Generator().manual_seed(self.rows)
        found = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        policy = InternalPolicies(self.model).language_model
        for prompt in prompts:
            ids = TOKENIZER(prompt)["input_ids"]
            length = int(torch.randint(2, 6, (), generator=generator))
            answer = [*torch.randint(3, 262, (length - 1,), generator=generator).tolist(), TOKENIZER.eos_token_id]
            with torch.no_grad():
                said = policy.log_probs(torch.tensor([ids + answer]))[0, len(ids) - 1 :]
            found["prompt_ids"].append(ids)
            found["completion_ids"].append(answer)
            found["logprobs"].append([x + self.shift(self.rows, place) for place, x in enumerate(said.tolist())])
            self.rows += 1
        return found


def off_policy(folder, shift, monkeypatch, **changes):
    """Run phase 1 with a sampler and a threshold; return each update's advantages, mask, inputs and log-probs."""
    model, seen = small(), []
    args = BuPOConfig(**options(folder, **{"off_policy_mask_threshold": 0.5, **FIRST, **changes}))
    trainer = BuPOTrainer(
        model, token_reward, args, train_dataset=FEW, processing_class=TOKENIZER, rollout_func=Sampler(model, shift)
    )
    true = GRPOTrainer.get_off_policy_mask

    def heard(**given):
        seen.append({**given, "kept": true(**given)})
        return seen[-1]["kept"]

    monkeypatch.setattr(trainer, "get_off_policy_mask", heard)
    trainer.train()
    return seen


# with one update a rollout batch, for which TRL keeps no old log-probs, and with two
@pytest.mark.parametrize("aligned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_answers_on_policy_are_not_masked_in_phase_one(tmp_path, monkeypatch, aligned):
    # updates hardly move the layer
    changes = {"max_steps": 2, "learning_rate": 1e-7, "off_policy_mask_threshold": 1e-3}
    if aligned:
        changes["gradient_accumulation_steps"] = 2
    seen = off_policy(tmp_path, unshifted, monkeypatch, **changes)
    negative = sum((update["advantages"] < 0).sum() for update in seen)
    assert negative > 0 and all((update["kept"] == 1).all() for update in seen)


def test_the_off_policy_mask_measures_the_samplers_mismatch_in_phase_one(tmp_path, monkeypatch):
    """At the first update the layer has not moved, so that each completion's mean difference is its mean offset."""

    def shift(row, place):
        return 0.3 * (row % 4)  # 0, 0.3, 0.6, 0.9 against a threshold of 0.5

    seen = off_policy(tmp_path, shift, monkeypatch, max_steps=2)
    difference = seen[0]["sampling_per_token_logps"] - seen[0]["per_token_logps"]
    mask, advantages = seen[0]["mask"], seen[0]["advantages"][:, 0]
    mean = (difference * mask).sum(1) / mask.sum(1)
    rounded = [round(value / 0.3) for value in mean.tolist()]
    torch.testing.assert_close(mean, 0.3 * torch.tensor(rounded), atol=1e-4, rtol=0)
    assert set(rounded) <= {0, 1, 2, 3} and max(rounded) >= 2
    by_hand = [1.0 if rounded[row] < 2 or advantages[row] >= 0 else 0.0 for row in range(4)]
    assert seen[0]["kept"][:, 0].tolist() == by_hand
    dropped = [(update["kept"] == 0).sum().item() for update in seen]
    assert sum(dropped) > 0


def test_vllms_correction_compares_the_language_model_policy_with_the_sampler_in_phase_one(tmp_path):
    """With a `rollout_func` in place of vLLM, the weights are exp(language model policy - sampler), independent of the layer."""

    class Engine:
        def sync_weights(self): ...

    model, seen = small(), []
    args = BuPOConfig(**options(tmp_path, vllm_importance_sampling_mode="token_truncate", max_steps=1, **FIRST))
    sampler = Sampler(model, lambda row, place: 0.25 * (place % 2))
    trainer = BuPOTrainer(
        model, token_reward, args, train_dataset=FEW, processing_class=TOKENIZER, rollout_func=sampler
    )
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
    loss = trainer.compute_micro_batch_loss
    trainer.compute_micro_batch_loss = lambda model, inputs: (seen.append(dict(inputs)), loss(model, inputs))[1]
    trainer.train()
    inputs, mask = seen[0], seen[0]["completion_mask"].bool()
    by_hand = torch.exp(-0.25 * (torch.arange(mask.size(1)) % 2)).expand(mask.shape)
    torch.testing.assert_close(inputs["importance_sampling_ratio"][mask], by_hand[mask], atol=1e-4, rtol=0)
    shift = inputs["sampling_per_token_logps"] - inputs["old_per_token_logps"]
    torch.testing.assert_close(shift[mask], -by_hand[mask].log(), atol=1e-4, rtol=0)


# -- mixtures of experts -------------------------------------------------------------------------------------------------

DENSE_FIRST: dict[str, dict] = {
    "qwen3_moe": {**MOE, "num_experts": 4, "mlp_only_layers": [0]},
    "ernie4_5_moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
        **{"moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1},
    },
}


@pytest.mark.parametrize(
    ("family", "layer"),
    [("ernie4_5_moe", 1), ("qwen3_moe", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("qwen3_moe", 1), ("ernie4_5_moe", 2))],
)
def test_experts_above_dense_layers_train_in_phase_one(tmp_path, family, layer):
    """At layer 1 no router runs, and the load-balancing loss is 0. At layer 2 it is the loss of one router, computed by hand."""
    model = model_of(family, **DENSE_FIRST[family], num_hidden_layers=3, router_aux_loss_coef=0.1)
    before, routed = snapshot(model), []
    trainer = BuPOTrainer(
        model,
        token_reward,
        BuPOConfig(**options(tmp_path, logging_steps=1, max_steps=2, **{**FIRST, "internal_layer": layer})),
        train_dataset=FEW,
        processing_class=TOKENIZER,
    )

    def loss_of(m, inputs, inner=trainer.compute_micro_batch_loss):
        if not routed:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                logits = model.model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
            routed.append(load_balancing_loss_func(logits[:1], 4, 2, mask).item() if layer == 2 else 0.0)
        return inner(m, inputs)

    trainer.compute_micro_batch_loss = loss_of
    trainer.train()
    assert_first_phase(before, model, layer)
    assert trainer.state.log_history[0]["aux_loss"] == pytest.approx(routed[0], abs=1e-5)
    assert (routed[0] > 0) == (layer == 2)


# -- architectures -------------------------------------------------------------------------------------------------------

TWO = {**SIZES, "vocab_size": 262, "bos_token_id": None, "eos_token_id": 1, "num_hidden_layers": 2}
BARE = {"vocab_size": 262, "bos_token_id": None, "eos_token_id": 1}
LINEAR = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
PER_LAYER = {
    **{"vocab_size_per_layer_input": 262, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "layer_types": ["sliding_attention", "full_attention"],
}
# families with an unknown residual stream, and the additions to their configs
WHOLE: dict[str, dict] = {
    "phi": TWO,
    "cohere": TWO | {"logit_scale": 0.25},
    "opt": TWO | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gptj": BARE | {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4, "n_positions": 128},
    "mpt": BARE | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "bloom": TWO | {"n_head": 4, "n_layer": 2},
    "falcon": {k: v for k, v in TWO.items() if k != "head_dim"} | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "lfm2": TWO | {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": TWO
    | PER_LAYER
    | {
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": [48, 48],
    },
    "gemma4_text": TWO | PER_LAYER | {"global_head_dim": 8, "final_logit_softcapping": 3.0},
    "mamba": TWO | {"state_size": 4},
    "falcon_h1": TWO
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    | {"mamba_chunk_size": 8, "lm_head_multiplier": 0.5},
    "jamba": TWO
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4},
    "minimax": TWO
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "nemotron_h": TWO
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8}
    | {"n_groups": 1, "chunk_size": 8},
    "qwen3_5_text": TWO | LINEAR,
    "qwen3_next": TWO | LINEAR | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24},
}
FAST_FAMILIES = ("cohere",)


def whole_model(kind, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **WHOLE[kind]), dtype=torch.float32)


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST_FAMILIES else pytest.param(kind, marks=pytest.mark.slow) for kind in WHOLE]
)
def test_a_model_of_an_unknown_family_trains_without_a_first_phase(tmp_path, kind):
    """A run without a layer equals GRPOTrainer's to the bit; options that name a layer are refused."""
    mine, theirs = whole_model(kind), whole_model(kind)
    trainer = bupo(mine, tmp_path / "a")
    grpo(theirs, tmp_path / "b")
    assert_same(mine, theirs, exact=True)
    assert changed(snapshot(whole_model(kind)), mine)
    if trainer.stream is None:
        with pytest.raises(UserError):
            bupo(whole_model(kind), tmp_path / "c", phases=FIRST)
        assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_an_unknown_family_has_evaluations_a_penalty_and_an_estimator(tmp_path):
    whole_model("phi").save_pretrained(tmp_path / "model")
    mine, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2))
    changes = {"beta": 0.1, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    bupo(mine, tmp_path / "a", options_=changes, eval_dataset=FEW)
    grpo(theirs, tmp_path / "b", options_=changes, eval_dataset=FEW)
    assert_same(mine, theirs, exact=True)
    bupo(whole_model("phi"), tmp_path / "c", options_={"advantage_estimator": "rloo", "save_strategy": "steps"})
    with pytest.raises(UserError, match="phi"):
        bupo(whole_model("phi"), tmp_path / "d", options_={"frozen_up_to_layer": 1})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_known_family_equals_trl_without_a_first_phase(tmp_path, family):
    mine, theirs = model_of(family), model_of(family)
    bupo(mine, tmp_path / "a", options_={"disable_dropout": True, **PLAIN})
    grpo(theirs, tmp_path / "b", options_={"disable_dropout": True, **PLAIN})
    assert_same(mine, theirs)


class Processor(ProcessorMixin):
    def __init__(self): ...


def test_models_that_read_images_are_refused_before_the_set_up(tmp_path):
    model = small()
    with pytest.raises(UserError, match="reads images: BuPO trains text models, with a tokenizer as processing_class"):
        bupo(model, tmp_path / "a", processing_class=Processor())
    seeing = small()
    seeing.config.vision_config = {}
    with pytest.raises(UserError, match="reads images"):
        bupo(seeing, tmp_path / "a", processing_class=None)
    LlavaConfig().save_pretrained(tmp_path / "model")  # without weights, from its configuration
    with pytest.raises(UserError, match="reads images"):
        bupo(str(tmp_path / "model"), tmp_path / "a", processing_class=None)
    with pytest.raises(UserError, match="reads images"):  # as the sixth argument
        args = BuPOConfig(**options(tmp_path / "a", **FIRST))
        BuPOTrainer(model, token_reward, args, FEW, None, Processor())
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_a_model_with_an_image_tower_trains_on_text(tmp_path):
    """With a tokenizer, TRL and both phases train it as a text model."""

    def model():
        torch.manual_seed(0)
        sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = CLIPVisionConfig(**sees, image_size=8, patch_size=4, projection_dim=16)
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TWO), image_token_index=5)
        return LlavaForConditionalGeneration(config)

    mine, theirs, first = model(), model(), model()
    bupo(mine, tmp_path / "a", options_=PLAIN)
    grpo(theirs, tmp_path / "b", options_=PLAIN)
    assert_same(mine, theirs)
    bupo(first, tmp_path / "c", phases=FIRST)
    assert_first_phase(dict(snapshot(model())), first)


# -- epochs, logs --------------------------------------------------------------------------------------------------------


def seen_by(reward):
    """Make a reward function that records its prompts."""
    prompts = []

    def noting(prompts_, **kwargs):
        prompts.append(list(prompts_))
        return reward(**kwargs)

    def function(prompts, **kwargs):
        return noting(prompts, **kwargs)

    return function, prompts


def test_without_a_first_phase_later_epochs_equal_trl(tmp_path):
    """Over three epochs of two rollout batches, problems, order and parameters are the same."""
    mine, theirs = small(), small()
    reward_a, seen_a = seen_by(token_reward)
    reward_b, seen_b = seen_by(token_reward)
    epochs = {"num_train_epochs": 3, "max_steps": -1}
    bupo(mine, tmp_path / "a", reward_a, options_=epochs)
    grpo(theirs, tmp_path / "b", reward_b, options_=epochs)
    assert len(seen_a) == 6 and seen_a == seen_b
    assert len({str(seen_a[i : i + 2]) for i in (0, 2, 4)}) > 1  # each epoch has another order
    assert_same(mine, theirs)


@pytest.mark.slow
def test_an_unknown_family_equals_trl_to_the_bit_over_epochs(tmp_path):
    mine, theirs = whole_model("phi"), whole_model("phi")
    epochs = {"num_train_epochs": 3, "max_steps": -1}
    bupo(mine, tmp_path / "a", options_=epochs)
    grpo(theirs, tmp_path / "b", options_=epochs)
    assert_same(mine, theirs, exact=True)


@pytest.mark.slow
def test_the_last_row_of_the_history_holds_what_trls_would(tmp_path):
    """TRL's defaults log a short run in the last row only; bupo logs each rollout batch, and completes the last row."""
    theirs = grpo(small(), tmp_path / "b").state.log_history[-1]
    for steps in (3, 4):  # inside a rollout batch, and at its end
        mine = bupo(small(), tmp_path / "a", options_={"max_steps": steps}).state.log_history[-1]
        missing = {name for name in theirs if name not in mine}
        assert not missing and mine["train_loss"] is not None and mine["reward"] is not None


def test_another_object_as_args_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UserError, match=r"args is not set: pass BuPOConfig\(.*internal_layer=\.\.\.\)"):
        BuPOTrainer(small(), token_reward, train_dataset=FEW)
    args = GRPOConfig(**options(tmp_path))
    with pytest.raises(UserError, match=r"must be a BuPOConfig, got GRPOConfig: .* or internal_steps=0 for GRPO"):
        BuPOTrainer(small(), token_reward, args, train_dataset=FEW)


@pytest.mark.slow
def test_a_pad_token_that_is_the_eos_token_changes_nothing(tmp_path):
    """TRL masks by lengths and by the first eos, so that the id of padding does not matter."""
    runs = []
    for token in (TOKENIZER.pad_token, TOKENIZER.eos_token):
        tokenizer, model = copy.deepcopy(TOKENIZER), small()
        tokenizer.pad_token = token
        bupo(model, tmp_path / "a", phases={**FIRST, "internal_steps": 1}, processing_class=tokenizer)
        runs.append(model)
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id
    first, second = runs
    assert_same(first, second, exact=True)


# -- every option --------------------------------------------------------------------------------------------------------

FAST_OPTIONS = ("top_entropy_quantile", "auto_find_batch_size")
TRIED = [name for name, row in OPTIONS.items() if row.outcome != ELSEWHERE]


def test_every_option_and_argument_of_trl_is_in_the_table():
    """Fails for an option that TRL adds, until the table tries or explains it, and for one that TRL removes."""
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert fields - set(OPTIONS) == set(), "new in TRL"
    assert set(OPTIONS) - fields == set(), "gone from TRL"
    arguments = [name for name in inspect.signature(GRPOTrainer.__init__).parameters if name != "self"]
    assert arguments == list(ARGUMENTS)
    for name, row in OPTIONS.items():
        assert row.outcome == ELSEWHERE or name in row.options or name == "output_dir", name
        assert row.outcome == TRAINS or row.why, f"{name}: why?"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in FAST_OPTIONS else pytest.param(name, marks=pytest.mark.slow) for name in TRIED]
)
def test_an_option_of_trl_in_both_phases(tmp_path, name):
    row = OPTIONS[name]
    moe = {"family": "qwen3_moe", "num_experts": 4, **MOE} if name == "router_aux_loss_coef" else {}
    small(**moe).save_pretrained(tmp_path / "model")

    def model():
        if name == "model_init_kwargs":
            return str(tmp_path / "model")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    evaluated = {"eval_dataset": FEW} if "eval_strategy" in row.options else {}
    if row.outcome == REFUSED:
        with pytest.raises((UserError, ValueError), match=name):
            bupo(model(), tmp_path / "a", options_=row.options, phases=FIRST)
        assert not (tmp_path / "a").exists()
        return
    theirs = grpo(model(), tmp_path / "b", options_=row.options, **evaluated)
    mine = bupo(model(), tmp_path / "a", options_=row.options, **evaluated)
    assert_same(mine.model, theirs.model, atol=1e-3 if name == "bf16" else 5e-5)  # TRL rounds logits to 16 bits
    first = bupo(model(), tmp_path / "c", options_=row.options, phases=FIRST, **evaluated)
    before = {n: p.clone() for n, p in AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters()}
    if not row.options.get("mask_truncated_completions"):  # all completions may be truncated
        assert_first_phase(before, first.model)
    losses = [row.get("loss", row.get("train_loss", 0.0)) for row in first.state.log_history]
    assert losses and all(math.isfinite(loss) for loss in losses)


# -- every argument ------------------------------------------------------------------------------------------------------


async def slow_reward(completion_ids, **kwargs):
    return token_reward(completion_ids)


def sometimes(completion_ids, **kwargs):
    return [None if len(ids) % 2 else 1.0 for ids in completion_ids]


class Counted(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def reward_model():
    config = AutoConfig.for_model("qwen3", **{**TWO, "tie_word_embeddings": True}, num_labels=1)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.config._name_or_path = "embedded"
    return model


def lora(**changes):
    return LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", **changes)


def optimizers(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2), None


def cases():
    """Return the cases: a name, and the arguments of a model that differ."""
    return {
        "positional": lambda model: {},
        "several rewards": lambda model: {"reward": [token_reward, sometimes]},
        "async reward": lambda model: {"reward": slow_reward},
        "reward model": lambda model: {"reward": reward_model(), "reward_processing_classes": TOKENIZER},
        "iterable": lambda model: {"problems": FEW.to_iterable_dataset()},
        "eval_dataset": lambda model: {
            "eval_dataset": {"a": FEW.select([0]), "b": FEW.select([1])},
            "options_": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
        },
        "callbacks": lambda model: {"callbacks": [Counted()]},
        "optimizers": lambda model: {"optimizers": optimizers(model)},
        "peft_config": lambda model: {"peft_config": lora()},
        "rollout_func": lambda model: {"rollout_func": Sampler(model, lambda row, place: 0.1)},
        "conversations": lambda model: {
            "problems": Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in FEW["prompt"]]})
        },
    }


FAST_CASES = ("async reward",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in FAST_CASES else pytest.param(name, marks=pytest.mark.slow) for name in cases()]
)
def test_an_argument_of_trl_in_both_phases(tmp_path, name):
    make = cases()[name]
    mine, theirs, first = small(), small(), small()
    b = grpo(theirs, tmp_path / "b", **make(theirs))
    a = bupo(mine, tmp_path / "a", **make(mine))
    assert_same(a.model, b.model)
    before = snapshot(first)
    c = bupo(first, tmp_path / "c", phases=FIRST, **make(first))
    if name == "peft_config":
        moved = [n for n, p in c.model.named_parameters() if "lora_B" in n and p.abs().max() > 0]
        assert moved and all(".layers.0." in n for n in moved)
    else:
        assert_first_phase(before, first)


# -- tools ---------------------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        The sum.
    """
    return a + b


class Adder:
    """An environment with a reward."""

    def reset(self, **kwargs) -> str | None:
        self.calls = 0
        return None

    def add(self, a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            The sum.
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        return float(self.calls)


def calling_tokenizer():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tools", "environment_factory"])
def test_tools_in_both_phases(tmp_path, monkeypatch, kind):
    """A script replaces sampling: every second completion calls a tool, whose output is in no loss."""
    tokenizer = calling_tokenizer()
    talk = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in FEW["prompt"]]})

    def turn(trainer, prompt_ids, *args, **kwargs):
        found = []
        for ids in prompt_ids:
            asks = "tool_response" not in tokenizer.decode(ids) and trainer.turns % 2 == 0
            word = CALL if asks else "abcdefgh"[: 1 + trainer.turns % 7]
            found.append([*tokenizer(word)["input_ids"], tokenizer.eos_token_id])
            trainer.turns += 1
        return found, None

    monkeypatch.setattr(GRPOTrainer, "turns", 0, raising=False)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", turn)
    given = {"tools": [add]} if kind == "tools" else {"environment_factory": Adder}
    given |= {
        "processing_class": tokenizer,
        "problems": talk,
        "options_": {"max_completion_length": 400, "max_steps": 2},
    }
    mine, theirs, first = (small(max_position_embeddings=4096) for _ in range(3))
    grpo(theirs, tmp_path / "b", **given)
    bupo(mine, tmp_path / "a", **given)
    assert_same(mine, theirs)
    before = snapshot(first)
    run = bupo(first, tmp_path / "c", phases=FIRST, **given)
    assert_first_phase(before, first)
    assert run.state.log_history[0]["tools/call_frequency"] == 0.5
    assert run.state.log_history[0]["tools/failure_frequency"] == 0.0
