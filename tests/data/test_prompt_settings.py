"""Prompt settings next to a model's weights: how they are written, and which commands read them."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from datasets import Dataset
from peft import LoraConfig

import bupo
from bupo import AnalyzeOptions, BuPOConfig, UserError
from bupo.analysis.run import _load_problems as load_the_problems
from bupo.cli.main import main
from bupo.data.chat_templates import BOXED_INSTRUCTION, CHAT_TEMPLATES, tokenize_prompt
from bupo.data.prompt_settings import (
    EVALUATION_FILE,
    MAX_SETTINGS_BYTES,
    TEMPLATE_FILE,
    TrainingPromptSettings,
    read_training_prompt_settings,
    resolve_defaults,
)
from bupo.evaluation.benchmarks import BENCHMARKS, get_k_by_label, split_k
from bupo.evaluation.options import FALLBACK_OPTIONS, EvalOptions
from bupo.evaluation.paper_preset import resolve_preset
from bupo.generation.seeded_sampling import CompletionRequest, TransformersEngine, derive_seed
from bupo.models.loading import load_model, load_tokenizer, resolve_model_path
from bupo.rewards.math_reward import math_reward
from bupo.training.prompt_settings import get_shared_system_prompt
from bupo.training.trainer import BuPOTrainer
from tests.analysis.test_analysis import fails  # noqa: F401

OWN = {"system_prompt": "Think.", "max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9}
MODEL = Path(resolve_model_path("embedded"))


def a_run(folder, **values):
    """Copy the embedded model's folder, with the prompt settings of a run."""
    shutil.copytree(MODEL, folder)
    (folder / EVALUATION_FILE).write_text(json.dumps({"schema_version": 1, **OWN, **values}))
    return str(folder)


def evaluated(output, *words):
    """Return the summary of an evaluation of two problems, and the settings of its answers."""
    command = ["eval", "--benchmarks", "arithmetic", "--size", "2", "--k", "2", "--output", str(output), *words]
    assert main(command) == 0
    settings = json.loads((output / "arithmetic" / "settings.json").read_text())
    return json.loads((output / "summary.json").read_text()), settings


def read_output(capsys):
    return " ".join(capsys.readouterr().out.split())


# -- reading


def test_a_run_is_evaluated_as_it_was_trained(tmp_path, capsys):
    run = a_run(
        tmp_path / "run", other_sampling={"top_k": 20}, server="http://localhost:1", chat_template="/etc/passwd"
    )
    summary, settings = evaluated(tmp_path / "eval", "--model", run)
    assert {name: settings[name] for name in OWN} == OWN == {name: summary["meta"][name] for name in OWN}
    assert "Think." in settings["prompt"] and summary["meta"]["as_trained"] == {"folder": run, **OWN}
    assert summary["benchmarks"]["arithmetic"]["mean_tokens"] <= 9
    line = read_output(capsys)
    assert "was trained: system_prompt 'Think.', max_new_tokens 9, temperature 0.5, top_p 0.9; its rollouts" in line
    assert "also had top_k 20, which is ignored" in line
    config = (tmp_path / "eval" / "config.yaml").read_text()
    assert not [name for name in OWN if name in config]  # only the given options

    given = ["--system_prompt", "", "--temperature", "1", "--max_new_tokens", "5"]
    summary, settings = evaluated(tmp_path / "given", "--model", run, *given)
    assert (settings["temperature"], settings["max_new_tokens"], settings["top_p"]) == (1.0, 5, 0.9)
    assert "Think." not in settings["prompt"] and summary["meta"]["as_trained"] == {"folder": run, "top_p": 0.9}

    _, settings = evaluated(tmp_path / "plain", "--model", str(MODEL), "--max_new_tokens", "5")
    assert (settings["system_prompt"], settings["temperature"], settings["top_p"]) == (None, 1.0, 1.0)


def test_cached_answers_are_graded_with_their_prompts(tmp_path):
    run = a_run(tmp_path / "run")
    first, _ = evaluated(tmp_path / "eval", "--model", run)
    shutil.rmtree(run)
    again, _ = evaluated(tmp_path / "eval", "--engine", "cached")  # only the folder holds the system prompt
    assert again["benchmarks"] == first["benchmarks"]


@pytest.fixture
def without_figures(monkeypatch):
    """Skip the figures, which take most of the time of an analysis."""
    monkeypatch.setattr("bupo.analysis.run.write_report", lambda report: None)


def test_analysis_and_sampling_of_a_run(tmp_path, capsys, without_figures):
    run = a_run(tmp_path / "run")
    report = bupo.analyze(
        ["embedded", run], bupo.AnalyzeOptions(size=2, output=str(tmp_path / "analysis"), max_tokens=4)
    )
    for label, model in zip(("embedded", "run"), report.models, strict=True):  # compared models get the same prompts
        settings = json.loads((tmp_path / "analysis" / label / "settings.json").read_text())
        assert {name: settings[name] for name in OWN} == OWN and "Think." in settings["prompt"]
        assert model.meta["temperature"] == 0.5 and model.meta["as_trained"]["folder"] == run
    assert main(["sample", "--model", run, "--prompt", "57+23-41", "--max_new_tokens", "3"]) == 0
    assert "was trained: system_prompt 'Think.', temperature 0.5, top_p 0.9" in read_output(capsys)


def test_two_runs_that_were_trained_in_two_ways(tmp_path, fails):  # noqa: F811
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b", max_new_tokens=12)]
    message = fails("analyze", "--model", *runs, "--size", "2", "--output", str(tmp_path / "out"))
    assert "a was trained with max_new_tokens 9," in message and "b with 12: give max_new_tokens" in message


def test_arguments_of_the_template():
    own = TrainingPromptSettings(chat_template_kwargs={"enable_thinking": True}, max_new_tokens=3)
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %} at once{% endif %}"
    _, prompt_settings = resolve_defaults(EvalOptions(), own, FALLBACK_OPTIONS)
    assert prompt_settings.template_kwargs == {"enable_thinking": True}
    assert prompt_settings.set_template(tokenizer) == 'the model\'s own, with {"enable_thinking": true}'
    _, prompt_settings = resolve_defaults(EvalOptions(chat_template="octothinker"), own, FALLBACK_OPTIONS)
    assert prompt_settings.template_kwargs == {} and prompt_settings.set_template(tokenizer).startswith("octothinker, ")
    _, prompt_settings = resolve_defaults(
        EvalOptions(), TrainingPromptSettings(chat_template_kwargs={"enable_thinking": False}), FALLBACK_OPTIONS
    )
    tokenizer.chat_template = "{{ messages[0].content }}{% if not enable_thinking %} at once{% endif %}"
    assert prompt_settings.set_template(tokenizer) == "the model's own, no thinking"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "7",
        '{"max_new_tokens": 0}',
        '{"max_new_tokens": "9"}',
        '{"temperature": NaN}',
        '{"top_p": 2}',
        '{"system_prompt": ["Think."]}',
        '{"system_prompt": "\\ud800"}',
        '{"chat_template_kwargs": ["enable_thinking"]}',
        '{"chat_template_kwargs": {"tokenize": false}}',  # would return text instead of tokens
        '{"chat_template_kwargs": {"chat_template": "x"}}',
        '{"chat_template_kwargs": {"messages": []}}',
        '{"other_sampling": 7}',
        "[" * 100_000,
        '{"system_prompt": "' + "x" * (1 << 20) + '"}',
        b"\xff\xfe",
    ],
    ids=lambda content: str(content)[:40],
)
def test_what_is_no_such_file_is_one_line(tmp_path, content):
    path = tmp_path / EVALUATION_FILE
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"evaluation\.json cannot be used \(.*\): repair it, or remove it") as raised:
        read_training_prompt_settings(str(tmp_path))
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [EVALUATION_FILE, TEMPLATE_FILE])
def test_only_regular_files_of_the_folder_are_read(tmp_path, name):
    """A pipe would block, a link could show a file outside the folder, and an endless file would fill the memory."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    TrainingPromptSettings().write(folder)
    (folder / TEMPLATE_FILE).write_text("{{ messages }}")
    assert read_training_prompt_settings(None, str(folder)).template == "{{ messages }}"
    path, elsewhere = folder / name, tmp_path / name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match=rf"{name} cannot be .*{name} is no regular file of its folder"):
        read_training_prompt_settings(None, str(folder))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{name} cannot be .*{name} is no regular file of its folder"):
        read_training_prompt_settings(None, str(folder))
    path.unlink()
    path.write_bytes(b" " * (MAX_SETTINGS_BYTES + 1))
    with pytest.raises(UserError, match=rf"{name} cannot be .*{name} is larger than 1024 KB"):
        read_training_prompt_settings(None, str(folder))


def test_the_hubs_cache_is_read_through_its_links(tmp_path):
    """Links from `snapshots/REVISION` are followed to `blobs` only."""
    folder, blobs = tmp_path / "models--a--b" / "snapshots" / "f00", tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    TrainingPromptSettings(temperature=0.6).write(blobs)
    (folder / EVALUATION_FILE).symlink_to(f"../../blobs/{EVALUATION_FILE}")
    assert read_training_prompt_settings(str(folder)).temperature == 0.6
    (blobs / EVALUATION_FILE).rename(blobs.parent / EVALUATION_FILE)
    (folder / EVALUATION_FILE).unlink()
    (folder / EVALUATION_FILE).symlink_to(f"../../{EVALUATION_FILE}")
    with pytest.raises(UserError, match="no regular file of its folder"):
        read_training_prompt_settings(str(folder))


def test_most_models_have_no_settings(tmp_path):
    for name in ("embedded", "Qwen/Qwen3-4B", str(tmp_path), "x" * 5000, "a\0b", "", None, 7):
        assert read_training_prompt_settings(name) is None


# -- writing


def trainer(folder, tokenizer=None, peft=None, problems=None, **options):
    args = BuPOConfig(
        str(folder), internal_layer=5, per_device_train_batch_size=4, num_generations=4, report_to="none", **options
    )
    rows = problems or [{"prompt": [{"role": "user", "content": "57+23-41"}], "answer": "39"}] * 4
    return BuPOTrainer(
        load_model("embedded"),
        math_reward,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer or load_tokenizer("embedded"),
        peft_config=peft,
    )


def test_a_trainer_saves_it_with_every_model(tmp_path):
    system = {"role": "system", "content": "Think."}
    problems = [{"prompt": [system, {"role": "user", "content": f"{i}+1"}], "answer": str(i + 1)} for i in range(4)]
    run_trainer = trainer(tmp_path / "run", problems=problems, max_completion_length=24, temperature=0.7, top_k=5)
    run_trainer.args.chat_template_kwargs = {"enable_thinking": False}
    run_trainer.save_model(str(tmp_path / "model"))
    assert read_training_prompt_settings(str(tmp_path / "model")) == TrainingPromptSettings(
        "Think.", {"enable_thinking": False}, 24, 0.7, 1.0, {"top_k": 5}, str(tmp_path / "model")
    )
    assert (
        get_shared_system_prompt(Dataset.from_list([*problems, {"prompt": problems[0]["prompt"][1:], "answer": "1"}]))
        is None
    )
    assert (
        get_shared_system_prompt(Dataset.from_list([{"prompt": "1+1="}])) is None
        and get_shared_system_prompt(iter(())) is None
    )


def test_an_adapter_has_its_template(tmp_path):
    """The base model's tokenizer has another template; the adapter's folder holds the run's."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = CHAT_TEMPLATES["octothinker"]
    run_trainer = trainer(tmp_path / "run", tokenizer, LoraConfig(target_modules="all-linear"), max_completion_length=6)
    run_trainer.save_model(str(tmp_path / "adapter"))
    _, settings = evaluated(tmp_path / "eval", "--adapter", str(tmp_path / "adapter"))
    assert settings["prompt"].count("A conversation between User and Assistant.") == 1
    assert settings["max_new_tokens"] == 6 and settings["adapter"] == str(tmp_path / "adapter")
    default_template = load_tokenizer("embedded").chat_template
    (tmp_path / "default.jinja").write_text(default_template)
    given = ["--adapter", str(tmp_path / "adapter"), "--chat_template", str(tmp_path / "default.jinja")]
    _, settings = evaluated(tmp_path / "given", *given)
    assert "conversation" not in settings["prompt"]


# -- answers per problem, by benchmark


@pytest.mark.parametrize(
    ("name", "bare", "k"),
    [
        ("aime24:32", "aime24", 32),
        ("aime24", "aime24", None),
        ("mine=a.parquet:4", "mine=a.parquet", 4),
        ("reasoning_gym:chain_sum", "reasoning_gym:chain_sum", None),
        ("reasoning_gym:chain_sum:8", "reasoning_gym:chain_sum", 8),
        ("reasoning_gym:7", "reasoning_gym:7", None),
        ("harness:1234", "harness:1234", None),
        ("harness:own.yaml", "harness:own.yaml", None),
        ("mine=C:/data/16", "mine=C:/data/16", None),
        ("C:/data/a.parquet:2", "C:/data/a.parquet", 2),
        ("org/set@0123abc:16", "org/set@0123abc", 16),
        ("org/set@1234", "org/set@1234", None),
    ],
)
def test_the_number_after_a_name(name, bare, k):
    assert split_k(name) == (bare, k)


def test_answers_by_label():
    names = ["aime24:32,math500", "mine=a.parquet", "reasoning_gym:chain_sum:2", "mmlu-pro"]
    assert get_k_by_label(names, None) == {"aime24": 32, "math500": 16, "mine": 16, "chain_sum": 2}
    assert get_k_by_label(names, 4) == {"aime24": 32, "math500": 4, "mine": 4, "chain_sum": 2}
    assert get_k_by_label(names, None, {"mine": 7, "aime24": 9}, 3)["mine"] == 7
    paper = EvalOptions(preset="paper", benchmarks=["math500=a.parquet,aime25=b.parquet,mine=c.parquet"])
    assert paper.get_k_by_label() == {"math500": 16, "aime25": 32, "mine": 16}


@pytest.mark.slow
def test_benchmarks_of_different_k(tmp_path, capsys):
    command = ["eval", "--benchmarks", "arithmetic:3,reasoning_gym:chain_sum", "--k", "1", "--size", "3"]
    command += ["--max_new_tokens", "12"]
    assert main([*command, "--output", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "summary.json").read_text())["benchmarks"]
    assert {label: numbers["k"] for label, numbers in found.items()} == {"arithmetic": 3, "chain_sum": 1}
    header, _, *rows = (tmp_path / "a" / "table.md").read_text().splitlines()
    assert header.startswith("| benchmark | n | k | avg@k [95 %] | strict | pass@k | maj@k | tokens |")
    assert rows[0].startswith("| arithmetic | 3 | 3 | ") and rows[1].startswith("| chain_sum | 3 | 1 | ")
    mean = (found["arithmetic"]["avg@k"] + found["chain_sum"]["avg@k"]) / 2
    assert rows[2].startswith(f"| average |  |  | {100 * mean:.1f} [")
    assert "avg@k [95 %]" in out and max(map(len, out.splitlines())) <= 80
    (tmp_path / "a" / "summary.json").unlink()
    assert main([*command, "--output", str(tmp_path / "a"), "--engine", "cached"]) == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["benchmarks"] == found
    more = ["--output", str(tmp_path / "b"), "--compare", str(tmp_path / "a"), "--seed", "0"]
    more += ["--benchmarks", "arithmetic:2,reasoning_gym:chain_sum:2"]
    assert main([*command[:1], *command[3:], *more]) == 0
    found = json.loads((tmp_path / "b" / "summary.json").read_text())["benchmarks"]
    assert all("difference" in numbers and numbers["k"] == 2 for numbers in found.values())
    assert "| avg@2 [95 %] |" in (tmp_path / "b" / "table.md").read_text()


# -- the paper's settings


def papers(**options):
    given = EvalOptions(preset="paper", **options)
    return resolve_preset(
        given, None, ["embedded"], None, FALLBACK_OPTIONS, {"temperature": 1.0, "benchmarks": ["math500"]}
    )[0]


def test_the_papers_answer_length(monkeypatch):
    def as_if(kind):
        monkeypatch.setattr("bupo.evaluation.paper_preset.load_config", lambda name, **given: Config(kind))

    class Config:
        def __init__(self, kind):
            self.model_type = kind

        def get_text_config(self):
            return self

    assert papers().max_new_tokens == 7168  # the embedded model is a Qwen3
    as_if("llama")
    assert papers().max_new_tokens == 3072 and papers(max_new_tokens=5).max_new_tokens == 5
    as_if("gemma3_text")
    with pytest.raises(UserError, match="answer lengths of Qwen and Llama models, and this is a gemma3_text: give max"):
        papers()


def test_the_papers_system_message_is_for_models_that_may_think(monkeypatch):
    assert papers().system_prompt is None
    thinking = load_tokenizer("embedded")
    thinking.chat_template = "{{ messages[0].content }}{{ enable_thinking }}"
    monkeypatch.setattr("bupo.evaluation.paper_preset.load_tokenizer", lambda name, **given: thinking)
    assert papers().system_prompt == BOXED_INSTRUCTION and papers(system_prompt="").system_prompt == ""
    own = TrainingPromptSettings("Think.", max_new_tokens=9, temperature=0.5)
    given = EvalOptions(preset="paper")
    options, asking = resolve_preset(
        given, own, ["embedded"], None, FALLBACK_OPTIONS, {"temperature": 1.0, "benchmarks": ["math500"]}
    )
    assert (options.system_prompt, options.max_new_tokens, options.temperature) == ("Think.", 9, 1.0)
    assert asking.inherited == ("system_prompt", "max_new_tokens", "top_p")


def problem_file(path, count=3):
    path.write_text("".join(json.dumps({"problem": f"{i}+11", "answer": str(i + 11)}) + "\n" for i in range(count)))
    return path


@pytest.mark.slow
def test_the_papers_setting_end_to_end(tmp_path, without_figures):
    files = ",".join(f"{label}={problem_file(tmp_path / f'{label}.jsonl')}" for label in ("math500", "aime24"))
    command = ["eval", "--preset", "paper", "--benchmarks", files, "--size", "2", "--max_new_tokens", "6"]
    assert main([*command, "--output", str(tmp_path / "eval")]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert {label: found["k"] for label, found in summary["benchmarks"].items()} == {"math500": 16, "aime24": 32}
    assert (summary["meta"]["preset"], summary["meta"]["temperature"], summary["meta"]["top_p"]) == ("paper", 1.0, 1.0)
    dataset = f"math500={tmp_path / 'math500.jsonl'}"
    given: dict = {"preset": "paper", "dataset": dataset, "max_new_tokens": 6}
    whole = bupo.analyze("embedded", bupo.AnalyzeOptions(output=str(tmp_path / "whole"), **given)).single_model.meta
    assert (whole["preset"], whole["answers"], whole["lens"], whole["dataset"]) == ("paper", 3, "raw", dataset)
    part = bupo.analyze("embedded", bupo.AnalyzeOptions(size=2, output=str(tmp_path / "part"), **given))
    assert part.single_model.meta["answers"] == 2


# -- an analysis of an evaluation's answers


def test_the_answers_of_an_evaluation_are_rollouts(tmp_path, without_figures, fails):  # noqa: F811
    """The measures equal those of the same tokens, sampled again and given in a file."""
    evaluated(tmp_path / "eval", "--max_new_tokens", "20", "--k", "3")
    tokenizer, problems = load_tokenizer("embedded"), bupo.load_problems("arithmetic", "test", size=2)
    prompts = [tuple(tokenize_prompt(tokenizer, messages)) for messages in problems["prompt"]]
    engine = TransformersEngine(load_model("embedded"), tokenizer, 20)
    requests = [CompletionRequest(p, n, prompts[p], derive_seed(0, p, n)) for n in range(3) for p in range(2)]
    sampled = dict(engine.generate_token_ids(requests))
    rows = [{"prompt_ids": request.prompt_ids, "completion_ids": sampled[request]} for request in requests]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = tmp_path / "eval" / "arithmetic" / "samples.jsonl"

    def analysed(name, rollouts):
        options = bupo.AnalyzeOptions(rollouts=str(rollouts), output=str(tmp_path / name))
        return bupo.analyze("embedded", options).single_model

    own, by_folder, by_file = (
        analysed("a", tmp_path / "own.jsonl"), analysed("b", samples.parent), analysed("c", samples)
    )  # fmt: skip
    assert own.meta["answers"] == 6 and own.meta["tokens"] == sum(map(len, sampled.values()))
    for other in (by_folder, by_file):
        pd.testing.assert_frame_equal(other.table, own.table)
        assert (other.boundary_layer, other.stages) == (own.boundary_layer, own.stages)
    arguments = ("analyze", "--output", str(tmp_path / "d"), "--rollouts")
    assert "give the folder of one of its benchmarks, arithmetic" in fails(*arguments, str(tmp_path / "eval"))
    row = json.loads(samples.read_text().splitlines()[0])
    del row["prompt_ids"], row["completion_ids"]  # the answers of a server have no token ids
    samples.write_text(json.dumps(row) + "\n")
    assert "samples.jsonl, line 1 is no rollout (ValueError: an evaluation's answer without tokens" in fails(
        *arguments, str(samples)
    )


def test_benchmarks_are_datasets_of_an_analysis(tmp_path, monkeypatch, fails):  # noqa: F811
    """A benchmark is loaded at its pinned revision; a file with a label is loaded like in `bupo eval`."""
    loaded = []

    def load_dataset(name, config, split, revision):
        loaded.append((name, split, revision))
        return Dataset.from_list([{"problem": f"{i}+11", "answer": str(i + 11)} for i in range(4)])

    monkeypatch.setattr("bupo.data.problems.load_dataset", load_dataset)
    found = load_the_problems(AnalyzeOptions(dataset="math500", size=3, system_prompt="Think."))
    known = BENCHMARKS["math500"]
    assert loaded == [(known.hub, "test", known.revision)] and found["answer"] == ["11", "12", "13"]
    assert found["prompt"][0][0] == {"role": "system", "content": "Think."}
    path = problem_file(tmp_path / "a=b.jsonl")
    for name in (f"mine={path}", str(path)):  # the second is a file in spite of the `=` in its name
        assert load_the_problems(AnalyzeOptions(dataset=name, size=None))["answer"] == ["11", "12", "13"]
    arguments = ("analyze", "--output", str(tmp_path / "out"), "--dataset")
    assert "split 'train' is for a dataset, and math500 is a benchmark" in fails(
        *arguments, "math500", "--split", "train"
    )
    assert "one answer" in fails(*arguments, f"mine={path}:16")
