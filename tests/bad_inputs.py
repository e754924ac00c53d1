"""Bad inputs of every command, and what the one line of complaint must hold: the option or file, its value, what is allowed.

`FILES` are made once, in the folder that the commands run in. A row of `train` stands behind the flags of a run that would
train; its own flags go before those.
"""

import json
import shlex
from typing import NamedTuple

FAULTLESS = {
    "train": (
        "--model embedded --dataset arithmetic --size 64 --internal_layer 5 --internal_steps 1 --max_steps 4 "
        "--per_device_train_batch_size 8 --steps_per_generation 2 --num_generations 4 --max_new_tokens 28 "
        "--save_strategy no --output deep/er/out"
    ),
    "eval": "--benchmarks arithmetic --size 2 --k 1 --max_new_tokens 4 --output deep/er/out",
    "analyze": "--size 2 --max_new_tokens 4 --output deep/er/out",
    "sample": "--prompt 57+23-41",
    "demo": "--steps 1 --problems 4 --output deep/er/out",
    "report": "other-run --output deep/er/page.html",
}


class Bad(NamedTuple):
    """A command line that is refused.

    Attributes:
        words (`list[str]`): the whole command line.
        says (`tuple[str]`): what the line of complaint holds.
    """

    words: list[str]
    says: tuple[str, ...]


def bad(command: str, words: str, *says: str) -> Bad:
    """A row whose flags stand behind faultless ones."""
    return Bad([command, *shlex.split(FAULTLESS[command]), *shlex.split(words)], says)


def bare(line: str, *says: str) -> Bad:
    """A row that stands alone."""
    return Bad(shlex.split(line), says)


def each(command: str, option: str, values: str, *says: str) -> list[Bad]:
    """A row for each value of an option."""
    return [bad(command, f"--{option}={value}", option, *says) for value in values.split()]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def problems(count: int, **changes) -> str:
    return lines(*({"problem": f"{i}+11", "answer": str(i + 11), **changes} for i in range(10, 10 + count)))


FILES: dict[str, str | bytes] = {
    # data
    "good.jsonl": problems(64),
    "few.jsonl": problems(3),
    "latin.jsonl": '{"problem": "dix-huit gar\xe7ons", "answer": "18"}\n'.encode("latin-1"),
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"problem": "1+1", "answer": "2"}\n{"problem": \n',
    "binary.jsonl": b"\x00\xff\xfe\x01" * 64,
    "columns.jsonl": lines({"text": "1+1", "label": "2"}),
    "words.jsonl": problems(64, answer=""),
    "nan.jsonl": '{"problem": "1+1", "answer": NaN}\n' * 2,
    "inf.jsonl": '{"problem": "1+1", "answer": Infinity}\n' * 2,
    "null.jsonl": problems(64, answer=None),
    "mapping.jsonl": problems(64, answer={"value": 1}),
    "numbers.jsonl": problems(64, problem=7),
    "no-prompt.jsonl": problems(64, problem=""),
    "long.jsonl": problems(8) + lines({"problem": "1+1" * 3000, "answer": "2"}) + problems(8),
    "wrong.parquet": "no parquet at all",
    "cut.parquet": b"PAR1\x15\x04\x15",
    "list.json": "[1, 2, 3]",
    "number.json": "7",
    "data.csv": "problem,answer\n1+1,2\n",
    "folder.jsonl/keep": "",
    # rewards
    "syntax_reward.py": "def short(:\n",
    "name_reward.py": "undefined_name\ndef short(completions, **kwargs): return [0.0]\n",
    "raising_reward.py": "raise RuntimeError('the judge is not at home')\n",
    "leaving_reward.py": "import sys\nsys.exit(3)\n",
    "number_reward.py": "short = 7\n",
    # templates
    "syntax.jinja": "{% for message in messages %}{{ message.content }",
    "hostile.jinja": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "attribute.jinja": "{{ messages[0].nothing.more }}",
    "raises.jinja": "{{ raise_exception('only in Latin') }}",
    "empty.jinja": "",
    "latin.jinja": "Caf\xe9 {{ messages[0].content }}".encode("latin-1"),
    "ranges.jinja": "{% for i in range(10**12) %}x{% endfor %}",
    # models
    "no-config/keep": "",
    "broken-config/config.json": '{"model_type": "qwen3"',
    "list-config/config.json": "[]",
    "no-type/config.json": "{}",
    "strange-type/config.json": '{"model_type": "perpetuum_mobile"}',
    "adapter/adapter_config.json": "{}",
    "file-model": "x",
    "no-adapter/keep": "",
    # rollouts
    "binary-rollouts.jsonl": b"\x00\xff\xfe\x01" * 64,
    "null-rollouts.jsonl": "\x00\x00\n",
    "number-rollouts.jsonl": "7\n",
    "list-rollouts.jsonl": "[]\n",
    "string-rollouts.jsonl": '"prompt_ids"\n',
    "far-rollouts.jsonl": lines({"prompt_ids": [5, 6], "completion_ids": [7, 99999999]}),
    "negative-rollouts.jsonl": lines({"prompt_ids": [5, -6], "completion_ids": [7]}),
    "huge-rollouts.jsonl": lines({"prompt_ids": [5, 10**30], "completion_ids": [7]}),
    "word-rollouts.jsonl": lines({"prompt_ids": ["five"], "completion_ids": [7]}),
    "no-answer-rollouts.jsonl": lines({"prompt": "1+1", "completion": ""}),
    "user-rollouts.jsonl": lines({"messages": [{"role": "user", "content": "1+1"}]}),
    "messages-rollouts.jsonl": lines({"messages": "1+1"}),
    "number-prompt-rollouts.jsonl": lines({"prompt": 7, "completion": "8"}),
    "number-answer-rollouts.jsonl": lines({"prompt": "7", "completion": 8}),
    "surrogate-rollouts.jsonl": '{"prompt": "\\ud800", "completion": "8"}\n',
    "cut-rollouts.jsonl": '{"prompt": "1+1", "comp',
    "long-rollouts.jsonl": lines({"prompt": "1+1" * 300, "completion": "2"}),
    # runs
    "file": "x",
    "other-run/metrics.jsonl": '{"loss": 1}\n',
    "half-run/checkpoint-4/keep": "",
    "named-run/checkpoint-abc/trainer_state.json": "{}",
    "finished/summary.json": '{"benchmarks": {"arith',
    "numbers/summary.json": "7",
    "strangers/summary.json": '{"schema_version": 99, "benchmarks": {"math500": {}}}',
    "wordy/summary.json": '{"schema_version": "x", "benchmarks": {"arithmetic": {}}}',
    "older/summary.json": '{"schema_version": 1, "benchmarks": {"arithmetic": {}}}',
    "empty-numbers/summary.json": '{"schema_version": 3, "benchmarks": {"arithmetic": {}}}',
    "broken-run/evaluation.json": '{"max_new_tokens": 0}',
    "evaluated/arithmetic/samples.jsonl": lines(
        {"problem": 0, "sample": 0, "text": "7", "tokens": 2, "truncated": False}
    ),
    "kept-cut/arithmetic/settings.json": '{"problems": [',
    "kept-cut/arithmetic/answers.jsonl": "{}\n",
    "kept-bare/arithmetic/settings.json": "{}",
    "kept-none/keep": "",
    "analysis-cut/embedded/settings.json": '{"dtype',
    "analysis-cut/embedded/rollouts.jsonl": '{"problem": 0}\n',
    # YAML
    "twice.yaml": "internal_layer: 5\nseed: 1\nseed: 2\n",
    "nested-twice.yaml": "internal_layer: 5\nlr_scheduler_kwargs: {a: 1, a: 2}\n",
    "list.yaml": "- internal_layer: 5\n",
    "word.yaml": "internal_layer\n",
    "number.yaml": "7\n",
    "empty.yaml": "",
    "open.yaml": "internal_layer: [5\n",
    "tab.yaml": "internal_layer:\n\t5\n",
    "tag.yaml": "internal_layer: !!python/object/apply:os.getcwd []\n",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "date.yaml": "internal_layer: 2024-99-99\n",
    "digits.yaml": f"seed: {'9' * 5000}\n",
    "deep.yaml": "internal_schedule: " + "[" * 500 + "]" * 500 + "\n",
    "laughs.yaml": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(8))
    + "seed: *a8\n",
    "self.yaml": "seed: &me [*me]\n",
    "keys.yaml": "? [a, b]\n: 1\n",
    "number-key.yaml": "1: 2\n",
    "null-key.yaml": "~: 2\n",
    "env-list.yaml": "env: [A, B]\n",
    "env-null.yaml": 'env: {"A\\0": b}\n',
    "env-equals.yaml": "env: {A=B: c}\n",
    "mapping.yaml": "internal_layer: {a: 1}\n",
    "null-rate.yaml": "internal_layer: 5\nlearning_rate: null\n",
    "null-group.yaml": "internal_layer: 5\nnum_generations: null\n",
    "list-rate.yaml": "internal_layer: 5\nlearning_rate: [1.0e-5]\n",
    "true-rate.yaml": "internal_layer: 5\nlearning_rate: true\n",
    "float-seed.yaml": "internal_layer: 5\nseed: 1.5\n",
    "word-flag.yaml": "internal_layer: 5\nuse_peft: perhaps\n",
    "two-flag.yaml": "internal_layer: 5\nbf16: 2\n",
    "mapping-rewards.yaml": "internal_layer: 5\nreward_funcs: {a: 1}\n",
    "null-rewards.yaml": "internal_layer: 5\nreward_funcs: [null]\n",
    "string-rewards.yaml": "reward_funcs: my_rewards.short\n",
    "words-weights.yaml": "internal_layer: 5\nreward_weights: [a]\n",
    "nan-weights.yaml": "internal_layer: 5\nreward_weights: [.nan]\n",
    "list-kwargs.yaml": "internal_layer: 5\nlr_scheduler_kwargs: [1]\n",
    "both-names.yaml": "output: a\noutput_dir: b\n",
    "lens.yaml": "lens: zzz\n",
    "null-lens.yaml": "lens: null\n",
    "null-byte.yaml": 'output: "a\\0b"\n',
    "null-dataset.yaml": 'dataset: "a\\0b"\n',
    "null-model.yaml": 'model: "a\\0b"\n',
    "config-key.yaml": "config: a.yaml\n",
}

LONG = "x" * 300

MAIN = [
    bare("tran", "unknown command 'tran'", "train"),
    bare("--config a.yaml", "unknown command '--config'"),
    bare("train --config", "--config names no file"),
    bare("train --config=", "--config names no file"),
    bare("train --config a.yaml --config b.yaml", "--config is given twice"),
    bare("train --config absent.yaml", "absent.yaml", "cannot be read"),
    bare("train --config no-config", "no-config", "cannot be read"),
    bare(f"train --config {LONG}.yaml", "cannot be read"),
    bare("train --learning_rat 1", "unknown option 'learning_rat'", "learning_rate"),
    bare("eval --dataset x", "unknown option 'dataset'", "benchmarks"),
    bare("demo --step 3", "unknown option 'step'", "steps"),
    bare("train 7", "unknown option '7'"),
    bare("analyze --", "unknown option"),
    bare("train --model a --model_name_or_path b", "model", "both given"),
]

YAML = [
    bare("train --config twice.yaml", "seed is given twice in twice.yaml"),
    bare("train --config nested-twice.yaml", "a is given twice in nested-twice.yaml"),
    *(
        bare(f"train --config {name}.yaml", f"{name}.yaml must contain a YAML mapping")
        for name in ("list", "word", "number", "empty")
    ),
    *(
        bare(f"train --config {name}.yaml", f"{name}.yaml is no valid YAML")
        for name in ("open", "tab", "tag", "binary", "date", "digits", "deep", "keys")
    ),
    bare("train --config laughs.yaml", "seed must be one int, got [["),
    bare("train --config self.yaml", "seed must be one int"),
    bare("train --config number-key.yaml", "unknown option '1'"),
    bare("train --config null-key.yaml", "unknown option 'None'"),
    bare("train --config config-key.yaml", "unknown option 'config'"),
    bare("train --config env-list.yaml", "env of config file env-list.yaml must be a mapping"),
    bare("train --config env-null.yaml", "env of config file env-null.yaml"),
    bare("train --config env-equals.yaml", "env of config file env-equals.yaml"),
    bare("train --config mapping.yaml", "internal_layer must be a layer from 1 up, or auto"),
    bare("train --config null-rate.yaml", "learning_rate must be set"),
    bare("train --config null-group.yaml", "num_generations must be 2 or more, got None"),
    bare("train --config list-rate.yaml", "learning_rate must be one float, got [1e-05]"),
    bare("train --config true-rate.yaml", "learning_rate must be one float, got True"),
    bare("train --config float-seed.yaml", "seed must be one int, got 1.5"),
    bare("train --config word-flag.yaml", "use_peft"),
    bare("train --config two-flag.yaml", "bf16 must be true or false, got 2"),
    bad("train", "--config mapping-rewards.yaml", "reward_funcs must be a list"),
    bad("train", "--config null-rewards.yaml", "reward_funcs must be text, got None"),
    bad("train", "--config string-rewards.yaml", "'my_rewards.short' cannot be imported", "No module named"),
    bad("train", "--config words-weights.yaml", "reward_weights must be a number, got 'a'"),
    bad("train", "--config nan-weights.yaml", "reward_weights must be a finite number, got nan"),
    bad("train", "--config list-kwargs.yaml", "lr_scheduler_kwargs must be a mapping"),
    bare("train --config both-names.yaml", "output", "both given"),
    bare("analyze --config lens.yaml", "lens must be raw or final_norm, got 'zzz'"),
    bare("analyze --config null-lens.yaml", "lens must be set"),
    bare("analyze --config null-byte.yaml", "output", "byte"),
    bare("analyze --config null-dataset.yaml", "dataset", "byte"),
    bare("sample --prompt 1 --config null-model.yaml", "model", "byte"),
]

TRAINING_NUMBERS = [
    *each("train", "learning_rate", "-1 nan inf", "must be 0 or more"),
    *each("train", "learning_rate", "x", "invalid float value: 'x'"),
    *(
        row
        for option in (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("steps_per_generation", "num_iterations", "max_new_tokens", "ref_model_sync_steps", "probe_answers"),
            *("eval_every", "eval_k", "eval_problems", "frozen_up_to_layer", "slow_above_layer"),
        )
        for row in (
            *each("train", option, "0 -1", "must be 1 or more")[option == "max_new_tokens" and 2 :],
            *each("train", option, "1.5", "invalid int value: '1.5'")[option == "max_new_tokens" and 1 :],
        )
    ),
    bad("train", "--max_new_tokens 0", "max_completion_length must be 1 or more, got 0"),
    bad("train", "--per_device_train_batch_size 10000000000", "must be 1 or more and at most"),
    *each("train", "num_generations", "0 1 -3", "must be 2 or more"),
    *each("train", "num_generations", "3", "must be divisible by num_generations (3)"),
    bad("train", "--gradient_accumulation_steps 3", "gradient_accumulation_steps=3 does not divide"),
    bad("train", "--generation_batch_size 16", "generation_batch_size", "steps_per_generation"),
    bad("train", "--max_steps -1 --num_train_epochs 0", "num_train_epochs must be positive, got 0"),
    bad("train", "--max_steps -1 --num_train_epochs=-2", "num_train_epochs must be positive, got -2"),
    *each("train", "num_train_epochs", "nan inf", "finite number"),
    *each("train", "warmup_steps", "-1 nan inf", "must be 0 or more"),
    *each("train", "weight_decay", "-1 nan", "must be 0 or more"),
    *each("train", "adam_beta1", "1 -0.1 nan", "must lie from 0 to below 1"),
    *each("train", "adam_beta2", "1.5", "must lie from 0 to below 1"),
    *each("train", "adam_epsilon", "-1 nan", "must be 0 or more"),
    *each("train", "max_grad_norm", "nan", "must be a number"),
    *each("train", "seed", "-1 4294967296", "must lie from 0 to 4294967295"),
    *each("train", "temperature", "0 -1 nan inf", "must be positive"),
    *each("train", "top_p", "0 -1 2 nan", "must lie above 0 and up to 1"),
    *each("train", "top_k", "-5", "must be -1 or more"),
    *each("train", "min_p", "2 -1 nan", "must lie from 0 to 1"),
    *each("train", "repetition_penalty", "0 -1 nan inf", "must be positive"),
    *each("train", "beta", "-1 nan inf", "must be 0 or more"),
    *each("train", "epsilon", "-1 nan", "must be 0 or more"),
    *each("train", "epsilon_high", "-1 nan", "must be 0 or more"),
    *each("train", "delta", "0 nan", "must be positive"),
    *each("train", "top_entropy_quantile", "1.5 nan", "must lie from 0 to 1"),
    *each("train", "ref_model_mixup_alpha", "2", "must lie from 0 to 1"),
    *each("train", "entropy_coef", "nan", "finite number"),
    *each("train", "sapo_temperature_pos", "0", "must be positive"),
    *each("train", "router_aux_loss_coef", "-1 nan", "must be 0 or more"),
    *each("train", "logging_steps", "0 -1 nan", "must be positive"),
    *each("train", "logging_steps", "1.5", "a share of the run below 1"),
    bad("train", "--save_strategy steps --save_steps 0", "save_steps must be positive, got 0"),
    bad("train", "--save_strategy steps --save_steps=-3", "save_steps must be positive, got -3"),
    bad("train", "--save_strategy steps --save_steps inf", "save_steps must be positive and finite"),
    bad("train", "--save_strategy steps --save_steps 2.5", "save_steps must be a whole number"),
    bad("train", "--eval_strategy steps --eval_steps=-1", "eval_steps must be positive"),
    *each("train", "dataloader_num_workers", "-1", "must be 0 or more"),
    *each("train", "ddp_timeout", "0", "must be 1 or more"),
    *each("train", "torch_empty_cache_steps", "0", "must be 1 or more"),
    *each("train", "eval_accumulation_steps", "0", "must be 1 or more"),
    *each("train", "pad_to_multiple_of", "0 zzz", "auto or none"),
    *each("train", "vllm_gpu_memory_utilization", "0 2", "must lie above 0 and up to 1"),
    *each("train", "vllm_server_port", "70000", "must lie from 0 to 65535"),
    *each("train", "critic_learning_rate", "0 -1 nan", "must be positive"),
    *each("train", "value_clip", "0 nan", "must be positive"),
    *each("train", "gae_lambda", "1.5 nan", "must lie from 0 to 1"),
    *each("train", "slow_factor", "2 nan", "must lie from 0 to 1"),
    *each("train", "lora_r", "0", "must be 1 or more"),
    *each("train", "lora_dropout", "2 nan", "must lie from 0 to 1"),
    *each("train", "size", "0 -4", "must be 1 or more"),
    *each("train", "size", "100000000", "must be at most 10000000"),
    *each("train", "shuffle_seed", "-1", "must be 0 or more"),
    *each("train", "max_prompt_tokens", "0 -4", "must be 1 or more"),
    *each("train", "eval_size", "0", "must be 1 or more"),
]

TRAINING_WORDS = [
    bad("train", "--internal_layer 0", "internal_layer must be a layer from 1 up, or auto, got 0"),
    bad("train", "--internal_layer=-2", "internal_layer must be a layer from 1 up, or auto, got -2"),
    bad("train", "--internal_layer abc", "internal_layer must be a layer from 1 up, or auto, got 'abc'"),
    bad("train", "--internal_layer 2.5", "internal_layer must be a layer from 1 up, or auto, got '2.5'"),
    bad("train", "--internal_layer 9", "internal_layer: layer 9 does not exist: embedded has layers 1 to 8"),
    bad("train", "--frozen_up_to_layer 9 --internal_steps 0", "frozen_up_to_layer: layer 9 does not exist"),
    bad("train", "--slow_above_layer 9", "slow_above_layer: layer 9 does not exist"),
    bad("train", "--frozen_up_to_layer 5", "frozen_up_to_layer=5", "no layer to train"),
    bad("train", "--internal_schedule [[2,3]]", "internal_schedule and internal_layer"),
    bare("train --internal_schedule [[2,0]]", "internal_schedule must be a list of [layer, rollout batches]"),
    bare("train --internal_schedule zzz", "internal_schedule", "zzz"),
    bare("train --model embedded --dataset arithmetic --internal_schedule [[9,1]]", "internal_schedule: layer 9"),
    bare("train --model embedded --dataset arithmetic", "internal_layer is not set"),
    bare("train --internal_layer auto --internal_steps 0", "internal_layer auto", "internal_steps is 0"),
    *each("train", "internal_steps", "-1", "must be 0 or more"),
    *each("train", "internal_lens", "zzz", "invalid choice: 'zzz'"),
    *each("train", "internal_module", "zzz", "invalid choice: 'zzz'"),
    *each("train", "advantage_estimator", "zzz", "invalid choice: 'zzz'"),
    *each("train", "critic_backbone", "zzz", "invalid choice: 'zzz'"),
    *each("train", "loss_type", "zzz", "must be", "grpo", "got 'zzz'"),
    *each("train", "importance_sampling_level", "zzz", "must be token or sequence"),
    *each("train", "scale_rewards", "foo", "must be group, batch or none, got 'foo'"),
    *each("train", "multi_objective_aggregation", "foo", "sum_then_normalize"),
    *each("train", "vllm_mode", "foo", "must be colocate or server"),
    *each("train", "vllm_model_impl", "foo", "must be auto, vllm, transformers or terratorch"),
    *each("train", "optim", "zzz", "invalid choice: 'zzz'", "adamw_torch"),
    *each("train", "optim", "adamw_bnb_8bit", "bitsandbytes"),
    *each("train", "optim", "lomo", "lomo"),
    *each("train", "optim_args", "zzz", "is refused"),
    *each("train", "lr_scheduler_type", "zzz", "invalid choice: 'zzz'", "linear"),
    *each("train", "lr_scheduler_type", "warmup_stable_decay", "num_decay_steps"),
    *each("train", "lr_scheduler_kwargs", "zzz {", "must be a mapping, as JSON on the command line"),
    bad("train", "--lr_scheduler_kwargs '{\"zzz\": 1}'", "lr_scheduler_kwargs", "zzz"),
    *each("train", "generation_kwargs", "zzz", "must be a mapping"),
    bad("train", "--generation_kwargs '{\"zzz\": 1}'", "generation_kwargs holds 'zzz'"),
    *each("train", "chat_template_kwargs", "zzz", "must be a mapping"),
    *each("train", "model_init_kwargs", "zzz", "must be a mapping"),
    bad("train", "--model_init_kwargs '{\"zzz\": 1}'", "embedded", "zzz"),
    *each("train", "gradient_checkpointing_kwargs", "zzz", "must be a mapping"),
    bad("train", "--gradient_checkpointing_kwargs '{\"zzz\": 1}'", "gradient_checkpointing_kwargs", "zzz"),
    *each("train", "accelerator_config", "zzz", "JSON file"),
    bad("train", "--accelerator_config '{\"zzz\": 1}'", "zzz"),
    *each("train", "cache_implementation", "zzz", "zzz", "dynamic"),
    *each("train", "eval_strategy", "zzz", "invalid choice: 'zzz'", "epoch"),
    *each("train", "save_strategy", "zzz", "invalid choice: 'zzz'", "best"),
    *each("train", "hub_strategy", "zzz", "every_save"),
    *each("train", "log_level", "zzz", "invalid choice"),
    *each("train", "debug", "zzz", "invalid DebugOption value: 'zzz'"),
    *each("train", "report_to", "zzz", "zzz is not supported"),
    *each("train", "report_to", "wandb", "wandb to be installed"),
    *each("train", "deepspeed", "zzz", "deepspeed needs the package"),
    *each("train", "use_vllm", "true", "use_vllm needs the package vllm"),
    *each("train", "use_liger_kernel", "true", "use_liger_kernel needs the package"),
    *each("train", "load_in_4bit", "true", "load_in_4bit needs the package bitsandbytes"),
    bad("train", "--load_in_4bit true --load_in_8bit true", "8 bit and 4 bit"),
    *each("train", "use_vllm", "perhaps", "perhaps"),
    *each("train", "torch_compile_backend", "zzz", "ZZZ"),
    *each("train", "tf32", "true", "Ampere"),
    *each("train", "fsdp", "zzz", "zzz"),
    *each("train", "dtype", "zzz", "invalid choice"),
    *each("train", "attn_implementation", "zzz", "zzz"),
    bad("train", "--use_peft --lora_task_type zzz", "lora_", "zzz"),
    bad("train", "--use_peft --lora_target_modules zzz", "zzz"),
    bad("train", "--push_to_hub", "push_to_hub true needs the hub"),
    bad("train", "--sync_ref_model", "sync_ref_model true", "beta is 0"),
    bad("train", "--dataloader_prefetch_factor 2", "dataloader_prefetch_factor", "dataloader_num_workers"),
    bad("train", "--auto_find_batch_size", "auto_find_batch_size is not supported"),
    bad("train", "--load_best_model_at_end --save_strategy steps", "load_best_model_at_end"),
    bad("train", "--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau requires an eval strategy"),
    bad("train", "--fp16 --bf16 true", "fp16 and bf16"),
    bad("train", "--fp16 --advantage_estimator ppo", "advantage_estimator ppo", "fp16"),
    bad("train", "--advantage_estimator rloo --scale_rewards batch", "scale_rewards='batch' is grpo's"),
    bad("train", "--log_completions_hub_repo a/b", "log_completions_hub_repo"),
    bad("train", "--reward_weights 1 2", "reward_weights holds 2 weights for 1 reward_funcs"),
    bad("train", "--reward_weights nan", "reward_weights must be a finite number"),
    bad("train", "--reward_weights", "reward_weights", "expected at least one argument"),
    bad("train", "--learning_rate", "learning_rate", "expected one argument"),
    bad("train", "--eval_benchmarks zzz", "unknown benchmark 'zzz'"),
    bad("train", "--eval_strategy steps --per_device_eval_batch_size 3", "must be divisible", "(4)"),
]

TRAINING_FILES = [
    bare("train --model embedded --internal_layer 5 --output deep/er/out", "dataset is not set"),
    bare("train --dataset arithmetic --internal_layer 5 --output deep/er/out", "model is not set"),
    *each("train", "dataset", "''", "is empty"),
    bad("train", "--dataset absent.jsonl", "absent.jsonl is no file"),
    bad("train", "--dataset nobody/nothing", "dataset 'nobody/nothing'", "cannot be loaded"),
    bad("train", f"--dataset {LONG}", "dataset", "xxx"),
    bad("train", "--dataset no-config", "no-config is no file"),
    bad("train", "--dataset folder.jsonl", "folder.jsonl is no file"),
    bad("train", "--dataset data.csv", "data.csv is no .parquet"),
    bad("train", "--dataset empty.jsonl", "empty.jsonl is empty"),
    *(
        bad("train", f"--dataset {name}", name)
        for name in ("blank.jsonl", "latin.jsonl", "broken.jsonl", "binary.jsonl")
    ),
    *(bad("train", f"--dataset {name}", name) for name in ("wrong.parquet", "cut.parquet", "list.json", "number.json")),
    bad("train", "--dataset columns.jsonl", "no prompt column", "text, label"),
    bad("train", "--dataset good.jsonl --prompt_column zzz", "no prompt column zzz"),
    bad("train", "--dataset good.jsonl --answer_column answer.deep", "no answer column answer.deep"),
    bad("train", "--dataset words.jsonl", "row 0: the answer is empty"),
    bad("train", "--dataset null.jsonl", "row 0: the answer is empty"),
    bad("train", "--dataset mapping.jsonl", "row 0: the answer is no text"),
    bad("train", "--dataset numbers.jsonl", "row 0: the prompt is no text"),
    bad("train", "--dataset no-prompt.jsonl", "row 0: the prompt is no text", "or is empty"),
    bad("train", "--dataset nan.jsonl", "nan.jsonl"),
    bad("train", "--dataset inf.jsonl", "inf.jsonl"),
    bad("train", "--dataset bools.parquet --answer_column deep", "row 0"),
    bad("train", "--dataset few.jsonl", "holds 3 problems, and a rollout batch takes 4"),
    bad("train", "--max_prompt_length 3", "unknown option 'max_prompt_length': did you mean 'max_prompt_tokens'?"),
    bad("train", "--shuffle_seed 1", "shuffle_seed is 1", "arithmetic are made at random, by seed: leave it out"),
    bad("train", "--max_prompt_tokens 3", "max_prompt_tokens 3 leaves 0 of 64 problems", "a rollout batch takes 4"),
    bad("train", "--size 3", "holds 3 problems, and a rollout batch takes 4", "per_device_train_batch_size 8"),
    bad("train", "--steps_per_generation 64", "a rollout batch takes 128"),
    bad("train", "--model learned --dataset long.jsonl", "the dataset, row 8: the prompt has", "context of 512"),
    bad("train", "--split zzz", "splits train and test, not 'zzz'"),
    bad("train", "--dataset reasoning_gym:nope", "reasoning_gym:nope cannot be made"),
    bad("train", "--dataset reasoning_gym:chain_sum --dataset_config zzz", "with zzz"),
    bad("train", "--dataset reasoning_gym:chain_sum --dataset_config '{\"zzz\": 1}'", "zzz"),
    bad("train", "--eval_strategy steps --per_device_eval_batch_size 4 --eval_split zzz", "not 'zzz'"),
    bad("train", "--eval_strategy steps --per_device_eval_batch_size 4 --eval_dataset absent.jsonl", "absent.jsonl"),
    bad("train", "--reward_funcs nope", "unknown reward function 'nope'"),
    bad("train", "--reward_funcs ''", "unknown reward function ''"),
    bad("train", "--reward_funcs os.path", "'os.path' is a module"),
    bad("train", "--reward_funcs no_module.f", "No module named 'no_module'"),
    bad("train", "--reward_funcs json.nope", "'json.nope' cannot be imported"),
    bad("train", "--reward_funcs syntax_reward.short", "SyntaxError"),
    bad("train", "--reward_funcs name_reward.short", "NameError"),
    bad("train", "--reward_funcs raising_reward.short", "the judge is not at home"),
    bad("train", "--reward_funcs leaving_reward.short", "SystemExit"),
    bad("train", "--reward_funcs number_reward.short", "'number_reward.short' is a int"),
    bad("train", "--reward_funcs .f", "'.f'"),
    bad("train", "--reward_funcs a..f", "'a..f'"),
    *(
        bad("train", f"--chat_template {name}.jinja", "template")
        for name in ("syntax", "hostile", "attribute", "raises", "ranges")
    ),
    bad("train", "--chat_template empty.jinja", "empty"),
    bad("train", "--chat_template latin.jinja", "chat_template 'latin.jinja' cannot be read"),
    bad("train", "--chat_template absent.jinja", "chat_template must be qwen-math"),
    bad("train", "--chat_template no-config", "chat_template must be qwen-math"),
    bad("train", f"--chat_template {LONG}.jinja", "chat_template", "xxx"),
    bad("train", "--model ''", "model is empty"),
    bad("train", "--model nobody/nothing", "model 'nobody/nothing'", "cannot be loaded"),
    bad("train", "--model /no/such/folder", "/no/such/folder does not exist"),
    bad("train", f"--model {LONG}", "model", "xxx"),
    bad("train", "--model file-model", "file-model is a file"),
    bad("train", "--model no-config", "no-config holds no model"),
    bad("train", "--model adapter", "adapter holds an adapter"),
    *(bad("train", f"--model {name}", name) for name in ("broken-config", "list-config", "no-type", "strange-type")),
    bad("train", "--model no-tokenizer", "'no-tokenizer' has no tokenizer"),
    bad("train", "--model cut-weights", "'cut-weights' cannot be loaded"),
    bad("train", "--model no-weights", "'no-weights' cannot be loaded"),
    bad("train", "--model encoder", "'encoder' is no causal language model: it is a BertModel"),
    bad("train", "--model nobody/nothing --revision zzz", "nobody/nothing"),
    bad("train", "--output ''", "output is empty"),
    bad("train", "--output file", "output file is a file"),
    bad("train", "--output file/below", "output 'file/below' cannot be a folder"),
    bad("train", f"--output {LONG}", "output", "too long"),
    bad("train", f"--output a/{LONG}/b", "output", "too long"),
    bad("train", "--output /proc/nobody", "/proc/nobody cannot be written"),
    bad("train", "--output other-run", "other-run holds a run (metrics.jsonl)"),
    bad("train", "--resume_from_checkpoint /no/checkpoint", "/no/checkpoint"),
    bad("train", "--resume_from_checkpoint ''", "resume_from_checkpoint"),
    bad("train", "--resume_from_checkpoint file", "file"),
    bad("train", f"--resume_from_checkpoint {LONG}", "resume_from_checkpoint", "no such folder"),
]

EVAL = [
    *each("eval", "k", "0 -1", "must be 1 or more"),
    *each("eval", "size", "0", "must be 1 or more"),
    *each("eval", "max_new_tokens", "0", "must be 1 or more"),
    *each("eval", "batch_size", "0 -2", "must be 1 or more"),
    *each("eval", "temperature", "-1 nan inf", "must be 0 or more"),
    *each("eval", "top_p", "0 2 nan", "must lie above 0 and up to 1"),
    *each("eval", "seed", "-1", "must lie from 0"),
    *each("eval", "layer", "0 -1", "must be 1 or more"),
    *each("eval", "layer", "9", "layer 9 does not exist"),
    *each("eval", "deadline", "0 nan inf", "must be positive"),
    *each("eval", "dtype", "int4", "must be auto, float32"),
    *each("eval", "engine", "zzz", "invalid choice"),
    *each("eval", "lens", "zzz", "invalid choice"),
    bad("eval", "--benchmarks zzz", "unknown benchmark 'zzz'", "math500"),
    *each("eval", "benchmarks", "''", "names none"),
    bad("eval", "--benchmarks a/b=good.jsonl", "a/b"),
    bad("eval", "--benchmarks ..=good.jsonl", "label '..'"),
    bad("eval", f"--benchmarks {LONG}=good.jsonl", "label"),
    bad("eval", "--benchmarks x=good.jsonl,x=few.jsonl", "one label twice"),
    bad("eval", "--benchmarks x=absent.jsonl", "absent.jsonl"),
    bad("eval", "--benchmarks x=columns.jsonl", "no prompt column"),
    bad(
        "eval",
        "--benchmarks harness:zzz --engine server --server http://localhost:1 --model embedded",
        "lm-eval-harness",
    ),
    bad("eval", "--benchmarks harness:absent.yaml", "absent.yaml"),
    bad("eval", "--temperature 0 --k 2", "temperature 0", "set k to 1"),
    bad(
        "eval",
        "--temperature 0 --benchmarks arithmetic:3",
        "temperature 0 gives 3 answers",
        "set k to 1 for arithmetic",
    ),
    bad("eval", "--benchmarks arithmetic:0", "answers in benchmark 'arithmetic:0' must be 1 or more, got 0"),
    bad("eval", "--benchmarks arithmetic:99999999999", "'arithmetic:99999999999' must be 1 or more and at most"),
    bad("eval", "--benchmarks arithmetic:many", "unknown benchmark 'arithmetic:many'"),
    bad("eval", "--benchmarks arithmetic:-2", "unknown benchmark 'arithmetic:-2'"),
    bad("eval", "--benchmarks mmlu-pro:4", "'mmlu-pro:4' is lm-eval-harness', which answers once: leave out :4"),
    bad("eval", "--benchmarks harness:zzz:4", "'harness:zzz:4' is lm-eval-harness'"),
    *each("eval", "preset", "zzz", "invalid choice", "paper"),
    *(
        bad(
            "eval",
            f"--{option} broken-run",
            "broken-run/evaluation.json cannot be used (max_new_tokens must be 1 or more",
        )
        for option in ("model", "adapter")
    ),
    bare("eval --table", "table", "expected at least one argument"),
    bare("eval --table no-config", "no-config holds no finished evaluation"),
    bare("eval --table finished", "finished/summary.json cannot be read"),
    bare("eval --table older", "older was graded by an earlier version"),
    bare("eval --table empty-numbers", "table empty-numbers", "KeyError"),
    bare("eval --table empty-numbers --seed 3", "table evaluates nothing: leave out seed"),
    bad("eval", "--server http://localhost:1", "engine server and its address"),
    bad("eval", "--engine server", "engine server and its address"),
    bad("eval", "--engine server --server zzz --model embedded", "zzz"),
    bad("eval", "--engine server --server http://localhost:1 --model embedded", "localhost:1"),
    bad("eval", "--engine vllm --layer 3", "engine vllm samples whole models"),
    bad("eval", "--engine vllm --model embedded", "vllm"),
    bad("eval", "--engine kept --output kept-none", "kept-none/arithmetic holds no answers"),
    bad("eval", "--engine kept --output kept-cut", "settings.json cannot be read"),
    bad("eval", "--engine kept --output kept-bare", "settings.json"),
    bad("eval", "--compare no-config", "no-config holds no finished evaluation"),
    bad("eval", "--compare finished", "summary.json cannot be read"),
    bad("eval", "--compare numbers", "summary.json"),
    bad("eval", "--compare strangers", "strangers holds none of arithmetic"),
    bad("eval", "--compare wordy", "wordy/summary.json cannot be read"),
    bad("eval", "--compare older", "older was graded by an earlier version"),
    bad("eval", "--compare ''", "compare is empty"),
    bad("eval", "--adapter no-adapter", "adapter 'no-adapter'"),
    bad("eval", "--adapter adapter", "adapter 'adapter'"),
    bad("eval", "--device_map zzz", "zzz"),
    bad("eval", "--model no-tokenizer", "no tokenizer"),
    bad("eval", "--model encoder", "no causal language model"),
    bad("eval", "--chat_template raises.jinja", "only in Latin"),
    bad("eval", "--output file", "output file is a file"),
    bad("eval", "--output ''", "output is empty"),
]

ANALYZE = [
    *each("analyze", "size", "0", "must be 1 or more"),
    bad("analyze", "--shuffle_seed 1", "shuffle_seed is 1", "arithmetic are made at random"),
    *each("analyze", "max_tokens", "0 -1", "must be 1 or more"),
    *each("analyze", "max_new_tokens", "0", "must be 1 or more"),
    *each("analyze", "batch_size", "0", "must be 1 or more"),
    *each("analyze", "temperature", "0 -1 nan inf", "must be positive"),
    *each("analyze", "top_p", "0 2", "must lie above 0 and up to 1"),
    *each("analyze", "until", "zzz", "invalid choice"),
    *each("analyze", "layer", "0 -1", "must be 1 or more"),
    bad(
        "analyze", "--layer 5", "layer 5 is for checkpoints of one run, measured on the same rollouts: give --rollouts"
    ),
    *each("analyze", "dtype", "zzz", "must be auto"),
    *each("analyze", "seed", "-1", "must lie from 0"),
    bad("analyze", "--model", "model", "expected at least one argument"),
    bad("analyze", "--model ''", "model"),
    bad("analyze", "--model ..", ".."),
    bad("analyze", "--model embedded no-tokenizer", "no-tokenizer"),
    bad("analyze", "--model cut-weights", "'cut-weights' cannot be loaded"),
    bad("analyze", "--dataset good.jsonl --rollouts good.jsonl", "both dataset and rollouts"),
    bad("analyze", "--rollouts absent.jsonl", "absent.jsonl is no file of rollouts"),
    bad("analyze", "--rollouts ''", "rollouts is empty"),
    bad("analyze", "--rollouts empty.jsonl", "empty.jsonl holds no rollouts"),
    *(
        bad("analyze", f"--rollouts {name}-rollouts.jsonl", f"{name}-rollouts.jsonl")
        for name in (
            *("binary", "null", "number", "list", "string", "far", "negative", "huge", "word", "no-answer", "user"),
            *("messages", "number-prompt", "number-answer", "surrogate", "cut", "long"),
        )
    ),
    bad(
        "analyze",
        "--rollouts evaluated",
        "evaluated is a whole evaluation: give the folder of a benchmark in it, arithmetic",
    ),
    bad("analyze", "--rollouts evaluated/arithmetic", "samples.jsonl, line 1 is no rollout", "without tokens"),
    bad("analyze", "--dataset math500 --split train", "split 'train' is for a dataset, and math500 is a benchmark"),
    bad("analyze", "--dataset math500 --dataset_config a", "dataset_config 'a' is for a dataset"),
    bad("analyze", "--dataset x=good.jsonl:3", "dataset x=good.jsonl:3: an analysis takes one answer a problem"),
    bad("analyze", "--dataset x=absent.jsonl", "absent.jsonl is no file"),
    *each("analyze", "preset", "zzz", "invalid choice", "paper"),
    bad("analyze", "--model broken-run", "broken-run/evaluation.json cannot be used"),
    bad("analyze", "--output analysis-cut", "settings.json cannot be read"),
    bad("analyze", "--model learned --dataset long.jsonl --size 9", "long.jsonl, row 8: the prompt has"),
    bad("analyze", "--chat_template syntax.jinja", "template"),
    bad("analyze", "--output file", "output file is a file"),
]

SAMPLE = [
    bare("sample", "prompt is not set"),
    bad("sample", "--layer 3 --ffn 3", "layer and ffn are both given"),
    *each("sample", "layer", "0", "must be 1 or more"),
    *each("sample", "attn", "9", "layer 9 does not exist"),
    *each("sample", "top", "0", "must be 1 or more"),
    *each("sample", "max_new_tokens", "-1", "must be 1 or more"),
    *each("sample", "temperature", "-1 nan", "must be 0 or more"),
    *each("sample", "seed", "-1 99999999999999999999", "must lie from 0"),
    bad("sample", "--raw_prompt --system_prompt x", "raw_prompt"),
    bad("sample", "--model no-config", "no-config holds no model"),
    bad("sample", "--model broken-run", "broken-run/evaluation.json cannot be used"),
    bad("sample", "--adapter no-adapter", "adapter 'no-adapter'"),
    bad("sample", "--chat_template empty.jinja", "empty"),
]

DEMO = [
    *each("demo", "seed", "-1", "must lie from 0 to 4294967295"),
    *each("demo", "steps", "0", "must be 1 or more"),
    *each("demo", "problems", "0 -1", "must be 1 or more"),
    *each("demo", "internal_layer", "0", "must be 1 or more"),
    *each("demo", "internal_layer", "9", "layer 9 does not exist"),
    *each("demo", "internal_steps", "-1", "must be 0 or more"),
    *each("demo", "learning_rate", "-1 nan inf", "must be 0 or more"),
    bad("demo", "--output file", "output file is a file"),
    bad("demo", "--output other-run", "other-run holds a run"),
]

REPRODUCE = [
    bare("reproduce", "nothing is named", "fig2, fig3", "or all"),
    bare("reproduce fig1", "unknown figure or table 'fig1'", "table11"),
    bare("reproduce ../scales", "unknown figure or table '../scales'"),
    bare("reproduce fig3 --scale large", "scale must be embedded, small, paper, tiny, got 'large'"),
    bare("reproduce fig3 --jobs 0", "jobs must be 1 or more"),
    bare("reproduce fig3 --seeds 0", "seeds must be 1 or more"),
    bare("reproduce fig3 --print_commands pbs", "print_commands must be lines or slurm, got 'pbs'"),
    bare("reproduce fig3 --output file", "output file is a file"),
    bare("reproduce fig3 --name x", "unknown option 'name'"),
]

REPORT = [
    bare("report", "folders is empty: give run folders"),
    bare("report --output x.html", "folders is empty"),
    bare("report gone", "gone (does not exist)"),
    bare("report file", "no folder holds a run: file (a file)"),
    bare(
        "report finished numbers wordy no-config", "summary.json cannot be read", "numbers (summary.json is no mapping)"
    ),
    bare("report other-run", "other-run (config.yaml is missing)"),
    bare("report . --output deep/er/x.html", "no folder holds a run"),
    bare("report other-run --output file", "output file is another file than a page of bupo report"),
    bare("report other-run --output finished", "output 'finished' is a folder: name the file"),
    bare("report other-run --output file/x.html", "output file is a file"),
    bare("report other-run --output=", "output is empty"),
    bare("report other-run --outputs x.html", "unknown option 'outputs': did you mean 'output'?"),
    bare("report other-run --output", "expected one argument"),
    bare("report 'a\0b'", "folders must be text"),
]

ROWS = [
    *MAIN, *YAML, *TRAINING_NUMBERS, *TRAINING_WORDS, *TRAINING_FILES, *EVAL, *ANALYZE, *SAMPLE, *DEMO, *REPRODUCE, *REPORT,
]  # fmt: skip
