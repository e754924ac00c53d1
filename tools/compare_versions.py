"""Compare the numbers of two revisions: run the same commands with both and compare the files that they write.

    python tools/compare_versions.py BEFORE             # against the working tree
    python tools/compare_versions.py BEFORE AFTER --demo
    python tools/compare_versions.py BEFORE --runs grpo ppo eval --folder runs/compared

The embedded model is trained for four rollout batches with every estimator and with every option that changes the code path,
uninterrupted and resumed from checkpoints inside rollout batches of both phases. It is also analysed and evaluated. Weights
must be equal to the bit between the versions and between resumed and uninterrupted runs. Rows, tables and summaries must be
equal in all keys that both versions write, except times. Each comparison prints one line; the exit status is 1 if anything
differs. It takes ten minutes on two CPU cores, fifteen with `--demo`. Revisions before 0.3 get the former option names.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("before", "after")
TIMES = re.compile(r"time|seconds|per_second|total_flos")
ONLY_IN_ONE = 0.0  # difference of a key that only one version has
# Names before 0.3, for revisions whose command line is in `bupo.commands`. The default of `--slow_factor` was 0.1.
FORMER_NAMES = {
    "bupo.cli.main": "bupo.commands.main",
    "--internal_early_stopping": "--internal_guard",
    "--layer_lr_multipliers": "--slow_above_layer",
    '{"6":0.1}': "5",
}
FORMER_METRICS = {"kl_old": "approx_kl", "internal/ended_by_guard": "internal/stopped_early"}
TRAIN = """train --model_name_or_path embedded --dataset_name arithmetic --dataset_size 64 --internal_early_stopping true
    --probe_every 1 --per_device_train_batch_size 8 --num_generations 4 --steps_per_generation 4
    --max_completion_length 24 --max_steps 16 --save_strategy steps --save_steps 5 --learning_rate 1e-4
    --lr_scheduler_type constant --gradient_checkpointing false --report_to none"""
BUPO = "--internal_layer 5 --internal_steps 2"
PPO = f"{BUPO} --advantage_estimator ppo --critic_learning_rate 1e-3"
EVALUATED = "--eval_strategy steps --eval_steps 8 --eval_size 8 --eval_benchmarks arithmetic --eval_problems 8"
TRAININGS: dict[str, tuple[str, tuple[int, ...]]] = {  # options, and the updates of the checkpoints to resume from
    "grpo": (BUPO, (5, 10)),
    "rloo": (f"{BUPO} --advantage_estimator rloo", (5, 10)),
    "reinforce++": (f"{BUPO} --advantage_estimator reinforce++", (5, 10)),
    "ppo": (PPO, (5, 10)),
    "ppo-shared": (f"{PPO} --critic_backbone shared", (5, 10)),
    "two-iterations": (f"{BUPO} --num_iterations 2 --max_steps 32", (5, 20)),
    "schedule": ("--internal_schedule [[3,1],[5,1]]", (5, 10)),
    "peft": (f"{BUPO} --use_peft", (5, 10)),
    "beta": (f"{BUPO} --beta 0.04", ()),
    "peft-beta": (f"{BUPO} --use_peft --beta 0.04", ()),
    "ffn": (f"{BUPO} --internal_module ffn", ()),
    "final-norm": (f"{BUPO} --internal_lens final_norm", ()),
    "auto": ("--internal_layer auto --internal_steps 2 --per_device_train_batch_size 32 --dataset_size 128", ()),
    "no-phase-1": ("--internal_steps 0", ()),
    "frozen-slow": ('--internal_steps 0 --frozen_up_to_layer 2 --layer_lr_multipliers {"6":0.1}', ()),
    "accumulated": (f"{PPO} --critic_backbone shared --gradient_accumulation_steps 2 --max_steps 8", ()),
    "evaluated": (f"{BUPO} {EVALUATED}", ()),
}
ANALYSES = {"analysis": "", "analysis-kl": "--kl_pairs true", "analysis-lens": "--lens final_norm"}
EVAL = "eval --benchmarks arithmetic --size 32 --k 2 --max_new_tokens 24 --output eval"


@contextmanager
def check_out(revision: str | None) -> Iterator[Path]:
    """Yield the folder of a temporary checkout of a revision, or of the working tree for None."""
    if revision is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


class Versions:
    """Two versions of bupo and the folders that they write to.

    Args:
        trees (`list[Path]`): checkouts of the two versions.
        folder (`Path`): parent of the output folders `before` and `after`.
    """

    def __init__(self, trees: list[Path], folder: Path):
        self.trees = trees
        self.folders = [folder / version for version in VERSIONS]
        for tree, output_folder in zip(trees, self.folders, strict=True):
            output_folder.mkdir(parents=True, exist_ok=True)
            loaded = Path(_python(tree, output_folder, "-c", "import bupo; print(bupo.__file__)").stdout.strip())
            if not loaded.is_relative_to(tree):
                sys.exit(f"compare_versions: {tree} runs {loaded}")

    def run(self, name: str, arguments: list[str]) -> list[str]:
        """Run a command with both versions in parallel, with output in `NAME.log`. Return the error of each, or ""."""

        def run_version(version: int) -> str:
            words = ["bupo.cli.main", *arguments]
            if (self.trees[version] / "src/bupo/commands").is_dir():
                words = [FORMER_NAMES.get(word, word) for word in words]
            done = _python(self.trees[version], self.folders[version], "-m", *words)
            (self.folders[version] / f"{name}.log").write_text(done.stdout + done.stderr)
            lines = done.stderr.strip().splitlines()
            return "" if done.returncode == 0 else f"exit status {done.returncode}: {lines[-1] if lines else ''}"

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run_version, (0, 1)))

    def paths(self, name: str) -> list[Path]:
        return [folder / name for folder in self.folders]


def _python(tree: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


def compare(versions: Versions, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each comparison's name and outcome. The outcome starts with "identical" if nothing differs."""
    for name in [name for name in TRAININGS if name in names]:
        yield from compare_training(versions, name, *TRAININGS[name])
    for name in [name for name in ANALYSES if name in names]:
        command = f"analyze --answers 16 --max_new_tokens 24 --output {name} {ANALYSES[name]}"
        yield f"{name}: exit", compare_errors(versions.run(name, command.split()))
        yield f"{name}: layers.parquet", compare_files(versions.paths(f"{name}/layers.parquet"), table)
    if "eval" in names:
        yield "eval: exit", compare_errors(versions.run("eval", EVAL.split()))
        yield "eval: samples.jsonl", compare_files(versions.paths("eval/arithmetic/samples.jsonl"), samples)
        yield "eval: summary.json", compare_files(versions.paths("eval/summary.json"), summary)
    if "demo" in names:
        yield "demo: exit", compare_errors(versions.run("demo", ["demo", "--output_dir", "demo"]))
        yield "demo: accuracies", compare_files(versions.paths("demo/summary.json"), summary)
        yield "demo: weights", compare_files(versions.paths("demo/model.safetensors"), load_file)


def compare_training(
    versions: Versions, name: str, options: str, checkpoints: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Compare an uninterrupted run, and a run resumed from each checkpoint in a copy of its folder."""
    command = f"{TRAIN} {options}".split()
    if checkpoints:  # without it, the first log after a resume is a mean over the rest of a rollout batch
        command += ["--logging_steps", "1"]
    weights = "adapter_model.safetensors" if "--use_peft" in command else "model.safetensors"
    yield f"{name}: exit", compare_errors(versions.run(name, [*command, "--output_dir", name]))
    yield from compare_training_files(versions, name, weights)
    for checkpoint in checkpoints:
        again = f"{name}-from-{checkpoint}"
        for original, copy in zip(versions.paths(name), versions.paths(again), strict=True):
            shutil.copytree(original, copy)
            (copy / weights).unlink(missing_ok=True)
            for later in copy.glob("checkpoint-*"):  # a folder with later checkpoints is refused
                if int(later.name.rpartition("-")[2]) > checkpoint:
                    shutil.rmtree(later)
        resumed = ["--output_dir", again, "--resume_from_checkpoint", f"{again}/checkpoint-{checkpoint}"]
        yield f"{again}: exit", compare_errors(versions.run(again, command + resumed))
        yield from compare_training_files(versions, again, weights)
        for version, folder in zip(VERSIONS, versions.folders, strict=True):
            paths = [folder / name / weights, folder / again / weights]
            yield f"{again}: {weights} and the uninterrupted run's, {version}", compare_files(paths, load_file)


def compare_training_files(versions: Versions, name: str, weights: str) -> Iterator[tuple[str, str]]:
    """Compare the files of a training."""
    yield f"{name}: {weights}", compare_files(versions.paths(f"{name}/{weights}"), load_file)
    yield f"{name}: metrics.jsonl", compare_files(versions.paths(f"{name}/metrics.jsonl"), metrics)
    if any(path.exists() for path in versions.paths(f"{name}/dynamics.parquet")):
        yield f"{name}: dynamics.parquet", compare_files(versions.paths(f"{name}/dynamics.parquet"), table)


# -- content of files --------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(path: Path) -> list[dict]:
    """Return the logged rows, with current names. `train_loss` of a resumed run is skipped: it covers a part of the steps."""
    skipped = {"train_loss"} if "-from-" in path.parent.name else set()
    return [
        {FORMER_METRICS.get(key, key): value for key, value in row.items() if key not in skipped} for row in lines(path)
    ]


def samples(path: Path) -> list[dict]:
    """Return answers in the order of their problems. Batches may finish in another order."""
    return sorted(lines(path), key=lambda row: (row["problem"], row["sample"]))


def table(path: Path) -> dict[str, list]:
    return pd.read_parquet(path).to_dict("list")


def summary(path: Path) -> dict:
    content = json.loads(path.read_text())
    return {key: content[key] for key in ("benchmarks", "accuracy_before", "accuracy_after") if key in content}


# -- differences -------------------------------------------------------------------------------------------------------


def compare_errors(errors: list[str]) -> str:
    """Compare the errors of two commands."""
    before, after = errors
    if before == after:
        return f"differs: both end with {before}" if before else "identical"
    return f"differs: {before or 'success'} before, {after or 'success'} after"


def compare_files(paths: list[Path], read: Callable[[Path], Any]) -> str:
    """Return the outcome of comparing two files."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        return f"differs: there is no {' and no '.join(missing)}"
    before, after = (read(path) for path in paths)
    sizes = dict(differences(before, after))
    only_in_one = sorted({path.rpartition("/")[2] for path, size in sizes.items() if size == ONLY_IN_ONE})
    sizes = {path: size for path, size in sizes.items() if size != ONLY_IN_ONE}
    if only_in_one and read is load_file:
        return f"differs: {', '.join(only_in_one)} in one only"
    note = f" ({', '.join(only_in_one)} in one only)" if only_in_one else ""
    if not sizes:
        return f"identical{note}"
    largest = max(sizes, key=lambda path: sizes[path])
    size = "" if math.isinf(sizes[largest]) else f", by {sizes[largest]:.3g}"
    return f"differs in {len(sizes)} places, most in {largest}{size}{note}"


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and size of each difference: infinite without a number, `ONLY_IN_ONE` for a missing key."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(key for key in before.keys() | after.keys() if not TIMES.search(key)):
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}", ONLY_IN_ONE
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{path} ({len(before)} entries before, {len(after)} after)", math.inf
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(before, torch.Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            yield f"{path} (shape or type)", math.inf
        elif not torch.equal(before, after):
            yield path, (before.double() - after.double()).abs().max().item()
    elif before != after and not (before != before and after != after):  # nan is nan
        numbers = isinstance(before, int | float) and isinstance(after, int | float)
        yield path, abs(before - after) if numbers and math.isfinite(before - after) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TRAININGS, *ANALYSES, "eval"]
    parser.add_argument("before", help="revision")
    parser.add_argument("after", nargs="?", help="revision; by default the working tree")
    parser.add_argument("--runs", nargs="+", choices=[*names, "demo"], default=names, help="run only these")
    parser.add_argument("--demo", action="store_true", help="also run the demo")
    parser.add_argument("--folder", type=Path, help="empty folder in which the runs are kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkouts are removed
    differing = count = 0
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        trees = [stack.enter_context(check_out(options.before)), stack.enter_context(check_out(options.after))]
        for name, outcome in compare(Versions(trees, folder.resolve()), options.runs + ["demo"] * options.demo):
            print(f"{name}: {outcome}", flush=True)
            count, differing = count + 1, differing + (not outcome.startswith("identical"))
    print(f"{count} comparisons, {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
