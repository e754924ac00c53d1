"""Private names, signatures and values of TRL, transformers and accelerate that [`bupo.training.trl_internals`] relies
on.

`tests/training/test_trl_contract.py` names each entry that an installed version changes; `make test-newest` runs it
with the newest versions.
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """Use of a private name.

    Attributes:
        signature (`str`): parameters of a method, in Python's notation; empty for an attribute.
        reason (`str`): purpose of the call or override.
    """

    signature: str
    reason: str


PRIVATE_NAMES = {
    "_generate_and_score_completions": PrivateName(
        "(self, inputs)", "overridden: the first phase also scores the internal policy"
    ),
    "_calculate_rewards": PrivateName(
        "(self, inputs, prompts, completions, completion_ids_list)",
        "overridden: stores the rewards of all processes, for advantage estimators and early stopping",
    ),
    "_get_per_token_logps_and_entropies": PrivateName(
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, *)",
        "called with a scorer in place of the model; overridden: one pass over rollouts scores two policies",
    ),
    "_prepare_inputs": PrivateName(
        "(self, generation_batch)", "overridden: arranges the micro-batches of a rollout batch"
    ),
    "_compute_loss": PrivateName("(self, model, inputs)", "overridden, and called with a scorer in place of the model"),
    "_get_train_sampler": PrivateName("(self, dataset)", "overridden: the sampler can start at any epoch"),
    "_save_checkpoint": PrivateName(
        "(self, model, trial)", "overridden: adds bupo's part, and moves the checkpoint into its folder"
    ),
    "_push_from_checkpoint": PrivateName(
        "(self, checkpoint_folder)", "overridden: pushes a checkpoint from its final folder"
    ),
    "_load_optimizer_and_scheduler": PrivateName("(self, checkpoint)", "overridden: loads bupo's part of a checkpoint"),
    "_load_from_checkpoint": PrivateName(
        "(self, resume_from_checkpoint, model)", "overridden: also loads weights that are saved under other names"
    ),
    "_load_best_model": PrivateName("(self)", "overridden: also loads weights that are saved under other names"),
    "_get_output_dir": PrivateName("(self, trial)", "overridden: writes a checkpoint into a staging folder"),
    "_run_epoch": PrivateName(
        "(self, *)", "overridden: a finished run stays finished when resumed; counts passes over a stream"
    ),
    "_maybe_log_save_evaluate": PrivateName(
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)",
        "overridden and called: logs the end of an interrupted epoch",
    ),
    "_load_rng_state": PrivateName("(self, checkpoint)", "overridden and called: for the end of an interrupted epoch"),
    "_evaluate": PrivateName("(self, *)", "overridden: a resumed run does not repeat `eval_on_start`"),
    "_determine_best_metric": PrivateName(
        "(self, metrics, trial)", "overridden: an evaluation may have graded no completion"
    ),
    "_tr_loss": PrivateName("", "read and set: the loss since the last log"),
    "_total_loss_scalar": PrivateName("", "read and set: the losses of all logs, for `train_loss`"),
    "_globalstep_last_logged": PrivateName("", "read and set: the first update of the next log"),
    "_initial_global_step": PrivateName("", "read and set: the first update that `train_loss` counts"),
    "_get_learning_rate": PrivateName("(self)", "called: for messages"),
    "_step": PrivateName("", "read and set: micro-steps done, which determine the rollout batch"),
    "_buffered_inputs": PrivateName("", "read and set: the micro-batches of the rollout batch, for checkpoints"),
    "_metrics": PrivateName("", "read and extended: metrics of the next log"),
    "_logs": PrivateName("", "read and set: the table of completions and their advantages"),
    "_entropy_window_stats": PrivateName(
        "", "read: whether an update has a token, for the adaptive entropy coefficient"
    ),
    "_last_world_entropy": PrivateName("", "restored after an update without a token"),
    "_is_vlm": PrivateName("", "read: models with images are refused"),
    "_tag_names": PrivateName("", "overridden: tags of the model card"),
}

# of accelerate's AcceleratorState, which keeps the mixed precision of the process' first trainer
ACCELERATE_PRIVATE_NAMES = {
    "_shared_state": "read: the mixed precision of an earlier trainer",
    "_reset_state": "called if this run has another mixed precision, as transformers does for new arguments",
}

# public names outside of the documented interfaces: path and parameters
UNDOCUMENTED_FUNCTIONS = {
    "trl.models.utils.disable_gradient_checkpointing": "(model, gradient_checkpointing_kwargs)",
    "trl.trainer.grpo_trainer.create_model_from_path": "(model_id, architecture, kwargs)",
    "trl.trainer.utils.use_adapter": "(model, adapter_name)",
    "trl.trainer.utils.get_config_model_id": "(config)",
    "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func": (
        "(gate_logits, num_experts, top_k, attention_mask)"
    ),
}
# values that TRL's loss accepts. TRL refuses others at the first update only, after sampling a rollout batch
ACCEPTED_VALUES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
    "importance_sampling_level": ("token", "sequence"),
}
# attributes of a GRPOTrainer that are read
TRAINER_ATTRIBUTES = (
    "num_generations", "num_iterations", "max_completion_length", "current_gradient_accumulation_steps", "reward_weights",
    "reward_func_names", "aux_loss_enabled", "ref_model", "processing_class", "is_fsdp_enabled", "is_deepspeed_enabled",
    "eos_token_ids", "generation_config", "use_vllm",
)  # fmt: skip
# entries of the dict that TRL passes from sampling to the loss
ROLLOUT_KEYS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "ref_per_token_logps",  # with several updates a rollout batch, or a KL penalty
)  # fmt: skip
# TRL's metrics that bupo reads, renames or draws
TRL_METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "step_time", "completions/mean_length",
    "completions/clipped_ratio", "num_tokens",
)  # fmt: skip
