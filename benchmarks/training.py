"""Runs of `bupo train` with held-out accuracy before and after, two in parallel on a CPU.

python -m benchmarks.training methods         # every recipe of the embedded model, one seed
python -m benchmarks.training guard           # a first phase of 10 and of 40 rollout batches, with and without early stopping
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from transformers.utils.logging import disable_progress_bar

import bupo
from bupo.data.problems import ARITHMETIC, load_problems
from bupo.evaluation.answers import get_correct, grade_completions, sample_completions, tokenize_prompts
from bupo.evaluation.metrics import avg_at_k, paired_difference
from bupo.generation.seeded_sampling import TransformersEngine
from bupo.models.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from bupo.reports.figures import draw_guard_figure
from bupo.run_files.names import METRICS_FILE
from bupo.training.callbacks.metrics_file import read_metrics

RECIPES = Path(bupo.__file__).parent / "recipes" / "cpu"
PROBLEMS, SAMPLES, MAX_NEW_TOKENS = 512, 8, 32
WORKERS = 2


def trained(recipe: Path, folder: Path, *flags: str) -> Path:
    """Run a recipe into a folder, with its output in `log.txt`. A finished run is kept."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "bupo.cli.main",
            "train",
            "--config",
            str(recipe),
            "--output_dir",
            str(folder),
        ]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(
                [*command, *flags], check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
    return folder


def accuracy(model: str | Path) -> np.ndarray:
    """Return the correctness of sampled answers to the held-out problems, (problems, answers)."""
    problems, tokenizer = load_problems(ARITHMETIC, "test", size=PROBLEMS), load_tokenizer(str(model))
    engine = TransformersEngine(load_model(str(model)), tokenizer, MAX_NEW_TOKENS, batch_size=128)
    return get_correct(
        grade_completions(problems, sample_completions(engine, tokenize_prompts(problems, tokenizer), SAMPLES))
    )


def run_all(runs: dict[str, tuple[Path, list[str]]], folder: Path) -> dict[str, dict]:
    """Train all runs, `WORKERS` in parallel, and compare each with its base model."""
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = {name: pool.submit(trained, recipe, folder / name, *flags) for name, (recipe, flags) in runs.items()}
        for name, job in jobs.items():
            job.result()
            print(f"{name}: trained", flush=True)
    before, rows = accuracy(EMBEDDED_MODEL), {}
    for name in runs:
        after = accuracy(folder / name)
        gain, interval = paired_difference(before, after)
        reached, reached_interval = avg_at_k(after)
        steps = [row for row in read_metrics(folder / name / METRICS_FILE) if "rollout_batch" in row]
        rows[name] = {
            "before": before.mean(),
            "after": reached,
            "after_interval": reached_interval,
            "gain": gain,
            "gain_interval": interval,
            "phase_1": sum(row["phase"] < 1.5 for row in steps),
            "probe_share": sum(row.get("probe/time", 0) for row in steps) / sum(_seconds(row) for row in steps),
        }
        low, high = interval
        print(
            f"{name:24} {100 * before.mean():5.1f} % -> {100 * reached:5.1f} %  {100 * gain:+.1f} [{100 * low:+.1f}, "
            f"{100 * high:+.1f}]  phase 1: {rows[name]['phase_1']:2} batches  probes {100 * rows[name]['probe_share']:.1f} %",
            flush=True,
        )
    (folder / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def _seconds(row: dict) -> float:
    """Return the seconds of a rollout batch with four updates. `step_time` of the first update includes the rollouts."""
    return row["step_time"] * 4


def methods(folder: Path) -> None:
    run_all({path.stem: (path, []) for path in sorted(RECIPES.glob("embedded-*.yaml"))}, folder)


def guard(folder: Path, seeds: int = 3) -> None:
    """Compare a phase 1 of the right length with one four times as long, at a learning rate at which it does harm."""
    recipe = RECIPES / "embedded-long-phase-1.yaml"
    lengths = yaml.safe_load(recipe.read_text())["internal_steps"]
    runs = {}
    for seed in range(seeds):
        for name, steps, guarded in (
            ("right", lengths // 4, False),
            ("long", lengths, False),
            ("guarded", lengths, True),
        ):
            flags = [
                "--internal_steps",
                str(steps),
                "--internal_early_stopping",
                str(guarded).lower(),
                "--seed",
                str(seed),
            ]
            runs[f"{name}-{seed}"] = (recipe, flags)
    run_all(runs, folder)
    rows = {name: read_metrics(folder / name / METRICS_FILE) for name in runs}
    draw_guard_figure(rows, folder / "guard.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["methods", "guard"])
    parser.add_argument("--output", type=Path, default=Path("runs"))
    options = parser.parse_args()
    disable_progress_bar()
    {"methods": methods, "guard": guard}[options.what](options.output / options.what)


if __name__ == "__main__":
    main()
