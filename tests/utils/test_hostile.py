"""Hostile content has no effect in a page, a table, a terminal, a path, a config, a checkpoint or a model's folder."""

import csv
import json
import os
import pickle
import re
import shutil
import sqlite3
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console

from bupo import UserError
from bupo.analysis.checkpoint_series import find_checkpoint_series
from bupo.cli.main import main
from bupo.data.chat_templates import tokenize_prompt
from bupo.evaluation.answers import grade_completions, summarize
from bupo.evaluation.lm_eval import _hiding_secret_variables, _storing_responses_as_json
from bupo.generation.seeded_sampling import SampledCompletion
from bupo.models.loading import load_model, load_tokenizer, resolve_model_path
from bupo.reports.analysis_page import write_analysis_page
from bupo.reports.evaluation_scores import render_score_tables, write_scores
from bupo.reports.html import dump_script_json
from bupo.reports.runs_page import report_runs
from bupo.reports.samples_page import write_samples_page
from bupo.run_files.result_cache import get_label_folder
from bupo.training.callbacks.console import ConsoleCallback
from bupo.utils.sanitize import (
    escape_csv_cell,
    escape_figure_label,
    escape_markdown_cell,
    escape_text,
    sanitize_message,
)
from tests.helpers.made_runs import analyze, evaluate, probed, train
from tests.reports.test_samples_page import META, answers, data_of

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\x08\x9b31m\u202eevil\u2066\x00\udc80"
MARKUP = "[red]x[/] [/] [link=file:///etc/passwd]y[/link]"
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href=javascript:alert(3)>"
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # except tab and newline


class Bomb:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture
def touched(tmp_path):
    """Path of a file that no test may create."""
    path = tmp_path / "touched"
    yield path
    assert not path.exists()


# -- text


def test_what_steers_a_terminal_is_written_as_an_escape():
    text = escape_text(ESCAPES)
    assert not STEERING.search(text) and r"\x1b[2J" in text and r"\u202eevil\u2066" in text and r"\udc80" in text
    kept = "é 数\n\tnaïve 🙂 \u3000\xa0½"
    assert escape_text(kept) == kept
    assert escape_figure_label(r"a$\frac$") == r"a\$\frac\$"


def test_an_error_line_shows_no_token(capsys):
    token = "hf_" + "a1B2" * 9
    assert main(["eval", "--benchmarks", f"{token}{ESCAPES}"]) == 2
    assert main(["eval", "--server", f"http://me:{token}@host", "--traceback", "--model", "embedded"]) == 2
    err = capsys.readouterr().err
    assert "bupo: error: " in err and "Traceback" in err and token not in err and not STEERING.search(err)
    assert sanitize_message("http://me:pass@host/x is wrong") == "http://***@host/x is wrong"
    names = "task_name, hf_model, sk-learn and hf-internal-testing/tiny-random-LlamaForCausalLM"
    assert sanitize_message(names) == names
    assert sanitize_message("github_pat_" + "1aB2_" * 9) == "***"


@pytest.mark.parametrize("text", ["@SUM(1+1)", "=1+1", "+1+1", "-1+1", "\t=1", "\r=1", " =1", "=cmd|' /C calc'!A0"])
def test_a_formula_is_text_in_a_spreadsheet(text):
    assert escape_csv_cell(text) == f"'{text}"


def test_numbers_and_names_stay_as_they_are():
    for text in ("-5", "+1.5e-3", "0", "aime24", "a=b", "33.6 [29.6, 37.8]", "-inf", ""):
        assert escape_csv_cell(text) == text
    assert escape_markdown_cell("chain_sum") == "chain_sum"
    assert escape_markdown_cell("a|b\n| c [x](http://h) <b> `d`") == r"a\|b \| c \[x\](http://h) \<b\> \`d\`"


# -- pages, tables and lines of an evaluation


def summary_of(*labels):
    table = answers(3, 2)
    found = {label: summarize(table) for label in labels}
    return dict.fromkeys(labels, table), {
        "meta": META | {"model": f"{MARKUP}{SCRIPT}{ESCAPES}"},
        "benchmarks": found,
        "harness": {},
    }


def test_hostile_labels_do_nothing_in_tables(tmp_path):
    labels = ["@SUM(1+1)", "=a|b", "[red]x[/]", "<b>[l](http://h)", r"$\frac"]
    _, summary = summary_of(*labels)
    numbers = summary["benchmarks"]["@SUM(1+1)"]
    summary["harness"] = {"=h": {"problems": 1, "score": 0.5, "interval": None, "metric": "-m|", "task": "+t"}}
    write_scores(summary, tmp_path)  # also draws the figure, whose labels could be formulas
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["benchmark"] for row in rows[:2]] == ["'@SUM(1+1)", "'=a|b"] and rows[2]["benchmark"] == "[red]x[/]"
    assert float(rows[0]["strict"]) == pytest.approx(100 * numbers["strict_avg@k"], abs=0.05)
    with (tmp_path / "harness.csv").open(newline="") as file:
        assert {"'=h", "'-m|", "'+t"} <= set(next(csv.DictReader(file)).values())
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(labels) + 1
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"\<b\>\[l\](http://h)" in lines[5]


def test_hostile_names_do_nothing_in_a_terminal():
    _, summary = summary_of(MARKUP, "plain")
    console = Console(width=300, file=open(os.devnull, "w"), record=True, force_terminal=True)  # noqa: SIM115
    for table in render_score_tables(summary):
        console.print(table)
    lines = ConsoleCallback(console)
    lines.live = object()  # type: ignore[assignment]
    logs = {"eval_rollout_batches": 1} | {f"eval_{MARKUP}/{name}": 0.5 for name in ("avg@4", "low", "high")}
    lines.on_log(None, None, None, logs)
    text = console.export_text(styles=False)
    assert text.count(MARKUP) == 4  # unchanged in a title, a row of two tables and a line
    assert not STEERING.search(text.replace("\x1b[0m", ""))


def test_a_sampled_answer_does_nothing_in_a_terminal(monkeypatch, capsys):
    decode = type(load_tokenizer("embedded")).decode
    monkeypatch.setattr(
        type(load_tokenizer("embedded")), "decode", lambda self, *a, **k: decode(self, *a, **k) + ESCAPES + MARKUP
    )
    assert main(["sample", "--model", "embedded", "--prompt", "1+2", "--max_new_tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "[red]x[/]" in out and r"\x1b[2J" in out and not STEERING.search(out)


def test_hostile_answers_stay_text_in_a_page(tmp_path):
    tables, summary = summary_of(SCRIPT, "__proto__")
    tables[SCRIPT] = tables[SCRIPT].assign(text=SCRIPT, question=SCRIPT, gold=SCRIPT, value=SCRIPT)
    write_samples_page(tables, summary, dict.fromkeys(tables, SCRIPT), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page and "<img src=x" not in page and "<a href=javascript" not in page
    assert page.count("<script") == 2  # the data, and the script of the page
    assert {row["gold"] for row in data_of(tmp_path / "report.html")["problems"]} >= {SCRIPT}
    assert "default-src &#39;none&#39;" in page


def analysis_page(folder, label):
    table = pd.DataFrame(
        {"model": label, "measure": measure, "layer": layer, "mean": 1.0, "low": 0.5, "high": 1.5, "std": 0.1}
        for measure in (
            "entropy_layer_input",
            "entropy_layer",
            "entropy_attn",
            "entropy_ffn",
            "entropy_attn_input",
            "entropy_ffn_input",
            "d_entropy_ffn",
        )
        for layer in (1, 2)
    )
    meta = {
        "label": label,
        "model": label,
        "layers": 2,
        "revision": None,
        "lens": "raw",
        "dtype": "float32",
        "temperature": 1.0,
    }
    meta |= {"tokens": 3, "answers": 1, "dataset": SCRIPT, "identity_error_layers": 0.0, "identity_error_head": 0.0}
    meta |= {"versions": {"bupo": "1"}, "adapter": SCRIPT, "stopped_when_settled": False}
    model = {
        "meta": meta,
        "stages": ["exploration", "undecided"],
        "explanation": SCRIPT,
        "verdict": SCRIPT,
        "perplexity": 1.0,
    }
    model |= {"entropy_language_model": 1.0, "similarity": [[1.0, 0.5], [0.5, 1.0]], "kl": None}
    cell = [[[SCRIPT, 0.5]], [[SCRIPT, 0.5]]]
    view = {
        "prompt": SCRIPT,
        "tokens": [SCRIPT],
        "entropy": [[1.0], [1.0]],
        "chosen": [[0.5], [0.5]],
        "top": [[c] for c in cell],
    }
    write_analysis_page(table, [model], {label: [view]}, folder / "report.html")
    return folder / "report.html"


def test_a_hostile_label_stays_text_in_an_analysis(tmp_path):
    page = analysis_page(tmp_path, f"=1+1{SCRIPT}").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page and "<img src=x" not in page and "<a href=javascript" not in page
    data = data_of(tmp_path / "report.html")
    assert next(iter(csv.DictReader(data["csv"].splitlines())))["model"].startswith("'=1+1")


@pytest.mark.external
def test_a_hostile_label_is_drawn_as_text(tmp_path, open_file):
    """Plotly would turn `<a href>` in a name into a link. No request is sent, and no script runs."""
    label = "<a href='https://evil.invalid'>click</a> %{x} <b>b</b>"
    page = open_file(analysis_page(tmp_path, label + SCRIPT), "#curve .main-svg")
    page.wait_for_timeout(500)
    assert page.locator("#curve a[href]").count() == 0
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    tables, summary = summary_of(label)
    write_samples_page(tables, summary, dict.fromkeys(tables, SCRIPT), tmp_path / "samples.html")
    open_file(tmp_path / "samples.html", ".answer")


# -- run folders of a runs page


def hostile_runs(runs):
    """Write a run's folder with HTML, markup and escapes in every name, and with invalid or too large numbers."""
    names = {"model": SCRIPT, "optim": ESCAPES + MARKUP, "internal_layer": SCRIPT, "advantage_estimator": "@SUM(1+1)"}
    folders = [
        train(runs / "a", 1, names | {"internal_steps": 2}),
        train(runs / "b", 2, names | {"internal_steps": 10**40}),
    ]
    with (folders[0] / "metrics.jsonl").open("a") as file:
        file.write(
            '{"rollout_batch": 2, "reward": NaN, "entropy": -Infinity, "loss": 1e308, "kl": ' + "9" * 5000 + "}\n"
        )
        file.write(
            json.dumps({"eval/rollout_batches": 1, f"eval/{SCRIPT.replace('/', '')}/avg@4": 0.5}) + "\n" + "[" * 99_999
        )
    folders += [
        evaluate(runs / "e", "runs/a", **{SCRIPT: 50, "=cmd": 40, "__proto__": 30}),
        evaluate(runs / "v", MARKUP, m=1),
    ]
    folders += [analyze(runs / "l", SCRIPT, "runs/a"), probed(runs / "b")]
    loop = "optim: &a [*a, *a]\nmodel: &b [x, x, x, x]\n" + "".join(
        f"o{n}: &c{n} [{f'*c{n - 1}' if n else '*b'}, {f'*c{n - 1}' if n else '*b'}]\n" for n in range(30)
    )
    (train(runs / "bomb", 3) / "config.yaml").write_text(
        loop
    )  # 2^30 texts by YAML aliases, and a list that contains itself
    return [*folders, runs / "bomb"]


def test_hostile_run_folders_do_nothing_in_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    odd = tmp_path / f"odd{ESCAPES.replace(chr(0), '').removesuffix(chr(0xDC80))}"
    odd.mkdir()
    folders = [*hostile_runs(tmp_path / "runs"), tmp_path / "pipe", odd]
    assert main(["report", *map(str, folders), "--output", "page.html"]) == 0
    out = capsys.readouterr().out
    assert "left out: " in out and "(no run)" in out and not STEERING.search(out)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = page[page.rindex("</script>\n</head>") :]  # after the code of Plotly
    assert "alert(1)</script>" not in page and "<img src=x" not in page and page.count("<script") == 2
    data = data_of(tmp_path / "page.html")
    (run,) = [run for run in data["runs"] if run["folder"].endswith("/a")]
    assert len(run["y"]["reward"]["y"]) == 6 and "kl" not in run["y"] and "loss" not in run["y"]
    assert len(json.dumps(data)) < 200_000 and not STEERING.search(json.dumps(data, ensure_ascii=False))
    found = report_runs(folders, tmp_path / "page.html")
    rows = list(csv.DictReader(found.tables[0].to_dataframe().to_csv(index=False).splitlines()))
    assert rows and not [value for row in rows for value in row.values() if value[:1] in tuple("=+@")]
    lines = found.tables[0].to_markdown().splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_json_in_a_script_cannot_end_it():
    assert "<" not in dump_script_json({SCRIPT: [SCRIPT], "<!--": SCRIPT})


def test_hostile_questions_are_graded_as_text(touched):
    """Prompts, gold answers and answers hold null bytes, lone surrogates, control characters and code."""
    code = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    texts = [
        ESCAPES.removesuffix("\udc80"),
        SCRIPT,
        MARKUP,
        code,
        f"\\boxed{{{code}}}",
        "\x00",
        "\\boxed{\x00}",
    ]
    prompts = [[{"role": "user", "content": f"{text} 1+1"}] for text in texts]
    problems = Dataset.from_dict({"prompt": prompts, "answer": ["2"] * len(texts)})
    table = grade_completions(problems, [[SampledCompletion(text, 1, False)] for text in texts])
    assert set(table["verdict"]) <= {"wrong", "unparsable"} and len(table) == len(texts)


# -- paths and configs


@pytest.mark.parametrize(
    "label", ["..", ".", "", "a/b", "../x", "/abs", "a\\b", "a\0b", "a\x1b[2Jb", "a\rb", "a\nb", "a\u202eb", "x" * 121]
)
def test_a_label_stays_inside_its_folder(label, tmp_path):
    with pytest.raises(UserError, match="names no folder inside"):
        get_label_folder(tmp_path, label)


@pytest.mark.parametrize("label", ["../x", "a\x1b[2Jb"])
def test_a_hostile_label_of_a_benchmark_writes_nothing(label, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    named = f"{label}={tmp_path / 'p.jsonl'}"
    assert main(["eval", "--model", "embedded", "--benchmarks", named, "--output", "run"]) == 2
    train = ["train", "--model", "embedded", "--dataset", "arithmetic", "--internal_layer", "3", "--output", "run"]
    assert main([*train, "--eval_benchmarks", named]) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if "bupo: error" in line]
    assert (
        len(lines) == 2
        and not STEERING.search("".join(lines))
        and all("names no folder inside" in line for line in lines)
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["p.jsonl"]


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
    ],
)
@pytest.mark.parametrize("command", ["train", "eval", "analyze", "sample", "demo", "report"])
def test_a_config_runs_nothing(tag, command, tmp_path, touched, capsys):
    (tmp_path / "c.yaml").write_text(f"seed: {tag.format(touched)}\n")
    assert main([command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml" in capsys.readouterr().err


# -- models


@pytest.fixture
def model_folder(tmp_path):
    shutil.copytree(resolve_model_path("embedded"), tmp_path / "model")
    return tmp_path / "model"


def test_code_of_a_model_does_not_run_unasked(model_folder, touched, capsys):
    """`trust_remote_code` is false by default, and there is no question at the terminal."""
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\n"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (model_folder / f"{name}.py").write_text(code)
    known = json.loads((model_folder / "config.json").read_text())
    auto = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    for changes in ({"auto_map": auto}, {"auto_map": auto, "model_type": "evil", "architectures": ["EvilForCausalLM"]}):
        (model_folder / "config.json").write_text(json.dumps(known | changes))
        for command in (
            ["sample", "--prompt", "1+1", "--max_new_tokens", "1"],
            ["eval", "--benchmarks", "arithmetic", "--size", "1", "--k", "1"],
        ):
            output = ["--output", str(touched.parent / "run")] if command[0] == "eval" else []
            assert main([*command, "--model", str(model_folder), *output]) in (0, 2)
    assert "custom code" in capsys.readouterr().err


def test_pickled_weights_run_nothing(model_folder, touched):
    (model_folder / "model.safetensors").unlink()
    with (model_folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": Bomb(touched)}, file)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(model_folder))
    torch.save({"x": Bomb(touched)}, model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(model_folder))


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ raise_exception.__globals__['__builtins__']['open']('FILE', 'w') }}",
    "{{ messages.append(1) }}{{ messages[0].__setitem__('a', 1) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_reaches_nothing(template, model_folder, touched, capsys):
    """transformers renders it in jinja's sandbox, whose objects cannot be changed."""
    (model_folder / "chat_template.jinja").write_text(template.replace("FILE", str(touched)))
    tokenizer = load_tokenizer(str(model_folder))
    messages = [{"role": "user", "content": "1+1"}]
    with pytest.raises(Exception) as caught:
        tokenize_prompt(tokenizer, messages)
    assert type(caught.value).__module__.startswith(("jinja2", "bupo")) or isinstance(caught.value, OverflowError)
    assert messages == [{"role": "user", "content": "1+1"}]


# -- checkpoints and cached responses


@pytest.mark.faults
def test_pickles_of_a_checkpoint_run_nothing(tmp_path, touched):
    """The files of the optimizer, the scheduler, the random state, bupo's state, and the arguments, which no resume reads."""
    command = [
        "train",
        "--model",
        "embedded",
        "--dataset",
        "arithmetic",
        "--size",
        "8",
        "--internal_layer",
        "2",
        "--internal_steps",
        "1",
    ]
    command += [
        "--per_device_train_batch_size",
        "4",
        "--num_generations",
        "4",
        "--max_new_tokens",
        "4",
        "--save_steps",
        "1",
    ]
    command += ["--report_to", "none", "--output", str(tmp_path / "run")]
    assert main([*command, "--max_steps", "1"]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-1"
    files = [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= {path.name for path in files}
    for file in files:
        whole = file.read_bytes()
        torch.save({"x": Bomb(touched)}, file)
        try:
            main([*command, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint)])
        except Exception as error:
            assert "eights" in str(error) or "load" in str(error), error
        assert not touched.exists(), file.name
        file.write_bytes(whole)
        shutil.rmtree(tmp_path / "run" / "checkpoint-2", ignore_errors=True)


FINISHED = {"rollout_batches": 1.0, "schedule": [[1, 1]]}
UNREAD = {
    "a bomb": lambda path, bomb: torch.save({"passes": 1, "x": bomb}, path),
    "a pickle": lambda path, bomb: path.write_bytes(pickle.dumps({"passes": bomb})),
    "rubbish": lambda path, bomb: path.write_bytes(b"\x00rubbish" * 99),
    "nothing": lambda path, bomb: path.write_bytes(b""),
    "a folder": lambda path, bomb: path.mkdir(),
    "a list": lambda path, bomb: torch.save([1], path),
    "no batches": lambda path, bomb: torch.save({"passes": 1, "layout": {"micro_steps": 0}}, path),
    "words": lambda path, bomb: torch.save({"passes": "1", "layout": None}, path),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_a_checkpoint_that_is_analysed_is_read_as_numbers_only(tmp_path, touched, kind):
    """A checkpoint whose position in its run cannot be read has no position."""
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    UNREAD[kind](checkpoint / "bupo.pt", Bomb(touched))
    (tmp_path / "run" / "finished.json").write_text(json.dumps(FINISHED))
    assert find_checkpoint_series([str(checkpoint), str(tmp_path / "run")], None, tmp_path) is None
    for text in (
        "7",
        "[]",
        "{",
        "",
        json.dumps(FINISHED | {"schedule": [1]}),
        json.dumps(FINISHED | {"rollout_batches": []}),
    ):
        (tmp_path / "run" / "finished.json").write_text(text)
        assert find_checkpoint_series([str(tmp_path / "run")] * 2, None, tmp_path) is None


@pytest.mark.parametrize("batches", ["NaN", "1e400", "-1", "-Infinity"])
def test_a_run_that_has_done_what_none_does_is_one_line(tmp_path, batches):
    (tmp_path / "finished.json").write_text(f'{{"rollout_batches": {batches}, "schedule": []}}')
    with pytest.raises(
        UserError, match=r"has \S+ completed rollout batches, which is impossible: its files are damaged"
    ):
        find_checkpoint_series([str(tmp_path)] * 2, None, tmp_path / "out")


def test_a_layer_that_a_later_model_does_not_have_is_found_before_it_is_measured(tmp_path):
    """The checkpoints of a folder may come from models with different numbers of layers."""
    (tmp_path / "finished.json").write_text(json.dumps(FINISHED | {"schedule": [[5, 1]]}))
    (tmp_path / "config.yaml").write_text("model: embedded")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 4}')
    with pytest.raises(UserError, match=rf"layer: layer 5 does not exist: {tmp_path} has layers 1 to 4$"):
        find_checkpoint_series(["embedded", str(tmp_path)], None, tmp_path / "out")


@pytest.mark.parametrize("name", ["finished.json", "config.yaml"])
def test_only_regular_files_of_an_analysed_run_are_read(tmp_path, name):
    """A pipe would block, and a link could show a file outside the folder."""
    run = tmp_path / "run"
    run.mkdir()
    files = {"finished.json": json.dumps(FINISHED | {"schedule": []}), "config.yaml": "internal_layer: 5"}
    for each, text in files.items():
        (run / each).write_text(text)
    (run / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": 8}')

    def find_layers():
        found = find_checkpoint_series([str(run)] * 2, None, tmp_path / "out")
        return found and found.layers

    assert find_layers() == [5]
    (tmp_path / name).write_text(files[name])
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / name)
    assert not find_layers()
    (run / name).unlink()
    os.mkfifo(run / name)
    assert not find_layers()


@pytest.mark.parametrize(
    "config",
    [
        "internal_layer: [1, 2]",
        "internal_layer: -3",
        "[1, 2]",
        "{",
        "!!python/name:os.system x",
        pytest.param("[" * 5000, id="deep"),
        pytest.param("internal_layer: 5\nx: '" + "x" * (300 << 10) + "'", id="huge"),
    ],
)
def test_a_run_whose_config_cannot_be_read_names_no_layer(tmp_path, config):
    (tmp_path / "finished.json").write_text(json.dumps(FINISHED | {"schedule": []}))
    (tmp_path / "config.yaml").write_text(config)
    assert find_checkpoint_series([str(tmp_path)] * 2, None, tmp_path / "out").layers == []


def test_kept_responses_of_the_harness_are_no_pickles(tmp_path, touched):
    """The cache of lm-eval-harness would unpickle a copied folder's content."""
    sqlitedict = pytest.importorskip("sqlitedict")
    kept = tmp_path / "responses_rank0.db"
    with _storing_responses_as_json(tmp_path), sqlitedict.SqliteDict(str(kept), autocommit=True) as cache:
        cache["a"], cache["b"] = "text", (-1.5, True)
        cache.commit()
        assert (cache["a"], cache["b"]) == ("text", (-1.5, True))
    rows = sqlite3.connect(kept)
    rows.execute("UPDATE unnamed SET value = ?", (pickle.dumps(Bomb(touched)),))
    rows.commit()
    rows.close()
    with (
        _storing_responses_as_json(tmp_path),
        sqlitedict.SqliteDict(str(kept)) as cache,
        pytest.raises(UserError, match="holds responses that are not JSON: choose another"),
    ):
        cache["a"]
    with sqlitedict.SqliteDict(
        str(tmp_path / "other.db")
    ) as cache:  # the setting of the harness is restored afterwards
        cache["a"] = {1, 2}
        assert cache["a"] == {1, 2}


def test_code_that_a_model_wrote_sees_no_secret(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, "s3cret")
    before = dict(os.environ)
    with _hiding_secret_variables(False):
        assert dict(os.environ) == before
    with pytest.raises(KeyboardInterrupt), _hiding_secret_variables(True):
        assert "s3cret" not in os.environ.values() and os.environ["PATH"]
        raise KeyboardInterrupt
    assert dict(os.environ) == before


@pytest.mark.slow
def test_tokens_reach_no_file(tmp_path):
    """All files of a run are searched: config, arguments, model card, metrics, checkpoints."""
    config = {
        "model": "embedded",
        "dataset": "arithmetic",
        "size": 8,
        "internal_steps": 0,
        "per_device_train_batch_size": 4,
    }
    config |= {"num_generations": 4, "max_new_tokens": 4, "max_steps": 1, "save_steps": 1, "report_to": "none"}
    config |= {"hub_token": "hf_s3cret", "model_init_kwargs": {"token": "hf_s3cret"}, "output": str(tmp_path / "run")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"training_args.bin", "config.yaml", "run.json", "README.md"} <= {path.name for path in files}
    assert [str(path) for path in files if b"hf_s3cret" in path.read_bytes()] == []
    assert not any("hf_s3cret" in word for word in sys.argv)
