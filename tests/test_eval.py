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
from math_verify import parse, verify
from scipy import stats

from bupo.analysis.rollouts import prompt_ids
from bupo.commands.main import main
from bupo.data.problems import load_problems
from bupo.data.templates import chosen_template
from bupo.evaluation import vllm
from bupo.evaluation.benchmarks import BENCHMARKS, load_benchmark
from bupo.evaluation.metrics import avg_at_k
from bupo.evaluation.run import correct_by_problem, sample_missing
from bupo.evaluation.sampling import Answer, Request, SeededSampling, TransformersEngine, seed_of
from bupo.models import load_model, load_tokenizer
from bupo.policy import InternalPolicies
from tests.test_data import write

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
    prompts, settings = [(1, 2), (3,), (4,)], {"model": "m"}
    whole = sample_missing(Counting(), prompts, 4, 0, tmp_path / "whole", settings)
    first = Counting(stop=5)
    with pytest.raises(KeyboardInterrupt):
        sample_missing(first, prompts, 4, 0, tmp_path / "run", settings)
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"problem": 1, "sample": 3, "te')  # killed while it wrote
    second = Counting()
    assert sample_missing(second, prompts, 4, 0, tmp_path / "run", settings) == whole
    assert len(second.asked) == 7 and not set(first.asked) & set(second.asked)
    more = Counting()
    found = sample_missing(more, prompts, 6, 0, tmp_path / "run", settings)
    assert [row[:4] for row in found] == whole and len(more.asked) == 6
    fewer = sample_missing(Counting(stop=0), prompts, 2, 0, tmp_path / "run", settings)
    assert fewer == [row[:2] for row in whole]
    anew = Counting()
    sample_missing(anew, prompts, 2, 1, tmp_path / "run", settings)  # another seed
    assert len(anew.asked) == 6


def evaluation(folder, *extra):
    return ["eval", "--benchmarks", "arithmetic", "--size", "48", "--k", "4", "--max_new_tokens", "32", "--batch_size", "8",
            "--output", str(folder), *extra]  # fmt: skip


def rows(folder):
    lines = (folder / "arithmetic" / "samples.jsonl").read_text().splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: (row["problem"], row["sample"]))


def test_twice_the_same_and_once_killed(tmp_path):
    assert main(evaluation(tmp_path / "a")) == 0
    assert main(evaluation(tmp_path / "b")) == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") and len(rows(tmp_path / "a")) == 192
    for name in ("summary.json", "table.md", "table.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "pass_at_k.png").stat().st_size > 1000

    command = [sys.executable, "-m", "bupo.commands.main", *evaluation(tmp_path / "c")]
    samples = tmp_path / "c" / "arithmetic" / "samples.jsonl"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    started = time.monotonic()
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 16):
        assert running.poll() is None and time.monotonic() - started < 120
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = samples.read_bytes()
    assert 16 <= before.count(b"\n") < 192 and not (tmp_path / "c" / "summary.json").exists()
    assert main(evaluation(tmp_path / "c")) == 0
    whole = before[: before.rfind(b"\n") + 1]
    assert samples.read_bytes().startswith(whole)
    assert rows(tmp_path / "c") == rows(tmp_path / "a")
    assert (tmp_path / "c" / "table.md").read_bytes() == (tmp_path / "a" / "table.md").read_bytes()


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
    correct = correct_by_problem(tmp_path / "arithmetic")
    assert found["avg@k"] == pytest.approx(np.mean(direct)) == pytest.approx(avg_at_k(correct)[0])
    assert correct.shape == (48, 4) and sum(found["verdicts"].values()) == 192
    assert found["pass@k"]["4"] == pytest.approx(correct.any(1).mean())
    assert summary["meta"]["template"] == "its own" and summary["meta"]["versions"]["bupo"]


def test_two_runs_compared(tmp_path, capsys):
    assert main(evaluation(tmp_path / "whole")) == 0
    assert main(evaluation(tmp_path / "layer", "--layer", "6", "--compare", str(tmp_path / "whole"))) == 0
    summary = json.loads((tmp_path / "layer" / "summary.json").read_text())
    found = summary["benchmarks"]["arithmetic"]
    first, second = (correct_by_problem(tmp_path / name / "arithmetic").mean(1) for name in ("whole", "layer"))
    assert found["difference"] == pytest.approx((second - first).mean())
    low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found["difference_interval"] == pytest.approx([low, high])
    assert "difference [95 %]" in (tmp_path / "layer" / "table.md").read_text()
    assert "layer 6" in capsys.readouterr().out


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
    assert {"math500", "amc23", "aime24", "aime25", "olympiadbench", "minerva", "gsm8k"} == set(BENCHMARKS)


def test_the_template_is_chosen_by_the_model():
    tokenizer = load_tokenizer("embedded")
    assert chosen_template(tokenizer) == ("its own", {})
    tokenizer.chat_template = "{% if enable_thinking %}think{% endif %}{{ messages[0].content }}"
    assert chosen_template(tokenizer) == ("its own, no thinking", {"enable_thinking": False})
    tokenizer.chat_template = None
    name, kwargs = chosen_template(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2?"}], tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert name == "octothinker" and text.endswith("User: 2?\nAssistant:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmarks", "math5000"], "unknown benchmark 'math5000': choose math500, amc23"),
        (["--benchmarks", "math500"], "dataset 'HuggingFaceH4/MATH-500' .* cannot be loaded"),
        (["--benchmarks", "arithmetic,arithmetic"], "has one label twice"),
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
        (["--server", "http://127.0.0.1:9"], "engine server and its address go together"),
        (["--engine", "vllm", "--layer", "3"], "engine vllm samples whole models"),
        (["--engine", "vllm"], "--engine vllm needs vLLM"),
    ],
)
def test_an_engine_that_is_not_there_is_one_line(tmp_path, capsys, options, message):
    assert main(evaluation(tmp_path, *options)) == 2
    assert message in capsys.readouterr().err
