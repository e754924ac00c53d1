"""Texts of tokens: they show bytes and white space, and tokens are compared by id."""

import json
import re

import pytest
import torch
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bupo import InternalPolicies
from bupo.analysis.rollouts import Rollout
from bupo.analysis.token_view import build_token_views, get_top_tokens
from bupo.cli import sample
from bupo.cli.main import main
from bupo.data.token_text import format_token, get_token_bytes
from bupo.models.loading import load_model, load_tokenizer
from tests.helpers.tiny_models import tiny_model

TEXTS = ["你好,世界!😀👩‍👩‍👧", "naïve café — Ωμέγα", "  x = 3;\n\treturn\r\n", "日本語のテスト🇯🇵", "12 + 30 = 42"]


def byte_level(merges=40):
    """Return a byte-level BPE tokenizer, like those of GPT-2, Qwen and Llama 3, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["你好 世界 hello world 😀😀"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def byte_fallback():
    """Return a SentencePiece tokenizer with byte fallback, like those of Llama 2, Mistral and Gemma."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁",
        "▁the",
        "the",
        "你",
        "x",
        "=",
    ]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>", pad_token="</s>"
    )


def metaspace():
    """Return a SentencePiece unigram tokenizer, like those of T5, XLM-R and many Japanese models."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("the", -3.0), ("日本", -2.0), ("x", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback, lambda: load_tokenizer("embedded")])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(make, text):
    """The expected bytes are the text's UTF-8, which `decode` of single tokens does not return."""
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    joined = b"".join(get_token_bytes(tokenizer, token) for token in ids)
    assert joined.decode() in (text, " " + text)  # SentencePiece puts a space before a text


def test_bytes_of_incomplete_characters_are_shown_as_bytes():
    for tokenizer in (byte_level(0), byte_fallback(), load_tokenizer("embedded")):
        ids = tokenizer("界😀", add_special_tokens=False)["input_ids"]
        shown = [format_token(tokenizer, token) for token in ids if format_token(tokenizer, token) != "␣"]
        assert shown == [f"<{byte:02X}>" for byte in "界😀".encode()]


def test_all_bytes_have_different_texts():
    """`decode` returns the same character, or nothing, for every token of one byte that is not ASCII."""
    tokenizer = byte_level(0)
    texts = [format_token(tokenizer, token) for token in range(2, 258)]
    assert len(set(texts)) == 256
    assert {text for text in texts if re.fullmatch(r"<[89A-F][0-9A-F]>", text)} == {
        f"<{b:02X}>" for b in range(128, 256)
    }
    assert not any(text.isspace() or not text for text in texts)


def test_tokens_of_several_characters_and_of_a_part():
    tokenizer = byte_level()
    by_piece = {get_token_bytes(tokenizer, token): token for token in range(len(tokenizer))}
    assert format_token(tokenizer, by_piece[b" hello"]) == "␣hello"
    assert format_token(tokenizer, by_piece["😀".encode()]) == "😀"
    parts = [raw for raw in by_piece if raw in ("😀".encode()[:2], "你".encode()[:2], "你".encode()[1:])]
    assert parts and all(format_token(tokenizer, by_piece[raw]) == "".join(f"<{b:02X}>" for b in raw) for raw in parts)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, metaspace])
def test_white_space_and_characters_without_a_glyph_are_visible(make):
    tokenizer = make()
    tokenizer.add_tokens(["\n\n", "\u00a0", "\u3000", "\u200b", "a\ufe0f", "  "])
    for piece, shown in (
        ("\n\n", "⏎⏎"), ("\u00a0", "<U+00A0>"), ("\u3000", "<U+3000>"), ("\u200b", "<U+200B>"), ("a\ufe0f", "a<U+FE0F>"),
        ("  ", "␣␣"),
    ):  # fmt: skip
        assert format_token(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == shown


@pytest.mark.parametrize("make", [byte_fallback, metaspace])
def test_a_space_before_a_word_is_shown(make):
    tokenizer = make()
    before, inside = (format_token(tokenizer, tokenizer.convert_tokens_to_ids(piece)) for piece in ("▁the", "the"))
    assert (before, inside) == ("␣the", "the")
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("▁the")]) == "the"  # the same text


def test_special_tokens_and_ids_beyond_the_vocabulary():
    tokenizer = byte_level()
    assert format_token(tokenizer, 1) == "<end>"
    assert format_token(tokenizer, len(tokenizer)) == f"⟨{len(tokenizer)}⟩" and format_token(tokenizer, -1) == "⟨-1⟩"


# -- where they are compared and shown -------------------------------------------------------------------------------


def test_a_views_tokens_are_the_most_likely_ids():
    """The expected ids are the `argsort` of each layer's logits; the tokens are parts of Chinese characters and emoji."""
    tokenizer = byte_level(0)
    model = tiny_model("qwen3", vocab_size=300, seed=3)
    policies = InternalPolicies(model)
    ids = tokenizer("你好 世界 😀😀")["input_ids"]
    view = get_top_tokens(policies, tokenizer, ids[:4], ids[4:], top=3)
    assert view["ids"] == ids[4:] and view["tokens"] == [format_token(tokenizer, token) for token in ids[4:]]
    for layer in range(1, 5):
        with torch.no_grad():
            expected = policies.layer(layer).logits(torch.tensor([ids]))[0, 3:-1].argsort(-1, descending=True)[:, :3]
        assert view["top_ids"][layer - 1] == expected.tolist()
        texts = [[text for text, _ in cell] for cell in view["top"][layer - 1]]
        assert texts == [[format_token(tokenizer, token) for token in row] for row in expected.tolist()]
    (page,) = build_token_views(policies, tokenizer, [Rollout(ids[:4], ids[4:], "p", "c")])
    assert page["ids"] == view["ids"] and json.dumps(page)


def cells(table):
    """Return which cells of a rich table are bold, by layer (the last first) and position."""
    return [[str(cell.style) for cell in column.cells] for column in table.columns[1:]]


@pytest.mark.parametrize("top", [1, 3])
def test_bold_are_the_layers_whose_most_likely_id_was_sampled(top, tmp_path, monkeypatch, capsys):
    """`bupo sample` runs on Chinese text and emoji, where every other token is a byte that is no complete character."""
    tokenizer = byte_level(0)
    model = tiny_model("qwen3", vocab_size=258, pad_token_id=0, eos_token_id=1, bos_token_id=None, seed=5)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made, inner = [], sample._make_table
    monkeypatch.setattr(sample, "_make_table", lambda *args: made.append(inner(*args)) or made[-1])
    prompt = "你好 世界 😀"
    options = ["--raw_prompt", "--max_new_tokens", "30", "--top", str(top), "--temperature", "0.4", "--seed", "1"]
    assert main(["sample", "--model", str(tmp_path), "--prompt", prompt, *options]) == 0
    styles = [column for table in made for column in cells(table)]

    loaded = load_model(str(tmp_path)).eval()
    policies, ids = InternalPolicies(loaded, temperature=0.4), tokenizer(prompt)["input_ids"]
    torch.manual_seed(1)
    whole = policies.language_model.generate(torch.tensor([ids]), max_new_tokens=30)
    with torch.no_grad():
        best = torch.stack([policies.layer(n).logits(whole)[0, len(ids) - 1 : -1].argmax(-1) for n in (4, 3, 2, 1)], 1)
    expected = best == whole[0, len(ids) :, None]
    assert [[style == "bold" for style in column] for column in styles] == expected.tolist()
    rows = zip(best.tolist(), whole[0, len(ids) :].tolist(), strict=True)
    alike = [[tokenizer.decode([b]) == tokenizer.decode([token]) for b in row] for row, token in rows]
    assert 0 < expected.sum() < torch.tensor(alike).sum(), "compared by text, other cells would be bold"


def test_a_table_shows_brackets_as_they_are():
    """The console does not interpret `<E7>` and `[bold]` as markup."""
    view = {"ids": [5], "tokens": ["<E7>"], "top": [[[["[bold]", 0.5]]]], "top_ids": [[[5]]]}
    console = Console(width=60)
    with console.capture() as captured:
        console.print(sample._make_table(view, slice(0, 1)))
    assert "<E7>" in captured.get() and "[bold]" in captured.get()
    assert isinstance(sample._make_table(view, slice(0, 1)).columns[1].header, Text)
