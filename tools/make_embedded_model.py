"""Make the embedded model: a 1.2 M parameter Qwen3 that knows two ways to answer `57+23-41`.

Stage 1 trains on worked answers until most are right. Stage 2 continues with worked and direct answers: the model is then
right 20 to 40 % of the time at temperature 1, so that RL can choose between two ways. Training uses only the `train` split of
the task. On two CPU cores:

    python tools/make_embedded_model.py --output src/bupo/embedded/model
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bupo.data.arithmetic import make_arithmetic_problem

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with bytes, chat markers and `\\boxed{` as tokens: it covers any text, and each digit is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("\\boxed{", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int = 8, width: int = 128) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=max(1, width // 64),
            head_dim=32,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )


def training_batch(tokenizer, seed, step, size, worked_share, numbers=3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels, both (B, T). Only the answer and its end have labels."""
    ids, labels = [], []
    rng = random.Random(f"style-{seed}-{step}")
    for row in range(size):
        problem = make_arithmetic_problem("train", seed, step * size + row, numbers)
        answer = problem.worked_answer if rng.random() < worked_share else problem.direct_answer
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=False
        )
        target = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + target))
        labels.append(torch.tensor([-100] * len(prompt) + target))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, -100)


def longest_answer(numbers: int) -> int:
    """Return the tokens of the longest worked answer to a problem of `numbers` numbers, with its end token."""
    return 32 if numbers == 3 else 13 * (numbers - 1) + 8


def supervised(model, states, labels) -> torch.Tensor:
    """Return the mean cross-entropy of the layers' policies `softmax(H^l E_u^T)`; later layers weigh more.

    `states` holds (B, T, D) for each layer, `labels` is (B, T).
    """
    mask = labels[:, 1:].reshape(-1) != -100
    targets = labels[:, 1:].reshape(-1)[mask]
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(state[:, :-1].flatten(0, 1)[mask]), targets) for state in states
    ]
    weights = torch.arange(1, len(losses) + 1, dtype=torch.float32)
    return (torch.stack(losses) * weights / weights.sum()).sum()


@torch.no_grad()
def accuracy(model, tokenizer, problems=512, numbers=3) -> tuple[float, float, float]:
    """Return the shares of exact and of worked answers and the mean length, at temperature 1 on the test split."""
    held_out = [make_arithmetic_problem("test", 0, i, numbers) for i in range(problems)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p.question}], add_generation_prompt=True, tokenize=False
        )
        for p in held_out
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    out = model.eval().generate(**inputs, max_new_tokens=longest_answer(numbers), do_sample=True, top_k=0)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    model.train()
    right = sum(t.endswith(p.direct_answer) for t, p in zip(texts, held_out, strict=True)) / problems
    worked = sum("=" in t for t in texts) / problems
    return right, worked, sum(map(len, texts)) / problems


def train(
    model, tokenizer, *, name, steps, peak_rate, worked_share, seed, batch_size, minutes, numbers=3, supervision=0.0
):
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.1)
    started = time.time()
    for step in range(steps):
        ids, labels = training_batch(tokenizer, seed, step, batch_size, worked_share, numbers)
        mask = (ids != tokenizer.pad_token_id).long()
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=bool(supervision))
        loss = out.loss
        if supervision:  # without the last layer: its policy is in the model's loss
            loss = loss + supervision * supervised(model, out.hidden_states[1:-1], labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            row = {"stage": name, "step": step, "loss": round(loss.item(), 4), "seconds": round(time.time() - started)}
            if step % 500 == 0 or step == steps - 1:
                row["accuracy"], row["worked"], row["length"] = accuracy(model, tokenizer, numbers=numbers)
            print(json.dumps(row), flush=True)
        if time.time() - started > 60 * minutes:
            raise SystemExit(f"stage {name} took longer than {minutes} minutes")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--worked", type=Path, help="start stage 2 from this folder instead of training stage 1")
    parser.add_argument("--worked_steps", type=int, default=1800, help="updates of stage 1")
    parser.add_argument("--mixed_steps", type=int, default=200, help="updates of stage 2")
    parser.add_argument("--worked_share", type=float, default=0.35, help="share of worked answers in stage 2")
    parser.add_argument("--mixed_rate", type=float, default=5e-4, help="peak learning rate of stage 2")
    parser.add_argument("--minutes", type=float, default=60, help="limit of a stage")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    if args.worked:
        model = Qwen3ForCausalLM.from_pretrained(args.worked, dtype=torch.float32)
    else:
        model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    limits = {"batch_size": 64, "minutes": args.minutes}
    if not args.worked:
        train(
            model,
            tokenizer,
            name="worked",
            steps=args.worked_steps,
            peak_rate=3e-3,
            worked_share=1.0,
            seed=1,
            **limits,
        )
        model.save_pretrained(args.output.with_name(args.output.name + "-worked"))
    train(
        model,
        tokenizer,
        name="mixed",
        steps=args.mixed_steps,
        peak_rate=args.mixed_rate,
        worked_share=args.worked_share,
        seed=2,
        **limits,
    )
    save(model, tokenizer, args.output)


def save(model, tokenizer, folder, numbers=3):
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=longest_answer(numbers),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
