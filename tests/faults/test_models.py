"""Every damage of a model's folder, met by every command and by training of both kinds: one line, status 2, nothing left.

`BUPO_FAULTS=short` takes each damage with one command.
"""

import json
import shutil

import pytest
import torch

from bupo.models.loading import load_model
from tests.faults.harness import SHORT
from tests.helpers.damaged_models import (
    GENERATION_WRONG,
    MODEL,
    TOKENIZER_WRONG,
    UP,
    WEIGHTS_WRONG,
    Damage,
    as_type,
    damaged,
    entry,
    settings,
    weights,
    without,
)

pytestmark = pytest.mark.faults

TRAIN = (
    "--dataset arithmetic --size 64 --max_steps 2 --report_to none --output out --per_device_train_batch_size 8 "
    "--num_generations 4 --max_new_tokens 8 --save_strategy no"
)
COMMANDS = {
    "eval": "eval --benchmarks arithmetic --size 2 --k 1 --max_new_tokens 4 --output out",
    "eval of a layer": "eval --benchmarks arithmetic --size 2 --k 1 --max_new_tokens 4 --output out --layer 3",
    "analyze": "analyze --dataset arithmetic --size 2 --max_new_tokens 4 --output out",
    "sample": "sample --prompt 57+23-41 --max_new_tokens 3",
    "train, phase 1": f"train {TRAIN} --internal_layer 2 --internal_steps 1",
    "train, phase 2": f"train {TRAIN} --internal_steps 0",
    "train, with a reference": f"train {TRAIN} --internal_steps 0 --beta 0.1",
    "train, LoRA": f"train {TRAIN} --internal_layer 2 --internal_steps 1 --use_peft --lora_r 2 --lora_target_modules q_proj",
}
DAMAGES = {**WEIGHTS_WRONG, **GENERATION_WRONG, **TOKENIZER_WRONG}
NUMBERS = list(range(8))


def tensors():
    """Names of the embedded model's tensors."""
    return sorted({name for name in load_model("embedded").state_dict() if name != "lm_head.weight"})


def refused(zygote, folder, command, model, says):
    """The command must end with one line that holds these words, and leave nothing."""
    before = names_in(folder)
    ended = zygote.run(*COMMANDS[command].split(), "--model", str(model), folder=folder)
    lines = [line for line in ended.output.splitlines() if "bupo: error: " in line]
    assert ended.status == 2 and len(lines) == 1, ended.output[-3000:]
    assert "Traceback" not in ended.output and len(lines[0]) < 1100
    assert not [part for part in says if part not in lines[0]], lines[0]
    assert names_in(folder) == before


def names_in(folder):
    return {path.name for path in folder.iterdir()} - {"printed.txt"}


def pairs():
    names, commands = list(DAMAGES), list(COMMANDS)
    if SHORT:
        return [(name, commands[number % len(commands)]) for number, name in enumerate(names)]
    return [(name, command) for name in names for command in commands]


@pytest.mark.parametrize(("wrong", "command"), pairs())
def test_a_damaged_model_meets_a_command(wrong, command, zygote, tmp_path):
    model = damaged(DAMAGES[wrong], tmp_path / "model")
    refused(zygote, tmp_path, command, model, DAMAGES[wrong].says)


@pytest.mark.parametrize("number", NUMBERS[::4] if SHORT else NUMBERS)
def test_any_tensor_may_be_missing_or_no_number(number, zygote, tmp_path):
    """Every eighth tensor is left out, and the same ones hold NaN or a number without a square."""
    commands = list(COMMANDS)
    for place, tensor in enumerate(tensors()[number :: len(NUMBERS)]):
        lacking = damaged(Damage(without(tensor), ()), tmp_path / f"lacking-{place}")
        refused(zygote, tmp_path, commands[place % len(commands)], lacking, ("its files lack", tensor))
        value = (float("nan"), 1e30, -1e19, float("inf"))[place % 4]
        wrong = damaged(Damage(entry(tensor, value, place=0), ()), tmp_path / f"wrong-{place}")
        refused(zygote, tmp_path, commands[(place + 3) % len(commands)], wrong, (tensor, "holds"))
        shutil.rmtree(lacking), shutil.rmtree(wrong)


CONFIGURATIONS = [
    {"num_attention_heads": 8},
    {"num_key_value_heads": 4},
    {"head_dim": 16},
    {"intermediate_size": 512},
    {"attention_bias": True},
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
    {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    {"vocab_size": 100},
    {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    {"hidden_size": "wide"},
    {"hidden_size": -128},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("changes", CONFIGURATIONS[::3] if SHORT else CONFIGURATIONS, ids=str)
def test_a_configuration_of_another_model(changes, zygote, tmp_path):
    model = damaged(Damage(settings("config.json", **changes), ()), tmp_path / "model")
    for command in list(COMMANDS)[:1] if SHORT else COMMANDS:
        refused(zygote, tmp_path, command, model, ("model", "cannot be"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_of_other_types_are_loaded(dtype, zygote, tmp_path):
    model = damaged(Damage(as_type(getattr(torch, dtype), 1), ()), tmp_path / "model")
    for command in ("eval", "sample", "train, phase 1"):
        ended = zygote.run(*COMMANDS[command].split(), "--model", str(model), folder=tmp_path)
        assert ended.status == 0, ended.output[-3000:]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("command", list(COMMANDS)[:4] if SHORT else COMMANDS)
def test_states_that_overflow(command, zygote, tmp_path):
    """Weights of 6e4 are numbers of float16; the states they make are none."""
    model = damaged(
        Damage(weights(lambda t: {**t, UP.replace("up", "down"): t[UP].T * 0 + 6e4}), ()), tmp_path / "model"
    )
    words = COMMANDS[command].split()
    ended = zygote.run(*words, "--model", str(model), "--dtype", "float16", folder=tmp_path)
    assert ended.status == 2 and "not finite at layer 3 in float16" in ended.output, ended.output[-3000:]
    assert "bfloat16 or float32" in ended.output


@pytest.mark.parametrize("size", [60_000, 3_000_000])
@pytest.mark.parametrize("kind", ["digits", "one word", "spaces", "emoji"])
def test_long_prompts(kind, size, zygote, tmp_path):
    text = {"digits": "1+", "one word": "aa", "spaces": "  ", "emoji": "🙂🙂"}[kind] * (size // 2) + "1"
    rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(10, 80)]
    rows[-1]["problem"] = text
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in ("eval", "analyze", "train, phase 1"):
        words = (
            COMMANDS[command].replace("--dataset arithmetic", "--dataset long.jsonl").replace("--size 2", "--size 70")
        )
        words = words.replace("--benchmarks arithmetic", "--benchmarks long=long.jsonl").replace(
            "--size 64", "--size 70"
        )
        ended = zygote.run(*words.split(), "--model", str(MODEL), folder=tmp_path)
        assert ended.status == 2 and "the prompt has" in ended.output, ended.output[-3000:]
        assert not (tmp_path / "out").exists()
