"""Every recipe is parsed and run: on a tiny model of the family with as many layers, for a rollout batch of each kind."""

from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from bupo.commands.main import main
from bupo.commands.parsing import parse
from bupo.data.templates import TEMPLATES, chat_template, said_of_template
from bupo.errors import UserError
from bupo.model.loading import EMBEDDED, load_tokenizer
from bupo.training.config import BuPOConfig
from bupo.training.inputs import TrainOptions
from bupo.training.metrics_file import read_metrics
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.relative_to(ROOT) for path in ROOT.glob("*/*.yaml"))
ALWAYS_RUN = ("qwen3-4b/bupo", "octothinker-3b/ppo", "cpu/embedded-bupo", "cpu/embedded-ppo-shared", "cpu/smollm2-bupo")
LAYERS = {"qwen3-4b": 36, "qwen3-8b": 36, "octothinker-3b": 28, "octothinker-8b": 32, "cpu": 30}
METHODS = {"bupo", "grpo", "rloo", "reinforce++", "ppo"}
OF_A_METHOD = {
    "internal_layer", "internal_steps", "internal_guard", "internal_lens", "advantage_estimator", "critic_learning_rate", "value_clip",
    "gae_gamma", "gae_lambda", "critic_backbone", "frozen_up_to_layer", "slow_above_layer", "slow_factor", "output",
}  # fmt: skip


def read(recipe):
    return yaml.safe_load((ROOT / recipe).read_text())


def parsed(recipe):
    return parse((TrainOptions, BuPOConfig, ModelConfig), ["--config", str(ROOT / recipe)], "bupo train")


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_is_read(recipe):
    problems, config, model = parsed(recipe)
    assert model.model_name_or_path == read(recipe)["model"] and problems.reward_funcs == ["math"]
    assert config.first_phase.batches < config.max_steps  # the whole policy has its turn


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
    first = config.first_phase.batches
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
        small |= {"internal_schedule": f"[[{config.first_phase.stages[0].layer}, 1]]", "max_steps": 2}
    elif first:
        small["internal_steps"] = 1
    if config.internal_layer == "auto":  # two prompts do not show a boundary; tests/test_dynamics.py shows it
        small["internal_layer"] = 5
    if options["model"] != EMBEDDED:
        family = "qwen3" if "qwen3" in str(recipe) else "llama"
        stand_in = tiny_model(
            family, vocab_size=262, num_hidden_layers=LAYERS[recipe.parts[0]], bos_token_id=None, eos_token_id=1
        )
        stand_in.save_pretrained(tmp_path / "model")
        load_tokenizer(EMBEDDED).save_pretrained(tmp_path / "model")
        small["model_name_or_path"] = str(tmp_path / "model")
        if not options["dataset"].startswith("reasoning_gym"):
            small |= {"dataset": "arithmetic", "prompt_column": "prompt", "answer_column": "answer"}
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["train", "--config", str(ROOT / recipe), *flags]) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "phase" in row]
    assert [row["phase"] for row in rows] == ([1, 2] if first else [2])


@pytest.mark.parametrize("model", [name for name in LAYERS if name != "cpu"])
def test_a_models_recipes_differ_in_the_method_only(model):
    recipes = {path.stem: read(path) for path in RECIPES if path.parts[0] == model}
    assert METHODS | {"final-norm"} <= set(recipes)
    for name, options in recipes.items():
        assert options["output"] == f"runs/{model}-{name}"
        common = {key: value for key, value in options.items() if key not in OF_A_METHOD}
        assert common == {key: value for key, value in recipes["bupo"].items() if key not in OF_A_METHOD}


# What the paper's runs are made of (its table of hyperparameters and its code, where that says more), by option. Of what differs
# by model: in the order of `LAYERS`.
PAPER = {
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "num_generations": 8, "max_new_tokens": (7168, 7168, 3072, 3072),
    "temperature": 1.0, "top_p": 1.0, "max_steps": 300 * 4, "size": 5000, "dataset": "zwhe99/DeepMath-103K",
    "epsilon": 0.2, "beta": 0.0,
    "loss_type": "dapo", "delta": 10.0, "max_grad_norm": 1.0, "bf16": True,  # its code: token mean, dual clip, autocast
    "critic_learning_rate": 1e-5, "gae_gamma": 1.0, "gae_lambda": 1.0,
    "internal_layer": (6, 6, 27, 31), "internal_steps": (30, 20, 20, 20), "internal_guard": False,
    "frozen_up_to_layer": 6, "slow_above_layer": 6, "slow_factor": 0.1,
    "vllm_importance_sampling_correction": False,
}  # fmt: skip
# What it does not say, or what depends on the machine
OURS = {
    "model", "prompt_column", "answer_column", "system_prompt", "chat_template", "chat_template_kwargs", "advantage_estimator",
    "internal_lens", "critic_backbone", "value_clip", "per_device_train_batch_size", "gradient_accumulation_steps",
    "steps_per_generation", "gradient_checkpointing", "use_vllm", "vllm_mode", "save_strategy", "save_steps", "report_to", "output",
}  # fmt: skip


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path.parts[0] != "cpu"], ids=str)
def test_a_recipe_is_the_papers(recipe):
    """Every value that the paper or its code gives, and the batch that it comes to on eight processes."""
    options, place = read(recipe), list(LAYERS).index(recipe.parts[0])
    assert set(options) <= set(PAPER) | OURS
    wanted = {name: value[place] if isinstance(value, tuple) else value for name, value in PAPER.items()}
    if recipe.stem not in ("bupo", "final-norm"):
        wanted["internal_steps"] = 0
    assert {name: options[name] for name in options if name in wanted} == {n: wanted[n] for n in options if n in wanted}
    of_a_method = {
        "critic_learning_rate",
        "gae_gamma",
        "gae_lambda",
        "internal_layer",
        "internal_guard",
        "internal_steps",
    }
    of_a_method |= {"frozen_up_to_layer", "slow_above_layer", "slow_factor"}
    assert set(PAPER) - of_a_method <= set(options)
    answers = 8 * options["per_device_train_batch_size"]  # of eight processes
    assert answers * options["gradient_accumulation_steps"] == 32 * 8  # 32 prompts an update
    assert answers * options["steps_per_generation"] == 128 * 8  # 128 a rollout batch


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("bupo", {"internal_layer", "internal_steps", "internal_guard"}),
        ("final-norm", {"internal_layer", "internal_steps", "internal_guard", "internal_lens"}),
        ("ppo", {"critic_learning_rate", "gae_gamma", "gae_lambda", "value_clip"}),
        ("frozen", {"frozen_up_to_layer"}),
        ("slow", {"slow_above_layer", "slow_factor"}),
    ],
)
def test_a_methods_own_options_are_there(name, needed):
    recipes = [path for path in RECIPES if path.stem == name]
    assert recipes and all(needed <= set(read(path)) for path in recipes)


def test_templates():
    tokenizer = load_tokenizer(EMBEDDED)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    tokenizer.chat_template = chat_template("qwen-math")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (  # Qwen2.5-Math's
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer.chat_template = chat_template("octothinker")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (  # `orz_base` of rl_dataset.py in the paper's public code, [PROMPT] filled
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
        "first thinks about the reasoning process in the mind and then provides the user with the answer. User: You must put "
        "your answer inside \\boxed{} and Your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "What is 2 + 3?\nAssistant:"
    )
    assert set(TEMPLATES) == {"qwen-math", "octothinker"}
    assert said_of_template(tokenizer) == "chat template: the model's own"  # of a model that was trained with it
    assert said_of_template(tokenizer, "qwen-math") == "chat template: qwen-math"
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking %}{% endif %}"
    assert said_of_template(tokenizer) == "chat template: the model's own, no thinking"  # the paper's for Qwen3
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert said_of_template(tokenizer) == "chat template: the model's own; its wording is not the paper's"
    with pytest.raises(
        UserError, match=r"chat_template must be qwen-math, octothinker or a \.jinja file, got 'chatml'"
    ):
        chat_template("chatml")


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert chat_template(str(tmp_path / "mine.jinja")) == "{{ messages[0].content }}!"
