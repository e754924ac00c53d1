"""A run over a stream that is killed in its second pass and resumed sees the same rows as one that is not, and ends with its weights."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.faults.harness import ROOT, SHORT, unequal

pytestmark = pytest.mark.faults
NEVER = 99


def run(folder, kind, update):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tests.faults.streaming", str(folder), kind, str(update)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("kind", ["shuffled in a buffer", *([] if SHORT else ["interleaved", "sharded and shuffled"])])
def test_a_killed_stream_goes_on_in_its_pass(tmp_path, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, kind, NEVER).returncode == 0
    assert run(killed, kind, 11).returncode == -signal.SIGKILL
    ended = run(killed, kind, NEVER)
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected, found = (json.loads((folder / "seen.json").read_text()) for folder in (whole, killed))
    assert unequal(expected["rows"], found["rows"]) == ""
    assert found["prompts"] and expected["prompts"][-len(found["prompts"]) :] == found["prompts"]
    assert {prompt for _, prompt in expected["prompts"][: -len(found["prompts"])]} & {p for _, p in found["prompts"]}
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (whole, killed)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
