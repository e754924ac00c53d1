"""Copies of the embedded model with one error each, and parts of the error message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

MODEL = Path(__file__).parents[2] / "src" / "bupo" / "embedded" / "model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.2.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


class Damage(NamedTuple):
    """A damaged model.

    Attributes:
        make (`Callable`): damages the folder of an intact model.
        says (`tuple[str, ...]`): parts of the error message.
    """

    make: Callable[[Path], Any]
    says: tuple[str, ...]


def weights(change: Callable[[Tensors], Tensors | None]) -> Callable[[Path], None]:
    """Change the tensors, in place or to those that `change` returns."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors)
        contiguous = {name: values.contiguous() for name, values in (tensors if changed is None else changed).items()}
        save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})

    return make


def settings(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change entries of a JSON file."""

    def make(folder: Path) -> None:
        entries = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**entries, **changes}))

    return make


def text(file: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(content)


def entry(tensor: str, value: float, place: int = 5) -> Callable[[Path], None]:
    """Put one number into a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[tensor].view(-1)[place] = value

    return weights(change)


def layers(count: int) -> Callable[[Path], None]:
    """Change the number of layers in the configuration."""
    return settings("config.json", num_hidden_layers=count, layer_types=["full_attention"] * count)


def sharded(dropped: str | None = None, file: str | None = None) -> Callable[[Path], None]:
    """Split the weights into two files with an index, without a tensor, or without a file in the index."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names, where = sorted(tensors), {}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            shard = f"model-{number:05d}-of-00002.safetensors"
            save_file(
                {name: tensors[name] for name in part if name != dropped}, folder / shard, metadata={"format": "pt"}
            )
            where |= dict.fromkeys(part, shard)
        where = {name: shard for name, shard in where.items() if shard != file}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (folder / WEIGHTS).unlink()

    return make


def without(*endings: str) -> Callable[[Path], None]:
    """Remove the tensors whose names have one of these endings."""
    return weights(lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(endings)})


def no_tokenizer(model_type: str) -> Callable[[Path], None]:
    """Remove the tokenizer files and set a model type for which transformers builds a tokenizer without files."""

    def make(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
        settings("config.json", model_type=model_type, architectures=None)(folder)

    return make


def more_tokens(*tokens: str, special: bool = False) -> Callable[[Path], None]:
    """Add tokens to the tokenizer, but not to the model."""

    def make(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(list(tokens), special_tokens=special)
        tokenizer.save_pretrained(folder)

    return make


def words_only(folder: Path) -> None:
    """Write a tokenizer of two words that fails on all other text."""
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1})).save(str(folder / "tokenizer.json"))


def pickled(dtype: torch.dtype) -> Callable[[Path], None]:
    """Store the weights as a dtype with `torch.save`."""

    def make(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save({name: (values * 100).to(dtype) for name, values in tensors.items()}, folder / "pytorch_model.bin")

    return make


def as_type(dtype: torch.dtype, scale: float = 100) -> Callable[[Path], None]:
    return weights(lambda tensors: {name: (values * scale).to(dtype) for name, values in tensors.items()})


def only(tensor: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[tensor] = (tensors[tensor] * 100).to(dtype)

    return weights(change)


def generation(says: str, **changes: Any) -> Damage:
    return Damage(settings("generation_config.json", **changes), ("generation_config.json cannot be used", says))


LACK, HOLD = "its files lack", "its files hold"
# damaged weights, one of each kind
WEIGHTS_WRONG = {
    "a tensor is missing": Damage(without(UP), (LACK, "1 of the 91 tensors", UP)),
    "a norm is missing": Damage(without("model.norm.weight"), (LACK, "model.norm.weight")),
    "the embedding is missing": Damage(without("embed_tokens.weight"), (LACK, "model.embed_tokens.weight")),
    "a layer is missing": Damage(
        without(*(f"layers.7.{x}" for x in ("weight",)), "7.mlp.up_proj.weight"), (LACK, "7.mlp")
    ),
    "all under other names": Damage(
        weights(lambda t: {f"net.{name.replace('model', 'm')}": x for name, x in t.items()}),
        (LACK, "91 of the 91", "net."),
    ),
    "all norms under other names": Damage(
        weights(lambda t: {name.replace("layernorm", "ln"): x for name, x in t.items()}), (LACK, "16 of the 91", "_ln")
    ),
    "more layers in the configuration": Damage(layers(10), (LACK, "model.layers.8.")),
    "fewer layers in the configuration": Damage(layers(3), (HOLD, "55 tensors", "model.layers.3.")),
    "biases that the configuration leaves out": Damage(
        weights(lambda t: {**t, "model.layers.1.self_attn.q_proj.bias": torch.ones(128)}),
        (HOLD, "model.layers.1.self_attn.q_proj.bias"),
    ),
    "scales without a quantization": Damage(
        weights(lambda t: {**t, UP + "_scale_inv": torch.ones(2, 1)}), (HOLD, UP + "_scale_inv")
    ),
    "another width": Damage(settings("config.json", hidden_size=64), ("has the shape (262, 128)", "(262, 64)")),
    "another vocabulary": Damage(settings("config.json", vocab_size=300), ("has the shape (262, 128)", "(300, 128)")),
    "an index without a tensor": Damage(sharded(dropped=UP), (LACK, UP)),
    "an index without a file": Damage(sharded(file="model-00002-of-00002.safetensors"), (LACK, "more")),
    "a quantization that there is not": Damage(
        lambda folder: (
            as_type(torch.int8)(folder),
            settings("config.json", quantization_config={"quant_method": "zzz"})(folder),
        ),
        ("is stored as I8",),
    ),
    "architectures of another type": Damage(
        settings("config.json", architectures={"a": 1}), ("architectures must be a list",)
    ),
    "no name of an architecture": Damage(
        settings("config.json", architectures=[None]), ("architectures must be a list",)
    ),
    "no layers": Damage(layers(0), ("num_hidden_layers is 0",)),
    "text as a size": Damage(settings("config.json", vocab_size="many"), ("vocab_size", "many")),
    "nan": Damage(entry(UP, float("nan")), (UP, "holds nan", "float32")),
    "inf": Damage(entry("model.norm.weight", float("inf")), ("model.norm.weight", "holds inf")),
    "-inf": Damage(entry("model.embed_tokens.weight", -float("inf")), ("embed_tokens.weight holds -inf",)),
    "1e30": Damage(entry("model.embed_tokens.weight", 1e30, place=-1), ("embed_tokens.weight holds 1e+30",)),
    "-1e25": Damage(entry(UP, -1e25), (UP, "holds -1e+25")),
    "int8": Damage(as_type(torch.int8), ("is stored as I8", "no quantization")),
    "int64": Damage(as_type(torch.int64), ("is stored as I64",)),
    "int8, pickled": Damage(pickled(torch.int8), ("is stored as int8", "no quantization")),
    "one of uint8": Damage(only(UP, torch.uint8), (UP, "is stored as U8")),
    "bool": Damage(as_type(torch.bool), ("is stored as BOOL",)),
}
# damaged generation_config.json
GENERATION_WRONG = {
    "text as the end": generation("eos_token_id must be a token's id", eos_token_id="<|im_end|>"),
    "text among the ends": generation("eos_token_id must be a token's id", eos_token_id=[1, "2"]),
    "an end beyond all numbers": generation("eos_token_id must be a token's id", eos_token_id=10**30),
    "no ends": generation("eos_token_id must be a token's id", eos_token_id=[]),
    "a list as filling": generation("pad_token_id must be a token's id", pad_token_id=[0]),
    "a truth as the end": generation("eos_token_id must be", eos_token_id=True),
    "text as temperature": generation("temperature must be a number", temperature="hot"),
    "a list as top_p": generation("top_p must be a number", top_p=[0.5]),
    "text as a flag": generation("do_sample must be true or false", do_sample="yes"),
    "a negative length": generation("max_new_tokens", max_new_tokens=-4),
    "text as the end, in config.json": Damage(
        lambda folder: (
            (folder / "generation_config.json").unlink(),
            settings("config.json", eos_token_id="<end>")(folder),
        ),
        ("model", "cannot be"),
    ),
    "no JSON": Damage(
        text("generation_config.json", "{broken"), ("generation_config.json cannot be used: it is not valid JSON",)
    ),
    "a list": Damage(text("generation_config.json", "[1]"), ("generation_config.json cannot be used: it is a list",)),
    "bytes": Damage(
        lambda folder: (folder / "generation_config.json").write_bytes(b"\xff\xfe\x00"), ("it is not valid JSON",)
    ),
    "deep": Damage(text("generation_config.json", "[" * 100_000), ("it is not valid JSON",)),
}
# damaged tokenizers
TOKENIZER_WRONG = {
    "no files, Gemma's type": Damage(no_tokenizer("gemma3_text"), ("GemmaTokenizer", "tokenizer.json")),
    "no files, Qwen's type": Damage(no_tokenizer("qwen2"), ("has no tokenizer", "vocab.json", "merges.txt")),
    "no files, Llama's type": Damage(no_tokenizer("llama"), ("has no tokenizer",)),
    "a token more": Damage(more_tokens("<think>"), ("embeddings for 262 tokens", "'<think>' (id 262)")),
    "an end that the model does not have": Damage(
        lambda folder: (
            more_tokens("<end>", special=True)(folder),
            settings("tokenizer_config.json", eos_token="<end>")(folder),
        ),
        ("embeddings for 262 tokens", "'<end>' (id 262)"),
    ),
    "neither an end nor padding": Damage(
        settings("tokenizer_config.json", eos_token=None, pad_token=None),
        ("no end token and no padding token", "eos_token"),
    ),
    "fails on an ordinary text": Damage(words_only, ("cannot read an ordinary text", "[UNK]")),
}


def damaged(damage: Damage, folder: Path) -> Path:
    """Create a damaged copy of the embedded model."""
    shutil.copytree(MODEL, folder)
    damage.make(folder)
    return folder
