"""Every bad input gets one line that names the option or file, its value and what is allowed; status 2; nothing left on disk."""

import os
import shutil
from dataclasses import fields
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.training_args import OptimizerNames
from trl import GRPOConfig, ModelConfig

import bupo
from bupo.analysis.options import AnalyzeOptions
from bupo.cli import parsing
from bupo.cli.main import main
from bupo.cli.sample import SampleOptions
from bupo.evaluation.options import EvalOptions
from bupo.options.ranges import MAX_INTEGER, check_number, get_field_types, get_non_none_types, get_option_detail
from bupo.options.training import MethodOptions
from bupo.planning.options import PlanOptions
from bupo.training.config import BuPOConfig
from bupo.training.demo import DemoOptions
from bupo.training.train_data import TrainOptions
from bupo.training.validation.arguments import describe_short_run
from bupo.training.validation.dry_run import dry_run_components
from bupo.training.validation.option_ranges import MODEL_RANGES, RANGES, STEP_STRATEGIES
from bupo.utils.errors import UserError
from tests.helpers.bad_inputs import FILES, ROWS

ANALYZE: Any = AnalyzeOptions  # for values that its types refuse
EVAL: Any = EvalOptions
TRAIN: Any = TrainOptions
MODEL = Path(__file__).parents[2] / "src" / "bupo" / "embedded" / "model"


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
    learned = {
        "vocab_size": 262,
        "n_positions": 512,
        "n_embd": 32,
        "n_layer": 6,
        "n_head": 4,
    }  # positions, not rotary ones
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **learned)).save_pretrained(folder / "learned")
    for name in ("encoder", "learned"):
        shutil.copy(MODEL / "tokenizer.json", folder / name)
        shutil.copy(MODEL / "tokenizer_config.json", folder / name)


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

    Parser = parsing._Parser
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "_Parser", parser)
        yield


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


NUMBERS_OF = (
    TrainOptions,
    BuPOConfig,
    ModelConfig,
    EvalOptions,
    AnalyzeOptions,
    SampleOptions,
    DemoOptions,
    PlanOptions,
)


def test_every_number_has_a_range():
    """An option that a newer TRL adds shows up here."""
    checked_by_name = {"internal_layer", "pad_to_multiple_of", "vllm_server_host", *STEP_STRATEGIES}
    library_options = {*RANGES, *MODEL_RANGES, *checked_by_name}
    for options in NUMBERS_OF:
        for name, hint in get_field_types(options).items():
            field = options.__dataclass_fields__[name]
            if field.init and any(member in (int, float) for member in get_non_none_types(hint)):
                known = name in library_options or get_option_detail(field, "range")
                assert known, f"{options.__name__}.{name} takes any number: give it a range"


def test_a_range_is_defined_once():
    """The tables hold options of TRL and transformers only; those of bupo carry their range."""
    own = {field.name for field in fields(MethodOptions)}
    assert own.isdisjoint(RANGES) and own.isdisjoint(MODEL_RANGES)
    theirs = {field.name for field in (*fields(GRPOConfig), *fields(ModelConfig))}
    assert {*RANGES, *MODEL_RANGES} <= theirs


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, np.float64(0)), (1, -0.1, nan, True, "0", None)),
        ("(0, inf)", (1e-9, 10**9), (0, inf, -inf, nan)),
        ("[0, inf]", (0, inf), (-inf, nan)),
        ("whole [1, inf)", (1, MAX_INTEGER, np.int64(3)), (0, 1.0, MAX_INTEGER + 1, True, nan, "1")),
        ("(-inf, inf)", (0, -0.0, -1e30, 1e-30), (inf, -inf, nan, 10**400, -1e300, 3.5e38, 1e-320, -1e-40)),
        ("[0, inf]", (0, inf, 1e29), (1e39, 5e-324)),
        ("[-inf, inf]", (inf, -inf), (nan, 1e300)),
    ],
)
def test_ranges(interval, inside, outside):
    for value in inside:
        check_number("x", value, interval)
    for value in outside:
        with pytest.raises(UserError, match=r"^x must .*, got "):
            check_number("x", value, interval)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": "1e-4"}, "learning_rate must be a number, 0 or more, got '1e-4'"),
        ({"learning_rate": None}, "learning_rate must be set"),
        ({"seed": 1.0}, "seed must be a whole number, from 0 to 4294967295, got 1.0"),
        ({"num_generations": None}, "num_generations must be 2 or more, got None"),
        ({"lr_scheduler_kwargs": [1]}, "lr_scheduler_kwargs must be a mapping"),
        ({"report_to": "none", "optim": "zzz"}, "optim must be adamw_torch, "),
        ({"internal_lens": "zzz"}, "internal_lens must be raw or final_norm, got 'zzz'"),
        ({"bf16": "yes"}, "bf16 must be true or false, got 'yes'"),
        ({"internal_layer": True}, "internal_layer must be a layer from 1 up, or auto, got True"),
        ({"internal_layer": 2**40}, "internal_layer must be a layer from 1 up, or auto, got 1099511627776"),
    ],
)
def test_a_configuration_from_python(options, says):
    with pytest.raises(UserError) as raised:
        BuPOConfig(**{"output_dir": "o", "internal_layer": 1, **options})
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1},
        {"max_steps": 0},
        {"max_steps": 3, "num_train_epochs": -1},
        {"top_k": 0},
        {"top_k": -1},
        {"top_k": None},
        {"top_p": None},
        {"min_p": None},
        {"temperature": 2},
        {"save_steps": 0.25},
        {"save_steps": 0, "save_strategy": "no"},
        {"save_total_limit": 0},
        {"max_grad_norm": 0},
        {"max_grad_norm": None},
        {"max_grad_norm": float("inf")},
        {"epsilon": float("inf")},
        {"warmup_steps": 0.1},
        {"scale_rewards": False},
        {"scale_rewards": "False"},
        {"num_generations_eval": 0},
        {"pad_to_multiple_of": "none"},
        {"report_to": ["none"]},
        {"entropy_coef": -0.1},
        {"eval_steps": 0},
        {"label_names": None},
        {"optim": OptimizerNames.SGD},
        {"lr_scheduler_kwargs": '{"num_cycles": 2}', "lr_scheduler_type": "cosine"},
        {"hub_token": None},
        {"seed": np.int64(3)},
        {"gradient_checkpointing": None},
        {"layer_lr_multipliers": {7: 0.1}},
        {"layer_lr_multipliers": '{"7": "1e-1"}'},
        {"layer_lr_multipliers": [1, 0.5, 0]},
    ],
    ids=str,
)
def test_what_trl_trains_with_is_not_refused(options):
    config = BuPOConfig("o", internal_layer=1, **options)
    dry_run_components(config, ModelConfig())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bupo.analyze("embedded", ANALYZE(size="x", output="o")), "size must be a whole number"),
        (lambda: bupo.analyze("embedded", ANALYZE(temperature=nan, output="o")), "temperature must be positive"),
        (lambda: bupo.analyze("embedded", ANALYZE(lens="zzz", output="o")), "lens must be raw or final_norm"),
        (lambda: bupo.analyze("embedded", ANALYZE(output="")), "output is empty"),
        (lambda: bupo.evaluate("embedded", EVAL(k=1.5, output="o")), "k must be a whole number"),
        (lambda: bupo.evaluate("embedded", EVAL(benchmarks=[1], output="o")), "benchmarks must be text, got 1"),
        (lambda: bupo.evaluate("embedded", EVAL(engine="zzz", output="o")), "engine must be transformers"),
        (lambda: bupo.evaluate("embedded", EVAL(layer=9, output="o")), "layer 9 does not exist"),
        (
            lambda: bupo.train("embedded", BuPOConfig("o", internal_layer=9), TRAIN(dataset="arithmetic")),
            "internal_layer: layer 9 does not exist: embedded has layers 1 to 8",
        ),
        (
            lambda: bupo.train("embedded", BuPOConfig("o", internal_layer=5), TRAIN("arithmetic", size=0)),
            "size must be 1 or more, got 0",
        ),
        (
            lambda: bupo.train(
                "embedded", BuPOConfig("o", internal_layer=5), TRAIN("arithmetic", reward_funcs="os.path")
            ),
            "'os.path' is a module",
        ),
    ],
)
def test_calls_from_python(tmp_path, monkeypatch, call, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        call()
    assert says in str(raised.value) and not list(tmp_path.iterdir())


def test_a_run_that_ends_inside_its_first_phase_is_told():
    config = BuPOConfig("o", internal_layer=1, internal_steps=3, steps_per_generation=2, max_steps=5)
    assert "takes 3 rollout batches of 2 updates, and max_steps is 5" in describe_short_run(config)
    for changes in ({"max_steps": 6}, {"max_steps": -1}, {"internal_steps": 2}):
        given: dict = {"internal_steps": 3, "steps_per_generation": 2, "max_steps": 5, **changes}
        assert describe_short_run(BuPOConfig("o", internal_layer=1, **given)) is None
