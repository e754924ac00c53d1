"""Time of a complete rollout batch relative to TRL's GRPOTrainer, and a breakdown of a small model's step.

    python -m benchmarks.step --model SmolLM2.gguf --json out.json

- The three trainers take turns, each in a separate process (`benchmarks.turns`): 32 answers of at most 64 tokens to sums, 8 per
  prompt, one update. The reward is cheap and differs within a group.
- The embedded model is trained by its recipe (`bupo train --config recipes/cpu/embedded-bupo.yaml`) for some rollout batches
  of each phase. A clock measures the model's forward and backward passes with the optimizer, the sampling and the grading.
  The rest is Python: collation, advantages, the arithmetic of the loss, metrics, logs, probes. A second thread samples the
  stack every few milliseconds to break the rest down by function.
"""

import functools
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOTrainer, ModelConfig

import bupo
from benchmarks.result import Result, Table, Target, middle, options, ratios
from benchmarks.turns import FIRST, SECOND, TRL, Job, Update, profiles_of, trainers
from bupo.cli.parsing import parse_options
from bupo.models.packing import PackedLayout
from bupo.models.residual_stream import unwrap_causal_lm

ROWS, GROUP, MAX_NEW_TOKENS = 32, 8, 64
RECIPE = Path(bupo.__file__).parent / "recipes" / "cpu" / "embedded-bupo.yaml"
PARTS = ("sampling", "scoring", "update", "grading")
MODEL, SAMPLING, GRADING, REST = "model and optimizer", "sampling", "grading", "the rest"
LIBRARIES = ("bupo", "trl", "transformers", "accelerate", "peft", "datasets")


def table_of(updates: dict[str, list[Update]]) -> Table:
    """Return the seconds of each part by variant, with ratios to TRL's total and to its sampling."""
    rows = []
    for name, done in updates.items():
        row = {"": name}
        for part in (*PARTS, "total"):
            row[f"{part}, s"] = middle([u.seconds[part] for u in done], 1)
        for part in ("sampling", "total"):
            row[f"{part} of TRL's"] = middle(
                ratios(*([u.seconds[part] for u in variant] for variant in (done, updates[TRL])))
            )
        row["answer tokens"] = f"{statistics.median([u.tokens for u in done]):.0f}"
        row["largest resident set, GB"] = f"{max(u.memory['total'] for u in done) / 1e9:.1f}"
        rows.append(row)
    return Table(f"{ROWS} answers of at most {MAX_NEW_TOKENS} tokens, {GROUP} per prompt, one update", rows)


def targets_of(updates: dict[str, list[Update]]) -> list[Target]:
    """Return the targets of a rollout batch."""

    def ratio(variant: str, part: str) -> float:
        return statistics.median(ratios(*([u.seconds[part] for u in updates[name]] for name in (variant, TRL))))

    return [
        Target("a rollout batch in phase 1, of TRL's time", ratio(FIRST, "total"), 0.45),
        Target("a rollout batch in phase 2, of TRL's time", ratio(SECOND, "total"), 0.60),
        Target("sampling, of TRL's time", max(ratio(name, "sampling") for name in (FIRST, SECOND)), 0.50),
    ]


class Clock:
    """Seconds by part. Nested parts count for the outer one: the model's work in sampling is sampling."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.within: list[tuple[str, float]] = []

    def start(self, part: str) -> None:
        self.within.append((part, time.perf_counter()))

    def stop(self) -> None:
        part, started = self.within.pop()
        if not self.within:
            self.seconds[part] += time.perf_counter() - started

    def timed(self, function: Callable, part: str) -> Callable:
        """Return the function with its time added to a part."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return wrapper

    def excluded(self, function: Callable) -> Callable:
        """Return the function with its time subtracted from the model's, in which it runs."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[MODEL] -= time.perf_counter() - started

        return wrapper

    @contextmanager
    def patch_trainers(self) -> Iterator[None]:
        """Time sampling, grading, backward passes and optimizer steps of all trainers in the block."""
        with ExitStack() as patches:
            for owner, name, part in (
                (GRPOTrainer, "_generate", SAMPLING),
                (GRPOTrainer, "_calculate_rewards", GRADING),
                (Accelerator, "backward", MODEL),
                (Accelerator, "clip_grad_norm_", MODEL),
                (AcceleratedOptimizer, "step", MODEL),
                (AcceleratedOptimizer, "zero_grad", MODEL),
            ):
                patches.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            patches.enter_context(mock.patch.object(PackedLayout, "from_rows", self.excluded(PackedLayout.from_rows)))
            patches.enter_context(
                mock.patch.object(PackedLayout, "_make_bucket", self.excluded(PackedLayout._make_bucket))
            )
            yield

    def hook_model(self, model: nn.Module) -> None:
        """Time the forward passes of a model."""
        for module in (model, unwrap_causal_lm(model).base_model):
            module.register_forward_pre_hook(lambda *_: self.start(MODEL))
            module.register_forward_hook(lambda *_: self.stop(), always_call=True)


class Steps(TrainerCallback):
    """Callback that records the seconds of each rollout batch after the first."""

    def __init__(self, clock: Clock, sampler: "StackSampler", updates: int):
        self.clock, self.sampler, self.updates = clock, sampler, updates  # updates per rollout batch
        self.batches: list[dict[str, float]] = []
        self.began = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.clock.hook_model(model)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.updates == 0 and state.global_step:
            self._end()
            self.sampler.active = True
            self.began = time.perf_counter()
            self.clock.seconds.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self._end()
        self.sampler.active = False

    def _end(self) -> None:
        if self.began:
            self.batches.append({"total": time.perf_counter() - self.began, **self.clock.seconds})


class StackSampler:
    """A thread that samples the main thread's current library function every few milliseconds, outside the clock's parts."""

    def __init__(self, clock: Clock, seconds: float = 0.002):
        self.clock, self.interval, self.counts = clock, seconds, Counter[str]()
        self.main, self.running, self.active = threading.get_ident(), False, False

    def __enter__(self) -> "StackSampler":
        self.running = True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    def _sample(self) -> None:
        while self.running:
            time.sleep(self.interval)
            frame = sys._current_frames().get(self.main)
            if frame is not None and self.active and not self.clock.within:
                self.counts[_get_library_function(frame)] += 1

    def shares(self) -> list[tuple[str, float]]:
        """Return functions with their shares of the samples, the most frequent first."""
        total = max(1, self.counts.total())
        return [(function, count / total) for function, count in self.counts.most_common()]


def _get_library_function(frame: FrameType | None) -> str:
    """Return the innermost function of one of the libraries."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in LIBRARIES:
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def small_steps(batches: int, folder: Path) -> tuple[list[dict[str, float]], list[tuple[str, float]]]:
    """Train the embedded model by its recipe for `batches` rollout batches of each phase.

    Returns the seconds of each batch by part, without the first batch, and the shares of functions in the rest.
    """
    flags = ["--config", str(RECIPE), "--output", str(folder), "--internal_steps", str(batches + 1)]
    options, config, loading = parse_options((bupo.TrainOptions, bupo.BuPOConfig, ModelConfig), flags, "bupo train")
    updates = config.steps_per_generation
    config.max_steps = (2 * batches + 1) * updates
    clock = Clock()
    with clock.patch_trainers(), StackSampler(clock) as sampler:
        steps = Steps(clock, sampler, updates)
        bupo.train("embedded", config, options, loading=loading, callbacks=[steps])
    return steps.batches, sampler.shares()


def small_table(batches: Sequence[dict[str, float]], title: str) -> tuple[Table, float]:
    """Return a table of medians by part with their shares of the total, and the share of the rest."""
    shares = [{part: batch.get(part, 0.0) / batch["total"] for part in (MODEL, SAMPLING, GRADING)} for batch in batches]
    for share in shares:
        share[REST] = 1 - sum(share.values())
    rows = [
        {
            "part": part,
            "seconds": middle([share[part] * batch["total"] for share, batch in zip(shares, batches, strict=True)], 3),
            "of the step, %": middle([100 * share[part] for share in shares], 0),
        }
        for part in (MODEL, SAMPLING, GRADING, REST)
    ]
    return Table(title, rows), statistics.median(share[REST] for share in shares)


def benchmark(model, layer: int, rounds: int, small: int, threads: int, profiled: bool = False) -> Result:
    """Run the benchmark. `model` as in [`benchmarks.turns.Job`]; `small`: rollout batches per phase of the embedded model."""
    named = Path(model).name if isinstance(model, str) else model["model_type"]
    result = Result(f"python -m benchmarks.step --model {named}", f"{named}, layer {layer}, and the embedded model")
    if rounds:
        job = Job(model, (layer,) * (1 + rounds + profiled), None, ROWS, 1, GROUP, MAX_NEW_TOKENS, profiled)
        with trainers((TRL, FIRST, SECOND), threads) as running:
            done = list(running.run(dict.fromkeys((TRL, FIRST, SECOND), job)))
        result.profiles, done = profiles_of(done[-1]), done[1 : 1 + rounds]  # the first is a warm-up
        updates = {name: [update[name] for update in done] for name in (TRL, FIRST, SECOND)}
        result.tables.append(table_of(updates))
        result.targets += targets_of(updates)
        result.raw["step"] = {
            name: [{"seconds": u.seconds, "memory": u.memory, "tokens": u.tokens} for u in of]
            for name, of in updates.items()
        }
    if small:
        with tempfile.TemporaryDirectory() as folder:
            batches, functions = small_steps(small, Path(folder) / "run")
        table, rest = small_table(
            batches, f"The embedded model, a rollout batch of {RECIPE.name}: 128 answers, 4 updates"
        )
        result.tables += [table, _make_functions_table(functions)]
        result.targets.append(
            Target("a step of the embedded model outside model, sampling and grading", rest, 0.25, "%")
        )
        result.raw["embedded"] = {"batches": batches, "rest": dict(functions[:30])}
    return result


def _make_functions_table(functions: Sequence[tuple[str, float]]) -> Table:
    rows = [{"function": f"`{name}`", "of the rest, %": f"{100 * share:.0f}"} for name, share in functions[:12]]
    return Table("Functions in the rest", rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measured rollout batches of each trainer; 0 skips them")
    parser.add_argument(
        "--small", type=int, default=10, help="rollout batches per phase of the embedded model; 0 skips it"
    )
    parser.add_argument("--profile", action="store_true", help="profile one more rollout batch of each trainer")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bar()
    threads = torch.get_num_threads()
    result = benchmark(given.model, given.layer, given.rounds, given.small, threads, given.profile)
    result.show()
    result.write(given.json)


if __name__ == "__main__":
    main()
