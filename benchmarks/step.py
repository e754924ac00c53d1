"""A whole rollout batch, sampled, graded and trained on, against TRL's GRPOTrainer; and what a small model's step is made of.

    python -m benchmarks.step --model SmolLM2.gguf --json out.json

- The three trainers take turns, each in a process of its own (`benchmarks.turns`): 32 answers of at most 64 tokens to sums, 8 a
  prompt, one update. The reward is a cheap one that differs within a group.
- The embedded model is trained as its recipe says (`bupo train --config recipes/cpu/embedded-bupo.yaml`), for some rollout
  batches of each phase, with a clock around the model's forward and backward passes and the optimizer, the sampling and the
  grading. What is left is the share of Python: collation, advantages, the loss' arithmetic, metrics, logs, probes. A second
  thread looks every few milliseconds where that time goes.
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
    """Seconds of each part, by variant, with the ratio to TRL's whole or its sampling."""
    rows = []
    for name, done in updates.items():
        theirs, row = updates[TRL], {"": name}
        for part in (*PARTS, "whole"):
            row[f"{part}, s"] = middle([u.seconds[part] for u in done], 1)
        for part in ("sampling", "whole"):
            row[f"{part} of TRL's"] = middle(ratios(*([u.seconds[part] for u in some] for some in (done, theirs))))
        row["answer tokens"] = f"{statistics.median([u.tokens for u in done]):.0f}"
        row["largest resident set, GB"] = f"{max(u.memory['whole'] for u in done) / 1e9:.1f}"
        rows.append(row)
    return Table(f"{ROWS} answers of at most {MAX_NEW_TOKENS} tokens, {GROUP} a prompt, one update", rows)


def targets_of(updates: dict[str, list[Update]]) -> list[Target]:
    """What is wanted of a rollout batch."""

    def ratio(mine: str, part: str) -> float:
        return statistics.median(ratios(*([u.seconds[part] for u in updates[name]] for name in (mine, TRL))))

    return [
        Target("a rollout batch in phase 1, of TRL's time", ratio(FIRST, "whole"), 0.45),
        Target("a rollout batch in phase 2, of TRL's time", ratio(SECOND, "whole"), 0.60),
        Target("sampling, of TRL's time", max(ratio(name, "sampling") for name in (FIRST, SECOND)), 0.50),
    ]


class Clock:
    """Seconds by part. Of parts inside one another, the outer one counts: what the model does to sample is sampling."""

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
        """The function, with its time counted."""

        @functools.wraps(function)
        def inner(*args, **kwargs):
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return inner

    def apart(self, function: Callable) -> Callable:
        """The function, with its time taken out of the model's, within which it runs."""

        @functools.wraps(function)
        def inner(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[MODEL] -= time.perf_counter() - started

        return inner

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, whatever samples, grades, differentiates or steps is timed, in every trainer."""
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
            patches.enter_context(mock.patch.object(PackedLayout, "of", self.apart(PackedLayout.from_rows)))
            patches.enter_context(mock.patch.object(PackedLayout, "_bucket", self.apart(PackedLayout._make_bucket)))
            yield

    def listen_to(self, model: nn.Module) -> None:
        """Time its forward passes."""
        for module in (model, unwrap_causal_lm(model).base_model):
            module.register_forward_pre_hook(lambda *_: self.start(MODEL))
            module.register_forward_hook(lambda *_: self.stop(), always_call=True)


class Steps(TrainerCallback):
    """Begins and ends the measuring, and keeps the time of each rollout batch but the first."""

    def __init__(self, clock: Clock, looking: "Looking", updates: int):
        self.clock, self.looking, self.updates = clock, looking, updates  # a rollout batch
        self.batches: list[dict[str, float]] = []
        self.began = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.clock.listen_to(model)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.updates == 0 and state.global_step:
            self._end()
            self.looking.now = True
            self.began = time.perf_counter()
            self.clock.seconds.clear()

    def on_train_end(self, args, state, control, **kwargs):
        self._end()
        self.looking.now = False

    def _end(self) -> None:
        if self.began:
            self.batches.append({"whole": time.perf_counter() - self.began, **self.clock.seconds})


class Looking:
    """A thread that looks every few milliseconds, while it is asked to, which function of the libraries the main thread is in
    outside the clock's parts."""

    def __init__(self, clock: Clock, seconds: float = 0.002):
        self.clock, self.seconds, self.seen = clock, seconds, Counter[str]()
        self.main, self.running, self.now = threading.get_ident(), False, False

    def __enter__(self) -> "Looking":
        self.running = True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()

    def _look(self) -> None:
        while self.running:
            time.sleep(self.seconds)
            frame = sys._current_frames().get(self.main)
            if frame is not None and self.now and not self.clock.within:
                self.seen[_place(frame)] += 1

    def shares(self) -> list[tuple[str, float]]:
        """Of all looks, the most frequent first."""
        total = max(1, self.seen.total())
        return [(place, count / total) for place, count in self.seen.most_common()]


def _place(frame: FrameType | None) -> str:
    """The innermost function of one of the libraries."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in LIBRARIES:
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "elsewhere"


def small_steps(batches: int, folder: Path) -> tuple[list[dict[str, float]], list[tuple[str, float]]]:
    """The embedded model by its recipe, for so many rollout batches of each phase: seconds of each batch by part, and shares of
    what the rest consists of. The first batch of all is left out."""
    flags = ["--config", str(RECIPE), "--output", str(folder), "--internal_steps", str(batches + 1)]
    options, config, loading = parse_options((bupo.TrainOptions, bupo.BuPOConfig, ModelConfig), flags, "bupo train")
    updates = config.steps_per_generation
    config.max_steps = (2 * batches + 1) * updates
    clock = Clock()
    with clock.listening(), Looking(clock) as looking:
        steps = Steps(clock, looking, updates)
        bupo.train("embedded", config, options, loading=loading, callbacks=[steps])
    return steps.batches, looking.shares()


def small_table(batches: Sequence[dict[str, float]], title: str) -> tuple[Table, float]:
    """Medians by part, with the share of each in the whole; and the share of the rest."""
    shares = [{part: batch.get(part, 0.0) / batch["whole"] for part in (MODEL, SAMPLING, GRADING)} for batch in batches]
    for share in shares:
        share[REST] = 1 - sum(share.values())
    rows = [
        {
            "part": part,
            "seconds": middle([share[part] * batch["whole"] for share, batch in zip(shares, batches, strict=True)], 3),
            "of the step, %": middle([100 * share[part] for share in shares], 0),
        }
        for part in (MODEL, SAMPLING, GRADING, REST)
    ]
    return Table(title, rows), statistics.median(share[REST] for share in shares)


def benchmark(model, layer: int, rounds: int, small: int, threads: int, profiled: bool = False) -> Result:
    """All of it. `model` as of [`benchmarks.turns.Job`]; `small`: rollout batches a phase of the embedded model."""
    named = Path(model).name if isinstance(model, str) else model["model_type"]
    result = Result(f"python -m benchmarks.step --model {named}", f"{named}, layer {layer}, and the embedded model")
    if rounds:
        job = Job(model, (layer,) * (1 + rounds + profiled), None, ROWS, 1, GROUP, MAX_NEW_TOKENS, profiled)
        with trainers((TRL, FIRST, SECOND), threads) as running:
            done = list(running.run(dict.fromkeys((TRL, FIRST, SECOND), job)))
        result.profiles, done = profiles_of(done[-1]), done[1 : 1 + rounds]  # the first warms up
        updates = {name: [update[name] for update in done] for name in (TRL, FIRST, SECOND)}
        result.tables.append(table_of(updates))
        result.targets += targets_of(updates)
        result.raw["step"] = {
            name: [{"seconds": u.seconds, "memory": u.memory, "tokens": u.tokens} for u in of]
            for name, of in updates.items()
        }
    if small:
        with tempfile.TemporaryDirectory() as folder:
            batches, places = small_steps(small, Path(folder) / "run")
        table, rest = small_table(
            batches, f"The embedded model, a rollout batch of {RECIPE.name}: 128 answers, 4 updates"
        )
        result.tables += [table, _places(places)]
        result.targets.append(
            Target("a step of the embedded model outside model, sampling and grading", rest, 0.25, "%")
        )
        result.raw["embedded"] = {"batches": batches, "rest": dict(places[:30])}
    return result


def _places(places: Sequence[tuple[str, float]]) -> Table:
    rows = [{"function": f"`{place}`", "of the rest, %": f"{100 * share:.0f}"} for place, share in places[:12]]
    return Table("What the rest consists of", rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="measured, of each trainer; 0 leaves them out")
    parser.add_argument(
        "--small", type=int, default=10, help="rollout batches a phase of the embedded model; 0 leaves it out"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show where one more rollout batch of each spends its time"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bar()
    threads = torch.get_num_threads()
    result = benchmark(given.model, given.layer, given.rounds, given.small, threads, given.profile)
    result.show()
    result.write(given.json)


if __name__ == "__main__":
    main()
