"""Tables, stages, rollouts and `bupo analyze` from end to end, its faults included."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

import bupo
from bupo import AnalyzeOptions, UserError
from bupo.analysis.measures import MEASURES, measure_completions
from bupo.analysis.rollouts import read_rollouts
from bupo.analysis.stages import classify_stages, find_stage_ranges
from bupo.analysis.tables import (
    BootstrapMeans,
    CompletionSums,
    build_layer_table,
    compute_perplexity,
    compute_similarity,
    has_significant_signs,
)
from bupo.cli.main import main
from bupo.models.loading import load_model, load_tokenizer, resolve_model_path
from bupo.models.residual_stream import ResidualStream
from bupo.reports.figures.style import BLUE, GREEN, ORANGE
from tests.cli.test_commands import fails  # noqa: F401
from tests.helpers.figure_reading import drawn
from tests.helpers.tiny_models import tiny_model

TOKENIZER = load_tokenizer("embedded")


def sums_of(means, tokens=10, spread=0.0, seed=0):
    """Answers whose dH_FFN scatters by `spread` around the given means; all else is 0."""
    rng = np.random.default_rng(seed)
    row = MEASURES.index("d_entropy_ffn")
    answers = []
    for index in range(40):
        total = np.zeros((len(MEASURES), len(means)))
        total[row] = tokens * (np.array(means) + spread * rng.standard_normal(len(means)))
        answers.append(
            CompletionSums(
                index, tokens, total, total**2 / tokens, np.eye(len(means)) * tokens, np.eye(len(means)), -2.0, 1.0
            )
        )
    return answers


def test_stages_and_boundary():
    found = classify_stages(sums_of([1.0, 0.01, 0.6, 0.0, -0.5], spread=0.1))
    assert found["stages"] == ["exploration", "integration", "exploration", "integration", "convergence"]
    assert found["boundary_layer"] == 3 and found["boundary_shares"][3] > 0.9
    assert "layer 3 is the last whose dH_FFN is positive beyond doubt: +0.6" in found["explanation"]
    assert sum(found["boundary_shares"].values()) == pytest.approx(1)


def test_a_model_without_a_boundary_says_why():
    found = classify_stages(sums_of([-1.0, -0.2, -0.6], spread=0.1))
    assert found["boundary_layer"] is None and found["boundary_shares"] == {0: 1.0}
    assert "no layer's dH_FFN is positive beyond doubt" in found["explanation"] and "in layer 2" in found["explanation"]


@pytest.mark.parametrize(
    ("means", "ranges", "pattern"),
    [
        ([1] * 6 + [0] * 20 + [-1] * 10, [[1, 6], [7, 26], [27, 36]], "progressive"),  # the paper's Qwen3-4B
        ([0.2] * 26 + [-1] * 2, [[1, 26], None, [27, 28]], "abrupt"),
        ([0.2] * 10 + [0] * 16 + [-1] * 2, [[1, 10], [11, 26], [27, 28]], "abrupt"),
        ([-1] * 8, [None, None, [1, 8]], "neither"),
        ([1, -1] * 4, [[1, 1], None, [2, 8]], "neither"),
        ([1, 0, -1, 0, -1, -1, -1, -1], [[1, 1], [2, 2], [3, 8]], "progressive"),
    ],
)
def test_ranges_and_pattern(means, ranges, pattern):
    found = classify_stages(sums_of([float(mean) for mean in means], spread=0.05))
    if means != [1, -1] * 4:  # there several cuts are as good
        assert list(found["ranges"].values()) == ranges
    assert found["pattern"] == pattern and found["verdict"].startswith(pattern)


def test_ranges_are_the_best_of_all():
    """Against every cut, written out once more; of several, the one whose middle changes least."""
    rng = np.random.default_rng(0)
    names = np.array(["exploration", "integration", "convergence"])
    for _ in range(30):
        size = int(rng.integers(1, 9))
        own, mean = rng.integers(0, 3, size), rng.standard_normal(size)
        ranges, fit = find_stage_ranges(names[own].tolist(), mean)
        cuts = [(a, b) for a in range(size + 1) for b in range(a, size + 1)]
        wanted = [np.repeat([0, 1, 2], [a, b - a, size - b]) for a, b in cuts]
        agree = [(own == stage).mean() for stage in wanted]
        assert fit == max(agree)
        got = np.concatenate([np.full(e[1] - e[0] + 1, i) for i, e in enumerate(ranges.values()) if e])
        assert (own == got).mean() == fit
        middles = [np.abs(mean[a:b]).sum() for (a, b), share in zip(cuts, agree, strict=True) if share == fit]
        assert np.abs(mean[got == 1]).sum() == pytest.approx(min(middles))


def test_the_papers_rule_stands_beside():
    found = classify_stages(sums_of([1.0, 0.02, -0.5], spread=0.001))
    assert (found["boundary_layer"], found["paper_boundary_layer"]) == (1, 2)
    assert "by the paper's rule, the last layer with a positive mean, it would be layer 2" in found["explanation"]


def test_settled():
    assert has_significant_signs(sums_of([1.0, -1.0], spread=0.1))
    assert not has_significant_signs(sums_of([1.0, 0.0], spread=0.1))
    assert not has_significant_signs(sums_of([1.0, -1.0], spread=0.1)[:7])


def test_one_answer_leaves_nothing_to_resample():
    one = sums_of([1.0, -1.0])[:1]
    assert (
        classify_stages(one)["stages"] == ["undecided", "undecided"] and classify_stages(one)["boundary_layer"] is None
    )
    assert build_layer_table(one, "m")["low"].isna().all() and not has_significant_signs(one)


def test_intervals_respect_answers():
    """Tokens of one answer that move together: the interval is that of 40 answers, not of 400 tokens."""
    answers = sums_of([0.0], spread=1.0)
    low, high = BootstrapMeans(answers).compute_interval()
    row = MEASURES.index("d_entropy_ffn")
    means = np.array([a.sums[row, 0] / a.tokens for a in answers])
    assert high[row, 0] - low[row, 0] == pytest.approx(2 * 1.96 * means.std(ddof=1) / math.sqrt(40), rel=0.1)


def test_table_against_plain_means():
    stream = ResidualStream(load_model("embedded", dtype=torch.float32))
    rollouts = [([5, 6, 7], [8, 9, 10, 11]), ([12, 13], [14, 15]), ([3, 4], [9])]
    found = list(measure_completions(stream, rollouts))
    answers = [CompletionSums.from_json(CompletionSums.from_measures(f).to_json()) for f in found]
    table = build_layer_table(answers, "m").set_index(["measure", "layer"])
    for name in MEASURES:
        values = np.concatenate([f.values[name] for f in found], axis=1)
        for layer in (1, 5, 8):
            row = table.loc[(name, layer)]
            np.testing.assert_allclose(row["mean"], values[layer - 1].mean(), rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(row["std"], values[layer - 1].std(ddof=1), rtol=1e-4, atol=1e-5)
            assert row["tokens"] == 7 and row["answers"] == 3
    assert compute_perplexity(answers) == pytest.approx(
        np.exp(-np.concatenate([f.log_probs for f in found]).mean()), rel=1e-6
    )
    np.testing.assert_allclose(np.diag(compute_similarity(answers)), 1, atol=1e-5)


def write_rollouts(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_every_form_of_rollout_is_the_same_rollout(tmp_path):
    user, said = {"role": "user", "content": "5+6"}, "\\boxed{11}"
    ids = TOKENIZER.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    answer = [*TOKENIZER(said)["input_ids"], TOKENIZER.eos_token_id]
    rows = [
        {"messages": [user, {"role": "assistant", "content": said}]},
        {"prompt": [user], "completion": said},
        {"prompt": [user], "completion": [{"role": "assistant", "content": said}]},
        {"prompt_ids": ids, "completion_ids": answer},
    ]
    for rollout in read_rollouts(write_rollouts(tmp_path / "r.jsonl", rows), TOKENIZER):
        assert rollout.prompt_ids == ids and rollout.completion_ids == answer
    # a prompt that holds the template's own markers is told apart all the same
    tricky = [{"role": "user", "content": "say <|assistant|>x"}]
    path = write_rollouts(tmp_path / "t.jsonl", [{"prompt": tricky, "completion": said}])
    assert read_rollouts(path, TOKENIZER)[0].completion_ids == answer


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "line 1 has an empty answer"),
        ({"prompt": "", "completion": "b"}, "line 1 has an empty prompt"),
        ({"prompt": "a"}, "line 1 is no rollout"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the last message is not the assistant's"),
        ({"prompt": "a", "completion": "b" * 600}, "line 1 has 602 tokens, more than the model's context of 512"),
        ("text", "line 1 is no rollout"),
    ],
)
def test_rollouts_that_are_none(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_rollouts(write_rollouts(tmp_path / "r.jsonl", [row]), TOKENIZER, context=512)


def copied(folder, to, file, lines, part=""):
    """A label's folder as a run leaves it that is killed after so many lines of a file."""
    shutil.copytree(folder, to)
    whole = (to / file).read_text().splitlines(keepends=True)
    (to / file).write_text("".join(whole[:lines]) + part)
    return whole


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"r.jsonl cannot be read: UnicodeDecodeError"):
        read_rollouts(tmp_path / "r.jsonl", TOKENIZER)


@pytest.mark.slow
def test_sampling_goes_on_where_it_stopped(tmp_path):
    options = AnalyzeOptions(size=12, batch_size=4, max_new_tokens=20, output=str(tmp_path / "a"))
    bupo.analyze("embedded", options)
    lines = copied(tmp_path / "a" / "embedded", tmp_path / "b" / "embedded", "rollouts.jsonl", 8, '{"problem": 8, "pro')
    shutil.rmtree(tmp_path / "b" / "embedded" / "raw")
    bupo.analyze("embedded", replace(options, output=str(tmp_path / "b")))
    assert (tmp_path / "b" / "embedded" / "rollouts.jsonl").read_text() == "".join(lines)
    for rollout in read_rollouts(tmp_path / "a" / "embedded" / "rollouts.jsonl", TOKENIZER):
        assert rollout.completion_ids.count(TOKENIZER.eos_token_id) <= 1 and 0 not in rollout.completion_ids


@pytest.mark.slow
def test_measuring_goes_on_where_it_stopped(tmp_path):
    options = AnalyzeOptions(size=6, max_new_tokens=20, output=str(tmp_path / "a"))
    whole = bupo.analyze("embedded", options)
    a, b = tmp_path / "a" / "embedded", tmp_path / "b" / "embedded"
    lines = copied(a, b, "raw/answers.jsonl", 3, '{"index": 3, "tok')
    again = bupo.analyze("embedded", replace(options, output=str(tmp_path / "b")))
    found = (b / "raw" / "answers.jsonl").read_text().splitlines(keepends=True)
    assert found[:3] == lines[:3] and [json.loads(line)["index"] for line in found] == list(range(6))
    np.testing.assert_allclose(again.table["mean"], whole.table["mean"], rtol=1e-5, atol=1e-4)
    short = bupo.analyze("embedded", replace(options, output=str(tmp_path / "c"), max_tokens=1))
    assert short.meta["answers"] == 1 and short.stages == ["undecided"] * 8


def test_analyze_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["analyze", "--size", "12", "--output", str(out), "--per_token", "true"]) == 0
    printed = capsys.readouterr().out
    assert "dH ffn" in printed and "positive beyond doubt" in printed
    table = pd.read_parquet(out / "layers.parquet")
    assert len(table) == 15 * 8 and set(table["measure"]) == set(MEASURES)
    tokens = pd.read_parquet(out / "embedded" / "raw" / "tokens.parquet")
    per_layer = tokens.groupby("layer")["d_entropy_ffn"].mean()
    wanted = table[table["measure"] == "d_entropy_ffn"].set_index("layer")["mean"]
    np.testing.assert_allclose(per_layer, wanted, rtol=1e-6)
    meta = json.loads((out / "summary.json").read_text())["models"][0]["meta"]
    assert {
        "model",
        "revision",
        "dtype",
        "lens",
        "temperature",
        "seed",
        "versions",
        "identity_error",
        "schema_version",
    } <= set(meta)
    for name, panels, line in (
        ("entropy_flow", 1, BLUE),
        ("entropy_change", 2, ORANGE),
        ("residual_cosine", 1, GREEN),
        ("kl_similarity", 3, BLUE),
    ):
        size, colours = drawn(out / "figures" / f"{name}.png")
        assert size == ((5.5 * panels + 1) * 150, 495) and colours[line] > 100
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    page = (out / "report.html").read_text()
    assert len(page) < 8 << 20 and 'id="data"' in page


@pytest.mark.slow
def test_analyze_stops_when_settled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bupo.analysis.measured_answers.has_significant_signs", lambda answers: len(answers) >= 9)
    out = tmp_path / "out"
    assert main(["analyze", "--size", "20", "--until", "settled", "--output", str(out)]) == 0
    meta = json.loads((out / "summary.json").read_text())["models"][0]["meta"]
    assert meta["answers"] == 9 and meta["stopped_when_settled"] and meta["tokens"] > 0


@pytest.mark.slow
def test_analyze_an_adapter_and_two_models(tmp_path):
    model = get_peft_model(load_model("embedded"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    rollouts = write_rollouts(tmp_path / "r.jsonl", [{"prompt": f"{i}+1", "completion": str(i + 1)} for i in range(9)])
    common = ["--rollouts", rollouts, "--output"]
    assert (
        main(["analyze", *common, str(tmp_path / "plain"), "--model", "embedded", resolve_model_path("embedded")]) == 0
    )
    assert main(["analyze", *common, str(tmp_path / "adapted"), "--adapter", str(tmp_path / "adapter")]) == 0
    plain, adapted = (pd.read_parquet(tmp_path / run / "layers.parquet") for run in ("plain", "adapted"))
    assert set(plain["model"]) == {"embedded", "model"}
    one, two = (plain[plain["model"] == m]["mean"].to_numpy() for m in ("embedded", "model"))
    np.testing.assert_allclose(one, two)
    assert not np.allclose(one, adapted["mean"], equal_nan=True)


def test_bf16_and_final_norm_run(tmp_path):
    options = ["--size", "4", "--dtype", "bfloat16", "--lens", "final_norm", "--output", str(tmp_path)]
    assert main(["analyze", *options]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["models"][0]["meta"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "0"], "size must be 1 or more, got 0"),
        (["--temperature", "0"], "temperature must be positive, got 0"),
        (["--dataset", "arithmetic", "--rollouts", "r"], "both dataset and rollouts are given"),
        (["--rollouts", "absent.jsonl"], "absent.jsonl is neither a file of rollouts"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--lens", "x"], "invalid choice: 'x'"),
        (["--model", "/no/such/model"], "/no/such/model does not exist"),
        (["--adapter", "/no/adapter", "--size", "2"], "adapter '/no/adapter' cannot be put on the model"),
    ],
)
def test_bad_options(tmp_path, fails, options, message):  # noqa: F811
    assert message in fails("analyze", "--output", str(tmp_path / "out"), *options)


def test_bad_models(tmp_path, fails):  # noqa: F811
    for name, family, poison in (("nan", "llama", True), ("bloom", "bloom", False)):
        model = tiny_model("llama", vocab_size=262) if family == "llama" else None
        if model is None:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model("bloom", vocab_size=262, hidden_size=32, n_layer=2, n_head=4)
            model = AutoModelForCausalLM.from_config(config)
        if poison:
            model.model.layers[1].mlp.up_proj.weight.data[0] = torch.nan
        model.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
        complaint = fails("analyze", "--model", str(tmp_path / name), "--output", str(tmp_path / "out"))
        assert ("layers.1.mlp.up_proj.weight holds nan" in complaint) if poison else ("'bloom' is unknown" in complaint)


def test_one_token_answers_are_answers(tmp_path):
    rows = [{"prompt_ids": [4, 5], "completion_ids": [6]}]
    out = tmp_path / "out"
    assert main(["analyze", "--rollouts", write_rollouts(tmp_path / "r.jsonl", rows), "--output", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["models"][0]["boundary_layer"] is None


def read_sums(path):
    return [CompletionSums.from_json(line) for line in path.read_text().split("\n")[:-1]]


def start_analysis(out, *more):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "bupo.cli.main",
            "analyze",
            "--size",
            "400",
            "--batch_size",
            "100",
            "--output",
            str(out),
            *more,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def heard():
    """A process that is started hears Ctrl-C: those of a shell's background job, of which this may be one, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("heard")
def test_ctrl_c_keeps_what_was_finished(tmp_path):
    out = tmp_path / "out"
    process = start_analysis(out)
    answers = out / "embedded" / "raw" / "answers.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (answers.exists() and answers.read_text().count("\n") > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    kept = read_sums(answers)
    assert process.returncode == 130 and len(kept) > 5
    assert [line for line in errors.splitlines() if line.startswith("bupo: interrupted: finished answers")]
    assert "Traceback" not in errors
    process = start_analysis(out)
    assert process.wait(timeout=300) == 0
    assert len(read_sums(answers)) == 400 and (out / "report.html").exists()
    again = [a.sums for a in read_sums(answers)[: len(kept)]]
    assert all(np.array_equal(a.sums, b, equal_nan=True) for a, b in zip(kept, again, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        process = start_analysis(disk / "out")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in errors
        complaint = [line for line in errors.splitlines() if line.startswith("bupo: error: ")]
        assert (
            len(complaint) == 1
            and "No space left on device" in complaint[0]
            and "run the same command again to resume" in complaint[0]
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_sample(capsys, fails):  # noqa: F811
    assert main(["sample", "--layer", "5", "--prompt", "57+23-41", "--max_new_tokens", "6"]) == 0
    printed = capsys.readouterr().out
    assert "InternalPolicy(layer 5, raw" in printed and "layer" in printed
    assert main(["sample", "--prompt", "57+23-41", "--temperature", "0", "--top", "2"]) == 0
    assert main(["sample", "--ffn", "3", "--prompt", "1+1", "--lens", "final_norm", "--max_new_tokens", "2"]) == 0
    assert main(["sample", "--attn", "3", "--prompt", "1+1", "--raw_prompt", "true", "--max_new_tokens", "2"]) == 0
    more = ["--chat_template", "octothinker", "--system_prompt", "Think.", "--dtype", "bfloat16", "--top_p", "0.5"]
    assert main(["sample", "--prompt", "1+1", "--max_new_tokens", "2", *more]) == 0
    capsys.readouterr()
    assert "chat_template must be" in fails("sample", "--prompt", "a", "--chat_template", "nope")
    assert "raw_prompt uses neither system_prompt nor chat_template" in fails(
        "sample", "--prompt", "a", "--raw_prompt", *more
    )
    assert "adapter '/no/adapter' cannot be put" in fails("sample", "--prompt", "a", "--adapter", "/no/adapter")
    assert "layer and ffn are both given" in fails("sample", "--prompt", "a", "--layer", "1", "--ffn", "2")
    assert "layer 9 does not exist" in fails("sample", "--prompt", "a", "--layer", "9")
    assert "prompt is not set" in fails("sample")
