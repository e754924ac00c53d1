"""Support of BuPOTrainer for each option of GRPOConfig and each argument of GRPOTrainer, with values to test.

`tests/training/test_trl_parity.py` trains each row in both phases, and fails if TRL has an option without a row. The documentation site shows the same table.
"""

from typing import Any, NamedTuple

TRAINS, REFUSED, ELSEWHERE = "trains", "refused", "not by these tests"


class Row(NamedTuple):
    """Support for an option.

    Attributes:
        outcome (`str`): `trains`, `refused`, or `not by these tests` for an option with other requirements.
        options (`dict`): values to test, including the option's; for a refused option, the refused values.
        why (`str`): reason of a refusal or a missing test, or a note on phase 1.
    """

    outcome: str
    options: dict[str, Any]
    why: str = ""


def trains(why: str = "", **options) -> Row:
    return Row(TRAINS, options, why)


def refused(why: str, **options) -> Row:
    return Row(REFUSED, options, why)


def elsewhere(why: str) -> Row:
    return Row(ELSEWHERE, {}, why)


VLLM = elsewhere("needs vLLM: `make test-vllm`")
VLLM_GPU = elsewhere("needs vLLM and a GPU")
VLLM_ONLY = "read with `use_vllm` alone"
SEVERAL = elsewhere("needs several processes: `pytest tests/training/test_distributed.py`")
HUB = elsewhere("needs the hub")
KL: dict[str, Any] = {"beta": 0.1}
EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
ENTROPY = "the entropy is that of the optimised policy: in phase 1 the layer's"
ADAPTIVE: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_coef": 0.01}
COMPILED = elsewhere("compiles for minutes")
LOG_PROBS = "the log-probs are those of the optimised policy: in phase 1 the layer's"

OPTIONS: dict[str, Row] = {
    # GRPO
    "model_init_kwargs": trains("for a model by name", model_init_kwargs={"dtype": "float32"}),
    "trust_remote_code": trains(trust_remote_code=True),
    "router_aux_loss_coef": trains("the layers that run, in phase 1 those up to l", router_aux_loss_coef=0.1),
    "disable_dropout": trains(disable_dropout=True),
    "cast_lm_head_to_fp32": trains(cast_lm_head_to_fp32=True),
    "num_generations": trains(num_generations=2),
    "num_generations_eval": trains(num_generations_eval=2, **EVALUATION),
    "max_completion_length": trains(max_completion_length=3),
    "ds3_gather_for_generation": elsewhere("of DeepSpeed ZeRO-3, which is refused"),
    "shuffle_dataset": trains(shuffle_dataset=False),
    "pad_to_multiple_of": trains(pad_to_multiple_of=4),
    "generation_batch_size": trains(generation_batch_size=8, steps_per_generation=None),
    "steps_per_generation": trains("a rollout batch must be whole updates", steps_per_generation=4, max_steps=4),
    "temperature": trains(temperature=0.7),
    "top_p": trains(top_p=0.9),
    "top_k": trains(top_k=20),
    "min_p": trains(min_p=0.01),
    "generation_kwargs": trains(generation_kwargs={"suppress_tokens": [5]}),
    "chat_template_kwargs": trains(chat_template_kwargs={"enable_thinking": False}),
    "repetition_penalty": trains(repetition_penalty=1.1),
    "cache_implementation": trains(cache_implementation="dynamic"),
    "use_vllm": VLLM,
    **dict.fromkeys(("vllm_mode", "vllm_structured_outputs_regex", "vllm_max_model_length"), VLLM),
    **dict.fromkeys(("vllm_model_impl", "vllm_enable_sleep_mode"), VLLM_GPU),
    **dict.fromkeys(
        ("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        VLLM,
    ),
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size"), VLLM_GPU),
    "vllm_importance_sampling_correction": trains(
        f"{VLLM_ONLY}; it compares the full model with the sampler, in both phases",
        vllm_importance_sampling_correction=False,
    ),
    "vllm_importance_sampling_mode": trains(VLLM_ONLY, vllm_importance_sampling_mode="token_truncate"),
    "vllm_importance_sampling_clip_max": trains(VLLM_ONLY, vllm_importance_sampling_clip_max=2.0),
    "vllm_importance_sampling_clip_min": trains(VLLM_ONLY, vllm_importance_sampling_clip_min=0.5),
    "vllm_importance_sampling_cap": trains(VLLM_ONLY, vllm_importance_sampling_cap=2.0),
    "beta": trains("the reference is the reference model's layer policy in phase 1", **KL),
    "num_iterations": trains(num_iterations=2, max_steps=4),
    "epsilon": trains(epsilon=0.1),
    "delta": trains(delta=2.0),
    "epsilon_high": trains(epsilon_high=0.28),
    "sapo_temperature_neg": trains(loss_type="sapo", sapo_temperature_neg=1.2),
    "sapo_temperature_pos": trains(loss_type="sapo", sapo_temperature_pos=1.2),
    "vespo_k_pos": trains(loss_type="vespo", vespo_k_pos=1.5),
    "vespo_lambda_pos": trains(loss_type="vespo", vespo_lambda_pos=2.0),
    "vespo_k_neg": trains(loss_type="vespo", vespo_k_neg=2.0),
    "vespo_lambda_neg": trains(loss_type="vespo", vespo_lambda_neg=1.5),
    "importance_sampling_level": trains(importance_sampling_level="sequence", loss_type="grpo"),
    "reward_weights": trains(reward_weights=[0.5]),
    "multi_objective_aggregation": trains(multi_objective_aggregation="normalize_then_sum"),
    "scale_rewards": trains(scale_rewards="batch"),
    "loss_type": trains("each of TRL's: `pytest tests/training/test_trainer.py`", loss_type="dr_grpo"),
    "mask_truncated_completions": trains(mask_truncated_completions=True),
    "sync_ref_model": trains(sync_ref_model=True, ref_model_sync_steps=1, **KL),
    "ref_model_mixup_alpha": trains(sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=1, **KL),
    "ref_model_sync_steps": trains(sync_ref_model=True, ref_model_sync_steps=2, **KL),
    "top_entropy_quantile": trains(ENTROPY, top_entropy_quantile=0.5),
    "entropy_coef": trains(ENTROPY, entropy_coef=0.01),
    "use_adaptive_entropy": trains(ENTROPY, **ADAPTIVE),
    "entropy_coef_min": trains(ENTROPY, entropy_coef_min=0.005, **ADAPTIVE),
    "entropy_coef_max": trains(ENTROPY, entropy_coef_max=0.5, **ADAPTIVE),
    "entropy_coef_delta": trains(ENTROPY, entropy_coef_delta=0.001, **ADAPTIVE),
    "entropy_target": trains(ENTROPY, entropy_target=9.0, **ADAPTIVE),
    "max_tool_calling_iterations": trains(max_tool_calling_iterations=1),
    "off_policy_mask_threshold": trains(LOG_PROBS, off_policy_mask_threshold=0.001),
    "use_bias_correction_kl": trains(use_bias_correction_kl=False, **KL),
    "log_completions": trains(log_completions=True),
    "log_multimodal": trains(log_multimodal=False),
    "num_completions_to_print": trains(num_completions_to_print=1, log_completions=True),
    "log_unique_prompts": trains(log_unique_prompts=True, log_completions=True),
    "log_completions_hub_repo": HUB,
    "use_transformers_continuous_batching": elsewhere("needs paged attention on an accelerator"),
    "transformers_continuous_batching_config": elsewhere("needs paged attention on an accelerator"),
    "use_transformers_paged": elsewhere("needs paged attention on an accelerator"),
    # transformers: length, optimizer, precision
    "output_dir": trains(),
    "per_device_train_batch_size": trains(per_device_train_batch_size=8),
    "num_train_epochs": trains(num_train_epochs=2, max_steps=-1),
    "max_steps": trains(max_steps=1),
    "learning_rate": trains(learning_rate=1e-4),
    "lr_scheduler_type": trains(lr_scheduler_type="cosine"),
    "lr_scheduler_kwargs": trains(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}),
    "warmup_steps": trains(warmup_steps=1),
    "optim": trains(optim="adafactor"),
    "optim_args": trains(optim_args="foreach=False", optim="adamw_torch"),
    "optim_target_modules": elsewhere("of GaLore and APOLLO, separate packages"),
    "weight_decay": trains("parameters without a gradient keep their values", weight_decay=0.1),
    "adam_beta1": trains(adam_beta1=0.8),
    "adam_beta2": trains(adam_beta2=0.9),
    "adam_epsilon": trains(adam_epsilon=1e-6),
    "gradient_accumulation_steps": trains(gradient_accumulation_steps=2),
    "average_tokens_across_devices": trains(average_tokens_across_devices=False),
    "max_grad_norm": trains(max_grad_norm=0.1),
    "label_smoothing_factor": trains(label_smoothing_factor=0.1),
    "bf16": trains(bf16=True, optim="sgd", learning_rate=0.1),
    "fp16": elsewhere("needs a GPU"),
    "bf16_full_eval": trains(bf16_full_eval=True),
    "fp16_full_eval": elsewhere("needs a GPU"),
    "tf32": elsewhere("needs a GPU"),
    "activation_checkpointing": trains(activation_checkpointing=True),
    "activation_checkpointing_kwargs": trains(
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False}
    ),
    "gradient_checkpointing": trains(gradient_checkpointing=True),
    "gradient_checkpointing_kwargs": trains(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "use_liger_kernel": elsewhere("needs liger-kernel and a GPU"),
    "liger_kernel_config": elsewhere("needs liger-kernel and a GPU"),
    "use_cache": trains(use_cache=True),
    "neftune_noise_alpha": trains(neftune_noise_alpha=0.1),
    "torch_empty_cache_steps": trains(torch_empty_cache_steps=1),
    "auto_find_batch_size": refused("groups of a prompt's answers must stay whole (TRL)", auto_find_batch_size=True),
    # logs, evaluation, saving
    "logging_strategy": trains(logging_strategy="epoch"),
    "logging_steps": trains("by default once a rollout batch", logging_steps=1),
    "logging_first_step": trains(logging_first_step=True),
    "log_on_each_node": trains(log_on_each_node=False),
    "logging_nan_inf_filter": trains(logging_nan_inf_filter=False),
    "include_num_input_tokens_seen": trains(include_num_input_tokens_seen="no"),
    "log_level": trains(log_level="error"),
    "log_level_replica": trains(log_level_replica="error"),
    "disable_tqdm": trains(disable_tqdm=True),
    "report_to": trains(report_to="none"),
    "run_name": trains(run_name="a name"),
    **dict.fromkeys(("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), HUB),
    "eval_strategy": trains("evaluation samples the full model in both phases", **EVALUATION),
    "eval_steps": trains(**{**EVALUATION, "eval_steps": 1}),
    "eval_delay": trains(eval_delay=1, **EVALUATION),
    "per_device_eval_batch_size": trains(**{**EVALUATION, "per_device_eval_batch_size": 8}),
    "prediction_loss_only": trains(prediction_loss_only=True, **EVALUATION),
    "eval_on_start": trains(eval_on_start=True, **EVALUATION),
    "eval_do_concat_batches": trains(eval_do_concat_batches=False, **EVALUATION),
    "eval_use_gather_object": trains(eval_use_gather_object=True, **EVALUATION),
    "eval_accumulation_steps": trains(eval_accumulation_steps=1, **EVALUATION),
    "include_for_metrics": trains(include_for_metrics=["loss"], **EVALUATION),
    "batch_eval_metrics": trains(batch_eval_metrics=False),
    "save_only_model": trains(save_only_model=True, save_strategy="steps", save_steps=2),
    "save_strategy": trains(save_strategy="steps", save_steps=2),
    "save_steps": trains(save_strategy="steps", save_steps=1),
    "save_on_each_node": trains(save_on_each_node=True, save_strategy="steps", save_steps=2),
    "save_total_limit": trains(save_total_limit=1, save_strategy="steps", save_steps=1),
    "enable_jit_checkpoint": trains(enable_jit_checkpoint=False),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), HUB),
    "load_best_model_at_end": trains(
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        save_strategy="steps",
        save_steps=2,
        **EVALUATION,
    ),
    "metric_for_best_model": trains(metric_for_best_model="eval_reward", **EVALUATION),
    "greater_is_better": trains(metric_for_best_model="eval_reward", greater_is_better=True, **EVALUATION),
    "ignore_data_skip": refused("a resumed run would train on other problems", ignore_data_skip=True),
    "restore_callback_states_from_checkpoint": trains(restore_callback_states_from_checkpoint=True),
    # the machine, data, distribution
    "full_determinism": elsewhere("sets the algorithms of the process"),
    "seed": trains(seed=7),
    "data_seed": trains(data_seed=7),
    "use_cpu": trains(use_cpu=True),
    "accelerator_config": trains(accelerator_config={"even_batches": False}),
    "parallelism_config": elsewhere("needs several processes"),
    "dataloader_drop_last": trains(dataloader_drop_last=True),
    "dataloader_num_workers": trains(dataloader_num_workers=1),
    "dataloader_pin_memory": trains(dataloader_pin_memory=False),
    "dataloader_persistent_workers": trains(
        "turned off: workers restart each epoch, so that a resumed run draws the same random numbers",
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    ),
    "dataloader_prefetch_factor": trains(dataloader_num_workers=1, dataloader_prefetch_factor=2),
    "dataloader_multiprocessing_context": trains(dataloader_num_workers=1, dataloader_multiprocessing_context="fork"),
    "dataloader_in_order": trains(
        "`false` is refused with several workers: the order of problems would be chance", dataloader_in_order=True
    ),
    "remove_unused_columns": trains(remove_unused_columns=True),
    "label_names": trains(label_names=["labels"]),
    "train_sampling_strategy": trains(train_sampling_strategy="random"),
    "length_column_name": trains(length_column_name="length"),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), SEVERAL),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"), SEVERAL),
    "fsdp": elsewhere("needs several processes: `make test-fsdp2`"),
    "fsdp_config": elsewhere("needs several processes: `make test-fsdp2`"),
    "deepspeed": elsewhere("needs DeepSpeed: `make test-deepspeed`; ZeRO-3 is refused"),
    "debug": trains(debug=""),
    "skip_memory_metrics": trains(skip_memory_metrics=True),
    "do_train": trains(do_train=True),
    "do_eval": trains(do_eval=True),
    "do_predict": trains(do_predict=True),
    "resume_from_checkpoint": elsewhere("an option of scripts, which `train(resume_from_checkpoint=...)` takes"),
}

# arguments of GRPOTrainer.__init__; test_trl.py makes their values
ARGUMENTS: dict[str, Row] = {
    "model": trains("an object, a name or a PEFT model; a model that reads images is refused"),
    "reward_funcs": trains("functions, async ones, several, or reward models"),
    "args": refused("must be a BuPOConfig: the first phase has no default layer"),
    "train_dataset": trains("`Dataset` or `IterableDataset`"),
    "eval_dataset": trains("one or several by name"),
    "processing_class": trains("a tokenizer; a processor of images is refused"),
    "reward_processing_classes": trains("tokenizers of reward models"),
    "callbacks": trains(),
    "optimizers": trains("refused with `layer_lr_multipliers`"),
    "quantization_config": elsewhere("needs bitsandbytes and a GPU"),
    "peft_config": trains("in phase 1 the adapters up to layer l move"),
    "tools": trains("tool output is masked in both phases"),
    "rollout_func": trains(LOG_PROBS),
    "environment_factory": trains(),
}
