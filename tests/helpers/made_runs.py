"""Run folders as the commands leave them, made in milliseconds: what a page over runs reads, and no weights."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import yaml

from bupo.evaluation.metrics import avg_at_k
from bupo.training.callbacks.probe_series import DynamicsWriter

BUPO: dict[str, Any] = {"internal_layer": 5, "internal_steps": 3}
GRPO: dict[str, Any] = {"internal_steps": 0}


def noted(folder, command, given):
    """`config.yaml` and `run.json`, as `note_run` writes them for a command that was started two folders above."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"# bupo {command}\n" + yaml.safe_dump(given, sort_keys=False))
    started = str(folder.parents[1])
    (folder / "run.json").write_text(json.dumps({"schema_version": 1, "command": command, "folder": started}))


def train(folder, seed, options=GRPO, batches=6, finished=True, reward=lambda batch: 0.1 * batch, **more):
    """A training run of some rollout batches, one log each. `more` are further options."""
    given = {"model": "embedded", "dataset": "arithmetic", "learning_rate": "1e-4", **options, **more}
    noted(folder, "train", given | {"seed": seed, "output": f"{folder.parent.name}/{folder.name}"})
    first = given.get("internal_steps", 20) if given.get("internal_layer") else 0
    rows = []
    for batch in range(1, batches + 1):
        row = {"step": 4 * batch, "rollout_batch": float(batch), "reward": reward(batch), "entropy": 1 / batch}
        row |= {"phase": 1.0 if batch <= first else 2.0, "completions/mean_length": 10.0 + batch}
        if batch <= first:
            row |= {"internal/layer": 5.0, "internal/entropy": 0.5}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"schema_version": 1, "updates": 4 * batches}))
    return folder


def probed(folder, layers=(6, 7, 8), batches=(0, 2, 4)):
    """`dynamics.parquet`, by the class that writes it."""
    dynamics = DynamicsWriter(folder, {})
    for batch in batches:
        rows = [{"measure": "perplexity", "layer": None, "later_layer": None, "value": 2.0}]
        rows += [
            {"measure": name, "layer": 5, "later_layer": later, "value": later + batch / 10}
            for name in ("cosine", "kl")
            for later in layers
        ]
        dynamics.add_rows(batch, rows)
    return folder


def evaluate(folder, model, **correct):
    """An evaluation of 10 problems with 10 answers each: by benchmark, how many of the 100 are correct."""
    noted(folder, "eval", {"model": str(model), "output": f"{folder.parent.name}/{folder.name}"})
    found = {}
    for label, right in correct.items():
        answers = [[place * 10 + n < right for n in range(10)] for place in range(10)]
        mean, interval = avg_at_k(np.array(answers))
        assert math.isclose(100 * mean, right)
        found[label] = {"problems": 10, "k": 10, "avg@k": mean, "avg@k_interval": interval}
        found[label]["pass@k"] = {"1": mean, "10": sum(map(any, answers)) / 10}
    meta = {"model": str(model), "layer": None, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 32}
    summary = {"schema_version": 4, "meta": meta, "benchmarks": found, "harness": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def analyze(folder, *models, height=0.0):
    """An analysis of models of 8 layers whose dH_FFN falls from 1 to -1, plus `height`."""
    noted(
        folder, "analyze", {"model": [str(model) for model in models], "output": f"{folder.parent.name}/{folder.name}"}
    )
    rows = [
        {
            "model": f"{n}-m",
            "measure": measure,
            "layer": layer,
            "mean": mean,
            "std": 1.0,
            "low": mean - 0.1,
            "high": mean + 0.1,
        }
        for n, _ in enumerate(models)
        for measure in ("d_entropy_ffn", "d_entropy_attn", "kl_next")
        for layer in range(1, 9)
        for mean in [float("nan") if measure == "kl_next" else 1 - (layer - 1) / 4 + height + n]
    ]
    pd.DataFrame(rows).to_parquet(folder / "layers.parquet")
    metas = [{"meta": {"label": f"{n}-m", "model": str(model), "adapter": None}} for n, model in enumerate(models)]
    (folder / "summary.json").write_text(json.dumps({"schema_version": 1, "models": metas}))
    return folder
