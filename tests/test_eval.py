"""Evaluation: each answer's random numbers are its own, nothing is sampled twice, and grades are math-verify's."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from math_verify import parse, verify
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import GenerationConfig

from bupo.commands.main import main
from bupo.data import problems as problems_module
from bupo.data.problems import load_problems
from bupo.data.templates import choose_template, prompt_ids, template_options
from bupo.errors import UserError
from bupo.evaluation import vllm
from bupo.evaluation.answers import correct_of, finished, sample, samples
from bupo.evaluation.benchmarks import BENCHMARKS, load_benchmark
from bupo.evaluation.metrics import avg_at_k
from bupo.model.loading import load_model, load_tokenizer
from bupo.model.policy import InternalPolicies
from bupo.sampling import Answer, Request, SeededSampling, TransformersEngine, seed_of
from tests.test_data import SHARED, write

TOKENIZER = load_tokenizer("embedded")
PROMPTS = [tuple(prompt_ids(TOKENIZER, row["prompt"])) for row in load_problems("arithmetic", "test", size=12)]


def requests(k, prompts=PROMPTS, run=0):
    return [Request(p, n, ids, seed_of(run, p, n)) for p, ids in enumerate(prompts) for n in range(k)]


def answers(engine, wanted):
    return {(r.problem, r.sample): answer for r, answer in engine(wanted)}


@pytest.fixture(scope="module")
def model():
    return load_model("embedded").eval()


# -- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_tokens_are_sampled_from_the_policy(temperature, top_p):
    """20,000 rows of one distribution, chi-squared against its probabilities."""
    scores = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])
    rows = 20_000
    processor = SeededSampling([seed_of(0, i, 0) for i in range(rows)], 3, 1, temperature, top_p)
    chosen = processor(torch.zeros(rows, 3, dtype=torch.long), scores.expand(rows, -1).clone()).argmax(-1)
    expected = (scores / temperature).double().softmax(-1)
    if top_p < 1:
        order = expected.argsort(descending=True)
        inside = order[: int((expected[order].cumsum(0) < top_p).sum()) + 1]
        expected = torch.zeros_like(expected).scatter(0, inside, expected[inside])
    expected /= expected.sum()
    counts = chosen.bincount(minlength=5)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible].numpy(), (rows * expected[possible]).numpy()).pvalue > 1e-3


def test_each_token_has_a_number_of_its_own():
    processor = SeededSampling([1, 2], 0, 50, 1.0, 1.0)
    flat = torch.zeros(2, 1000)
    chosen = torch.stack([processor(torch.zeros(2, t, dtype=torch.long), flat.clone()).argmax(-1) for t in range(50)])
    assert len(set(chosen[:, 0].tolist())) > 40 and not torch.equal(chosen[:, 0], chosen[:, 1])


def test_more_samples_never_change_earlier_ones(model):
    few, many = answers(TransformersEngine(model, TOKENIZER, 32), requests(2)), {}
    many = answers(TransformersEngine(model, TOKENIZER, 32), requests(5))
    assert len(few) == 24 and len(many) == 60
    assert all(many[key] == answer for key, answer in few.items())
    assert len({answer.text for answer in many.values()}) > 20
    other = answers(TransformersEngine(model, TOKENIZER, 32), requests(2, run=1))
    assert sum(other[key] != answer for key, answer in few.items()) > 6


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_does_not_matter(model, batch_size):
    """One prompt a batch is not prefilled for several; seven cut a prompt's samples in two."""
    whole = answers(TransformersEngine(model, TOKENIZER, 32), requests(3))
    assert answers(TransformersEngine(model, TOKENIZER, 32, batch_size=batch_size), requests(3)) == whole


def test_without_temperature_it_is_the_models_own_generate(model):
    found = answers(TransformersEngine(model, TOKENIZER, 24, temperature=0.0), requests(1))
    for problem, ids in enumerate(PROMPTS):
        own = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert found[problem, 0].text == TOKENIZER.decode(own, skip_special_tokens=True)


def test_the_models_own_generation_settings_do_not_matter(model):
    """A repetition penalty, beams, no cache or a length of its own would change what is sampled."""
    wanted = answers(TransformersEngine(model, TOKENIZER, 32), requests(3))
    for setting in (
        {"use_cache": False},
        {"repetition_penalty": 1.5},
        {"num_beams": 2},
        {"top_k": 2, "temperature": 0.1, "do_sample": True},
        {"max_new_tokens": 4},
        {"cache_implementation": "static"},
    ):
        own = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, **setting)
        before, model.generation_config = model.generation_config, own
        try:
            assert answers(TransformersEngine(model, TOKENIZER, 32), requests(3)) == wanted, setting
            assert model.generation_config is own
        finally:
            model.generation_config = before


def test_an_internal_policy_speaks(model):
    policies = InternalPolicies(model)
    found = answers(TransformersEngine(model, TOKENIZER, 12, temperature=0.0, policy=policies.layer(6)), requests(1))
    for problem, ids in enumerate(PROMPTS):
        own = policies.layer(6).generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert found[problem, 0].text == TOKENIZER.decode(own, skip_special_tokens=True)
    whole = answers(TransformersEngine(model, TOKENIZER, 12, temperature=0.0), requests(1))
    assert found != whole
    sampled = TransformersEngine(model, TOKENIZER, 12, policy=policies.layer(6))
    assert answers(sampled, requests(3)) == answers(sampled, requests(3))


def test_truncation(model):
    found = answers(TransformersEngine(model, TOKENIZER, 4), requests(4)).values()
    assert all(answer.tokens == 4 for answer in found if answer.truncated)
    assert any(answer.truncated for answer in found)
    found = answers(TransformersEngine(model, TOKENIZER, 64), requests(1)).values()
    assert not any(answer.truncated for answer in found) and all(answer.tokens < 64 for answer in found)


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
            yield request, Answer(f"{request.seed}", 3, False)


def test_nothing_is_sampled_twice(tmp_path):
    prompts = [(1, 2), (3,), (4,)]
    problems = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in "abc"]})

    def kept():
        store = samples(tmp_path, {"model": "m"}, problems)
        store.begin()
        return store

    whole = sample(Counting(), prompts, 4)
    first = Counting(stop=5)
    with pytest.raises(KeyboardInterrupt):
        sample(first, prompts, 4, 0, kept())
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"problem": 1, "sample": 3, "te')  # killed while it wrote
    second = Counting()
    assert sample(second, prompts, 4, 0, kept()) == whole
    assert len(second.asked) == 7 and not set(first.asked) & set(second.asked)
    more = Counting()
    assert [row[:4] for row in sample(more, prompts, 6, 0, kept())] == whole and len(more.asked) == 6
    assert sample(Counting(stop=0), prompts, 2, 0, kept()) == [row[:2] for row in whole]
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
    command = [sys.executable, "-m", "bupo.commands.main", *command]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    started = time.monotonic()
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= answers):
        assert running.poll() is None and time.monotonic() - started < 120
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    return samples.read_bytes()


def test_twice_the_same_and_once_killed(tmp_path):
    assert main(evaluation(tmp_path / "a")) == 0
    assert main(evaluation(tmp_path / "b")) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 192
    for name in ("summary.json", "table.md", "table.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "pass_at_k.png").stat().st_size > 1000

    samples = tmp_path / "c" / "arithmetic" / "samples.jsonl"
    before = killed_in(evaluation(tmp_path / "c"), samples, 16)
    assert 16 <= before.count(b"\n") < 192 and not (tmp_path / "c" / "summary.json").exists()
    assert main(evaluation(tmp_path / "c")) == 0
    whole = before[: before.rfind(b"\n") + 1]
    assert samples.read_bytes().startswith(whole)
    assert rows(tmp_path / "c") == rows(tmp_path / "a")
    assert (tmp_path / "c" / "table.md").read_bytes() == (tmp_path / "a" / "table.md").read_bytes()


FILES = ("math500", "amc2023", "aime_2024", "aime_2025", "deepmath-5k")


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


def test_grades_are_those_of_math_verify_called_directly(tmp_path):
    assert main(evaluation(tmp_path)) == 0
    table = pd.read_parquet(tmp_path / "arithmetic" / "graded.parquet")
    direct = [
        bool(verify(parse(f"\\boxed{{{gold}}}"), parse(text)))
        for gold, text in zip(table.gold, table.text, strict=True)
    ]
    assert (table["verdict"].isin(["correct", "unevaluated"])).tolist() == direct
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = summary["benchmarks"]["arithmetic"]
    correct = correct_of(finished(tmp_path / "arithmetic"))
    assert found["avg@k"] == pytest.approx(np.mean(direct)) == pytest.approx(avg_at_k(correct)[0])
    assert correct.shape == (48, 4) and sum(found["verdicts"].values()) == 192
    assert found["pass@k"]["4"] == pytest.approx(correct.any(1).mean())
    assert summary["meta"]["template"] == "the model's own" and summary["meta"]["versions"]["bupo"]


def test_two_runs_compared(tmp_path, capsys):
    assert main(evaluation(tmp_path / "whole")) == 0
    assert main(evaluation(tmp_path / "layer", "--layer", "6", "--compare", str(tmp_path / "whole"))) == 0
    summary = json.loads((tmp_path / "layer" / "summary.json").read_text())
    found = summary["benchmarks"]["arithmetic"]
    first, second = (correct_of(finished(tmp_path / name / "arithmetic")).mean(1) for name in ("whole", "layer"))
    assert found["difference"] == pytest.approx((second - first).mean())
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found["difference_interval"] == pytest.approx([low, high])
    assert "difference [95 %]" in (tmp_path / "layer" / "table.md").read_text()
    assert "layer 6" in capsys.readouterr().out


def test_answers_that_are_kept_are_graded_without_a_model(tmp_path, capsys):
    run = evaluation(tmp_path)
    assert main(run) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    for name in ("summary.json", "table.md", "report.html"):
        (tmp_path / name).unlink()
    assert main([*run, "--engine", "kept", "--model", "nowhere"]) == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["benchmarks"] == first["benchmarks"] and again["meta"]["model"] == "embedded"
    assert (tmp_path / "report.html").exists()
    capsys.readouterr()
    for more, message in (
        (["--k", "6"], "arithmetic holds 4 answers to problem 0, and k is 6: lower k or size"),
        (["--size", "60"], "arithmetic holds 0 answers to problem 48, and k is 4"),
        (["--system_prompt", "Think."], "arithmetic holds answers of other problems (number 0"),
    ):
        assert main([*run, "--engine", "kept", *more]) == 2
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


@pytest.mark.parametrize("layer", [None, "8"])
def test_the_harness_measures_the_same_policy(tmp_path, capsys, layer):
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
    assert main(command) == 0
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
    assert "lm-eval-harness gives no number for 'both' as a whole: name one of its tasks" in capsys.readouterr().err
    metric = "{metric: exact_match, aggregation: mean, weight_by_size: true, filter_list: boxed}"
    group.write_text(f"group: both\ntask: [one, two]\naggregate_metric_list: [{metric}]\n")
    assert main([*command[:-1], str(tmp_path / "again")]) == 0
    found = json.loads((tmp_path / "again" / "summary.json").read_text())["harness"]["group"]
    assert found["problems"] == 8 and found["metric"] == "exact_match,boxed" and found["shots"]["one"] == 0


def test_the_harness_has_the_limit_and_the_code_needs_leave(tmp_path, capsys):
    write(tmp_path / "sums.jsonl", [{"question": "57+23-41", "answer": "39"}])
    text = SUMS.replace("FILE", str(tmp_path / "sums.jsonl")).replace(", max_gen_toks: 32", "")
    (tmp_path / "sums.yaml").write_text(text)
    for limit, score in (("2", 0.0), ("40", None)):
        command = ["eval", "--benchmarks", f"harness:{tmp_path / 'sums.yaml'}", "--max_new_tokens", limit]
        assert main([*command, "--output", str(tmp_path / limit)]) == 0
        found = json.loads((tmp_path / limit / "summary.json").read_text())["harness"]["sums"]
        assert score is None or found["score"] == score
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
        shown = choose_template(tokenizer, wanted)
        return shown, tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "2+3"}]))

    thinks = (
        "{{ messages[0].content }}{% if enable_thinking is not defined or enable_thinking %}9{% else %}0{% endif %}"
    )
    assert chosen("{{ messages[0].content }}=") == ("the model's own", "2+3=")
    assert chosen(thinks) == ("the model's own, no thinking", "2+30")
    shown, text = chosen(None)
    assert shown.startswith("none (plain text") and text == "2+3\n"
    shown, text = chosen(None, "OctoThinker/OctoThinker-3B-Hybrid-Base")
    assert shown == "octothinker" and text.endswith("User: 2+3\nAssistant:")
    tokenizer = load_tokenizer("embedded")
    choose_template(tokenizer, "octothinker")
    talk = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"))]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.endswith(f"\\boxed{{}}.\n\nS\nUser: 1\nAssistant: 2{tokenizer.eos_token}\nUser: 3\nAssistant:")
    shown, text = chosen("{{ messages[0].content }}!", "OctoThinker/OctoThinker-3B-Hybrid-Base")  # trained with another
    assert shown == "the model's own" and text == "2+3!"
    shown, text = chosen("{{ messages[0].content }}", wanted="qwen-math")
    assert shown == "qwen-math" and "step by step" in text
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = thinks
    assert template_options(tokenizer) == {"enable_thinking": False}
    assert tokenizer.decode(prompt_ids(tokenizer, [{"role": "user", "content": "2"}], enable_thinking=True)) == "29"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "math5000"], "unknown benchmark 'math5000': choose math500, amc23"),
        (["--benchmarks", "math500"], "dataset 'HuggingFaceH4/MATH-500' .* cannot be loaded"),
        (["--benchmarks", "arithmetic,arithmetic"], "have one label twice: write LABEL=FILE"),
        (["--benchmarks", "arithmetic,harness:arithmetic"], "names none, or two of one label"),
        (["--benchmarks", ","], "names none, or two of one label"),
        (["--output", __file__], "cannot be written: .*; finished answers are kept"),
        (["--layer", "0"], "layer 0 does not exist"),
        (["--engine", "kept"], "holds no answers to grade: settings.json is missing"),
        (["--benchmarks", "humaneval"], "humaneval runs code that the model writes, on this machine: allow it with"),
        (["--benchmarks", "harness:nosuchtask"], "lm-eval-harness cannot load 'nosuchtask'"),
        (["--benchmarks", "harness:/nowhere.yaml"], "/nowhere.yaml is no file that names a task or a group"),
        (["--benchmarks", "arc-c"], "lm-eval-harness cannot load 'arc_challenge'"),
        (["--benchmarks", "arc-c", "--engine", "vllm"], "lm-eval-harness runs with engine transformers here"),
        (["--benchmarks", "x=/nowhere.parquet"], "/nowhere.parquet is no file"),
        (["--k", "0"], "k must be 1 or more, got 0"),
        (["--temperature", "0"], "temperature 0 gives 16 answers that are the same: set k to 1"),
        (["--top_p", "0"], "top_p must lie above 0 and up to 1"),
        (["--layer", "99"], "layer 99 does not exist: .* has layers 1 to 8"),
        (["--model", "nowhere"], "nowhere"),
        (["--chat_template", "nope"], "chat_template must be"),
        (["--dtype", "int4"], "dtype must be auto"),
        (["--deadline", "0"], "deadline must be positive"),
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


def test_a_launcher_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(evaluation(tmp_path)) == 2
    assert "bupo eval is one process: for several GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "1+1", "reply": "2"}], "has no answer column .*; its columns are question, reply"),
        ([{"text": "1+1", "answer": "2"}], "has no prompt column"),
        (
            [{"question": "1+1", "answer": "???"}],
            "row 0: the gold answer '\?\?\?' holds no mathematical expression",
        ),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_sampled(tmp_path, capsys, rows, message):
    write(tmp_path / "bad.jsonl", rows)
    assert main(["eval", "--benchmarks", str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "run")]) == 2
    assert pd.Series([capsys.readouterr().err]).str.contains(message).all()
    assert not (tmp_path / "run").exists()


# -- a server --------------------------------------------------------------------------------------------------------


class FakeServer(BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose text is a function of the request; every third answer fails once."""

    seen: ClassVar[list[dict]] = []
    failed: ClassVar[set[int]] = set()
    broken = False

    def log_message(self, *args):
        pass

    def _reply(self, value, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self._reply({"data": [{"id": "served"}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.broken:
            return self._reply({"error": "the prompt is too long"}, 400)
        if body["seed"] % 3 == 0 and body["seed"] not in self.failed:
            self.failed.add(body["seed"])
            return self._reply({}, 503)
        self.seen.append(body)
        text = f"\\boxed{{{body['seed'] % 50}}}"
        finish = "length" if body["seed"] % 2 else "stop"
        usage = {"completion_tokens": len(text)}
        return self._reply({"choices": [{"text": text, "finish_reason": finish}], "usage": usage})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm, "PAUSE", 0.01)
    FakeServer.seen, FakeServer.failed, FakeServer.broken = [], set(), False
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_answers_of_a_server(server):
    engine = vllm.ServerEngine(server + "/v1", 20, 0.5, 0.9, parallel=4)
    found = answers(engine, requests(3))
    assert engine.model == "served" and len(found) == 36 and FakeServer.failed
    for request in requests(3):
        answer = found[request.problem, request.sample]
        assert answer.text == f"\\boxed{{{request.seed % 50}}}" and answer.truncated == bool(request.seed % 2)
    sent = {row["seed"]: row for row in FakeServer.seen}
    for request in requests(3):
        row = sent[request.seed]
        assert tuple(row["prompt"]) == request.prompt_ids
        assert (row["max_tokens"], row["temperature"], row["top_p"], row["n"]) == (20, 0.5, 0.9, 1)
        assert (row["top_k"], row["min_p"], row["repetition_penalty"]) == (-1, 0, 1)  # else the server's model chooses


def test_answers_under_way_are_given_before_an_error_is_raised(server):
    engine = vllm.ServerEngine(server, 20, 1.0, 1.0, parallel=4)
    found, refused = [], {"n": 0}

    def answer(request, own=engine._answer):
        refused["n"] += request.problem == 5
        if request.problem == 5:
            raise UserError("no")
        return own(request)

    engine._answer = answer
    with pytest.raises(UserError, match="no"):
        for request, _ in engine(requests(3)):
            found.append(request.problem)
    assert 15 <= len(found) <= 15 + 3 + 4 and 1 <= refused["n"] <= 3 and len(FakeServer.seen) <= 22


def test_a_server_evaluates(server, tmp_path, capsys):
    assert main(evaluation(tmp_path, "--engine", "server", "--server", server)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["meta"]["served"] == "served" and summary["meta"]["engine"] == "server"
    FakeServer.broken = True
    assert main(evaluation(tmp_path, "--engine", "server", "--server", server)) == 0  # all answers are kept
    capsys.readouterr()
    assert main(evaluation(tmp_path / "new", "--engine", "server", "--server", server)) == 2
    assert 'answered 400 to /v1/completions: {"error": "the prompt is too long"}' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "server", "--server", "http://127.0.0.1:9"], "cannot be reached"),
        (["--engine", "server", "--server", "nowhere"], "cannot be reached or is no"),
        (["--engine", "server"], "engine server and its address go together"),
        (["--engine", "server", "--server", "http://127.0.0.1:80a0"], "cannot be reached or is no"),
        (
            ["--engine", "server", "--server", "http://127.0.0.1:9", "--model", ""],
            "model is not set: name the model that",
        ),
        (["--server", "http://127.0.0.1:9"], "engine server and its address go together"),
        (["--engine", "vllm", "--layer", "3"], "engine vllm samples whole models"),
        (["--engine", "vllm"], "--engine vllm needs vLLM"),
    ],
)
def test_an_engine_that_is_not_there_is_one_line(tmp_path, capsys, options, message):
    assert main(evaluation(tmp_path, *options)) == 2
    assert message in capsys.readouterr().err
