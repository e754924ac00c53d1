"""What [`bupo.training.trl_internals`] relies on of TRL, transformers and accelerate: names, shapes, and what they leave.

`PRIVATE` lists each private name with its reason; `tests/training/test_trl_contract.py` fails with the name where an installed version
differs (`make test-newest` asks the newest ones).
"""

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A private name that is relied on.

    Attributes:
        signature (`str`): the parameters of a method, as Python writes them; empty for an attribute.
        reason (`str`): what it is used or overridden for.
    """

    signature: str
    reason: str


PRIVATE_NAMES = {
    "_generate_and_score_completions": PrivateName(
        "(self, inputs)", "overridden: the first phase scores rollouts anew"
    ),
    "_calculate_rewards": PrivateName(
        "(self, inputs, prompts, completions, completion_ids_list)",
        "overridden and heard: the rewards of all processes, which estimators and the guard need",
    ),
    "_get_per_token_logps_and_entropies": PrivateName(
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss, *)",
        "called with a policy in the model's place; heard while rollouts are scored, for their entropies",
    ),
    "_prepare_inputs": PrivateName("(self, generation_batch)", "overridden: a rollout batch that was cut is arranged"),
    "_compute_loss": PrivateName("(self, model, inputs)", "overridden, and called with a policy in the model's place"),
    "_get_train_sampler": PrivateName("(self, dataset)", "overridden: it can be put at the start of any epoch"),
    "_save_checkpoint": PrivateName(
        "(self, model, trial)", "overridden: bupo's part is written too, and all moved into place"
    ),
    "_push_from_checkpoint": PrivateName(
        "(self, checkpoint_folder)", "overridden: a checkpoint is pushed from its place"
    ),
    "_load_optimizer_and_scheduler": PrivateName(
        "(self, checkpoint)", "overridden: a resumed run takes up bupo's part"
    ),
    "_load_from_checkpoint": PrivateName(
        "(self, resume_from_checkpoint, model)", "overridden: weights that are saved under other names are loaded too"
    ),
    "_load_best_model": PrivateName("(self)", "overridden: weights that are saved under other names are loaded too"),
    "_get_output_dir": PrivateName("(self, trial)", "overridden: a checkpoint is written beside its place"),
    "_run_epoch": PrivateName(
        "(self, *)", "overridden: a finished run that is resumed trains nothing more; passes over a stream are counted"
    ),
    "_maybe_log_save_evaluate": PrivateName(
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)",
        "overridden and called: the end of an epoch that a kill has cut off is made up for",
    ),
    "_load_rng_state": PrivateName(
        "(self, checkpoint)", "overridden and called: for the end of an epoch that is made up for"
    ),
    "_evaluate": PrivateName("(self, *)", "overridden: `eval_on_start` is of the start, not of a resumed run"),
    "_determine_best_metric": PrivateName(
        "(self, metrics, trial)", "overridden: an evaluation may have graded no answer"
    ),
    "_tr_loss": PrivateName("", "read and set: the loss since the last log"),
    "_total_loss_scalar": PrivateName("", "read and set: the losses of all logs, for `train_loss`"),
    "_globalstep_last_logged": PrivateName("", "read and set: what the loss of the next log is the mean over"),
    "_initial_global_step": PrivateName("", "read and set: what `train_loss` is the mean over"),
    "_get_learning_rate": PrivateName("(self)", "called: for messages"),
    "_step": PrivateName("", "read and set: forward and backward passes done, which decide the rollout batch"),
    "_buffered_inputs": PrivateName("", "read and set: the rollout batch in its pieces, which a checkpoint keeps"),
    "_metrics": PrivateName("", "read and added to: what the next log holds"),
    "_logs": PrivateName("", "read and set: the table of completions, and the advantages in it"),
    "_entropy_window_stats": PrivateName(
        "", "read: whether an update has a token, for the adaptive entropy coefficient"
    ),
    "_last_world_entropy": PrivateName("", "set back after an update without a token"),
    "_is_vlm": PrivateName("", "read: models with images are refused"),
    "_tag_names": PrivateName("", "overridden: tags of the model card"),
}

# of accelerate's AcceleratorState, which keeps the mixed precision of a process' first trainer for all later ones
ACCELERATE_PRIVATE_NAMES = {
    "_shared_state": "read: the mixed precision of an earlier trainer",
    "_reset_state": "called where this run has another, as new arguments of transformers do",
}

# public in name, but in no library's documented interface: where they are, and their parameters
UNDOCUMENTED_FUNCTIONS = {
    "trl.models.utils.disable_gradient_checkpointing": "(model, gradient_checkpointing_kwargs)",
    "trl.trainer.grpo_trainer.create_model_from_path": "(model_id, architecture, kwargs)",
    "trl.trainer.utils.use_adapter": "(model, adapter_name)",
    "trl.trainer.utils.get_config_model_id": "(config)",
    "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func": (
        "(gate_logits, num_experts, top_k, attention_mask)"
    ),
}
# attributes of a GRPOTrainer that are read
TRAINER_ATTRIBUTES = (
    "num_generations", "num_iterations", "max_completion_length", "current_gradient_accumulation_steps", "reward_weights",
    "reward_func_names", "aux_loss_enabled", "ref_model", "processing_class", "is_fsdp_enabled", "is_deepspeed_enabled",
    "eos_token_ids", "generation_config", "use_vllm",
)  # fmt: skip
# what TRL's scoring and sampling leave in the dict that the loss reads, at the least
ROLLOUT_KEYS = (
    "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
    "old_per_token_logps", "ref_per_token_logps",  # where there are several updates, or a KL penalty
)  # fmt: skip
# metrics of TRL's that bupo reads, moves or draws
TRL_METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "clip_ratio/region_mean", "step_time", "completions/mean_length",
    "completions/clipped_ratio", "num_tokens",
)  # fmt: skip
