"""Words that mean the same, what was given, what a run notes of itself, and whose fault an error is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from bupo.analysis.options import AnalyzeOptions
from bupo.cli.main import main
from bupo.cli.parsing import parse_options, parse_options_and_values
from bupo.cli.sample import SampleOptions
from bupo.evaluation.options import EvalOptions
from bupo.options.groups import (
    BatchedSamplingOptions,
    ColumnOptions,
    DatasetOptions,
    ModelOptions,
    PromptOptions,
    RunOptions,
    check_command_options,
)
from bupo.options.training import affects_training, expand_layer_lr_multipliers, parse_layer_lr_multipliers
from bupo.run_files.provenance import SECRET_NAME, record_run, redact_command_line
from bupo.training.config import BuPOConfig
from bupo.training.run import TrainOptions
from bupo.utils.errors import UserError, wrap_library_errors
from tests.cli.test_commands import fails  # noqa: F401


@dataclass
class Short(ModelOptions, DatasetOptions, ColumnOptions, PromptOptions, BatchedSamplingOptions, RunOptions):
    """All groups at once."""

    names: list[str] = field(default_factory=lambda: ["a"])
    maybe: list[str] | None = None


@dataclass
class Long(DatasetOptions):
    """As of `bupo train`."""

    eval_dataset: str | None = None
    eval_split: str = "test"


TRAIN = (Long, BuPOConfig, ModelConfig)


@pytest.mark.parametrize(
    ("theirs", "ours", "value"),
    [
        ("model_name_or_path", "model", "m"),
        ("model_revision", "revision", "r"),
        ("dataset_name", "dataset", "d"),
        ("dataset_train_split", "split", "s"),
        ("output_dir", "output", "o"),
        ("max_completion_length", "max_new_tokens", 7),
        ("per_device_eval_batch_size", "batch_size", 3),
    ],
)
def test_trls_words_are_ours(tmp_path, capsys, theirs, ours, value):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({theirs: value}))
    dashed = theirs.replace("_", "-")
    for line in (
        [f"--{theirs}", str(value)],
        [f"--{theirs}={value}"],
        [f"--{dashed}", str(value)],
        [f"--{dashed}={value}"],
        ["--config", str(tmp_path / "c.yaml")],
        [f"--config={tmp_path / 'c.yaml'}"],
    ):
        (options,), given = parse_options_and_values((Short,), line, "bupo x")
        assert getattr(options, ours) == value and given == {ours: value}
    assert not capsys.readouterr().err


def test_our_words_are_trls():
    line = ["--model", "m", "--revision=r", "--output", "o", "--max-new-tokens", "9", "--internal_steps", "0"]
    (_, config, model), given = parse_options_and_values(TRAIN, line, "bupo train")
    assert (model.model_name_or_path, model.model_revision) == ("m", "r")
    assert (config.output_dir, config.max_completion_length) == ("o", 9)
    wanted = {"model_name_or_path": "m", "model_revision": "r", "output_dir": "o"}
    assert given == wanted | {"max_completion_length": 9, "internal_steps": 0}
    theirs = "unknown option 'batch_size': did you mean 'per_device_train_batch_size'"  # training has several
    with pytest.raises(UserError, match=theirs):
        parse_options(TRAIN, ["--internal_steps", "0", "--batch_size", "4"], "bupo train")


def test_transformers_old_word_for_overwrite():
    flags = ["--overwrite_output_dir", "true", "--internal_steps", "0"]
    assert parse_options((TrainOptions, BuPOConfig, ModelConfig), flags, "bupo train")[0].overwrite
    with pytest.raises(UserError, match=r"overwrite_output_dir and overwrite are both given"):
        parse_options((Short,), ["--overwrite_output_dir", "true", "--overwrite", "true"], "bupo x")


def test_former_words_warn(capsys):
    line = ["--dataset_size", "5", "--eval-dataset-name", "e", "--dataset_test_split", "t", "--internal_steps", "0"]
    (options, *_) = parse_options(TRAIN, line, "bupo train")
    assert (options.size, options.eval_dataset, options.eval_split) == (5, "e", "t")
    assert capsys.readouterr().err.splitlines() == [
        "bupo: warning: dataset_size is called size now",
        "bupo: warning: eval_dataset_name is called eval_dataset now",
    ]


def test_a_word_and_its_synonym(tmp_path):
    with pytest.raises(UserError, match=r"^model and model_name_or_path are both given and mean the same"):
        parse_options((Short,), ["--model", "a", "--model-name-or-path", "b"], "bupo x")
    (tmp_path / "c.yaml").write_text("dataset_name: a\ndataset: b\n")
    with pytest.raises(UserError, match=r"^dataset_name and dataset are both given"):
        parse_options((Short,), ["--config", str(tmp_path / "c.yaml")], "bupo x")
    (tmp_path / "c.yaml").write_text("dataset_name: a\n")
    (options,) = parse_options((Short,), ["--config", str(tmp_path / "c.yaml"), "--dataset", "b"], "bupo x")
    assert options.dataset == "b"  # a flag goes before the file


def test_unknown_words(fails):  # noqa: F811
    for word, message in (
        ("modle", "unknown option 'modle': did you mean 'model'?"),
        ("datset_name", "unknown option 'datset_name': did you mean 'dataset_name'?"),
        ("qqqqqqqq", "unknown option 'qqqqqqqq'; see bupo x --help"),
    ):
        with pytest.raises(UserError) as raised:
            parse_options((Short,), [f"--{word}", "1"], "bupo x")
        assert str(raised.value) == message
    for command, word, message in (
        ("eval", "dataset", "unknown option 'dataset': did you mean 'benchmarks'?"),
        ("eval", "dataset-name", "did you mean 'benchmarks'?"),
        ("analyze", "answerss", "unknown option 'answerss'; see bupo analyze --help"),  # no former word
    ):
        assert message in fails(command, f"--{word}", "4")
    assert "--config names no file" in fails("analyze", "--config")
    assert "expected one argument" in fails("analyze", "--lens")


def test_one_word_of_a_list(tmp_path):
    (tmp_path / "c.yaml").write_text("names: abc\nmaybe: my.f\n")
    (options,), given = parse_options_and_values((Short,), ["--config", str(tmp_path / "c.yaml")], "bupo x")
    assert options.names == ["abc"] and options.maybe == ["my.f"] and given == {"names": ["abc"], "maybe": ["my.f"]}
    (tmp_path / "c.yaml").write_text("report_to: none\ninternal_schedule: '[[2, 3]]'\neval_benchmarks: math500\n")
    (_, config, _), given = parse_options_and_values(TRAIN, ["--config", str(tmp_path / "c.yaml")], "bupo train")
    assert config.internal_schedule == [[2, 3]] and config.eval_benchmarks == ["math500"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("size: 2.5", "size must be one int, got 2.5"),
        ("size: true", "size must be one int, got True"),
        ("temperature: [1]", "temperature must be one float, got [1]"),
        ("dataset_config: {a: 1}", "dataset_config must be one str, got {'a': 1}"),
        ("size: many", "argument --size: invalid int value: 'many'"),
    ],
)
def test_values_of_another_type(tmp_path, content, message):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError) as raised:
        parse_options((Short,), ["--config", str(tmp_path / "c.yaml")], "bupo x")
    assert message in str(raised.value)


def test_what_was_given_is_as_it_was_read(tmp_path):
    """A configuration changes itself; the file of a run must hold what was asked for."""
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-4\nlr_scheduler_type: constant\nseed: 42\n")
    line = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--internal_layer",
        "3",
        "--gradient_checkpointing_kwargs",
        '{"a": 1}',
    ]
    _, given = parse_options_and_values(TRAIN, line, "bupo train")
    wanted = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "internal_layer": "3"}
    wanted["seed"] = 42  # it is 42 anyhow, but of another version it may not be
    assert given == wanted | {"gradient_checkpointing_kwargs": '{"a": 1}'}
    record_run(tmp_path / "run", "train", given)
    _, again = parse_options_and_values(TRAIN, ["--config", str(tmp_path / "run" / "config.yaml")], "bupo train")
    assert again == given


def test_what_was_given_may_be_a_default(tmp_path):
    _, given = parse_options_and_values((Short,), ["--batch_size", "64", "--overwrite", "--split=train"], "bupo x")
    assert given == {"batch_size": 64, "overwrite": True, "split": "train"}
    line = ["--per_device_train_batch_size", "8", "--model", "m", "--per_device_eval_batch_size", "2"]
    _, given = parse_options_and_values(TRAIN, [*line, "--internal_steps", "0"], "bupo train")
    assert given["per_device_train_batch_size"] == 8
    record_run(tmp_path, "train", given)
    noted = yaml.safe_load((tmp_path / "config.yaml").read_text())
    wanted = {"model": "m", "per_device_eval_batch_size": 2, "per_device_train_batch_size": 8, "internal_steps": 0}
    assert wanted.items() <= noted.items()  # in bupo's own words, where training has them
    assert parse_options_and_values(TRAIN, ["--config", str(tmp_path / "config.yaml")], "bupo train")[1] == given


def test_the_environment_of_a_file_is_noted(tmp_path, monkeypatch):
    for name in ("BUPO_TEST_X", "BUPO_TEST_API_KEY"):
        monkeypatch.setenv(name, "")
    (tmp_path / "c.yaml").write_text("env: {BUPO_TEST_X: 1, BUPO_TEST_API_KEY: s3cret}\nsize: 3\n")
    _, given = parse_options_and_values((Short,), ["--config", str(tmp_path / "c.yaml")], "bupo x")
    assert os.environ["BUPO_TEST_X"] == "1" and os.environ["BUPO_TEST_API_KEY"] == "s3cret"
    record_run(tmp_path / "run", "x", given)
    noted = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert noted == {"size": 3, "env": {"BUPO_TEST_X": "1"}}
    (options,), again = parse_options_and_values(
        (Short,), ["--config", str(tmp_path / "run" / "config.yaml")], "bupo x"
    )
    assert options.size == 3 and again == noted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"size": 0}, "size must be 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 1 or more, got -1"),
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_p": 1.1}, "top_p must lie above 0 and up to 1, got 1.1"),
    ],
)
def test_values_out_of_range(change, message):
    options = Short(**change)
    with pytest.raises(UserError) as raised:
        check_command_options(options)
    assert str(raised.value) == message


def test_multipliers_by_layer():
    for value in ("{3: 0.1}", '{"3": "1e-1"}', {3: 0.1}, {"3": 0.1}):
        multipliers = parse_layer_lr_multipliers(value)
        assert multipliers == {3: 0.1} and expand_layer_lr_multipliers(multipliers, 4) == [1, 1, 0.1, 0.1]
    steps = parse_layer_lr_multipliers({4: 0, 2: 0.5})
    assert list(steps) == [2, 4] and expand_layer_lr_multipliers(steps, 5) == [1, 0.5, 0.5, 0, 0]
    assert parse_layer_lr_multipliers("[1, 1e-1]") == [1, 0.1] == parse_layer_lr_multipliers([1, "0.1"])
    assert expand_layer_lr_multipliers([1, 0.1], 2) == [1, 0.1]


def test_options_that_affect_training():
    names = {option.name for each in (TrainOptions, BuPOConfig) for option in fields(each)}
    unaffected = {name for name in names if not affects_training(name)}
    assert {
        "output_dir",
        "overwrite",
        "save_steps",
        "probe_every",
        "eval_benchmarks",
        "eval_k",
        "use_cpu",
    } <= unaffected
    assert not {"learning_rate", "seed", "internal_layer", "probe_answers", "layer_lr_multipliers"} & unaffected
    assert affects_training("an option of a later version")


def test_a_run_notes_itself(tmp_path):
    given = {"model": "m", "hub_token": "s3cret", "api_key": "s3cret", "overwrite": True, "tuple": (1, 2.5)}
    given |= {"path": Path("a/b"), "nested": {"token": "s3cret", "x": None}, "json": '{"token": "s3cret", "b": 1}'}
    record_run(tmp_path / "run", "analyze", given)
    text = (tmp_path / "run" / "config.yaml").read_text()
    again = f"# bupo analyze --config {tmp_path}/run/config.yaml starts this run again, in {os.getcwd()}\n"
    assert text.startswith(f"{again}# started by: ")
    wanted = {"model": "m", "tuple": [1, 2.5], "path": "a/b", "nested": {"x": None}, "json": '{"b": 1}'}
    assert yaml.safe_load(text) == wanted
    first = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(first["versions"]) == {
        *("bupo", "torch", "transformers", "trl", "accelerate", "datasets", "math-verify", "python")
    }
    assert all(first["versions"].values()) and first["command"] == "analyze" and first["earlier"] == []
    assert first["folder"] == os.getcwd()
    record_run(tmp_path / "run", "analyze", {})
    second = json.loads((tmp_path / "run" / "run.json").read_text())
    assert second["earlier"] == [{name: value for name, value in first.items() if name != "earlier"}]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {}


def test_a_command_line_without_secrets():
    line = ["bupo", "train", "--hub_token", "s3cret", "--api-key=s3cret", "--x", '{"hf_token": "s3cret"}', "--y", "a b"]
    assert "s3cret" not in redact_command_line(line) and redact_command_line(line).endswith("--y 'a b'")
    assert redact_command_line(["--system_prompt", "the key: think"]) == "--system_prompt 'the key: think'"
    assert redact_command_line(["--per_token", "true", "--per-token=true"]) == "--per_token true --per-token=true"
    for word in ("--server=http://me:s3cret@host/v1", '{"password": "s3cret"}', '{"a": {"api_secret": "s3cret"}}'):
        assert "s3cret" not in redact_command_line(["--x", word])


def test_what_is_a_secret():
    classes = (AnalyzeOptions, EvalOptions, SampleOptions, TrainOptions, BuPOConfig, ModelConfig)
    names = {option.name for each in classes for option in fields(each)}
    assert {name for name in names if SECRET_NAME.search(name)} == {"hub_token"}
    for name in ("WANDB_API_KEY", "HF_TOKEN", "aws_secret", "db-password", "key", "token"):
        assert SECRET_NAME.search(name)
    assert not any(SECRET_NAME.search(name) for name in ("eos_token", "per-token", "max_tokens", "keys", "monkey"))


@pytest.mark.parametrize(
    ("value", "noted"),
    [
        ("http://me:s3cret@host:8000/v1", "http://host:8000/v1"),
        ('{"password": "s3cret", "n": {"api_secret": "s3cret", "m": [1]}}', '{"n": {"m": [1]}}'),
        ('{"max_tokens": 3,  "b": 1}', '{"max_tokens": 3,  "b": 1}'),
        ("{'token': 's3cret'", "{'token': \"***\""),
        ("ask me@home: the key: think", "ask me@home: the key: think"),
    ],
)
def test_a_secret_is_left_out_not_starred(tmp_path, value, noted):
    """Stars would be sent as the secret by the run that the file starts."""
    record_run(tmp_path, "eval", {"x": value})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"x": noted}


def test_the_git_revision(tmp_path):
    def git(*words):
        done = subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def noted():
        code = "from bupo.run_files.provenance import get_git_state; import json; print(json.dumps(get_git_state()))"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    assert noted() is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    assert noted() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert noted()["dirty"]


def test_whose_fault_an_error_is():
    with (
        pytest.raises(UserError, match=r"^it fails: JSONDecodeError: Expecting value"),
        wrap_library_errors("it fails"),
    ):
        json.loads("x")
    with (
        pytest.raises(UserError, match=r"^so: Expecting value"),
        wrap_library_errors(lambda error: f"so: {error}", ValueError),
    ):
        json.loads("x")
    with pytest.raises(json.JSONDecodeError), wrap_library_errors("it fails", OSError):
        json.loads("x")
    with pytest.raises(UserError, match=r"^mine$"), wrap_library_errors("it fails"):
        raise UserError("mine")
    with pytest.raises(TypeError), wrap_library_errors("it fails"):
        parse_options((Short,), None, "bupo x")  # a fault in this package stays one


def test_the_traceback_is_shown_when_asked_for(capsys):
    for words in (["--traceback", "analyze", "--lens", "x"], ["analyze", "--traceback", "--lens", "x"]):
        assert main(words) == 2
        *trace, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("bupo: error: ") and trace[0] == "Traceback (most recent call last):"
    assert main(["analyze", "--lens", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err
