"""SmolLM2-135M: parity of every layer policy, generation, analysis and evaluation."""

import json

import numpy as np
import pytest
import torch
from math_verify import parse, verify

from bupo import InternalPolicies
from bupo.analysis.measures import measure_completions
from bupo.cli.main import main
from bupo.evaluation.answers import read_graded_table
from bupo.models.residual_stream import ResidualStream
from tests.analysis.test_measures import naive
from tests.evaluation.test_evaluation import FILES, SHARED, killed_in
from tests.helpers.real_models import MODELS, real_model
from tests.models.test_internal_policy import hooked_states

pytestmark = pytest.mark.external


@torch.no_grad()
def test_every_layer_policy_is_that_of_the_hooked_states():
    model, tokenizer = real_model("smollm2-135m")
    text = "Add 57 and 23. Then subtract 41. The sum is 80, and 80 - 41 = 39, so the answer is \\boxed{39}."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    policies = InternalPolicies(model)
    assert policies.num_layers == 30 and policies.identity_errors.max_error < 1e-5
    states, logits = hooked_states(model, ids)
    for layer in range(1, 31):
        expected = model.lm_head(states[layer]).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        found = policies.layer(layer).log_probs(ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # raw logits of hundreds
    full = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(policies.language_model.log_probs(ids), full, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_of_the_language_model_policy_is_the_models_own():
    model, tokenizer = real_model("smollm2-135m")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    got = InternalPolicies(model).language_model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, expected)
    assert InternalPolicies(model).layer(15).generate(**prompt, max_new_tokens=4).size(1) > prompt["input_ids"].size(1)


def test_automatic_layer_stops_where_there_is_no_boundary(tmp_path, capsys):
    """A Llama architecture whose FFNs only converge: the run ends before it trains, with the row and the choices."""
    options = ["--internal_layer", "auto", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--config", "recipes/cpu/smollm2-bupo.yaml", *options]) == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("bupo: error")]
    assert "no layer's dH_FFN is positive beyond doubt" in line and ", 30: -" in line
    assert "choose internal_layer yourself (1 to 30)" in line
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_measures_are_the_naive_ones():
    model, tokenizer = real_model("smollm2-135m")
    prompt, answer = (
        tokenizer(text)["input_ids"] for text in ("What is 57 + 23 - 41?", "57 + 23 = 80, and 80 - 41 = 39.")
    )
    found = next(measure_completions(ResidualStream(model), [(prompt, answer)]))
    values, _, _, log_probs, _ = naive(model, prompt, answer)
    for name, expected in values.items():
        np.testing.assert_allclose(found.values[name], expected, rtol=1e-3, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_analyze_from_a_cold_start(tmp_path, name):
    model = str(MODELS / f"{name}.gguf")
    options = ["--dataset", "arithmetic", "--size", "2", "--max_new_tokens", "12", "--output", str(tmp_path)]
    assert main(["analyze", "--model", model, *options]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["models"][0]
    assert summary["meta"]["identity_error"] < 1e-5 and (tmp_path / "report.html").stat().st_size < 8 << 20


@pytest.mark.skipif(not SHARED.exists(), reason="no problem files here")
def test_evaluation_of_the_problem_files(tmp_path):
    """A slice of each file gives the same results with and without a kill; grades are those of math-verify in this process."""
    files = ",".join(str(SHARED / f"{name}.parquet") for name in FILES)

    def command(folder):
        return ["eval", "--model", str(MODELS / "smollm2-135m.gguf"), "--benchmarks", files, "--size", "2", "--k", "2",
                "--max_new_tokens", "24", "--batch_size", "4", "--output", str(folder)]  # fmt: skip

    def samples(folder):
        return {name: sorted((folder / name / "samples.jsonl").read_text().splitlines()) for name in FILES}

    assert main(command(tmp_path / "a")) == 0
    killed_in(command(tmp_path / "c"), tmp_path / "c" / "amc2023" / "samples.jsonl", 1)
    assert main(command(tmp_path / "c")) == 0
    assert samples(tmp_path / "a") == samples(tmp_path / "c")
    for name in ("summary.json", "table.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    for name in FILES:
        table = read_graded_table(tmp_path / "a" / name)
        direct = [
            verify(parse(f"\\boxed{{{gold}}}"), parse(text)) for gold, text in zip(table.gold, table.text, strict=True)
        ]
        assert (table["verdict"] == "correct").tolist() == direct


@pytest.mark.skipif(not SHARED.exists(), reason="no problem files here")
def test_the_papers_setting_end_to_end(tmp_path):
    """16 and 32 answers by the labels' own numbers; their tokens are analysed as they were sampled."""
    model, shared = (
        str(MODELS / "smollm2-135m.gguf"),
        dict(zip(("math500", "amc23", "aime24", "aime25"), FILES, strict=False)),
    )
    files = ",".join(f"{label}={SHARED / f'{name}.parquet'}" for label, name in shared.items())
    command = [
        "eval",
        "--model",
        model,
        "--preset",
        "paper",
        "--benchmarks",
        files,
        "--size",
        "1",
        "--max_new_tokens",
        "8",
    ]
    assert main([*command, "--output", str(tmp_path / "eval")]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    ks = {label: found["k"] for label, found in summary["benchmarks"].items()}
    assert ks == {"math500": 16, "amc23": 16, "aime24": 32, "aime25": 32}
    command = ["analyze", "--model", model, "--preset", "paper", "--rollouts", str(tmp_path / "eval" / "math500")]
    assert main([*command, "--output", str(tmp_path / "analysis")]) == 0
    meta = json.loads((tmp_path / "analysis" / "summary.json").read_text())["models"][0]["meta"]
    tokens = summary["benchmarks"]["math500"]["mean_tokens"] * 16
    assert (meta["answers"], meta["tokens"]) == (16, pytest.approx(tokens))
