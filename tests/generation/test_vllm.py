"""vLLM, offline and as a server, compared with transformers: `make test-vllm`."""

import json
import subprocess

import pytest

from bupo.cli.main import main
from bupo.evaluation.answers import get_correct, read_graded_table, tokenize_prompts
from bupo.evaluation.benchmarks import load_benchmark
from bupo.generation.seeded_sampling import CompletionRequest, TransformersEngine, derive_seed
from bupo.models.loading import load_model, load_tokenizer
from tests.helpers.real_models import real_model
from tests.helpers.vllm_serving import PYTHON, environment, serving

pytestmark = pytest.mark.external
PROBLEMS, K, TOKENS = 64, 8, 48
OFFLINE = """
import json, sys
from bupo.generation.vllm_engines import VllmEngine
from bupo.generation.seeded_sampling import CompletionRequest

if __name__ == "__main__":
    job = json.load(sys.stdin)
    engine = VllmEngine(job["model"], job["tokens"], job["temperature"], 1.0, dtype="float32", enforce_eager=True,
                        max_model_len=1024, enable_chunked_prefill=False)
    requests = [CompletionRequest(p, n, tuple(ids), seed) for p, n, ids, seed in job["requests"]]
    runs = [[[r.problem, r.sample, a.text, a.length, a.truncated] for r, a in engine(requests)] for _ in range(2)]
    print("ANSWERS", json.dumps(runs))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save SmolLM2-135M as safetensors, which both engines read."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = real_model("smollm2-135m")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    # vLLM 0.32 cannot split a seeded request on a CPU: torch's CPU generators have no offset to reset
    options = ["--no-enable-chunked-prefill", "--max-model-len", "1024"]
    with serving(folder, tmp_path_factory.mktemp("log") / "vllm.log", *options) as url:
        yield url


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Write sums that a model of 135M solves half of the time."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    numbers = [(3 + 7 * i % 23, 2 + 5 * i % 17) for i in range(PROBLEMS)]
    file.write_text(
        "".join(json.dumps({"question": f"What is {a} + {b}?", "answer": a + b}) + "\n" for a, b in numbers)
    )
    return file


def evaluation(folder, sums, output, *options):
    return ["eval", "--model", str(folder), "--benchmarks", str(sums), "--size", str(PROBLEMS),
            "--max_new_tokens", str(TOKENS), "--output", str(output), *options]  # fmt: skip


def test_a_real_server_equals_transformers(folder, sums, server, tmp_path):
    """The most likely tokens are equal, so prompts, template and end tokens are the same."""
    greedy = ["--k", "1", "--temperature", "0"]
    assert main(evaluation(folder, sums, tmp_path / "server", *greedy, "--engine", "server", "--server", server)) == 0
    assert main(evaluation(folder, sums, tmp_path / "own", *greedy)) == 0
    server_table, own_table = (read_graded_table(tmp_path / name / "sums") for name in ("server", "own"))
    assert (server_table["text"] == own_table["text"]).mean() >= 0.95  # except for ties
    assert (server_table["tokens"] == own_table["tokens"]).mean() >= 0.95


def test_a_real_server_agrees_within_the_interval(folder, sums, server, tmp_path, capsys):
    own_folder, server_folder = tmp_path / "own", tmp_path / "server"
    sampling = ["--k", str(K), "--temperature", "0.4"]  # some answers are correct
    assert main(evaluation(folder, sums, own_folder, *sampling)) == 0
    sampled = [*sampling, "--engine", "server", "--server", server]
    assert main(evaluation(folder, sums, server_folder, *sampled, "--compare", str(own_folder))) == 0
    print(capsys.readouterr().out)
    found = json.loads((server_folder / "summary.json").read_text())["benchmarks"]["sums"]
    low, high = found["difference_interval"]
    assert low <= 0 <= high
    ours = json.loads((own_folder / "summary.json").read_text())["benchmarks"]["sums"]
    assert ours["avg@k_interval"][0] <= found["avg@k"] <= ours["avg@k_interval"][1]
    assert 0.1 < found["avg@k"] < 0.9  # otherwise agreement would mean nothing
    assert found["mean_tokens"] == pytest.approx(ours["mean_tokens"], rel=0.2)
    assert (
        get_correct(read_graded_table(server_folder / "sums")) != get_correct(read_graded_table(own_folder / "sums"))
    ).any()  # different random numbers
    (server_folder / "summary.json").unlink()
    assert main(evaluation(folder, sums, server_folder, *sampled)) == 0  # no answer is sampled again
    assert len((server_folder / "sums" / "samples.jsonl").read_text().splitlines()) == PROBLEMS * K


def test_vllm_offline(folder, sums):
    tokenizer, problems = load_tokenizer(str(folder)), load_benchmark(str(sums), size=16)[1]
    prompts = tokenize_prompts(problems, tokenizer)
    requests = [CompletionRequest(p, n, ids, derive_seed(0, p, n)) for p, ids in enumerate(prompts) for n in range(2)]
    job = {
        "model": str(folder),
        "tokens": TOKENS,
        "requests": [[r.problem, r.sample, r.prompt_ids, r.seed] for r in requests],
    }
    found = {}
    for temperature in (0.0, 1.0):
        done = subprocess.run(
            [PYTHON, "-c", OFFLINE],
            input=json.dumps(job | {"temperature": temperature}),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
        first, again = json.loads(line.removeprefix("ANSWERS "))
        assert first == again  # each answer has its seed
        found[temperature] = {(p, n): (text, tokens, cut) for p, n, text, tokens, cut in first}
    engine = TransformersEngine(load_model(str(folder)), tokenizer, TOKENS, temperature=0.0)
    ours = {(r.problem, r.sample): (a.text, a.length, a.truncated) for r, a in engine(requests)}
    same = sum(ours[key] == found[0.0][key] for key in ours)
    assert same >= 0.9 * len(ours)
    assert all(found[0.0][p, 0] == found[0.0][p, 1] for p in range(16))
    assert sum(found[1.0][p, 0] != found[1.0][p, 1] for p in range(16)) > 8
