"""Show that numbers are unchanged between two revisions: run the same commands with each, and compare what they leave.

    python tools/compare_versions.py BEFORE             # against the working tree
    python tools/compare_versions.py BEFORE AFTER --demo
    python tools/compare_versions.py BEFORE --runs grpo ppo eval --folder runs/compared

Trains the embedded model for four rollout batches by every estimator and option that has a path of its own, whole and
resumed from checkpoints that lie inside rollout batches of both phases; analyses it; evaluates it. Weights must agree to the
bit between the versions, and those of a resumed run with the whole run's; rows, tables and summaries in everything that both
versions write, except times. One line a comparison, exit status 1 if something differs. Ten minutes on two CPU cores, and
with `--demo` fifteen.
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
ALONE = 0.0
DRAWING = "KeyError: 'reward'"  # 0.1.0 ends so when a log holds no reward, after all else is written
TRAIN = """train --model_name_or_path embedded --dataset_name arithmetic --dataset_size 64 --internal_early_stopping true
    --probe_every 1 --per_device_train_batch_size 8 --num_generations 4 --steps_per_generation 4
    --max_completion_length 24 --max_steps 16 --save_strategy steps --save_steps 5 --learning_rate 1e-4
    --lr_scheduler_type constant --gradient_checkpointing false --report_to none"""
BUPO = "--internal_layer 5 --internal_steps 2"
PPO = f"{BUPO} --advantage_estimator ppo --critic_learning_rate 1e-3"
EVALUATED = "--eval_strategy steps --eval_steps 8 --eval_size 8 --eval_benchmarks arithmetic --eval_problems 8"
TRAININGS: dict[str, tuple[str, tuple[int, ...]]] = {  # options, and the checkpoints (updates) to resume from
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
def tree_of(revision: str | None) -> Iterator[Path]:
    """The folder of a revision, checked out for as long as it is needed; the working tree's for None."""
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
    """Two versions of bupo and what each has written.

    Args:
        trees (`list[Path]`): their sources, the one before and the one after.
        folder (`Path`): each writes into a folder of its own in it.
    """

    def __init__(self, trees: list[Path], folder: Path):
        self.trees = trees
        self.folders = [folder / version for version in VERSIONS]
        for tree, own in zip(trees, self.folders, strict=True):
            own.mkdir(parents=True, exist_ok=True)
            loaded = Path(_python(tree, own, "-c", "import bupo; print(bupo.__file__)").stdout.strip())
            if not loaded.is_relative_to(tree):
                sys.exit(f"compare_versions: {tree} runs {loaded}")

    def run(self, name: str, arguments: list[str]) -> list[str]:
        """Run a command with both at once, its output noted in `NAME.log`; returns how each ended, "" where well."""

        def one(version: int) -> str:
            own = self.folders[version]
            done = _python(self.trees[version], own, "-m", "bupo.cli.main", *arguments)
            (own / f"{name}.log").write_text(done.stdout + done.stderr)
            lines = done.stderr.strip().splitlines()
            return "" if done.returncode == 0 else f"exit status {done.returncode}: {lines[-1] if lines else ''}"

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, (0, 1)))

    def paths(self, name: str) -> list[Path]:
        return [own / name for own in self.folders]


def _python(tree: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


def compare(versions: Versions, names: list[str]) -> Iterator[tuple[str, str]]:
    """Each comparison's name and its outcome, which starts with "identical" where nothing differs."""
    for name in [name for name in TRAININGS if name in names]:
        yield from trained(versions, name, *TRAININGS[name])
    for name in [name for name in ANALYSES if name in names]:
        command = f"analyze --answers 16 --max_new_tokens 24 --output {name} {ANALYSES[name]}"
        yield f"{name}: exit", same_end(versions.run(name, command.split()))
        yield f"{name}: layers.parquet", of_files(versions.paths(f"{name}/layers.parquet"), table)
    if "eval" in names:
        yield "eval: exit", same_end(versions.run("eval", EVAL.split()))
        yield "eval: samples.jsonl", of_files(versions.paths("eval/arithmetic/samples.jsonl"), samples)
        yield "eval: summary.json", of_files(versions.paths("eval/summary.json"), summary)
    if "demo" in names:
        yield "demo: exit", same_end(versions.run("demo", ["demo", "--output_dir", "demo"]))
        yield "demo: accuracies", of_files(versions.paths("demo/summary.json"), summary)
        yield "demo: weights", of_files(versions.paths("demo/model.safetensors"), load_file)


def trained(versions: Versions, name: str, options: str, checkpoints: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """A whole run, and one from each checkpoint in a copy of its folder."""
    command = f"{TRAIN} {options}".split()
    if checkpoints:  # else the first log after a resume is a mean over what is left of a rollout batch
        command += ["--logging_steps", "1"]
    weights = "adapter_model.safetensors" if "--use_peft" in command else "model.safetensors"
    yield f"{name}: exit", same_end(versions.run(name, [*command, "--output_dir", name]))
    yield from outputs(versions, name, weights)
    for checkpoint in checkpoints:
        again = f"{name}-from-{checkpoint}"
        for whole, copy in zip(versions.paths(name), versions.paths(again), strict=True):
            shutil.copytree(whole, copy)
            (copy / weights).unlink(missing_ok=True)
        resumed = ["--output_dir", again, "--resume_from_checkpoint", f"{again}/checkpoint-{checkpoint}"]
        yield f"{again}: exit", same_end(versions.run(again, command + resumed))
        yield from outputs(versions, again, weights)
        for version, own in zip(VERSIONS, versions.folders, strict=True):
            ends = [own / name / weights, own / again / weights]
            yield f"{again}: {weights} and the whole run's, {version}", of_files(ends, load_file)


def outputs(versions: Versions, name: str, weights: str) -> Iterator[tuple[str, str]]:
    """What a training leaves."""
    yield f"{name}: {weights}", of_files(versions.paths(f"{name}/{weights}"), load_file)
    yield f"{name}: metrics.jsonl", of_files(versions.paths(f"{name}/metrics.jsonl"), metrics)
    if any(path.exists() for path in versions.paths(f"{name}/dynamics.parquet")):
        yield f"{name}: dynamics.parquet", of_files(versions.paths(f"{name}/dynamics.parquet"), table)


# -- what a file holds -------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(path: Path) -> list[dict]:
    """The logs. A resumed run's `train_loss` is left out: it was a sum over a part divided by the number of all."""
    skipped = {"train_loss"} if "-from-" in path.parent.name else set()
    return [{key: value for key, value in row.items() if key not in skipped} for row in lines(path)]


def samples(path: Path) -> list[dict]:
    """Answers in the order of their problems; batches may finish in another."""
    return sorted(lines(path), key=lambda row: (row["problem"], row["sample"]))


def table(path: Path) -> dict[str, list]:
    return pd.read_parquet(path).to_dict("list")


def summary(path: Path) -> dict:
    found = json.loads(path.read_text())
    return {key: found[key] for key in ("benchmarks", "accuracy_before", "accuracy_after") if key in found}


# -- what differs ------------------------------------------------------------------------------------------------------


def same_end(ends: list[str]) -> str:
    """How two commands ended. The version before may fail in drawing, which comes last; the one after only where it does."""
    before, after = ends
    if after and after != before:
        return f"differs: {before or 'well'} before, {after} after"
    if before and DRAWING not in before:
        return f"differs: both end with {before}"
    return "identical" + (f" (before: {before})" if before else "")


def of_files(paths: list[Path], read: Callable[[Path], Any]) -> str:
    """The outcome of comparing two files."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        return f"differs: there is no {' and no '.join(missing)}"
    before, after = (read(path) for path in paths)
    found = dict(differences(before, after))
    alone = sorted({place.rpartition("/")[2] for place, size in found.items() if size == ALONE})
    found = {place: size for place, size in found.items() if size != ALONE}
    if alone and read is load_file:
        return f"differs: {', '.join(alone)} in one only"
    note = f" ({', '.join(alone)} in one only)" if alone else ""
    if not found:
        return f"identical{note}"
    where = max(found, key=lambda place: found[place])
    size = "" if math.isinf(found[where]) else f", by {found[where]:.3g}"
    return f"differs in {len(found)} places, most in {where}{size}{note}"


def differences(before: Any, after: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Where two values differ, and by how much: infinitely where that is no number, `ALONE` where one has no such key."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(key for key in before.keys() | after.keys() if not TIMES.search(key)):
            if key in before and key in after:
                yield from differences(before[key], after[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}", ALONE
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{where} ({len(before)} entries before, {len(after)} after)", math.inf
        for index, pair in enumerate(zip(before, after, strict=False)):
            yield from differences(*pair, f"{where}[{index}]")
    elif isinstance(before, torch.Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            yield f"{where} (shape or type)", math.inf
        elif not torch.equal(before, after):
            yield where, (before.double() - after.double()).abs().max().item()
    elif before != after and not (before != before and after != after):  # nan is nan
        numbers = isinstance(before, int | float) and isinstance(after, int | float)
        yield where, abs(before - after) if numbers and math.isfinite(before - after) else math.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TRAININGS, *ANALYSES, "eval"]
    parser.add_argument("before", help="revision")
    parser.add_argument("after", nargs="?", help="revision; by default the working tree")
    parser.add_argument("--runs", nargs="+", choices=[*names, "demo"], default=names, help="some of them only")
    parser.add_argument("--demo", action="store_true", help="also the whole demo")
    parser.add_argument("--folder", type=Path, help="keep what the runs write in here, an empty folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the trees are removed then too
    differing = count = 0
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if folder.exists() and any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        trees = [stack.enter_context(tree_of(options.before)), stack.enter_context(tree_of(options.after))]
        for name, outcome in compare(Versions(trees, folder.resolve()), options.runs + ["demo"] * options.demo):
            print(f"{name}: {outcome}", flush=True)
            count, differing = count + 1, differing + (not outcome.startswith("identical"))
    print(f"{count} comparisons, {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
