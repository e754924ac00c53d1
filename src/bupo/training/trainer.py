"""BuPOTrainer: GRPO whose first rollout batches optimise an internal layer policy (arXiv 2512.19673, eq. 10).

What is TRL's stays TRL's: sampling, rewards, advantages, the loss and its variants, vLLM, PEFT, checkpoints. In the first
phase (internal policy alignment, IPA, eq. 9) three things differ:

1. the ratio of the clipped objective is the layer policy's, `pi_Layer^l(o_t) / pi_Layer,old^l(o_t)`, and so is the
   reference of a KL penalty; only layers 1..l run in an update;
2. rollouts still come from the language model policy, and so does the correction for vLLM's numerics;
3. the logged `entropy` is still the language model policy's; the layer policy's stands beside it.

A phase covers whole rollout batches, so old and new log-probs always come from the same policy.
"""

import json
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from bupo.errors import UserError
from bupo.residual import Family, ResidualStream
from bupo.training.config import BuPOConfig
from bupo.training.head import PolicyHead

logger = get_logger(__name__)

INTERNAL, LANGUAGE_MODEL = 1, 2  # the two phases, as logged


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
    and in phase 1 `internal/entropy`, the layer policy's entropy in nats. `entropy` is the language model policy's in both
    phases (in phase 1 at the time of the rollout); clip ratios are those of the policy being optimised.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): as for [`~trl.GRPOTrainer`]; a text model.
        reward_funcs: as for [`~trl.GRPOTrainer`].
        args ([`BuPOConfig`]): configuration of the run.
        family ([`~bupo.residual.Family`], *optional*): where the residual writes are, for an unknown model family.
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
        # during a rollout of phase 1, the entropies of the first scoring pass
        self._collecting = False
        self._collected_entropies: torch.Tensor | None = None

    @staticmethod
    def _open(model: nn.Module, args: BuPOConfig, family: Family | None) -> ResidualStream:
        stream = ResidualStream(model, family)
        if args.internal_steps > 0:
            stream.block(args.internal_layer)
        return stream

    @property
    def num_layers(self) -> int:
        """L of the model."""
        return self._heads[0].stream.num_layers

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
    def phase(self) -> int:
        """1 while an internal layer policy is optimised, 2 afterwards (eq. 10)."""
        return INTERNAL if self.rollout_batch <= self.args.internal_steps else LANGUAGE_MODEL

    @property
    def _aligning(self) -> bool:
        """Evaluation always speaks for the language model policy."""
        return self.phase == INTERNAL and self.model.training

    @contextmanager
    def _layer_policy(self):
        """Inside, scoring calls speak for the layer policy, of the reference model too."""
        with ExitStack() as stack:
            for head in self._heads:
                stack.enter_context(head.scoring(self.args.internal_layer))
            yield

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        started = time.perf_counter()
        self._collecting = self._aligning
        try:
            output = super()._generate_and_score_completions(inputs)  # everything in here is pi_theta's
            if self._aligning:
                self._score_with_layer_policy(output)
        finally:
            self._collecting, self._collected_entropies = False, None
        if self.model.training:
            self._metrics["train"]["rollout_time"].append(time.perf_counter() - started)
            self._warn_if_nothing_to_learn()
        return output

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        collect = self._collecting and self._collected_entropies is None
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or collect, **kwargs
        )
        if collect:
            self._collected_entropies = entropies
        return logps, entropies, aux_loss

    @torch.no_grad()
    def _score_with_layer_policy(self, output: dict) -> None:
        """Put the layer policy's log-probs where the loss looks for old and reference ones, and keep pi_theta's entropy."""
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
            with self._layer_policy():
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
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
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
        if last.get("frac_reward_zero_std") == 1.0:
            reasons.append(f"all answers to each prompt have one reward (mean {last['reward']:.3g})")
        if last.get("completions/clipped_ratio") == 1.0:
            reasons.append(f"every answer was cut at max_completion_length={self.max_completion_length}")
        if reasons:
            logger.warning(f"rollout batch {self.rollout_batch} teaches nothing: {' and '.join(reasons)}")

    # -- updates -----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if mode == "train":
            metrics["phase"].append(self.phase)
            metrics["rollout_batch"].append(self.rollout_batch)
        if not self._aligning:
            return super()._compute_loss(model, inputs)
        with self._layer_policy():
            loss = super()._compute_loss(model, inputs)
        metrics["internal/entropy"].append(metrics["entropy"].pop())
        metrics["entropy"].append(self._masked_mean(inputs["language_model_entropies"], inputs))
        return loss

    def _masked_mean(self, per_token: torch.Tensor, inputs: dict) -> float:
        """Mean over the answers' tokens of all processes."""
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        total, count = self.accelerator.reduce(torch.stack([(per_token * mask).sum(), mask.sum().float()]), "sum")
        return (total / count.clamp(min=1.0)).item()

    # -- checkpoints -------------------------------------------------------------------------------------------------
    # TRL's hold neither the place inside a rollout batch nor the batch itself; without them a resumed run would count
    # rollout batches, and so the phases, from the start again.

    def _rollout_file(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"rollouts_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        inside = self._step % self._micro_steps_per_rollout != 0
        torch.save(
            {"step": self._step, "buffered_inputs": self._buffered_inputs if inside else None},
            self._rollout_file(folder),
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file = self._rollout_file(checkpoint)
        if file.exists():
            saved = torch.load(file, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = saved["step"], saved["buffered_inputs"]
        else:  # another trainer's checkpoint, or another number of processes: the rollout batch is sampled anew
            state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())
            self._step = state["global_step"] * self.args.gradient_accumulation_steps
