"""Every bad input gets one line that names the option or file, its value and what is allowed; status 2; nothing left on disk."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoConfig, AutoModel

from bupo.commands import parsing
from bupo.commands.main import main
from tests.bad_inputs import FILES, ROWS

MODEL = Path(__file__).parents[1] / "src" / "bupo" / "embedded" / "model"


def make_files(folder):
    """`FILES`, and models that are not whole."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    pd.DataFrame({"problem": ["1+1"], "deep": [{"a": 1}]}).to_parquet(folder / "bools.parquet")
    for name in ("no-tokenizer", "cut-weights", "no-weights"):
        shutil.copytree(MODEL, folder / name)
    for path in (folder / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    (folder / "no-weights" / "model.safetensors").unlink()
    weights = folder / "cut-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes)).save_pretrained(folder / "encoder")
    shutil.copy(MODEL / "tokenizer.json", folder / "encoder")
    shutil.copy(MODEL / "tokenizer_config.json", folder / "encoder")


def seen(folder):
    """What a folder holds: names, kinds and sizes."""
    return {
        os.path.join(place, name): os.path.getsize(os.path.join(place, name)) if name in files else None
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if "__pycache__" not in (name, os.path.basename(place))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad") / "work"
    here.mkdir()
    make_files(here)
    return here


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """A command's parser is made once: to make one takes longer than all else that a row does."""
    made = {}

    def parser(classes, **options):
        key = (*classes, options["prog"])
        if key not in made:
            built = Parser(classes, **options)
            made[key] = built, [(action, action.default) for action in built._actions]
        for action, default in made[key][1]:  # a YAML file sets them
            action.default = default
        return made[key][0]

    Parser, parsing._Parser = parsing._Parser, parser
    yield
    parsing._Parser = Parser


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join([row.words[0], *row.words[-3:]])[:60])
def test_one_line_and_nothing_left(inside, capfd, row):
    before = seen(inside.parent)
    status = main(list(row.words))
    lines = capfd.readouterr().err.strip().splitlines()
    complaints = [line for line in lines if line.startswith("bupo: error: ")]
    assert status == 2 and len(complaints) == 1, lines
    assert not [line for line in lines if "Traceback" in line]
    assert not [part for part in row.says if part not in complaints[0]], complaints[0]
    assert len(complaints[0]) < 1000
    assert seen(inside.parent) == before
