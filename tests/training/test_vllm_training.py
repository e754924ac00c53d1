"""Answers for training that a real vLLM samples, beside the trainer and as a server: `make test-vllm`.

vLLM and the trainer live in an environment of their own (`BUPO_VLLM_PYTHON` is its interpreter), which `tests/helpers/vllm_cpu.py` makes
ready for a CPU. What is compared with it is computed here, by transformers alone.
"""

import json
import math
import signal
import subprocess
import time

import pytest
import torch
import yaml
from trl.scripts.vllm_serve import ScriptArguments, build_command

from bupo.models.loading import load_model
from tests.helpers.vllm_serving import PYTHON, ROOT, environment, free_port, serving

pytestmark = pytest.mark.external
LAYER = 5
RUNS: dict[str, dict] = {
    "colocate": {"vllm_importance_sampling_mode": "sequence_mask"},
    "adapter": {"vllm_importance_sampling_mode": "token_truncate", "adapter": True, "learning_rate": 1e-3},
    "bfloat16": {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.002},
    "bfloat16 masked": {
        **{"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.998},
        **{"vllm_importance_sampling_clip_max": 1.002},
    },
    "server": {"vllm_mode": "server", "vllm_importance_sampling_mode": "sequence_truncate"},
}
CONFIG = {
    **{"model": "embedded", "dataset": "arithmetic", "internal_layer": LAYER, "internal_steps": 2, "max_steps": 4},
    **{"per_device_train_batch_size": 64, "num_generations": 8, "steps_per_generation": 1, "max_new_tokens": 24},
    **{"learning_rate": 1e-4, "use_vllm": True, "vllm_mode": "colocate", "save_strategy": "no", "report_to": "none"},
}

# of itself vLLM binds its threads to cores
QUIET = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONWARNINGS": "ignore"}


def by_vllm(module, *arguments, dtype="float32"):
    """A module of the tests run in vLLM's environment."""
    command = [PYTHON, "-m", f"tests.{module}", *map(str, arguments)]
    variables = environment(VLLM_DTYPE=dtype, **QUIET)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real vLLM server of the embedded model, started as TRL says; weights come to it by a store, not by NCCL."""
    how = [
        *build_command(ScriptArguments(model=""))[-6:],
        "--worker-extension-cls",
        "tests.helpers.vllm_cpu.Worker",
    ]  # TRL's needs
    model, log = ROOT / "src" / "bupo" / "embedded" / "model", tmp_path_factory.mktemp("log") / "vllm.log"
    with serving(model, log, *how, VLLM_SERVER_DEV_MODE="1", **QUIET) as url:
        yield {"vllm_server_base_url": url, "vllm_group_port": free_port()}


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    """What a run saw of each of its four rollout batches, two a phase, with what transformers makes of the same tokens."""
    found = {}

    def run(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("run")
            options = {"internal_layer": LAYER} | RUNS[name]
            options |= request.getfixturevalue("server") if name == "server" else {}
            dtype = "bfloat16" if name.startswith("bfloat16") else "float32"
            done = by_vllm("vllm_run", folder, json.dumps(options), dtype=dtype)
            assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
            found[name] = torch.load(folder / "seen.pt", weights_only=True)
            assert [batch["phase"] for batch in found[name]] == [1, 1, 2, 2]
        return found[name]

    return run


@torch.no_grad()
def said(batch, weights, layer=None):
    """Log-probs of a batch's sampled tokens, answer by answer without padding: the whole model's, or its layer's own."""
    model = load_model("embedded").eval()
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unknown  # the head is the embedding
    rows = []
    for prompt, answer in zip(batch["prompts"], batch["answers"], strict=True):
        states = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        logits = states.logits if layer is None else states.hidden_states[layer] @ model.lm_head.weight.T
        rows.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return rows


def apart(rows, others):
    """The largest difference of two batches' log-probs."""
    return max((row - torch.as_tensor(other)).abs().max().item() for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize("name", ["colocate", "adapter", "server"])
def test_vllm_samples_with_the_weights_of_the_last_update(seen, name):
    """In both phases; neither with those of the batch before nor by the layer that is trained. In float32: 1e-4 nats."""
    batches = seen(name)
    for number, batch in enumerate(batches):
        assert len(batch["answers"]) == 16 and max(map(len, batch["answers"])) > 4
        assert apart(said(batch, batch["weights"]), batch["log_probs"]) < 1e-4
        assert apart(said(batch, batch["weights"], LAYER), batch["log_probs"]) > 0.1
        if number:
            assert apart(said(batch, batches[number - 1]["weights"]), batch["log_probs"]) > 0.01
    moved = [name for name, weight in batches[0]["weights"].items() if (weight != batches[2]["weights"][name]).any()]
    below = [f"model.layers.{layer}." for layer in range(LAYER)]
    assert moved and all(name.startswith((*below, "model.embed_tokens")) for name in moved)  # in the first phase


def corrected(theta, sampled, mode, low=None, high=3.0):
    """The importance weights of an answer, by hand."""
    ratio = (theta - sampled).sum(0, keepdim=True).exp() if mode.startswith("sequence") else (theta - sampled).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low if low is not None else -math.inf, high)
    outside = (ratio < (low if low is not None else -math.inf)) | (ratio > high)
    return ratio.masked_fill(outside, 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_the_correction_is_pi_thetas_against_the_sampler(seen, name):
    """The weights that the loss gets, in both phases: by hand from the weights and what vLLM answered."""
    options = RUNS[name]
    mode, high = options["vllm_importance_sampling_mode"], options.get("vllm_importance_sampling_clip_max", 3.0)
    low, cut = options.get("vllm_importance_sampling_clip_min"), 0
    for batch in seen(name):
        theta, layer = said(batch, batch["weights"]), said(batch, batch["weights"], LAYER)
        for row, sampled in enumerate(map(torch.tensor, batch["log_probs"])):
            expected = corrected(theta[row], sampled, mode, low, high)
            given = batch["importance_sampling_ratio"][row][: len(expected)]
            near = ((theta[row] - sampled).exp() - high).abs() < 1e-5  # which side it lies on is rounding
            near |= ((theta[row] - sampled).exp() - (low or 0)).abs() < 1e-5
            near = near.any(0, keepdim=True) if mode.startswith("sequence") else near
            torch.testing.assert_close(given[~near], expected[~near], atol=2e-5, rtol=0)
            cut += (expected == high).sum() + (expected == 0).sum()
            policy = layer if batch["phase"] == 1 else theta
            old = batch["old_per_token_logps"][row][: len(sampled)]
            torch.testing.assert_close(old, policy[row], atol=1e-4, rtol=0)  # the ratio stays the trained policy's
        if batch["phase"] == 1:
            of_layer = [
                corrected(a, torch.tensor(b), mode, low, high) for a, b in zip(layer, batch["log_probs"], strict=True)
            ]
            given = [batch["importance_sampling_ratio"][row][: len(one)] for row, one in enumerate(of_layer)]
            assert apart(of_layer, given) > 0.1  # and would be seen
    assert (cut > 5) == name.startswith("bfloat16")  # else nothing was cut


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 masked"])
def test_the_correction_weighs_each_token_of_the_loss(seen, name):
    """At a batch's first pass the policy's own ratio is 1, and the loss minus the mean of advantage times weight."""
    for batch in seen(name):
        given, mask = batch["of"], batch["of"]["completion_mask"]
        for weight, same in ((given["importance_sampling_ratio"], True), (torch.ones(()), False)):
            gains = given["advantages"].view(len(mask), -1) * weight * mask
            loss = -(gains.sum(1) / mask.sum(1)).mean().item()
            assert (abs(batch["loss"] - loss) < 1e-6) == same


def run_by_vllm(folder, *options, dtype="float32", **changes):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(CONFIG | {"output": str(folder / "run")} | changes))
    return by_vllm("vllm_cpu", "train", "--config", file, *options, dtype=dtype)


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "phase" in row]


def test_the_command_line_trains_in_both_phases(tmp_path):
    done = run_by_vllm(tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    rows = metrics(tmp_path)
    assert [row["phase"] for row in rows] == [1, 1, 2, 2]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)
    assert all(abs(row["sampling/importance_sampling_ratio/mean"] - 1) < 1e-3 for row in rows)
    assert max(row["grad_norm"] for row in rows[:2]) > 0  # else the first phase had nothing to push
    assert (tmp_path / "run" / "finished.json").exists()


def test_a_run_that_a_signal_ended_goes_on(tmp_path):
    """Ctrl-C: exit status 130, one line, a checkpoint; a resumed run pushes its weights before it samples."""
    file, more = tmp_path / "run.yaml", {"output": str(tmp_path / "run"), "max_steps": 40, "internal_steps": 20}
    file.write_text(yaml.safe_dump(CONFIG | more))
    command = [PYTHON, "-m", "tests.helpers.vllm_cpu", "train", "--config", str(file)]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, env=environment(**QUIET), stdout=log, stderr=log)
        started = time.monotonic()
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert running.poll() is None and time.monotonic() - started < 300, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130
    said = (tmp_path / "log").read_text()
    assert said.strip().splitlines()[-1].startswith("bupo: stopped by SIGINT after update") and "Traceback" not in said
    (place,) = (tmp_path / "run").glob("checkpoint-*")
    done = int(place.name.partition("-")[2])
    resumed = run_by_vllm(tmp_path, "--resume_from_checkpoint", "true", **more | {"max_steps": 40})
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr[-3000:]
    rows = metrics(tmp_path)
    assert 0 < done < 20 and [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows)


REFUSED: dict[str, tuple[dict, str]] = {
    "no server": ({"vllm_mode": "server", "vllm_server_port": 9, "vllm_server_timeout": 0}, "can't be reached"),
    "one process for two parts": ({"vllm_tensor_parallel_size": 2}, "tensor_parallel_size (2) must divide"),
    "too short": ({"vllm_max_model_length": 4}, "rollout batch 1"),
    "no pattern": ({"vllm_structured_outputs_regex": "([a"}, "rollout batch 1"),
    "an unknown setting": ({"generation_kwargs": {"fairness": 1}}, "holds 'fairness', which is no setting of vLLM's"),
    "no such value": ({"generation_kwargs": {"presence_penalty": 5}}, "generation_kwargs is refused: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_one_line(tmp_path, name):
    changes, words = REFUSED[name]
    done = run_by_vllm(tmp_path, **changes)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr[-3000:]
    assert line.startswith("bupo: error: ") and words in line and "Traceback" not in done.stderr
