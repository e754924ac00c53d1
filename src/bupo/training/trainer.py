"""BuPOTrainer: GRPO whose first rollout batches optimise an internal layer policy (arXiv 2512.19673, eq. 10).

What is TRL's stays TRL's: sampling, rewards, the loss and its variants, vLLM, PEFT, checkpoints. In the first
phase (internal policy alignment, IPA, eq. 9) three things differ:

1. the ratio of the clipped objective is the layer policy's, `pi_Layer^l(o_t) / pi_Layer,old^l(o_t)`, and so is the
   reference of a KL penalty; only layers 1..l run in an update;
2. rollouts still come from the language model policy, and so does the correction for vLLM's numerics;
3. the logged `entropy` is still the language model policy's; the layer policy's stands beside it.

A phase covers whole rollout batches, so old and new log-probs always come from the same policy. The advantages are
those of the chosen estimator, in both phases. Probes and the guard stand between rollout batches.
"""

import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from bupo.errors import UserError
from bupo.evaluation.benchmarks import load_benchmarks
from bupo.model.residual import Family, ResidualStream, evaluating
from bupo.training import advantages
from bupo.training.boundary import TOKENS as BOUNDARY_TOKENS
from bupo.training.boundary import boundary_layer
from bupo.training.callbacks import FiniteUpdates
from bupo.training.config import BuPOConfig
from bupo.training.critic import CRITIC_FILE, CopiedCritic, SharedCritic
from bupo.training.evaluations import Evaluations
from bupo.training.head import PolicyHead
from bupo.training.layers import above, freeze_up_to, slow_down
from bupo.training.probes import repetition
from bupo.training.schedule import Stage, place_of
from bupo.training.watch import Watch

logger = get_logger(__name__)

INTERNAL, LANGUAGE_MODEL = 1, 2  # the two phases, as logged
LARGEST_LOG_RATIO = 20.0  # beyond it a ratio leaves fp32, and its gradient is 0 times infinity
BOUNDARY_FILE, WATCH_FILE = "boundary.json", "watch.pt"


class BuPOTrainer(GRPOTrainer):
    """Trainer for Bottom-up Policy Optimization.

    ```python
    >>> trainer = BuPOTrainer(
    ...     model="Qwen/Qwen3-4B",
    ...     reward_funcs=math_reward,
    ...     args=BuPOConfig("runs/qwen3-4b-bupo", internal_layer=6, internal_steps=30),
    ...     train_dataset=problems,
    ... )
    >>> trainer.train()
    ```

    Logged besides what [`~trl.GRPOTrainer`] logs: `phase` (1 or 2), `rollout_batch` (from 1), `rollout_time` (seconds),
    `completions/repetition`, in phase 1 `internal/layer` and `internal/entropy` (the internal policy's, in nats), with
    PPO `critic/...`, and for a probe `probe/...`. `entropy` is the language model policy's in both phases (in phase 1 at the
    time of the rollout); clip ratios are those of the policy being optimised.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): as for [`~trl.GRPOTrainer`]; a text model.
        reward_funcs: as for [`~trl.GRPOTrainer`].
        args ([`BuPOConfig`]): configuration of the run.
        family ([`~bupo.model.residual.Family`], *optional*): where the residual writes are, for an unknown model family.
        benchmarks (`dict[str, Dataset]`, *optional*): the problems of `eval_benchmarks` by label; by default loaded by name.
        kwargs: all other arguments of [`~trl.GRPOTrainer`].

    Raises:
        UserError: if the layer does not exist, or the model's residual stream is not what its family's rules say.
    """

    _tag_names: ClassVar = ["trl", "grpo", "bupo"]
    _name = "BuPO"
    _paper: ClassVar = {
        "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
        "id": "2512.19673",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | nn.Module",
        reward_funcs=None,
        args: BuPOConfig | None = None,
        *positional,
        family: Family | None = None,
        benchmarks: dict[str, Dataset] | None = None,
        **kwargs,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            raise UserError(f"args is not set: pass BuPOConfig({Path(name).name + '-BuPO'!r}, internal_layer=...)")
        if not isinstance(args, BuPOConfig):
            raise UserError(f"args must be a BuPOConfig, got {type(args).__name__}")
        if not isinstance(model, str):  # a bad layer is refused before anything is written
            self._open(model, args, family)
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        if self._is_vlm:
            raise UserError(f"{type(self.model).__name__} reads images: BuPO trains text models")
        if self.is_deepspeed_enabled and args.deepspeed_plugin.zero_stage == 3:
            raise UserError("DeepSpeed ZeRO-3 partitions the unembedding: use FSDP2 or ZeRO stage 1 or 2")
        self._heads = [
            PolicyHead(self._open(m, args, family), args.temperature, args.internal_lens, args.cast_lm_head_to_fp32)
            for m in (self.model, self.ref_model)
            if m is not None
        ]
        self.stream = self._heads[0].stream
        self.schedule: tuple[Stage, ...] = args.stages
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._critic: Any = None
        if args.advantage_estimator == "ppo":
            if args.critic_backbone == "shared":
                self._critic = SharedCritic(self._heads[0], self.accelerator, args)
            elif sharded:
                raise UserError(
                    "critic_backbone copy trains a second model under DDP or one process, not FSDP or DeepSpeed: choose shared"
                )
            else:
                self._critic = CopiedCritic(self.stream.decoder, self.accelerator, args)
        if args.frozen_up_to_layer:
            freeze_up_to(self.stream, args.frozen_up_to_layer)
        if any(stage.layer == 0 for stage in self.schedule) and sharded:
            raise UserError(
                "internal_layer auto measures a whole model: with FSDP or DeepSpeed, run bupo analyze first"
            )
        self._watch = Watch(self.stream, self.accelerator, args, self.processing_class.decode, sharded)
        self._finite = FiniteUpdates()
        self.add_callback(self._finite)
        if args.eval_benchmarks:
            if sharded:
                raise UserError(
                    "eval_benchmarks needs whole parameters: with FSDP or DeepSpeed, run bupo eval on checkpoints"
                )
            self.add_callback(
                Evaluations(
                    self, benchmarks or load_benchmarks(args.eval_benchmarks, args.eval_problems, seed=args.seed)
                )
            )
        self._old_log_probs: torch.Tensor | None = None  # while a loss is computed
        # during a rollout of phase 1, the entropies of the first scoring pass
        self._collecting = False
        self._collected_entropies: torch.Tensor | None = None
        self._rewards = torch.empty(0)  # of the last rollout batch, by answer and function, of all processes

    @staticmethod
    def _open(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream:
        stream = ResidualStream(model, family)
        layers = [stage.layer for stage in args.stages if stage.layer]
        if isinstance(args.internal_layer, int):
            layers.append(args.internal_layer)
        for layer in (*layers, args.frozen_up_to_layer, args.slow_above_layer):
            if layer is not None:
                stream.block(layer)
        return stream

    @property
    def num_layers(self) -> int:
        """L of the model."""
        return self.stream.num_layers

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """TRL's, with slower groups for the layers above `slow_above_layer`."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.args.slow_above_layer:
            slow_down(optimizer, above(self.stream, self.args.slow_above_layer), self.args.slow_factor)
        return optimizer

    def _get_train_sampler(self, dataset=None):
        """TRL's, whose order depends on the epoch and not on the epochs before: a resumed run must see the same one."""
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(sampler.seed + epoch)
        return sampler

    # -- the schedule ------------------------------------------------------------------------------------------------

    @property
    def _micro_steps_per_rollout(self) -> int:
        """Forward and backward passes that one rollout batch is used for."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def rollout_batch(self) -> int:
        """The rollout batch that is being trained on, from 1."""
        return self._step // self._micro_steps_per_rollout + 1

    @property
    def stage(self) -> Stage | None:
        """The stage of the first phase that the rollout batch belongs to; None in the second."""
        place = place_of(self.schedule, self.rollout_batch)
        return None if place is None else self.schedule[place]

    @property
    def phase(self) -> int:
        """1 while an internal policy is optimised, 2 afterwards (eq. 10)."""
        return INTERNAL if self.stage else LANGUAGE_MODEL

    @property
    def _aligning(self) -> bool:
        """Evaluation always speaks for the language model policy."""
        return self.phase == INTERNAL and self.model.training

    @contextmanager
    def _internal_policy(self):
        """Inside, scoring calls speak for the internal policy, of the reference model too."""
        assert self.stage, "there is an internal policy in phase 1 only"
        with ExitStack() as stack:
            for head in self._heads:
                stack.enter_context(head.scoring(self.args.internal_module, self.stage.layer))
            yield

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        started = time.perf_counter()
        metrics = self._metrics["train"]
        self.schedule = self._watch.before_rollouts(self.schedule, self.rollout_batch, self.optimizer, metrics)
        self._collecting = self._aligning
        try:
            output = self._rollouts(inputs)  # everything in here is pi_theta's
            answers = self._answers(output)
            if self.stage and self.stage.layer == 0:
                self._choose_layer(answers)
            self._set_advantages(output)
            if self._aligning:
                self._score_with_internal_policy(output)
        finally:
            self._collecting, self._collected_entropies = False, None
        metrics["completions/repetition"].append(self._mean(repetition([answer for _, answer in answers])))
        self._watch.after_rollouts(self.schedule, self.rollout_batch, answers, self._rewards_by_answer(), metrics)
        metrics["rollout_time"].append(time.perf_counter() - started)
        self._warn_if_nothing_to_learn()
        return output

    def _rollouts(self, inputs):
        try:
            return super()._generate_and_score_completions(inputs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise UserError(
                f"the model's probabilities are not finite in {self._where()}: its weights have diverged; lower "
                "learning_rate, or go on from an earlier checkpoint"
            ) from error

    def _answers(self, output: dict) -> list[tuple[list[int], list[int]]]:
        """Token ids of this process' prompts and answers, one of each prompt first."""
        pairs = [
            (ids[mask.bool()].tolist(), answer[kept.bool()].tolist())
            for ids, mask, answer, kept in zip(
                output["prompt_ids"],
                output["prompt_mask"],
                output["completion_ids"],
                output["completion_mask"],
                strict=True,
            )
        ]
        group = self.num_generations
        pairs = [pair for first in range(group) for pair in pairs[first::group]]
        return [(prompt, answer) for prompt, answer in pairs if answer]  # masked, if truncated answers are

    def _choose_layer(self, answers: list[tuple[list[int], list[int]]]) -> None:
        """`internal_layer: auto`, on the first rollout batch."""
        with evaluating(self.stream.model):
            found = boundary_layer(
                self.stream,
                answers,
                self.args.internal_lens,
                self.args.temperature,
                tokens=BOUNDARY_TOKENS // self.accelerator.num_processes,
                gather=gather_object,
            )
        self.schedule = tuple(Stage(stage.layer or found["boundary_layer"], stage.batches) for stage in self.schedule)
        self.accelerator.print(f"internal_layer auto: {found['explanation']}")
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BOUNDARY_FILE).write_text(json.dumps(found, indent=1) + "\n")

    def _rewards_by_answer(self) -> torch.Tensor:
        """Weighted sum of the reward functions, of all processes' answers; NaN where none gave one."""
        rewards = (self._rewards * self.reward_weights.to(self._rewards)).nansum(1)
        return rewards.masked_fill(self._rewards.isnan().all(1), torch.nan)

    def _set_advantages(self, output: dict) -> None:
        """Put the estimator's advantages where TRL has put GRPO's."""
        estimator = self.args.advantage_estimator
        if estimator == "grpo":
            return
        rewards, size = self._rewards_by_answer(), output["completion_ids"].size(0)
        mine = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        mask = self._mask(output)

        def total(sums: torch.Tensor) -> torch.Tensor:
            return self.accelerator.reduce(sums, "sum")

        if estimator == "rloo":
            output["advantages"] = advantages.leave_one_out(rewards, self.num_generations)[mine]
        elif estimator == "reinforce++":
            on_all = rewards[mine].nan_to_num(nan=0.0)[:, None] * mask
            output["advantages"] = advantages.whitened(on_all, mask, total)
        else:
            values = self._values(output) * mask
            estimates, returns = advantages.generalized(
                advantages.last_token(rewards[mine], mask), values, mask, self.args.gae_gamma, self.args.gae_lambda
            )
            output["advantages"] = advantages.whitened(estimates, mask, total)
            output["values"], output["returns"] = values, returns
        self._log_advantages(output["advantages"], mask)

    @torch.no_grad()
    def _values(self, output: dict) -> torch.Tensor:
        """`(B, T)`: the critic's, of a rollout batch."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        answer, size = output["completion_ids"].size(1), self.args.per_device_train_batch_size
        if isinstance(self._critic, CopiedCritic):
            return self._critic.values(ids, attention, answer, size)
        with ExitStack() as stack:
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if self._aligning:
                stack.enter_context(self._internal_policy())
            values = stack.enter_context(self._critic.collecting())
            super()._get_per_token_logps_and_entropies(self.model, ids, attention, answer, batch_size=size)
        return torch.cat(values)[:, -answer:]

    def _log_advantages(self, found: torch.Tensor, mask: torch.Tensor) -> None:
        """TRL's table of completions shows an answer's advantage: by token, its mean."""
        by_answer = found if found.dim() == 1 else (found * mask).sum(1) / mask.sum(1).clamp(min=1)
        everyone = self.accelerator.gather(by_answer).tolist()
        logged = self._logs["advantages"]
        for _ in range(min(len(everyone), len(logged))):
            logged.pop()
        logged.extend(everyone)

    @staticmethod
    def _mask(inputs: dict) -> torch.Tensor:
        """`(B, T)`: the tokens that the policy chose."""
        return inputs["completion_mask"] * inputs.get("tool_mask", 1)

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        collect = self._collecting and self._collected_entropies is None
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or collect, **kwargs
        )
        if collect:
            self._collected_entropies = entropies
        old = self._old_log_probs
        if old is not None:
            change = logps - old
            limited = old + change.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            logps = torch.where(change.abs() > LARGEST_LOG_RATIO, limited, logps)
        return logps, entropies, aux_loss

    @torch.no_grad()
    def _score_with_internal_policy(self, output: dict) -> None:
        """Put the internal policy's log-probs where the loss looks for old and reference ones, and keep pi_theta's entropy."""
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)  # (B, P + C)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        size = {"batch_size": self.args.per_device_train_batch_size}
        scored = (ids, mask, output["completion_ids"].size(1))
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if "old_per_token_logps" in output:  # then TRL's first pass over the rollout was pi_theta's
                entropies = self._collected_entropies
            else:
                entropies = self._get_per_token_logps_and_entropies(self.model, *scored, compute_entropy=True, **size)[
                    1
                ]
            output["language_model_entropies"] = entropies
            with self._internal_policy():
                if "old_per_token_logps" in output:
                    output["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                        self.model, *scored, **size
                    )
                if "ref_per_token_logps" in output:
                    output["ref_per_token_logps"] = self._reference_log_probs(scored, size)

    def _reference_log_probs(self, scored: tuple, size: dict) -> torch.Tensor:
        if self.ref_model is not None:
            return self._get_per_token_logps_and_entropies(self.ref_model, *scored, **size)[0]
        peft = self.accelerator.unwrap_model(self.model)
        with use_adapter(peft, adapter_name="ref" if "ref" in peft.peft_config else None):
            return self._get_per_token_logps_and_entropies(self.model, *scored, **size)[0]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        try:
            self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            return self._rewards
        except UserError:
            raise
        except Exception as error:
            names = ", ".join(self.reward_func_names)
            raise UserError(
                f"reward function {names} failed in rollout batch {self.rollout_batch}: {type(error).__name__}: {error}"
            ) from error

    def _warn_if_nothing_to_learn(self) -> None:
        """Say aloud what would otherwise be a flat curve."""
        last = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        reasons = []
        grouped = self.args.advantage_estimator in ("grpo", "rloo")
        if grouped and last["frac_reward_zero_std"] == 1.0:
            reasons.append(f"all answers to each prompt have one reward (mean {last['reward']:.3g})")
        elif not grouped and last["reward_std"] == 0.0:
            reasons.append(f"all answers have one reward ({last['reward']:.3g})")
        if last.get("completions/clipped_ratio") == 1.0:
            reasons.append(f"every answer was cut at max_completion_length={self.max_completion_length}")
        if reasons:
            logger.warning(f"rollout batch {self.rollout_batch} teaches nothing: {' and '.join(reasons)}")

    # -- updates -----------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As TRL's; the probes also see the last weights."""
        result = super().train(*args, **kwargs)
        if self._step % self._micro_steps_per_rollout == 0:
            self._watch.after_training(self.schedule, self.rollout_batch)
        return result

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if mode == "train":
            metrics["phase"].append(self.phase)
            metrics["rollout_batch"].append(self.rollout_batch)
            self._finite.where = self._where()
            if isinstance(self._critic, CopiedCritic):
                self._log_values(self._critic.learn(inputs, self._mask(inputs), self._window_tokens(inputs)))
        shared = self._critic if mode == "train" and isinstance(self._critic, SharedCritic) else None
        self._old_log_probs = inputs.get("old_per_token_logps") if mode == "train" else None
        try:
            with ExitStack() as stack:
                if self._aligning:
                    stack.enter_context(self._internal_policy())
                values = stack.enter_context(shared.collecting()) if shared else []
                loss = super()._compute_loss(model, inputs)
        finally:
            self._old_log_probs = None
        if shared:
            term, sums = shared.loss(values, inputs, self._mask(inputs), self._window_tokens(inputs))
            self._log_values(sums)
            loss = loss + term
        if not self._aligning:
            return loss
        metrics["internal/layer"].append(self.stage.layer)  # type: ignore[union-attr]
        metrics["internal/entropy"].append(metrics["entropy"].pop())
        metrics["entropy"].append(self._masked_mean(inputs["language_model_entropies"], inputs))
        return loss

    def training_step(self, *args, **kwargs):
        """As TRL's; a shared critic's value heads step with the policy."""
        loss = super().training_step(*args, **kwargs)
        if isinstance(self._critic, SharedCritic) and self.accelerator.sync_gradients:
            self._critic.step()
        return loss

    def _window_tokens(self, inputs: dict) -> torch.Tensor:
        """Answer tokens of an update, a process."""
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation  # of the rollout batch
        return inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes * share

    def _log_values(self, sums: dict[str, torch.Tensor]) -> None:
        """The critic's part of a micro-batch, over all processes."""
        names = list(sums)
        values = self.accelerator.reduce(torch.stack([sums[name].float() for name in names]), "sum")
        total = dict(zip(names, values, strict=True))
        count, metrics = total["tokens"].clamp(min=1.0), self._metrics["train"]
        metrics["critic/value_loss"].append((total["loss"] / count).item())
        metrics["critic/clip_ratio"].append((total["clipped"] / count).item())
        variance = total["squares"] / count - (total["returns"] / count) ** 2
        if variance > 1e-6:  # else all returns are alike
            metrics["critic/explained_variance"].append((1 - total["error"] / count / variance).item())

    def _where(self) -> str:
        """For messages."""
        policy = f"the policy of layer {self.stage.layer}" if self.stage else "the whole policy"
        return f"rollout batch {self.rollout_batch} ({policy}, learning rate {self._get_learning_rate():.3g})"

    def _masked_mean(self, per_token: torch.Tensor, inputs: dict) -> float:
        """Mean over the answers' tokens of all processes."""
        mask = self._mask(inputs)
        total, count = self.accelerator.reduce(torch.stack([(per_token * mask).sum(), mask.sum().float()]), "sum")
        return (total / count.clamp(min=1.0)).item()

    def _mean(self, value: float) -> float:
        """Mean over processes."""
        return self.accelerator.gather(torch.tensor([value], device=self.accelerator.device)).mean().item()

    # -- checkpoints -------------------------------------------------------------------------------------------------
    # TRL's hold neither the place inside a rollout batch nor the batch itself; without them a resumed run would count
    # rollout batches, and so the phases, from the start again.

    @property
    def _layout(self) -> dict:
        """How a rollout batch is cut up: what its buffered pieces depend on."""
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "micro_steps": self._micro_steps_per_rollout,
        }

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model, trial):
        # before the trainer's own files, whose last marks the checkpoint as whole
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        inside = self._step % self._micro_steps_per_rollout != 0
        torch.save(
            {
                "step": self._step,
                "buffered_inputs": self._buffered_inputs if inside else None,
                "layout": self._layout,
                "planned": [(stage.layer, stage.batches) for stage in self.args.stages],
                "schedule": [(stage.layer, stage.batches) for stage in self.schedule],
            },
            self._rollout_file(folder),
        )
        if self.accelerator.is_main_process:
            torch.save(self._watch.state(), folder / WATCH_FILE)
        if self._critic:
            self._critic.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / "rollouts_0.pt").exists():  # another trainer's
            state = json.loads((folder / TRAINER_STATE_NAME).read_text())
            self._step = state["global_step"] * self.args.gradient_accumulation_steps
            return
        saved = torch.load(folder / "rollouts_0.pt", map_location="cpu", weights_only=True)
        planned = tuple(Stage(*pair) for pair in saved["planned"])
        if planned != self.args.stages:
            raise UserError(
                f"{folder} was made with the first phase {_shown(planned)}, the options say {_shown(self.args.stages)}: go on "
                "with the same"
            )
        self.schedule = tuple(Stage(*pair) for pair in saved["schedule"])
        if saved["layout"] == self._layout:
            own = torch.load(self._rollout_file(folder), map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = own["step"], own["buffered_inputs"]
        else:  # the same rollout batches in other pieces, or on another number of processes
            done, inside = divmod(saved["step"], saved["layout"]["micro_steps"])
            if inside:
                raise UserError(
                    f"{folder} lies inside a rollout batch: go on with the same number of processes and the same batch "
                    f"options ({saved['layout']}), or from a checkpoint at a rollout batch's end"
                )
            self._step = done * self._micro_steps_per_rollout
        self._watch.load(torch.load(folder / WATCH_FILE, map_location="cpu", weights_only=True), self.rollout_batch)
        if self._critic:
            if not (folder / CRITIC_FILE).exists():
                raise UserError(f"{folder} holds no critic ({CRITIC_FILE} is missing): it was not made by ppo")
            self._critic.load(folder)


def _shown(stages: tuple[Stage, ...]) -> str:
    """For messages."""
    return str([["auto" if not stage.layer else stage.layer, stage.batches] for stage in stages])
