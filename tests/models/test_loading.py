"""A model, adapter or tokenizer is loaded exactly from its files, or refused in one line."""

import json
import logging
import shutil
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bupo
from bupo import InternalPolicies, UserError
from bupo.analysis.options import AnalyzeOptions
from bupo.cli.main import main
from bupo.data.chat_templates import check_prompt_characters, check_prompt_tokens, tokenize_prompt
from bupo.evaluation.options import EvalOptions
from bupo.models.loading import ModelLimits, get_model_limits, load_model, load_on_device, load_tokenizer
from bupo.training.config import BuPOConfig
from bupo.training.train_data import TrainOptions
from bupo.training.trainer import BuPOTrainer
from tests.helpers.damaged_models import (
    GENERATION_WRONG,
    MODEL,
    TOKENIZER_WRONG,
    UP,
    WEIGHTS_WRONG,
    Damage,
    damaged,
    entry,
    more_tokens,
    settings,
    sharded,
    weights,
    without,
)
from tests.helpers.tiny_models import FAMILIES, tiny_model

ROWS = Dataset.from_list([{"prompt": f"{i}+1"} for i in range(8)])


def is_one_line(error, parts):
    line = str(error.value)
    assert "\n" not in line and len(line) < 900
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("wrong", [*WEIGHTS_WRONG, *GENERATION_WRONG])
def test_a_damaged_model_is_refused(wrong, tmp_path, capfd):
    damage = (WEIGHTS_WRONG | GENERATION_WRONG)[wrong]
    folder = damaged(damage, tmp_path / "model")
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    is_one_line(error, damage.says)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("wrong", TOKENIZER_WRONG)
def test_a_tokenizer_that_is_not_the_models_is_refused(wrong, tmp_path):
    damage = TOKENIZER_WRONG[wrong]
    with pytest.raises(UserError) as error:
        load_tokenizer(str(damaged(damage, tmp_path / "model")))
    is_one_line(error, damage.says)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_loaded(family, tmp_path, caplog):
    """Tied heads, buffers, mixtures of experts: tensors that a complete folder leaves out are not missing."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for name, values in model.state_dict().items():
        assert torch.equal(values, loaded.state_dict()[name]), name
    assert not caplog.records


def test_what_a_model_may_hold_besides_is_used_without_it(tmp_path, caplog):
    """A value head, a tower for images, a layer for several tokens at once, old buffers: one line names them."""
    more = {
        "v_head.summary.weight": torch.ones(1, 128),
        "vision_tower.layers.0.fc1.weight": torch.ones(2, 2),
        "model.layers.8.eh_proj.weight": torch.ones(2, 2),
        "model.layers.8.mlp.up_proj.weight": torch.ones(256, 128),
        "model.layers.0.attn.masked_bias": torch.ones(1),
    }
    folder = damaged(Damage(weights(lambda tensors: tensors | more), ()), tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(folder))
    for name, values in load_model("embedded").state_dict().items():
        assert torch.equal(values, loaded.state_dict()[name])
    (record,) = caplog.records
    assert "which are not used" in record.getMessage() and "v_head" not in record.getMessage().splitlines()[1:]


@pytest.mark.parametrize(
    "make",
    [
        sharded(),
        settings("generation_config.json", eos_token_id=[1, 2], temperature=0, num_return_sequences=1, foo="bar"),
        lambda folder: (folder / "generation_config.json").unlink(),
        more_tokens("<image>", special=True),  # like Gemma's, which no text contains
    ],
)
def test_a_complete_model_of_another_form_is_loaded(make, tmp_path):
    folder = str(damaged(Damage(make, ()), tmp_path / "model"))
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    assert torch.equal(loaded.lm_head.weight, load_model("embedded").lm_head.weight)
    assert tokenizer.decode(tokenizer("12+30")["input_ids"]) == "12+30"


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
def test_the_heads_bias_may_mask(value, tmp_path, monkeypatch):
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    with torch.no_grad():
        model.lm_head.bias[50:] = value
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: (model, REPORT))
    model.save_pretrained(tmp_path)
    assert InternalPolicies(load_model(str(tmp_path))).identity_errors.max_error < 1e-5
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds"):
        load_model(str(tmp_path))


REPORT = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


def test_float16_that_overflows_in_the_weights(tmp_path):
    folder = damaged(Damage(entry(UP, 1e5), ()), tmp_path / "model")
    with pytest.raises(UserError, match=r"up_proj\.weight holds inf \(in float16\): .*bfloat16 or float32"):
        load_model(str(folder), dtype="float16")
    load_model(str(folder), dtype="bfloat16")


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("phase", [1, 2])
def test_float16_that_overflows_on_the_way(layer, phase, tmp_path):
    """Weights are finite, states are not: the error names the layer, and does not blame the family."""
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        if layer == 0:
            model.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out * 1e6)
        else:
            model.model.layers[layer - 1].mlp.down_proj.weight.fill_(6e4)
    place = r"at layer \d" if layer else r"at the embedding \(layer 0\)"
    with pytest.raises(UserError, match=rf"not finite {place} in float16.*65504.*bfloat16 or float32"):
        InternalPolicies(model)
    args = BuPOConfig(
        str(tmp_path),
        internal_layer=2 if phase == 1 else None,
        internal_steps=2 if phase == 1 else 0,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
    )
    with pytest.raises(UserError, match=rf"not finite {place} in float16"):
        BuPOTrainer(model, lambda **columns: [], args, ROWS, processing_class=load_tokenizer("embedded"))
    model.float()
    if layer:
        assert InternalPolicies(model).identity_errors.max_error < 1e-4


def test_bfloat16_states_that_are_not_finite_mean_damaged_weights():
    model = tiny_model("gemma2", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:] = torch.nan
    with pytest.raises(UserError, match="not finite at layer 2 in bfloat16: its weights are damaged"):
        InternalPolicies(model)


# -- adapters ------------------------------------------------------------------------------------------------------------

KINDS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "with a head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


def adapter_of(kind, folder, change=None):
    """Save an adapter for the embedded model, optionally with changed tensors, and return the original ones."""
    get_peft_model(load_model("embedded"), KINDS[kind]).save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if change:
        save_file(change(tensors), file, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_adapter_is_loaded(kind, tmp_path, recwarn):
    saved = adapter_of(kind, tmp_path)
    adapted = load_on_device("embedded", adapter=str(tmp_path))
    values = {
        name.replace(".default", "").replace(".modules_to_save", ""): x
        for name, x in adapted.state_dict().items()
        if ".original_module" not in name
    }
    for name, expected in saved.items():
        if kind == "prompt":
            assert torch.equal(adapted.prompt_encoder["default"].embedding.weight, expected)
        else:
            found = next(x for key, x in values.items() if key.removesuffix(".weight") == name.removesuffix(".weight"))
            assert torch.equal(found.view_as(expected), expected), name


def renamed(tensors):
    return {name.replace("model.layers", "decoder.h"): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, ("lack", "layers.0", "also hold", "decoder.h.0")),
        (lambda t: dict(list(t.items())[1:]), ("lack", "layers.0")),
        (lambda t: {"x": torch.ones(2)}, ("lack", "also hold")),
        (
            lambda t: {**t, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 128)},
            ("layers.9",),
        ),
        (lambda t: {name: x * torch.nan for name, x in t.items()}, ("holds nan",)),
        (lambda t: {name: x + 1e22 for name, x in t.items()}, ("holds 1e+22",)),
        (lambda t: {name: x[:, :1].contiguous() for name, x in t.items()}, ("size mismatch",)),
    ],
)
def test_a_damaged_adapter_is_refused(change, says, tmp_path):
    adapter_of("lora", tmp_path, change)
    with pytest.raises(UserError) as error:
        load_on_device("embedded", adapter=str(tmp_path))
    is_one_line(error, ("adapter", *says))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    larger = tiny_model("llama", num_hidden_layers=6)
    get_peft_model(larger, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"also hold .*layers\.4.*give the model that it was trained on"):
        load_on_device(str(tmp_path / "base"), adapter=str(tmp_path))


# -- all entry points -----------------------------------------------------------------------------------------------------

COMMANDS = {
    "eval": "--benchmarks arithmetic --size 2 --k 1 --max_new_tokens 4 --output out",
    "analyze": "--dataset arithmetic --size 2 --max_new_tokens 4 --output out",
    "sample": "--prompt 57+23-41 --max_new_tokens 3",
    "train": (
        "--dataset arithmetic --size 64 --internal_layer 2 --internal_steps 1 --max_steps 2 --report_to none --output out "
        "--per_device_train_batch_size 8 --num_generations 4 --max_new_tokens 8 --save_strategy no"
    ),
}
SOME = {
    "missing": WEIGHTS_WRONG["a tensor is missing"],
    "renamed": WEIGHTS_WRONG["all under other names"],
    "nan": WEIGHTS_WRONG["nan"],
    "int8": WEIGHTS_WRONG["int8"],
    "generation": GENERATION_WRONG["text as the end"],
    "tokenizer": TOKENIZER_WRONG["no files, Gemma's type"],
    "vocabulary": TOKENIZER_WRONG["a token more"],
}


@pytest.mark.parametrize("wrong", SOME)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(command, wrong, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    damaged(SOME[wrong], tmp_path / "model")
    assert main([command, "--model", "model", *COMMANDS[command].split()]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    (complaint,) = [line for line in lines if line.startswith("bupo: error: ")]
    assert not [part for part in SOME[wrong].says if part not in complaint], complaint
    assert not [line for line in lines if "Traceback" in line]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("command", ["eval", "analyze", "sample"])
def test_every_command_refuses_a_damaged_adapter(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    adapter_of("lora", tmp_path / "adapter", renamed)
    assert main([command, "--adapter", "adapter", *COMMANDS[command].split()]) == 2
    assert "adapter 'adapter' cannot be put on the model: its files lack" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def arguments_of(folder, **changes):
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "report_to": "none",
    }
    return BuPOConfig(
        str(folder), internal_layer=2, internal_steps=1, max_steps=1, save_strategy="no", **usual | changes
    )


@pytest.mark.parametrize("wrong", SOME)
def test_calls_from_python_refuse(wrong, tmp_path):
    folder = str(damaged(SOME[wrong], tmp_path / "model"))
    options: dict[str, Any] = {"output": str(tmp_path / "out"), "size": 2, "max_new_tokens": 4}
    calls = [
        lambda: bupo.evaluate(folder, EvalOptions(benchmarks=["arithmetic"], k=1, **options)),
        lambda: bupo.analyze(folder, AnalyzeOptions(dataset="arithmetic", **options)),
        lambda: bupo.train(folder, arguments_of(tmp_path / "out"), TrainOptions(dataset="arithmetic", size=16)),
        lambda: BuPOTrainer(folder, lambda **columns: [], arguments_of(tmp_path / "out"), train_dataset=ROWS),
    ]
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        is_one_line(error, SOME[wrong].says)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_trainer_loads_a_model_by_name(tmp_path):
    """TRL loads the reference model by the same name."""
    trainer = BuPOTrainer(str(MODEL), lambda **columns: [], arguments_of(tmp_path, beta=0.1), train_dataset=ROWS)
    expected = load_file(MODEL / "model.safetensors")
    for model in (trainer.model, trainer.ref_model):
        for name, values in expected.items():
            assert torch.equal(model.state_dict()[name].cpu(), values)


# -- prompts -------------------------------------------------------------------------------------------------------------


def test_limits_of_models():
    assert get_model_limits(tiny_model("llama").config) == ModelLimits(128, False, 97)
    assert get_model_limits(tiny_model("gpt2").config) == ModelLimits(128, True, 97)
    assert (
        ModelLimits(128, True).max_prompt_length == 128
        and ModelLimits(128, False).max_prompt_length == 512
        and ModelLimits().max_prompt_length is None
    )


@pytest.mark.parametrize(
    ("prompt", "learned", "refused"),
    [
        ([1] * 127, True, None),
        ([1] * 128, True, "leaves no room for an answer in the model's context of 128"),
        ([1] * 511, False, None),
        ([1] * 512, False, "is more than 4 times the model's context of 128"),
        ([1, 96], False, None),
        ([1, 97], False, "holds token 97, and the model has embeddings for 97"),
    ],
)
def test_prompts_that_a_model_can_read(prompt, learned, refused):
    limits = ModelLimits(128, learned, 97)
    if refused is None:
        check_prompt_tokens([[1], prompt], limits, "problems")
    else:
        with pytest.raises(UserError, match=f"problems, row 1: the prompt .*{refused}"):
            check_prompt_tokens([[1], prompt], limits, "problems")


def test_a_long_prompt_is_refused_before_it_is_tokenized():
    message = [{"role": "system", "content": "x" * 5000}, {"role": "user", "content": "y" * 5000}]
    check_prompt_characters(["x" * 8192, message[:1]], ModelLimits(128), "problems")
    with pytest.raises(UserError, match="problems, row 7: the prompt has 10000 characters"):
        check_prompt_characters(["x", message], ModelLimits(128), "problems", 6)


def long_problems(folder):
    rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(10, 30)]
    rows[1]["problem"] = "1+" * 1_500_000 + "1"
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("command", COMMANDS)
def test_three_megabytes_are_refused_by_every_command(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    long_problems(tmp_path)
    words = COMMANDS[command].replace("--dataset arithmetic", "--dataset long.jsonl").replace("size 64", "size 20")
    words = words.replace("--benchmarks arithmetic", "--benchmarks long=long.jsonl")
    if command == "sample":
        (tmp_path / "c.yaml").write_text(json.dumps({"prompt": "1+" * 1_500_000 + "1"}))
        words = "--config c.yaml"
    before = sorted(tmp_path.iterdir())
    assert main([command, "--model", "embedded", *words.split()]) == 2
    error = capfd.readouterr().err
    assert "the prompt has 3000001 characters, which the model's context of 512 tokens cannot hold" in error
    assert sorted(tmp_path.iterdir()) == before


# -- system messages -----------------------------------------------------------------------------------------------------

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)


def test_a_template_without_a_system_message_names_the_remedy():
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = NO_SYSTEM
    user = [{"role": "user", "content": "1+1"}]
    with pytest.raises(UserError, match=r"System role not supported.*--system_prompt '' \(system_prompt: '' in YAML\)"):
        tokenize_prompt(tokenizer, [{"role": "system", "content": "Think."}, *user])
    assert tokenize_prompt(tokenizer, user)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError) as error:
        tokenize_prompt(tokenizer, [{"role": "system", "content": "Think."}, *user])
    assert "system_prompt" not in str(error.value)


@pytest.mark.parametrize(
    "command", ["sample", *(pytest.param(c, marks=pytest.mark.slow) for c in ("eval", "analyze", "train"))]
)
def test_the_remedy_works(command, tmp_path, monkeypatch, capfd):
    """In a folder of a run that was trained with a system message, by flag and by YAML."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(NO_SYSTEM)
    words = [command, "--model", "model", *COMMANDS[command].split()]
    if command != "train":
        (tmp_path / "model" / "evaluation.json").write_text(json.dumps({"system_prompt": "Think."}))
    else:
        words += ["--system_prompt", "Think."]
    assert main(words) == 2
    assert "give --system_prompt '' (system_prompt: '' in YAML)" in capfd.readouterr().err
    if command == "train":
        words = words[:-2]
    (tmp_path / "plain.yaml").write_text("system_prompt: ''\n")
    for number, remedy in enumerate((["--system_prompt", ""], ["--config", "plain.yaml"])):
        assert main([*(word if word != "out" else f"out{number}" for word in words), *remedy]) in (0, None)


def test_tokenizers_of_few_characters_are_accepted(tmp_path):
    """A tokenizer of digits also returns unknown tokens, but not only these."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "1": 1, "2": 2, "+": 3, "=": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tiny_model("llama").save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="=").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("1+2")["input_ids"] == [1, 3, 2]
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 5


def test_transformers_itself_loads_a_missing_tensor_as_random_numbers(tmp_path):
    """This is the behaviour that the checks prevent."""
    folder = damaged(Damage(without(UP), ()), tmp_path / "model")
    first, second = (AutoModelForCausalLM.from_pretrained(folder).model.layers[2].mlp.up_proj.weight for _ in range(2))
    assert not torch.equal(first, second)
