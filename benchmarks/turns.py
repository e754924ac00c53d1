"""Training runs of several trainers that take turns, update by update, each in a process of its own.

A process runs `trainer.train()` as a user would; a callback stops it before each rollout batch until it is its turn. So the
trainers see the same noise of the machine, and the memory of each is its own. The answers of a rollout batch can be given
(TRL's `rollout_func`) in the stead of sampled: then all trainers do the same work.
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
    """The answers of a rollout batch: token ids of a prompt and an answer a row, groups of a prompt one after another."""

    prompts: list[list[int]]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """Of prompts and answers, each prompt as often as it has answers."""
        return sum(map(len, self.prompts)) + sum(map(len, self.answers))


def made_up(prompt: int, answers: Sequence[int], group: int, vocabulary: int, seed: int = 0) -> Rollouts:
    """Rollouts of random token ids, which cost what words do.

    Args:
        prompt (`int`): tokens of a prompt.
        answers (`list[int]`): tokens of each answer.
        group (`int`): answers that share a prompt.
        vocabulary (`int`): of the model; special tokens, which come first, are not used.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(64, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(prompt) for _ in range(-(-len(answers) // group))]
    return Rollouts([prompts[row // group] for row in range(len(answers))], [draw(length) for length in answers])


@dataclass(frozen=True)
class Job:
    """A training run, one update a rollout batch.

    Attributes:
        model (`str` or `dict`): as of [`~bupo.models.loading.load_model`], or the configuration of one with random weights.
        layers (`tuple[int, ...]`): of each rollout batch, the layer that phase 1 optimises; the first is the published way's.
        rollouts (`tuple[Rollouts, ...]`, *optional*): of each rollout batch; without them, answers to sums are sampled.
        rows (`int`): sequences of a rollout batch.
        passes (`int`): forward and backward passes of an update, its gradients being accumulated.
        group (`int`): answers a prompt.
        max_new_tokens (`int`): of an answer that is sampled.
        profiled (`bool`): whether the last update, and the sampling for it, is also profiled, which slows it.
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
    """What a rollout batch and its update took.

    Attributes:
        seconds (`dict[str, float]`): `whole`, `sampling`, `grading`, `scoring` (the rest of what comes before the update), and
            `update`: forward and backward passes, the optimizer's step, logs.
        memory (`dict[str, int]`): bytes of the largest resident set: `whole`; above the loaded model, `scoring` (and all before
            the update) and `update`; and of the update's `passes` above weights, optimizer and gradients.
        entropy (`float`): of the language model policy, as logged.
        tokens (`int`): answer tokens.
        gradients (`dict[str, np.ndarray]`): of the first update only, of the layers 1 and l.
        profile (`str`): torch's, where it was asked for.
    """

    seconds: dict[str, float]
    memory: dict[str, int]
    entropy: float
    tokens: float
    gradients: dict[str, np.ndarray]
    profile: str = ""


def published_scores(model, input_ids, attention_mask, keep: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, keep)` each: log-probs of the layer's policy and entropies of the language model policy, the way the paper's code
    takes: a forward pass that keeps every layer's states, then head, log-softmax and entropy at every position, of the
    layer's states and of the last ones. TRL's temperature of 1."""
    out = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
    logits = model.get_output_embeddings()(out.hidden_states[layer])
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    entropies = [_entropy(logits.detach()), _entropy(out.logits.detach())]  # both policies' are logged
    return log_probs[:, -keep:], entropies[1][:, -keep - 1 : -1]


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """verl's `entropy_from_logits`."""
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class PublishedTrainer(GRPOTrainer):
    """TRL's, with phase 1 in the published way."""

    layer = 1

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return *published_scores(model, input_ids, attention_mask, logits_to_keep, self.layer), None


class Turns(TrainerCallback):
    """Waits before each rollout batch until it is this trainer's turn, and then says what the last one took."""

    def __init__(self, pipe, job: Job):
        self.pipe, self.job, self.loaded = pipe, job, 0
        self.memory: PeakMemory | None = None
        self.profile: profile | None = None
        self.spent: dict[str, float] = {}
        self.marks: dict[str, int] = {}
        self.logs: dict[str, float] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.first = True

    def listen_to(self, trainer: GRPOTrainer) -> None:
        """Take the time of what a rollout batch consists of."""
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
        self._tell()
        self.pipe.recv()
        self.spent.clear()
        give_back()
        self.marks = {"before": resident()}
        self.memory = PeakMemory().__enter__()
        if self.job.profiled and state.global_step == len(self.job.layers) - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            if not self.job.rollouts:
                self.profile.start()
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.marks["passes"] = self.memory.top if self.memory else 0
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.marks["gradients"] = sum(grad.numel() * grad.element_size() for grad in found.values())
        if self.first:
            watched = re.compile(rf"\.(?:layers|h)\.(?:0|{self.job.layers[0] - 1})\.")
            self.gradients = {
                name: grad.numpy(force=True).copy() for name, grad in found.items() if watched.search(name)
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs |= logs or {}

    def on_train_end(self, args, state, control, **kwargs):
        self._tell()

    def _tell(self) -> None:
        """Of the update that has ended, or that the first may begin."""
        if self.memory is None:
            self.pipe.send("ready")
            return
        whole = time.perf_counter() - self.started
        self.memory.__exit__()
        shown = ""
        if self.profile:
            self.profile.stop()
            shown = self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15)
        part = {name: self.spent.get(name, 0.0) for name in ("rollouts", "sampling", "grading")}
        seconds = {"whole": whole, "sampling": part["sampling"], "grading": part["grading"]}
        seconds |= {
            "scoring": part["rollouts"] - part["sampling"] - part["grading"],
            "update": whole - part["rollouts"],
        }
        marks = self.marks
        memory = {
            "whole": max(marks["rollouts"], self.memory.top),
            "scoring": marks["rollouts"] - self.loaded,
            "update": self.memory.top - self.loaded,
            "passes": marks["passes"] - marks["before"] - marks["gradients"],
        }
        tokens, entropy = self.logs["completions/mean_length"] * self.job.rows, self.logs["entropy"]
        self.pipe.send(Update(seconds, memory, entropy, tokens, self.gradients if self.first else {}, shown))
        self.first, self.memory = False, None


def resident() -> int:
    """Bytes of this process' resident set."""
    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Let glibc return what is free, so that the resident set is what is used."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def reward(completion_ids: Sequence[Sequence[int]], **kwargs) -> list[float]:
    """Cheap, and not the same for the answers of a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(variant: str, job: Job, folder: str, turns: Turns) -> GRPOTrainer:
    """The trainer of a job. All train with the same options: TRL's defaults, but for those that make runs comparable."""
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
    given: dict[str, Any] = {
        "train_dataset": _prompts(job, updates),
        "processing_class": load_tokenizer(job.model if isinstance(job.model, str) else EMBEDDED_MODEL),
        "callbacks": [turns],
    }
    if job.rollouts:
        batches = iter(job.rollouts)
        given["rollout_func"] = lambda prompts, trainer: _columns(next(batches), trainer.processing_class.eos_token_id)
    if variant in (TRL, PUBLISHED):
        kind = GRPOTrainer if variant == TRL else PublishedTrainer
        trainer = kind(model, reward, GRPOConfig(**options, use_cpu=True, bf16=False), **given)
        trainer.layer = job.layers[0]
    else:
        stages = [[layer, len(list(same))] for layer, same in groupby(job.layers)]
        plan = (
            {"internal_schedule": stages}
            if variant == FIRST
            else {"internal_layer": job.layers[0], "internal_steps": 0}
        )
        trainer = BuPOTrainer(
            model, reward, BuPOConfig(**options, **plan, internal_early_stopping=False, probe_every=0), **given
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def model_of(model: str | dict[str, Any]) -> PreTrainedModel:
    """In fp32, as TRL trains it."""
    if isinstance(model, str):
        return load_model(model, dtype=torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model), dtype=torch.float32)


def _prompts(job: Job, updates: int) -> Dataset:
    """A prompt a group; where answers are given, they bring prompts of their own."""
    count = updates * job.rows // job.group
    if job.rollouts:
        return Dataset.from_dict({"prompt": ["-"] * count})
    return load_problems(ARITHMETIC, "train", size=count).select_columns(["prompt"])


def _columns(batch: Rollouts, end: int) -> dict[str, Any]:
    """As a `rollout_func` gives them: answers that end, and are not cut."""
    return {
        "prompt_ids": batch.prompts,
        "completion_ids": [[*ids[:-1], end] for ids in batch.answers],
        "logprobs": None,
    }


def work(pipe, variant: str, threads: int) -> None:
    """The process of a variant: jobs come through the pipe, `None` ends it. What fails is told."""
    torch.set_num_threads(threads)
    set_verbosity_error()
    disable_progress_bar()
    while job := pipe.recv():
        try:
            with tempfile.TemporaryDirectory() as folder:
                turns = Turns(pipe, job)
                trainer = trainer_of(variant, job, folder, turns)
                turns.listen_to(trainer)
                trainer.train()
                del trainer
        except BaseException:
            pipe.send(RuntimeError(f"{variant}: {traceback.format_exc()}"))
            return


class Trainers:
    """A process for each variant.

    Args:
        variants (`list[str]`): which.
        threads (`int`): of torch, in each; one works at a time.
    """

    def __init__(self, variants: Sequence[str], threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipes: dict[str, Any] = {}
        self.processes = []
        for variant in variants:
            self.pipes[variant], theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, variant, threads), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, jobs: dict[str, Job]) -> Iterator[dict[str, Update]]:
        """What each update of each variant took, round by round. Jobs have equally many rollout batches, which the variants do
        in turn: A B C A B C …"""
        for variant, job in jobs.items():  # one after another: to load costs memory
            self.pipes[variant].send(job)
            self._heard(variant)
        for _ in min(jobs.values(), key=lambda job: len(job.layers)).layers:
            done = {}
            for variant in jobs:
                self.pipes[variant].send("go")
                done[variant] = self._heard(variant)
            yield done

    def _heard(self, variant: str) -> Any:
        try:
            found = self.pipes[variant].recv()
        except EOFError:
            raise RuntimeError(f"{variant}: its process has ended") from None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self.pipes.values(), self.processes, strict=True):
            if process.is_alive():
                process.terminate()
            process.join()
            pipe.close()


def profiles_of(done: dict[str, Update]) -> dict[str, str]:
    """Where BuPO's phases spend their time, where it was asked for."""
    return {name: done[name].profile for name in (FIRST, SECOND) if name in done and done[name].profile}


@contextmanager
def trainers(variants: Sequence[str], threads: int) -> Iterator[Trainers]:
    """Processes that are ended at the end. Their environment: no hub, and no word of what is deprecated or experimental."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
        "KINETO_LOG_LEVEL": "5",
        "TQDM_DISABLE": "1",
    }
    started = Trainers(variants, threads)
    try:
        yield started
    finally:
        started.close()
