"""Every recipe is parsed and run: on a tiny model of the family with as many layers, for a rollout batch of each kind."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from trl import GRPOTrainer, ModelConfig

from bupo.cli.main import main
from bupo.cli.parsing import parse_options
from bupo.data.chat_templates import CHAT_TEMPLATES, describe_chat_template, load_chat_template
from bupo.models.loading import EMBEDDED_MODEL, load_tokenizer
from bupo.training.callbacks.metrics_file import read_metrics
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions
from bupo.utils.errors import UserError
from tests.helpers.tiny_models import tiny_model

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.yaml") if path.parent.name != "accelerate")
ALWAYS_RUN = ("qwen3-4b/bupo", "octothinker-3b/ppo", "cpu/embedded-bupo", "cpu/embedded-ppo-shared", "cpu/smollm2-bupo")
LAYERS = {"qwen3-4b": 36, "qwen3-8b": 36, "octothinker-3b": 28, "octothinker-8b": 32, "cpu": 30}
METHODS = {"bupo", "final-norm", "grpo", "rloo", "reinforce++", "ppo"}


def read(recipe):
    return yaml.safe_load((ROOT / recipe).read_text())


def parsed(recipe):
    return parse_options((TrainOptions, BuPOConfig, ModelConfig), ["--config", str(ROOT / recipe)], "bupo train")


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_read(recipe):
    problems, config, model = parsed(recipe)
    assert model.model_name_or_path == read(recipe)["model"] and problems.reward_funcs == ["math"]
    assert config.phase_schedule.batches < config.max_steps  # the whole policy has its turn


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, id=str(path), marks=[] if str(path.with_suffix("")) in ALWAYS_RUN else [pytest.mark.slow])
        for path in RECIPES
    ],
)
def test_a_recipe_runs(tmp_path, recipe):
    """All of its options as they are, but for sizes, and the model where it is on the hub."""
    options = read(recipe)
    _, config, _ = parsed(recipe)
    first = config.phase_schedule.batches
    small = {
        "max_steps": 2 if first else 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "num_generations": 4,
        "max_completion_length": 12,
        "size": 8,
        "save_strategy": "no",
        "use_vllm": False,
        "bf16": False,
        "output_dir": str(tmp_path / "run"),
    }
    if config.internal_schedule:
        small |= {"internal_schedule": f"[[{config.phase_schedule.stages[0].layer}, 1]]", "max_steps": 2}
    elif first:
        small["internal_steps"] = 1
    if config.internal_layer == "auto":  # two prompts do not show a boundary; tests/training/test_probes.py shows it
        small["internal_layer"] = 5
    if options["model"] != EMBEDDED_MODEL:
        family = "qwen3" if "qwen3" in str(recipe) else "llama"
        stand_in = tiny_model(
            family, vocab_size=262, num_hidden_layers=LAYERS[recipe.parts[0]], bos_token_id=None, eos_token_id=1
        )
        stand_in.save_pretrained(tmp_path / "model")
        load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path / "model")
        small["model_name_or_path"] = str(tmp_path / "model")
        if not options["dataset"].startswith("reasoning_gym"):
            rows = [{"question": f"{i}+1", "final_answer": str(i + 1)} for i in range(9)]
            (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
            small["dataset"] = str(tmp_path / "problems.jsonl")
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["train", "--config", str(ROOT / recipe), *flags]) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "phase" in row]
    assert [row["phase"] for row in rows] == ([1, 2] if first else [2])


@pytest.mark.parametrize("model", [name for name in LAYERS if name != "cpu"])
def test_a_model_has_every_method_of_table_1(model):
    assert {path.stem for path in RECIPES if path.parts[0] == model} >= METHODS


# What is written in each recipe of the paper's models, by option, in the order of `LAYERS` where it differs by model: docs/recipes.md
# has the same table with the paper's values, their source, and the reason where they differ.
WRITTEN: dict = {
    "model": ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "OctoThinker/OctoThinker-3B-Hybrid-Base", "OctoThinker/OctoThinker-8B-Hybrid-Base"),
    "dataset": "zwhe99/DeepMath-103K", "size": 5000, "shuffle_seed": 0, "prompt_column": "question", "answer_column": "final_answer",
    "max_prompt_tokens": 1024, "max_new_tokens": (7168, 7168, 3072, 3072), "num_generations": 8, "temperature": 1.0, "top_p": 1.0,
    "advantage_estimator": "grpo", "loss_type": "dapo", "epsilon": 0.2, "delta": 10.0, "beta": 0.0,
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "max_steps": 300 * 4,
    "bf16": True, "gradient_checkpointing": True, "seed": 42, "vllm_importance_sampling_correction": False,
    # eight processes
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 16,
    "use_vllm": True, "vllm_mode": "colocate", "save_strategy": "steps", "save_steps": 120, "report_to": "none",
}  # fmt: skip
BY_FAMILY: dict[str, dict] = {
    "qwen3": {
        "system_prompt": "Please reason step by step, and put your final answer within \\boxed{}.",
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "octothinker": {"chat_template": "octothinker"},
}
IPA: dict = {"internal_layer": (6, 6, 27, 31), "internal_steps": (30, 20, 20, 20), "internal_early_stopping": False}
CRITIC = {
    "critic_backbone": "copy",
    "critic_learning_rate": 1e-5,
    "cliprange_value": 0.5,
    "gamma": 1.0,
    "lam": 1.0,
}
BY_METHOD: dict[str, dict] = {
    "bupo": IPA,
    "final-norm": {**IPA, "internal_lens": "final_norm"},
    "grpo": {"internal_steps": 0},
    "rloo": {"internal_steps": 0, "advantage_estimator": "rloo"},
    "reinforce++": {"internal_steps": 0, "advantage_estimator": "reinforce++"},
    "ppo": {"internal_steps": 0, "advantage_estimator": "ppo", **CRITIC},
    "frozen": {"internal_steps": 0, "frozen_up_to_layer": 6},
    "slow": {"internal_steps": 0, "layer_lr_multipliers": {7: 0.1}},
}
# What no recipe writes, because the default of TRL, or of bupo, is the paper's or its code's.
DEFAULTS: dict = {
    "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "warmup_steps": 0,
    "num_iterations": 1, "epsilon_high": None, "entropy_coef": 0.0, "scale_rewards": "group", "reward_weights": None,
    "importance_sampling_level": "token", "mask_truncated_completions": False, "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None, "multi_objective_aggregation": "sum_then_normalize", "shuffle_dataset": True,
    "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None,
    "fp16": False, "model_init_kwargs": None, "use_liger_kernel": False, "neftune_noise_alpha": None, "label_smoothing_factor": 0.0,
    "internal_module": "layer", "internal_schedule": None,
}  # fmt: skip
PAPERS_MODELS = [path for path in RECIPES if path.parts[0] != "cpu"]


def expected(recipe):
    """All that a recipe of the paper's models says."""
    model, place = recipe.parts[0], list(LAYERS).index(recipe.parts[0])
    values = (
        WRITTEN
        | BY_FAMILY[model.rpartition("-")[0]]
        | BY_METHOD[recipe.stem]
        | {"output": f"runs/{model}-{recipe.stem}"}
    )
    return {name: value[place] if isinstance(value, tuple) else value for name, value in values.items()}


@pytest.mark.parametrize("recipe", PAPERS_MODELS, ids=str)
def test_a_recipe_is_the_papers(recipe):
    """Every value, what is left to defaults, and the batch that it comes to on eight processes."""
    options = expected(recipe)
    assert read(recipe) == options
    problems, config, model = parsed(recipe)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.internal_lens == options.get("internal_lens", "raw")
    assert model.dtype in (None, "float32") and problems.reward_funcs == ["math"]  # weights in fp32, bf16 by autocast
    answers = 8 * options["per_device_train_batch_size"]  # of eight processes
    assert answers * options["gradient_accumulation_steps"] == 32 * 8  # 32 prompts an update
    assert answers * options["steps_per_generation"] == 128 * 8  # 128 a rollout batch


def test_what_no_option_sets():
    """What docs/recipes.md says of TRL's code."""
    source = inspect.getsource(GRPOTrainer)
    assert "advantages / (std_rewards + 1e-4)" in source
    assert (
        "self.current_gradient_accumulation_steps / self.args.steps_per_generation" in source
    )  # the token mean's window
    assert set(BY_METHOD) == {path.stem for path in PAPERS_MODELS}


def as_shown(value):
    """A value as the document writes it."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    return re.sub(r"^1.0e-0", "1e-", text)


def test_the_documents_tables_are_the_recipes():
    """A row for each option, with the recipes' values and no others; no row for an option that no recipe has."""
    lines = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text().splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if re.match(r"\| `\w+`.* \| .* \| `", line)]
    shown = {frozenset(re.findall(r"`(\w+)`", row[0])): set(re.findall(r"`([^`]*)`", row[2])) for row in rows}
    values: dict[str, set] = {}
    for recipe in PAPERS_MODELS:
        for name, value in (DEFAULTS | {"internal_lens": "raw"} | expected(recipe)).items():
            values.setdefault(name, set()).add(as_shown(value))
    assert {name for names in shown for name in names} == set(values) - {"output"}
    for names, told in shown.items():
        assert told == set().union(*(values[name] for name in names)), names


def test_templates():
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    tokenizer.chat_template = load_chat_template("qwen-math")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (  # Qwen2.5-Math's
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer.chat_template = load_chat_template("octothinker")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (  # `orz_base` of rl_dataset.py in the paper's public code, [PROMPT] filled
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
        "first thinks about the reasoning process in the mind and then provides the user with the answer. User: You must put "
        "your answer inside \\boxed{} and Your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "What is 2 + 3?\nAssistant:"
    )
    assert set(CHAT_TEMPLATES) == {"qwen-math", "octothinker"}
    assert describe_chat_template(tokenizer) == "chat template: the model's own"  # of a model that was trained with it
    assert describe_chat_template(tokenizer, "qwen-math") == "chat template: qwen-math"
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking %}{% endif %}"
    assert describe_chat_template(tokenizer) == "chat template: the model's own, no thinking"  # the paper's for Qwen3
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert describe_chat_template(tokenizer) == "chat template: the model's own; its wording is not the paper's"
    with pytest.raises(
        UserError, match=r"chat_template must be qwen-math, octothinker or a \.jinja file, got 'chatml'"
    ):
        load_chat_template("chatml")


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert load_chat_template(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}!"
