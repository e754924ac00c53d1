"""Evaluation: nothing is sampled twice, and grades are math-verify's."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from math_verify import parse, verify
from peft import LoraConfig, get_peft_model
from scipy import stats

from bupo.cli.main import main
from bupo.data import problems as problems_module
from bupo.data.chat_templates import get_template_kwargs, set_chat_template, tokenize_prompt
from bupo.data.problems import load_problems
from bupo.evaluation.answers import (
    get_correct,
    grade_completions,
    open_sample_cache,
    read_graded_table,
    sample_completions,
    summarize,
)
from bupo.evaluation.benchmarks import BENCHMARKS, load_benchmark
from bupo.evaluation.metrics import avg_at_k
from bupo.generation.seeded_sampling import SampledCompletion
from bupo.models.loading import load_model, load_tokenizer
from bupo.reports.figures.style import BLUE
from bupo.utils.errors import UserError
from tests.data.test_problems import SHARED, write
from tests.helpers.figure_reading import drawn

TOKENIZER = load_tokenizer("embedded")


# -- runs that are interrupted ---------------------------------------------------------------------------------------


class Counting:
    """An engine that notes what it is asked for, and may stop in the middle."""

    def __init__(self, stop=None):
        self.asked, self.stop = [], stop

    def __call__(self, wanted):
        for request in wanted:
            if self.stop is not None and len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append((request.problem, request.sample))
            yield request, SampledCompletion(f"{request.seed}", 3, False)


def test_nothing_is_sampled_twice(tmp_path):
    prompts = [(1, 2), (3,), (4,)]
    problems = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in "abc"]})

    def kept():
        store = open_sample_cache(tmp_path, {"model": "m"}, problems)
        store.begin()
        return store

    whole = sample_completions(Counting(), prompts, 4)
    first = Counting(stop=5)
    with pytest.raises(KeyboardInterrupt):
        sample_completions(first, prompts, 4, 0, kept())
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"problem": 1, "sample": 3, "te')  # killed while it wrote
    second = Counting()
    assert sample_completions(second, prompts, 4, 0, kept()) == whole
    assert len(second.asked) == 7 and not set(first.asked) & set(second.asked)
    more = Counting()
    assert [row[:4] for row in sample_completions(more, prompts, 6, 0, kept())] == whole and len(more.asked) == 6
    assert sample_completions(Counting(stop=0), prompts, 2, 0, kept()) == [row[:2] for row in whole]
    before = (tmp_path / "samples.jsonl").read_bytes()
    row = b'{"problem": 0, "sample": 9, "text": "", "tokens": 1, "truncated": false, "more": 1}\n'
    for broken, message in ((before + row, "line 19 cannot"), (b"[1]\n" + before, "line 1 cannot be read")):
        (tmp_path / "samples.jsonl").write_bytes(broken)
        with pytest.raises(UserError, match=message):
            kept()
        assert (tmp_path / "samples.jsonl").read_bytes() == broken  # nothing is cut off that is whole


def evaluation(folder, *extra):
    return ["eval", "--model", "embedded", "--benchmarks", "arithmetic", "--size", "48", "--k", "4", "--max_new_tokens", "32", "--batch_size", "8",
            "--output", str(folder), *extra]  # fmt: skip


def rows(folder):
    lines = (folder / "arithmetic" / "samples.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["problem"], row["sample"]))


def killed_in(command, samples, answers):
    """Run a command, kill it when a file holds so many answers, and return what the file holds then."""
    command = [sys.executable, "-m", "bupo.cli.main", *command]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    started = time.monotonic()
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= answers):
        assert running.poll() is None and time.monotonic() - started < 120
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    return samples.read_bytes()


@pytest.mark.slow
def test_twice_the_same_and_once_killed(tmp_path):
    assert main(evaluation(tmp_path / "a")) == 0
    assert main(evaluation(tmp_path / "b")) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 192
    for name in ("summary.json", "table.md", "table.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    size, colours = drawn(tmp_path / "a" / "pass_at_k.png")
    assert size == (825, 540) and colours[BLUE] > 100

    samples = tmp_path / "c" / "arithmetic" / "samples.jsonl"
    before = killed_in(evaluation(tmp_path / "c"), samples, 16)
    assert 16 <= before.count(b"\n") < 192 and not (tmp_path / "c" / "summary.json").exists()
    assert main(evaluation(tmp_path / "c")) == 0
    whole = before[: before.rfind(b"\n") + 1]
    assert samples.read_bytes().startswith(whole)
    assert rows(tmp_path / "c") == rows(tmp_path / "a")
    assert (tmp_path / "c" / "table.md").read_bytes() == (tmp_path / "a" / "table.md").read_bytes()


FILES = ("math500", "amc2023", "aime_2024", "aime_2025", "deepmath-5k")


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no problem files here")
def test_problem_files_twice_the_same_and_once_killed(tmp_path):
    """A slice of each; `docs/evaluation.md` tells of all of them."""
    names = ",".join([*(str(SHARED / f"{name}.parquet") for name in FILES), "arithmetic"])

    def command(folder):
        return ["eval", "--benchmarks", names, "--size", "8", "--k", "2", "--max_new_tokens", "16", "--batch_size", "4",
                "--output", str(folder)]  # fmt: skip

    def everything(folder):
        return {
            name: sorted((folder / name / "samples.jsonl").read_text().splitlines()) for name in (*FILES, "arithmetic")
        }

    assert main(command(tmp_path / "a")) == 0 and main(command(tmp_path / "b")) == 0
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    killed_in(command(tmp_path / "c"), tmp_path / "c" / "aime_2024" / "samples.jsonl", 4)
    assert not (tmp_path / "c" / "deepmath-5k").exists()
    assert main(command(tmp_path / "c")) == 0
    assert everything(tmp_path / "c") == everything(tmp_path / "a")
    for name in ("summary.json", "table.md", "table.csv", "report.html"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    scores = [
        found["avg@k"] for found in json.loads((tmp_path / "a" / "summary.json").read_text())["benchmarks"].values()
    ]
    assert f"| average |  | {100 * np.mean(scores):.1f} [" in (tmp_path / "a" / "table.md").read_text()
    page = (tmp_path / "a" / "report.html").read_text()
    assert all(name in page for name in FILES)


# -- grades and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grades_are_those_of_math_verify_called_directly(tmp_path):
    assert main(evaluation(tmp_path)) == 0
    table = pd.read_parquet(tmp_path / "arithmetic" / "graded.parquet")
    direct = [
        bool(verify(parse(f"\\boxed{{{gold}}}"), parse(text)))
        for gold, text in zip(table.gold, table.text, strict=True)
    ]
    assert (table["verdict"] == "correct").tolist() == direct
    assert "unevaluated" not in set(table["verdict"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["benchmarks"]["arithmetic"]
    correct = get_correct(read_graded_table(tmp_path / "arithmetic"))
    assert found["avg@k"] == pytest.approx(np.mean(direct)) == pytest.approx(avg_at_k(correct)[0])
    assert correct.shape == (48, 4) and sum(found["verdicts"].values()) == sum(found["strict_verdicts"].values()) == 192
    assert found["strict_avg@k"] == pytest.approx((table["strict"] == "correct").mean())
    assert found["graded_by"] == f"math-verify {version('math-verify')}"
    assert found["pass@k"]["4"] == pytest.approx(correct.any(1).mean())
    assert summary["meta"]["template"] == "the model's own" and summary["meta"]["versions"]["bupo"]


def test_two_runs_compared(tmp_path, capsys):
    assert main(evaluation(tmp_path / "whole")) == 0
    assert main(evaluation(tmp_path / "layer", "--layer", "6", "--compare", str(tmp_path / "whole"))) == 0
    summary = json.loads((tmp_path / "layer" / "summary.json").read_text())
    found = summary["benchmarks"]["arithmetic"]
    first, second = (
        get_correct(read_graded_table(tmp_path / name / "arithmetic")).mean(1) for name in ("whole", "layer")
    )
    assert found["difference"] == pytest.approx((second - first).mean())
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found["difference_interval"] == pytest.approx([low, high])
    assert "difference [95 %]" in (tmp_path / "layer" / "table.md").read_text()
    assert "layer 6" in capsys.readouterr().out


def test_both_grades_stand_side_by_side(tmp_path, capsys):
    """A policy that repeats its question is right for math-verify and for the record; the strict numbers tell of it."""
    problems = load_problems("arithmetic", "test", size=4)
    questions = [row["prompt"][-1]["content"].rstrip("=? ") for row in problems]
    texts = [
        f"\\boxed{{{questions[0]}}}",
        f"\\boxed{{{problems[1]['answer']}}}",
        f"\\fbox{{{problems[2]['answer']}}}",
        "",
    ]
    table = grade_completions(problems, [[SampledCompletion(text, 3, False)] for text in texts])
    assert table["verdict"].tolist() == ["correct", "correct", "unparsable", "unparsable"]
    assert table["strict"].tolist() == ["unevaluated", "correct", "correct", "unparsable"]
    assert table["value"][1:3].tolist() == problems[1:3]["answer"] and table["value"].isna().tolist() == [False] * 3 + [
        True
    ]
    table = grade_completions(problems, [[SampledCompletion(text, 3, False)] for text in texts[:1] * 3 + texts[-1:]])
    found = summarize(table)
    assert (found["avg@k"], found["strict_avg@k"]) == (0.25, 0.0)  # the question's sum is the first one's answer only
    assert found["verdicts"]["wrong"] == found["strict_verdicts"]["wrong"] == 2
    assert found["strict_verdicts"]["unevaluated"] == 1 and found["verdicts"]["unevaluated"] == 0
    assert main(evaluation(tmp_path, "--size", "4", "--k", "2")) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]["arithmetic"]
    share = f"{100 * summary['strict_avg@k']:.1f}"
    out = capsys.readouterr().out
    assert "strict" in out and max(map(len, out.splitlines())) <= 80
    (row,) = pd.read_csv(tmp_path / "table.csv", dtype=str).to_dict("records")
    assert row["strict"] == share and f"| {share} |" in (tmp_path / "table.md").read_text()
    assert f"<td>{share}</td>" in (tmp_path / "report.html").read_text()


def test_a_summary_of_another_format_is_refused_and_can_be_graded_again(tmp_path, capsys):
    """The refused evaluation is one to compare with; `--engine cached` grades its answers again."""
    assert main(evaluation(tmp_path / "old", "--size", "3", "--k", "1")) == 0
    summary, graded_file = tmp_path / "old" / "summary.json", tmp_path / "old" / "arithmetic" / "graded.parquet"
    summary.write_text(summary.read_text().replace('"schema_version": 4', '"schema_version": 3'))
    table = pd.read_parquet(graded_file)
    table.drop(columns="strict").to_parquet(graded_file)
    compared = evaluation(tmp_path / "new", "--size", "3", "--k", "1", "--compare", str(tmp_path / "old"))
    assert main(compared) == 2 and not (tmp_path / "new").exists()
    assert (
        "old was graded by an earlier version: run its bupo eval once more with --engine cached"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match=r"graded.parquet is damaged.*strict"):
        read_graded_table(tmp_path / "old" / "arithmetic")
    assert main(evaluation(tmp_path / "old", "--size", "3", "--k", "1", "--engine", "cached")) == 0
    assert pd.read_parquet(graded_file).equals(table) and '"schema_version": 4' in summary.read_text()


@pytest.mark.slow
def test_answers_that_are_kept_are_graded_without_a_model(tmp_path, capsys):
    run = evaluation(tmp_path)
    assert main(run) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    for name in ("summary.json", "table.md", "report.html"):
        (tmp_path / name).unlink()
    assert main([*run, "--engine", "cached", "--model", "nowhere"]) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["benchmarks"] == first["benchmarks"] and again["meta"]["model"] == "embedded"
    assert (tmp_path / "report.html").exists()
    capsys.readouterr()
    for more, message in (
        (["--k", "6"], "arithmetic holds 4 answers to problem 0, and k is 6: lower k or size"),
        (["--size", "60"], "arithmetic holds 0 answers to problem 48, and k is 4"),
        (["--system_prompt", "Think."], "arithmetic holds answers of other problems (number 0"),
        (["--seed", "1"], "): give the benchmark, seed and system_prompt that they were sampled with"),
        (["--seed", "1", "--overwrite", "true"], "): give the benchmark, seed"),  # it would delete what is to be graded
    ):
        assert main([*run, "--engine", "cached", *more]) == 2
        assert message in capsys.readouterr().err
    assert len(rows(tmp_path)) == 192


def test_a_model_that_was_trained_under_the_same_name_is_another(tmp_path, capsys):
    model = load_model("embedded")
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    run = evaluation(tmp_path / "run", "--size", "2", "--model", str(tmp_path / "model"))
    assert main(run) == 0 and main(run) == 0
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 1e-4
    model.save_pretrained(tmp_path / "model")
    assert main(run) == 2
    assert "made with another weights" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter(tmp_path, capsys):
    """That of a model which LoRA has changed; its answers are those of the merged model."""
    torch.manual_seed(0)
    adapted = get_peft_model(load_model("embedded"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    TOKENIZER.save_pretrained(tmp_path / "merged")
    for name, options in (
        ("a", ["--adapter", str(tmp_path / "adapter")]),
        ("b", ["--model", str(tmp_path / "merged")]),
    ):
        assert main(evaluation(tmp_path / name, "--size", "6", *options)) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert main(evaluation(tmp_path / "c", "--size", "6")) == 0
    assert rows(tmp_path / "c") != rows(tmp_path / "a")
    capsys.readouterr()
    assert main(evaluation(tmp_path / "d", "--adapter", str(tmp_path / "nowhere"))) == 2
    assert "cannot be put on the model" in capsys.readouterr().err


SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 32, do_sample: false}
filter_list:
  - name: boxed
    filter: [{function: regex, regex_pattern: 'boxed.(-?[0-9]+)'}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def own_tasks(monkeypatch):
    """The harness knows the tasks of a test's files only: to list its own 12,000 takes it ten seconds. Lists made so far."""
    from lm_eval import tasks

    made, manager = [], tasks.TaskManager

    def without_defaults(**options):
        made.append(manager(include_defaults=False, **options))
        return made[-1]

    monkeypatch.setattr(tasks, "TaskManager", without_defaults)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("layer", [None, pytest.param("8", marks=pytest.mark.slow)])
def test_the_harness_measures_the_same_policy(own_tasks, tmp_path, capsys, layer):
    """A task of the harness on the same problems, against our own greedy answers and grades."""
    problems = load_problems("arithmetic", "test", size=48)
    write(
        tmp_path / "sums.jsonl",
        [{"question": row["prompt"][-1]["content"], "answer": row["answer"]} for row in problems],
    )
    task = tmp_path / "sums.yaml"
    task.write_text(SUMS.replace("FILE", str(tmp_path / "sums.jsonl")))
    policy = ["--layer", layer, "--lens", "final_norm"] if layer else []
    command = evaluation(tmp_path / "run", "--k", "1", "--temperature", "0", *policy)
    command[command.index("arithmetic")] = f"arithmetic,harness:{task}"
    assert main(command) == 0 and len(own_tasks) == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summary["harness"]["sums"]
    assert found["score"] == pytest.approx(summary["benchmarks"]["arithmetic"]["avg@k"]) and found["score"] > 0
    assert found["problems"] == 48 and found["metric"] == "exact_match,boxed"
    error = np.sqrt(found["score"] * (1 - found["score"]) / 47)
    assert found["interval"][1] - found["score"] == pytest.approx(1.96 * error, rel=1e-3)
    assert "sums" in (tmp_path / "run" / "harness.md").read_text() and "exact_match" in capsys.readouterr().out
    assert "exact_match,boxed" in (tmp_path / "run" / "report.html").read_text()
    here = tmp_path / "run" / "harness" / "sums"
    for responses in here.glob("responses*"):
        responses.unlink()
    assert main(command) == 0 and not list(here.glob("responses*"))  # its result is kept
    capsys.readouterr()
    alone = evaluation(tmp_path / "run", "--k", "1", "--temperature", "0", *policy)
    alone[alone.index("arithmetic")] = f"harness:{task}"
    for more, message in ((["--layer", "2"], "responses made with another layer"), (["--size", "9"], "another size")):
        assert main([*alone, *more]) == 2
        assert message in capsys.readouterr().err
    task.write_text(task.read_text() + "\nrepeats: 1\n")
    assert main(alone) == 2
    assert "made with another task_sha256" in capsys.readouterr().err
    assert main([*alone, "--overwrite", "true"]) == 0


@pytest.mark.usefixtures("own_tasks")
def test_a_group_of_the_harness(tmp_path, capsys):
    """Its number is the mean over its tasks' questions; a tag or a group without a number is refused."""
    rows = [
        {"question": row["prompt"][-1]["content"], "answer": row["answer"]}
        for row in load_problems("arithmetic", "test", size=8)
    ]
    write(tmp_path / "sums.jsonl", rows)
    for name in ("one", "two"):
        text = SUMS.replace("FILE", str(tmp_path / "sums.jsonl")).replace(
            "task: sums", f"task: {name}\ntag: [both_tag]"
        )
        (tmp_path / f"{name}.yaml").write_text(text)
    group = tmp_path / "group.yaml"
    group.write_text("group: both\ntask: [one, two]\n")
    command = ["eval", "--benchmarks", f"harness:{group}", "--size", "4", "--output", str(tmp_path / "run")]
    assert main(command) == 2
    assert "lm-eval-harness gives no score for all of 'both': name one of its tasks" in capsys.readouterr().err
    metric = "{metric: exact_match, aggregation: mean, weight_by_size: true, filter_list: boxed}"
    group.write_text(f"group: both\ntask: [one, two]\naggregate_metric_list: [{metric}]\n")
    assert main([*command[:-1], str(tmp_path / "again")]) == 0
    found = json.loads((tmp_path / "again" / "summary.json").read_text())["harness"]["group"]
    assert found["problems"] == 8 and found["metric"] == "exact_match,boxed" and found["shots"]["one"] == 0


@pytest.mark.usefixtures("own_tasks")
def test_the_harness_has_the_limit_and_the_code_needs_leave(tmp_path, capsys):
    sums = load_problems("arithmetic", "test", size=16)
    rows = [{"question": row["prompt"][-1]["content"], "answer": row["answer"]} for row in sums]
    write(tmp_path / "sums.jsonl", rows)
    text = SUMS.replace("FILE", str(tmp_path / "sums.jsonl")).replace(", max_gen_toks: 32", "")
    (tmp_path / "sums.yaml").write_text(text)
    for limit in ("2", "40"):
        command = ["eval", "--benchmarks", f"harness:{tmp_path / 'sums.yaml'}", "--max_new_tokens", limit]
        assert main([*command, "--output", str(tmp_path / limit)]) == 0
        found = json.loads((tmp_path / limit / "summary.json").read_text())["harness"]["sums"]
        assert (found["score"] > 0) == (limit == "40"), found  # two tokens hold no answer
    (tmp_path / "unsafe.yaml").write_text(text.replace("task: sums", "task: unsafe\nunsafe_code: true"))
    capsys.readouterr()
    command = ["eval", "--benchmarks", f"harness:{tmp_path / 'unsafe.yaml'}", "--max_new_tokens", "4", "--output"]
    assert main([*command, str(tmp_path / "u")]) == 2
    assert "runs code that the model writes, on this machine: allow it with --run_code true" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "u"), "--run_code", "true"]) == 0


def test_a_local_file_under_a_benchmarks_name(tmp_path):
    file = tmp_path / "mine.jsonl"
    write(file, [{"problem": "1+2-1", "solution": "so \\boxed{2}"}, {"problem": "4+4-1", "solution": "7"}])
    assert (
        main(
            [
                "eval",
                "--benchmarks",
                f"aime24={file}",
                "--k",
                "2",
                "--max_new_tokens",
                "32",
                "--output",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["benchmarks"]["aime24"]["problems"] == 2
    label, problems = load_benchmark(str(file))
    assert label == "mine" and problems["answer"] == ["so \\boxed{2}", "7"]


def test_the_answer_of_gsm8k_stands_behind_a_mark(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    write(file, [{"question": "How many?", "answer": "2 and 3 make 5.\n#### 5"}])
    assert load_benchmark(f"gsm8k={file}")[1]["answer"] == ["5"]


def test_benchmarks_are_pinned():
    assert {"math500", "amc23", "aime24", "aime25", "olympiadbench", "minerva", "gsm8k"} == set(BENCHMARKS)
    for benchmark in BENCHMARKS.values():
        assert len(benchmark.revision) == 40 and int(benchmark.revision, 16)


@pytest.mark.parametrize("name", ["math500", "gsm8k", "org/mine@abc", "org/mine"])
def test_the_hub_is_asked_for_the_revision(monkeypatch, name):
    asked = []

    def hub(path, config, split, revision):
        asked.append((path, config, split, revision))
        return Dataset.from_dict({"problem": ["1+1"], "question": ["1+1"], "answer": ["#### 2"]})

    monkeypatch.setattr(problems_module, "load_dataset", hub)
    label, problems = load_benchmark(name)
    known = BENCHMARKS.get(name)
    wanted = (known.hub, known.config, "test", known.revision) if known else None
    assert asked == [wanted or ("org/mine", None, "test", "abc" if "@" in name else None)]
    assert label == (name if known else "mine") and len(problems) == 1


def test_several_values_are_one_answer(tmp_path):
    write(tmp_path / "olympiad.jsonl", [{"question": "roots?", "final_answer": ["1", "-2"]}])
    assert load_benchmark(str(tmp_path / "olympiad.jsonl"))[1]["answer"] == ["1, -2"]


def test_the_template_is_chosen_by_the_model():
    def chosen(template, name="m", wanted=None):
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template, tokenizer.name_or_path = template, name
        shown = set_chat_template(tokenizer, wanted)
        return shown, tokenizer.decode(tokenize_prompt(tokenizer, [{"role": "user", "content": "2+3"}]))

    thinks = (
        "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %}9{% else %}0{% endif %}"
    )
    assert chosen("{{ messages[0].content }}=") == ("the model's own", "2+3=")
    assert chosen(thinks) == ("the model's own, no thinking", "2+30")
    shown, text = chosen(None)
    assert shown.startswith("none (plain text") and text == "2+3\n"
    shown, text = chosen(None, "OctoThinker/OctoThinker-3B-Hybrid-Base")
    assert shown == "octothinker, as in the paper's code" and text.endswith("\\boxed{} tag.\n2+3\nAssistant:")
    tokenizer = load_tokenizer("embedded")
    set_chat_template(tokenizer, "octothinker")
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"))]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    asked = (
        "User: You must put your answer inside \\boxed{} and Your final answer will be extracted automatically by the "
        "\\boxed{} tag.\n"
    )
    assert text.endswith(f" S {asked}1\nAssistant: 2{tokenizer.eos_token} {asked}3\nAssistant:")
    shown, text = chosen("{{ messages[0].content }}!", "OctoThinker/OctoThinker-3B-Hybrid-Base")  # trained with another
    assert shown == "the model's own" and text == "2+3!"
    shown, text = chosen("{{ messages[0].content }}", wanted="qwen-math")
    assert shown == "qwen-math" and "step by step" in text
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = thinks
    assert get_template_kwargs(tokenizer) == {"enable_thinking": False}
    assert (
        tokenizer.decode(tokenize_prompt(tokenizer, [{"role": "user", "content": "2"}], enable_thinking=True)) == "29"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "math5000"], "unknown benchmark 'math5000': choose math500, amc23"),
        (["--benchmarks", "math500"], "dataset 'HuggingFaceH4/MATH-500' .* cannot be loaded"),
        (["--benchmarks", "arithmetic,arithmetic"], "have the same label twice: write LABEL=FILE"),
        (["--benchmarks", "arithmetic,harness:arithmetic"], "is empty, or two have the same label"),
        (["--benchmarks", ","], "is empty, or two have the same label"),
        (["--output", __file__], "is a file: choose another output$"),
        (["--layer", "0"], "layer must be 1 or more, got 0"),
        (["--engine", "cached"], "holds no answers to grade: settings.json is missing"),
        (["--benchmarks", "humaneval"], "humaneval runs code that the model writes, on this machine: allow it with"),
        pytest.param(
            ["--benchmarks", "harness:nosuchtask"],
            "lm-eval-harness cannot load 'nosuchtask'",
            marks=pytest.mark.slow,  # it looks through all that it has
        ),
        (["--benchmarks", "harness:/nowhere.yaml"], "/nowhere.yaml is not a file with a task or a group"),
        pytest.param(["--benchmarks", "arc-c"], "lm-eval-harness cannot load 'arc_challenge'", marks=pytest.mark.slow),
        (["--benchmarks", "arc-c", "--engine", "vllm"], "lm-eval-harness runs with engine transformers here"),
        (["--benchmarks", "x=/nowhere.parquet"], "/nowhere.parquet is no file"),
        (["--k", "0"], "k must be 1 or more, got 0"),
        (["--temperature", "0"], "temperature 0 gives 16 identical answers: set k to 1"),
        (["--top_p", "0"], "top_p must lie above 0 and up to 1"),
        (["--layer", "99"], "layer 99 does not exist: .* has layers 1 to 8"),
        (["--model", "nowhere"], "nowhere"),
        (["--chat_template", "nope"], "chat_template must be"),
        (["--dtype", "int4"], "argument --dtype: invalid choice: 'int4'"),
        (["--deadline", "0"], "deadline must be positive, got 0"),
        (["--deadline", "inf"], "deadline must be positive and finite, got inf"),
        (
            ["--compare", "/nowhere", "--k", "1", "--size", "1", "--max_new_tokens", "2"],
            "/nowhere holds no finished evaluation",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["eval", "--size", "2", "--output", str(tmp_path / "run"), *options]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("bupo: error")]
    assert pd.Series([line]).str.contains(message).all(), line
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
def test_a_launcher_is_refused(tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(evaluation(tmp_path)) == 2
    assert "bupo eval is one process: for several GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "1+1", "reply": "2"}], "has no answer column .*; its columns are question, reply"),
        ([{"text": "1+1", "answer": "2"}], "has no prompt column"),
        (
            [{"question": "1+1", "answer": "???"}],
            "row 0: the gold answer '\?\?\?' is no answer",
        ),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_sampled(tmp_path, capsys, rows, message):
    write(tmp_path / "bad.jsonl", rows)
    assert main(["eval", "--benchmarks", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "run")]) == 2
    assert pd.Series([capsys.readouterr().err]).str.contains(message).all()
    assert not (tmp_path / "run").exists()
