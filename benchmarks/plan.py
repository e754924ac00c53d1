"""Accuracy of `bupo.plan`: memory by part, peak memory and time of real updates in both phases, relative to the plan.

    python -m benchmarks.plan --model SmolLM2.gguf --layer 10 --json out.json

The trainer runs in this process on random answers of a given length. Memory comes from torch's profiler, which records every
allocation of the CPU's allocator, also inside operators; weights, allocated before, are added. Marks in the same trace show
the start and end of forward passes. Time is measured without the profiler. The plan gets the rate of the model's forward pass
over plain rows, with FLOPs counted by torch's `FlopCounterMode`, and the bandwidth of copying a tensor. Both are measured
before each update, so that plan and run see the same noise. Seconds are CPU time of this process on one thread, without other
processes.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import bupo
from benchmarks.result import Result, Table, Target, options
from benchmarks.turns import Rollouts, made_up, reward
from bupo import BuPOConfig, BuPOTrainer
from bupo.data.problems import ARITHMETIC, load_problems
from bupo.models.loading import EMBEDDED_MODEL, load_config, load_model, load_tokenizer
from bupo.models.token_scoring import score_tokens
from bupo.planning.memory import compute_activation_bytes, compute_persistent_memory
from bupo.planning.options import PlanOptions
from bupo.planning.plan import Plan, resolve_planned_run
from bupo.training.train_data import TrainOptions

MARK = "plan: "
WARM = 1  # rollout batches of each phase that are not measured: the first has no optimizer state
TOLERANCE = 0.2  # relative difference between plan and measurement


@dataclass(frozen=True)
class Case:
    """Sizes of a run: rows per micro-batch, micro-batches per update, tokens of prompts and answers; one update per batch."""

    name: str
    layer: int
    rows: int = 16
    passes: int = 1
    prompt: int = 44
    answer: int = 32
    group: int = 8
    checkpointing: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # options of the run

    def rollouts(self, vocabulary: int, seed: int) -> Rollouts:
        return made_up(self.prompt, [self.answer] * (self.rows * self.passes), self.group, vocabulary, seed)

    def config(self, folder: str, batches: int) -> BuPOConfig:
        """Return the configuration of a first phase of `batches` rollout batches and a second phase of equal length."""
        return BuPOConfig(
            folder,
            internal_schedule=[[self.layer, batches]],
            max_steps=2 * batches,
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=self.passes,
            steps_per_generation=self.passes,
            num_generations=self.group,
            max_completion_length=self.answer,
            gradient_checkpointing=self.checkpointing,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            internal_early_stopping=False,
            probe_every=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
            **self.more,
        )


def embedded_cases() -> list[Case]:
    return [
        Case("one pass", 5, rows=32),
        Case("four passes, short answers", 5, rows=32, passes=4, prompt=11, answer=16),
        Case("checkpointing", 5, rows=32, passes=2, answer=64, checkpointing=True),
    ]


def large_cases(layer: int) -> list[Case]:
    return [
        Case("one pass", layer),
        Case("two passes, checkpointing", layer, rows=8, passes=2, checkpointing=True),
    ]


@dataclass
class Watched(TrainerCallback):
    """Callback that records marks in a trace, bytes of gradients and optimizer, and seconds, by rollout batch from 1."""

    before_update: Callable[[], None] = lambda: None
    answer_tokens: list[float] = field(default_factory=list)  # mean length, of each rollout batch
    bytes: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    seconds: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.batch = state.global_step + 1
        self.before_update()
        self.started = time.process_time()
        mark(f"{self.batch} begins")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes[self.batch]["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        mark(f"{self.batch} ends")
        total = time.process_time() - self.started
        self.seconds[self.batch]["update"] = total - self.seconds[self.batch]["rollout"]
        states = self.trainer.optimizer.state.values()
        self.bytes[self.batch]["optimizer"] = sum(
            value.nbytes for each in states for value in each.values() if isinstance(value, torch.Tensor)
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "completions/mean_length" in logs:
            self.answer_tokens.append(logs["completions/mean_length"])

    def listen_to(self, trainer: BuPOTrainer) -> None:
        """Mark the start and end of the loss, and time the rollouts and their scoring."""
        self.trainer = trainer
        loss = trainer.compute_micro_batch_loss

        def marked(*args, **kwargs):
            mark(f"{self.batch} forward")
            result = loss(*args, **kwargs)
            mark(f"{self.batch} backward")
            return result

        def timed(method: Callable, part: str) -> Callable:
            def wrapper(*args, **kwargs):
                with clock() as passed:
                    result = method(*args, **kwargs)
                self.seconds[self.batch][part] = passed()
                return result

            return wrapper

        trainer.compute_micro_batch_loss = marked  # type: ignore[method-assign]
        trainer.generate_rollouts = timed(trainer.generate_rollouts, "rollout")  # type: ignore[method-assign]
        trainer.score_completions = timed(trainer.score_completions, "scoring")  # type: ignore[method-assign]


@contextmanager
def clock() -> Iterator[Callable[[], float]]:
    started = time.process_time()
    yield lambda: time.process_time() - started


def mark(name: str) -> None:
    with record_function(MARK + name):
        pass


def trained(
    model, tokenizer, case: Case, folder: str, batches: int, watched: Watched, samples: bool = False
) -> BuPOTrainer:
    """Return a trainer on random answers, or on sampled answers to sums if `samples` is set."""
    model.gradient_checkpointing_disable()  # a previous case may have enabled it
    vocabulary = model.config.get_text_config().vocab_size
    given = iter([case.rollouts(vocabulary, seed) for seed in range(2 * batches)])

    def rollouts(prompts, trainer) -> dict[str, Any]:
        batch = next(given)
        end = trainer.processing_class.eos_token_id
        answers = [[*ids[:-1], end] for ids in batch.answers]
        return {"prompt_ids": batch.prompts, "completion_ids": answers, "logprobs": None}

    prompts = 2 * batches * case.rows * case.passes // case.group
    sums = load_problems(ARITHMETIC, "train", size=prompts).select_columns(["prompt"])
    trainer = BuPOTrainer(
        model,
        reward,
        case.config(folder, batches),
        train_dataset=sums,
        processing_class=tokenizer,
        callbacks=[watched],
        rollout_func=None if samples else rollouts,
    )
    trainer.remove_callback(PrinterCallback)
    watched.listen_to(trainer)
    return trainer


# -- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """Allocated bytes over time, and the times of the marks."""

    held: list[tuple[float, int]]
    marks: dict[str, list[float]]

    @classmethod
    def read(cls, path: Path) -> "Trace":
        events = json.loads(path.read_text())["traceEvents"]
        held = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
        marks: dict[str, list[float]] = defaultdict(list)
        for event in events:
            if str(event.get("name", "")).startswith(MARK) and event.get("ph") == "X":
                marks[event["name"].removeprefix(MARK)].append(event["ts"])
        return cls(held, {name: sorted(times) for name, times in marks.items()})

    def at(self, moment: float) -> int:
        return next((held for when, held in reversed(self.held) if when <= moment), 0)

    def most(self, start: float, end: float) -> int:
        return max(held for when, held in self.held if start <= when <= end)

    def of(self, batch: int) -> dict[str, int]:
        """Return the activations kept by forward passes of a rollout batch, and its peak memory."""
        passes = zip(self.marks[f"{batch} forward"], self.marks[f"{batch} backward"], strict=True)
        kept = max(self.at(end) - self.at(start) for start, end in passes)
        return {
            "activations": kept,
            "peak": self.most(self.marks[f"{batch} begins"][0], self.marks[f"{batch} ends"][0]),
        }


def measured_memory(model, tokenizer, case: Case) -> dict[int, dict[str, int]]:
    """Return the measured bytes by phase and part."""
    batches, watched = WARM + 1, Watched()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(model, tokenizer, case, folder, batches, watched)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer.train()
        profiled.export_chrome_trace(str(Path(folder) / "trace.json"))
        trace = Trace.read(Path(folder) / "trace.json")
    found = {}
    for phase, batch in ((1, batches), (2, 2 * batches)):
        parts = {"weights": weights} | watched.bytes[batch] | trace.of(batch)
        found[phase] = parts | {"peak": parts["peak"] + weights}
    return found


# -- time ------------------------------------------------------------------------------------------------------------


class Rates:
    """Measured rates: FLOP/s of the forward pass over plain rows with the unembedding of answers, and bytes/s of a copy."""

    def __init__(self, model, case: Case):
        vocabulary = model.config.get_text_config().vocab_size
        self.model, self.case = model, case
        self.ids = torch.randint(64, vocabulary, (case.rows, case.prompt + case.answer))
        with FlopCounterMode(display=False) as counter:
            self._pass()
        self.flops = counter.get_total_flops()
        self.table = torch.zeros(32_000_000)
        self.other = torch.zeros_like(self.table)
        self.products: list[float] = []
        self.copies: list[float] = []

    @torch.no_grad()
    def _pass(self) -> None:
        states = self.model.base_model(input_ids=self.ids, use_cache=False).last_hidden_state
        answers = slice(self.case.prompt - 1, -1)
        score_tokens(states[:, answers], self.model.get_output_embeddings().weight, self.ids[:, self.case.prompt :])

    def take(self) -> None:
        with clock() as passed:
            self._pass()
        self.products.append(self.flops / passed())
        with clock() as passed:
            self.other.copy_(self.table)
        self.copies.append(2 * self.table.nbytes / passed())


def measured_time(model, tokenizer, case: Case, batches: int) -> tuple[dict[int, dict[str, list[float]]], Rates]:
    """Return the seconds of each measured rollout batch by phase and part, and the rates measured before each."""
    rates = Rates(model, case)
    watched = Watched(before_update=rates.take)
    with tempfile.TemporaryDirectory() as folder:
        trained(model, tokenizer, case, folder, batches, watched).train()
    found: dict[int, dict[str, list[float]]] = {1: defaultdict(list), 2: defaultdict(list)}
    for batch, seconds in watched.seconds.items():
        index = (batch - 1) % batches
        if index >= WARM:
            for part, value in seconds.items():
                found[1 if batch <= batches else 2][part].append(value)
    return found, rates


def sampling_rows(name: str, model, tokenizer, case: Case) -> list[dict[str, Any]]:
    """Return planned and measured seconds of sampling answers to sums: a rollout batch of phase 1 without its scoring."""
    rates = Rates(model, case)
    watched = Watched(before_update=rates.take)
    batches = WARM + 2
    with tempfile.TemporaryDirectory() as folder:
        trained(model, tokenizer, case, folder, batches, watched, samples=True).train()
    measured_batches = range(WARM + 1, batches + 1)
    taken = [watched.seconds[batch]["rollout"] - watched.seconds[batch]["scoring"] for batch in measured_batches]
    tokens = statistics.mean(watched.answer_tokens[batch - 1] for batch in measured_batches)
    on = on_cpu(case, rates)
    on.prompt_tokens, on.answer_tokens = None, max(1, round(tokens))
    found = bupo.plan(name, case.config("unused", batches), TrainOptions(dataset=ARITHMETIC), hardware=on)
    planned_seconds, seconds = found.phases[0].seconds.sampling, statistics.median(taken)
    return [{"case": case.name, "phase": 1, "part": "sampling", "plan": planned_seconds, "measured": seconds}]


# -- both ------------------------------------------------------------------------------------------------------------


def on_cpu(case: Case, rates: Rates | None) -> PlanOptions:
    """Return the plan's options for this machine, with the measured rates."""
    on = PlanOptions(gpus=0, prompt_tokens=case.prompt, answer_tokens=case.answer)
    if rates:
        on.tflops = statistics.median(rates.products) / 1e12
        on.bandwidth = statistics.median(rates.copies) / 1e12
    return on


def planned(name: str, case: Case, rates: Rates | None = None) -> tuple[Plan, dict[int, dict[str, float]]]:
    """Return the plan of a case, and the planned bytes by phase and part."""
    on = on_cpu(case, rates)
    config = case.config("unused", WARM + 1)
    found = bupo.plan(name, config, hardware=on)
    setting = resolve_planned_run(name, config, hardware=on)
    parts = {}
    for phase, planned_phase in enumerate(found.phases, 1):
        layer = planned_phase.layer
        kept = compute_persistent_memory(setting, layer)
        parts[phase] = {
            "weights": kept["weights"],
            "optimizer": kept["optimizer"],
            "gradients": 4.0 * planned_phase.trained_parameters,
            "activations": compute_activation_bytes(setting, layer, planned_phase.auxiliary_layer),
            "peak": planned_phase.memory.bytes,
        }
    return found, parts


PARTS = ("weights", "gradients", "optimizer", "activations", "peak")


def memory_rows(name: str, model, tokenizer, case: Case) -> list[dict[str, Any]]:
    """Return planned and measured bytes of each phase and part."""
    _, parts = planned(name, case)
    taken = measured_memory(model, tokenizer, case)
    return [
        {"case": case.name, "phase": phase, "part": part, "plan": parts[phase][part], "measured": taken[phase][part]}
        for phase in (1, 2)
        for part in PARTS
    ]


def time_rows(name: str, model, tokenizer, case: Case, batches: int) -> list[dict[str, Any]]:
    """Return planned and measured seconds of scoring and update by phase. Phase 2 has no scoring here."""
    taken, rates = measured_time(model, tokenizer, case, batches)
    found, _ = planned(name, case, rates)
    rows = []
    for phase, each in enumerate(found.phases, 1):
        for part in ("scoring", "update"):
            if getattr(each.flops, part):
                seconds = statistics.median(taken[phase][part])
                rows.append(
                    {
                        "case": case.name,
                        "phase": phase,
                        "part": part,
                        "plan": getattr(each.seconds, part),
                        "measured": seconds,
                    }
                )
    return rows


def shown(rows: list[dict[str, Any]], unit: float, digits: int) -> list[dict[str, str]]:
    return [
        {
            "case": row["case"],
            "phase": str(row["phase"]),
            "part": row["part"],
            "plan": f"{row['plan'] / unit:.{digits}f}",
            "measured": f"{row['measured'] / unit:.{digits}f}",
            "plan / measured": f"{row['plan'] / row['measured']:.2f}",
        }
        for row in rows
    ]


def benchmark(name: str, cases: list[Case], batches: int, sampled: bool) -> Result:
    """Run the benchmark on one model. With `sampled`, sampling is also measured; it has no target."""
    set_verbosity_error()
    disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
    layers = load_config(name).get_text_config().num_hidden_layers
    named = Path(name).name
    about = f"{named}, {layers} layers, phase 1 at layer {cases[0].layer}"
    result = Result(f"python -m benchmarks.plan --model {named}", about)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)  # reading a .gguf file takes long
        name = name if name == EMBEDDED_MODEL else folder
        tokenizer.save_pretrained(folder)
        memory = [row for case in cases for row in memory_rows(name, model, tokenizer, case)]
        seconds = [row for case in cases for row in time_rows(name, model, tokenizer, case, WARM + batches)]
        sampling = sampling_rows(name, model, tokenizer, cases[0]) if sampled else []
    result.tables += [Table("Memory, MB", shown(memory, 1e6, 1)), Table("Seconds", shown(seconds, 1, 2))]
    result.tables += [Table("Seconds of sampling", shown(sampling, 1, 2))] if sampled else []
    for what, rows in (("memory", memory), ("time", seconds)):
        worst = max(rows, key=lambda row: abs(row["plan"] / row["measured"] - 1))
        difference = abs(worst["plan"] / worst["measured"] - 1)
        text = f"{what}: the largest difference ({worst['case']}, phase {worst['phase']}, {worst['part']})"
        result.targets.append(Target(text, difference, TOLERANCE, "%"))
    result.raw = {"memory": memory, "time": seconds, "sampling": sampling}
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=2, help="timed rollout batches of each phase")
    parser.add_argument("--case", help="run only this case, such as 'one pass'")
    parser.add_argument("--sampling", action="store_true", help="also measure sampling")
    given = parser.parse_args()
    cases = embedded_cases() if given.model == "embedded" else large_cases(given.layer)
    cases = [case for case in cases if given.case in (None, case.name)]
    result = benchmark(given.model, cases, given.batches, given.sampling)
    result.show()
    result.write(given.json)


if __name__ == "__main__":
    main()
