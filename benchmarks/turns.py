"""Training runs of several trainers that alternate update by update, each in a separate process.

A process runs `trainer.train()` like a user; a callback blocks it before each rollout batch until its turn. All trainers see
the same noise of the machine, and their memory is measured separately. Fixed answers (TRL's `rollout_func`) can replace
sampling, so that all trainers do the same work.
"""

import ctypes
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error
from trl import GRPOConfig, GRPOTrainer

from benchmarks.analysis import PeakMemory
from bupo import BuPOConfig, BuPOTrainer
from bupo.data.problems import ARITHMETIC, load_problems
from bupo.models.loading import EMBEDDED_MODEL, load_model, load_tokenizer

TRL, FIRST, SECOND, PUBLISHED = "TRL", "BuPO, phase 1", "BuPO, phase 2", "phase 1 as published"


@dataclass(frozen=True)
class Rollouts:
    """Token ids of a rollout batch: a prompt and an answer per row, rows of the same prompt in sequence."""

    prompts: list[list[int]]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """Number of tokens of prompts and answers, with each prompt counted once per answer."""
        return sum(map(len, self.prompts)) + sum(map(len, self.answers))


def made_up(prompt: int, answers: Sequence[int], group: int, vocabulary: int, seed: int = 0) -> Rollouts:
    """Return rollouts of random token ids, which cost the same as text.

    Args:
        prompt (`int`): tokens of a prompt.
        answers (`list[int]`): tokens of each answer.
        group (`int`): answers that share a prompt.
        vocabulary (`int`): size of the model's vocabulary; the first ids, special tokens, are not used.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(64, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(prompt) for _ in range(-(-len(answers) // group))]
    return Rollouts([prompts[row // group] for row in range(len(answers))], [draw(length) for length in answers])


@dataclass(frozen=True)
class Job:
    """A training run with one update per rollout batch.

    Attributes:
        model (`str` or `dict`): as in [`~bupo.models.loading.load_model`], or the configuration of a model with random weights.
        layers (`tuple[int, ...]`): layer of phase 1, for each rollout batch; the published algorithm uses the first.
        rollouts (`tuple[Rollouts, ...]`, *optional*): fixed answers of each rollout batch; by default, answers to sums are
            sampled.
        rows (`int`): sequences of a rollout batch.
        passes (`int`): micro-batches of an update.
        group (`int`): answers per prompt.
        max_new_tokens (`int`): of a sampled answer.
        profiled (`bool`): whether to profile the last update and its sampling, which makes them slower.
    """

    model: str | dict[str, Any]
    layers: tuple[int, ...]
    rollouts: tuple[Rollouts, ...] | None = None
    rows: int = 32
    passes: int = 1
    group: int = 8
    max_new_tokens: int = 64
    profiled: bool = False


@dataclass(frozen=True)
class Update:
    """Time and memory of a rollout batch and its update.

    Attributes:
        seconds (`dict[str, float]`): `total`, `sampling`, `grading`, `scoring` (the rest of the work before the update), and
            `update` (forward and backward passes, optimizer step, logs).
        memory (`dict[str, int]`): bytes of the largest resident set: `total`; above the loaded model, `scoring` (all work
            before the update) and `update`; above weights, optimizer and gradients, `passes`.
        entropy (`float`): logged entropy of the final layer's policy.
        tokens (`int`): answer tokens.
        gradients (`dict[str, np.ndarray]`): of layers 1 and l, in the first update.
        profile (`str`): torch's profile, if the job is profiled.
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    entropy: float
    tokens: float
    gradients: dict[str, np.ndarray]
    profile: str = ""


def published_scores(model, input_ids, attention_mask, keep: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs of the layer's policy and the entropies of the final layer's policy, (B, `keep`) each.

    The algorithm is that of the published code: a forward pass that keeps every layer's states, then head, log-softmax and
    entropy at every position, of the layer's states and of the last layer's. The temperature is TRL's default of 1.
    """
    out = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    logits = model.get_output_embeddings()(out.hidden_states[layer])
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    entropies = [_entropy(logits.detach()), _entropy(out.logits.detach())]  # the published code logs both policies
    return log_probs[:, -keep:], entropies[1][:, -keep - 1 : -1]


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropies of logits; verl's `entropy_from_logits`."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class PublishedTrainer(GRPOTrainer):
    """TRL's trainer with phase 1 by the published algorithm."""

    layer = 1

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return *published_scores(model, input_ids, attention_mask, logits_to_keep, self.layer), None


class Turns(TrainerCallback):
    """Callback that waits for this trainer's turn before each rollout batch and sends the cost of the last one."""

    def __init__(self, pipe, job: Job):
        self.pipe, self.job, self.loaded = pipe, job, 0
        self.memory: PeakMemory | None = None
        self.profile: profile | None = None
        self.spent: dict[str, float] = {}
        self.marks: dict[str, int] = {}
        self.logs: dict[str, float] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.first = True

    def patch_trainer(self, trainer: GRPOTrainer) -> None:
        """Time the parts of a rollout batch."""
        for name, part in (
            ("_generate_and_score_completions", "rollouts"),
            ("_generate", "sampling"),
            ("_calculate_rewards", "grading"),
        ):
            setattr(trainer, name, self._timed(getattr(trainer, name), part))

    def _timed(self, method: Callable, part: str) -> Callable:
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - started
                if part == "rollouts" and self.memory:  # what follows is the update
                    self.marks["rollouts"], self.memory.top = self.memory.top, resident()
                    if self.profile and self.job.rollouts:
                        self.profile.start()

        return timed

    def on_step_begin(self, args, state, control, **kwargs):
        self._send_update()
        self.pipe.recv()
        self.spent.clear()
        trim_memory()
        self.marks = {"before": resident()}
        self.memory = PeakMemory().__enter__()
        if self.job.profiled and state.global_step == len(self.job.layers) - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            if not self.job.rollouts:
                self.profile.start()
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.marks["passes"] = self.memory.top if self.memory else 0
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.marks["gradients"] = sum(grad.numel() * grad.element_size() for grad in gradients.values())
        if self.first:
            compared = re.compile(rf"\.(?:layers|h)\.(?:0|{self.job.layers[0] - 1})\.")
            self.gradients = {
                name: grad.numpy(force=True).copy() for name, grad in gradients.items() if compared.search(name)
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs |= logs or {}

    def on_train_end(self, args, state, control, **kwargs):
        self._send_update()

    def _send_update(self) -> None:
        """Send the cost of the finished update, or that the first update can start."""
        if self.memory is None:
            self.pipe.send("ready")
            return
        total = time.perf_counter() - self.started
        self.memory.__exit__()
        profile_table = ""
        if self.profile:
            self.profile.stop()
            profile_table = self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        part = {name: self.spent.get(name, 0.0) for name in ("rollouts", "sampling", "grading")}
        seconds = {"total": total, "sampling": part["sampling"], "grading": part["grading"]}
        seconds |= {
            "scoring": part["rollouts"] - part["sampling"] - part["grading"],
            "update": total - part["rollouts"],
        }
        marks = self.marks
        memory = {
            "total": max(marks["rollouts"], self.memory.top),
            "scoring": marks["rollouts"] - self.loaded,
            "update": self.memory.top - self.loaded,
            "passes": marks["passes"] - marks["before"] - marks["gradients"],
        }
        tokens, entropy = self.logs["completions/mean_length"] * self.job.rows, self.logs["entropy"]
        self.pipe.send(Update(seconds, memory, entropy, tokens, self.gradients if self.first else {}, profile_table))
        self.first, self.memory = False, None


def resident() -> int:
    """Return the bytes of this process' resident set."""
    return psutil.Process().memory_info().rss


def trim_memory() -> None:
    """Have glibc return free memory to the system, so that the resident set equals the memory in use."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def reward(completion_ids: Sequence[Sequence[int]], **kwargs) -> list[float]:
    """Return cheap rewards that differ within a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(variant: str, job: Job, folder: str, turns: Turns) -> GRPOTrainer:
    """Return the trainer of a job. All use the same options: TRL's defaults, except to make runs comparable."""
    model, updates = model_of(job.model), len(job.layers)
    turns.loaded = resident()
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": job.rows // job.passes,
        "gradient_accumulation_steps": job.passes,
        "steps_per_generation": job.passes,
        "num_generations": job.group,
        "max_completion_length": job.max_new_tokens,
        "max_steps": updates,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments: dict[str, Any] = {
        "train_dataset": _prompts(job, updates),
        "processing_class": load_tokenizer(job.model if isinstance(job.model, str) else EMBEDDED_MODEL),
        "callbacks": [turns],
    }
    if job.rollouts:
        batches = iter(job.rollouts)
        arguments["rollout_func"] = lambda prompts, trainer: _columns(
            next(batches), trainer.processing_class.eos_token_id
        )
    if variant in (TRL, PUBLISHED):
        kind = GRPOTrainer if variant == TRL else PublishedTrainer
        trainer = kind(model, reward, GRPOConfig(**options, use_cpu=True, bf16=False), **arguments)
        trainer.layer = job.layers[0]
    else:
        stages = [[layer, len(list(same))] for layer, same in groupby(job.layers)]
        plan = (
            {"internal_schedule": stages}
            if variant == FIRST
            else {"internal_layer": job.layers[0], "internal_steps": 0}
        )
        trainer = BuPOTrainer(
            model, reward, BuPOConfig(**options, **plan, internal_early_stopping=False, probe_every=0), **arguments
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def model_of(model: str | dict[str, Any]) -> PreTrainedModel:
    """Return a model in fp32, which TRL trains in."""
    if isinstance(model, str):
        return load_model(model, dtype=torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=torch.float32)


def _prompts(job: Job, updates: int) -> Dataset:
    """Return a prompt per group. Fixed rollouts replace the prompts."""
    count = updates * job.rows // job.group
    if job.rollouts:
        return Dataset.from_dict({"prompt": ["-"] * count})
    return load_problems(ARITHMETIC, "train", size=count).select_columns(["prompt"])


def _columns(batch: Rollouts, end: int) -> dict[str, Any]:
    """Return the columns of a `rollout_func`, with an end token at the end of each answer."""
    return {
        "prompt_ids": batch.prompts,
        "completion_ids": [[*ids[:-1], end] for ids in batch.answers],
        "logprobs": None,
    }


def work(pipe, variant: str, threads: int) -> None:
    """Run the jobs of a variant from a pipe until `None`. Send the traceback of an error."""
    torch.set_num_threads(threads)
    set_verbosity_error()
    disable_progress_bar()
    while job := pipe.recv():
        try:
            with tempfile.TemporaryDirectory() as folder:
                turns = Turns(pipe, job)
                trainer = trainer_of(variant, job, folder, turns)
                turns.patch_trainer(trainer)
                trainer.train()
                del trainer
        except BaseException:
            pipe.send(RuntimeError(f"{variant}: {traceback.format_exc()}"))
            return


class Trainers:
    """Processes of the variants.

    Args:
        variants (`list[str]`): names of the trainers.
        threads (`int`): torch threads of each process; one process works at a time.
    """

    def __init__(self, variants: Sequence[str], threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Any] = {}
        self.processes = []
        for variant in variants:
            self.pipes[variant], child_pipe = context.Pipe()
            process = context.Process(target=work, args=(child_pipe, variant, threads), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, jobs: dict[str, Job]) -> Iterator[dict[str, Update]]:
        """Yield the updates of all variants, round by round. Jobs have the same number of rollout batches.

        The variants alternate: A B C A B C …
        """
        for variant, job in jobs.items():  # sequentially: loading takes memory
            self.pipes[variant].send(job)
            self._receive(variant)
        for _ in min(jobs.values(), key=lambda job: len(job.layers)).layers:
            done = {}
            for variant in jobs:
                self.pipes[variant].send("go")
                done[variant] = self._receive(variant)
            yield done

    def _receive(self, variant: str) -> Any:
        try:
            message = self.pipes[variant].recv()
        except EOFError:
            raise RuntimeError(f"{variant}: its process has ended") from None
        if isinstance(message, Exception):
            raise message
        return message

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes.values(), self.processes, strict=True):
            if process.is_alive():
                process.terminate()
            process.join()
            pipe.close()


def profiles_of(done: dict[str, Update]) -> dict[str, str]:
    """Return the profiles of BuPO's phases, if they were profiled."""
    return {name: done[name].profile for name in (FIRST, SECOND) if name in done and done[name].profile}


@contextmanager
def trainers(variants: Sequence[str], threads: int) -> Iterator[Trainers]:
    """Start the processes of the variants and end them after the block. They use no hub and print no warnings."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
        "KINETO_LOG_LEVEL": "5",
        "TQDM_DISABLE": "1",
    }
    running = Trainers(variants, threads)
    try:
        yield running
    finally:
        running.close()
