"""`bupo sample`: text from an internal policy, and what every layer would have said at each position."""

from dataclasses import dataclass, field

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bupo.analysis.run import top_tokens
from bupo.commands.parsing import parse
from bupo.data.templates import choose_template, prompt_ids
from bupo.errors import UserError
from bupo.model.loading import EMBEDDED, load_model, load_tokenizer
from bupo.model.policy import InternalPolicies, InternalPolicy, Lens

COLUMNS = 12  # positions a table holds


@dataclass
class SampleArguments:
    """Options of `bupo sample`. At most one of layer, attn and ffn; by default the whole model speaks.

    Parameters:
        model (`str`): hub id, folder, `.gguf` file, or `embedded`.
        prompt (`str`): what the user says; it goes through the chat template where there is one.
        layer, attn, ffn (`int`, *optional*): whose policy is sampled, counted from 1.
    """

    prompt: str | None = field(default=None, metadata={"help": "What the user says."})
    model: str = field(default=EMBEDDED, metadata={"help": "Hub id, folder, .gguf file, or embedded."})
    layer: int | None = field(default=None, metadata={"help": "Sample the policy of this layer's output."})
    attn: int | None = field(default=None, metadata={"help": "Sample the policy of this layer's attention."})
    ffn: int | None = field(default=None, metadata={"help": "Sample the policy of this layer's FFN."})
    max_new_tokens: int = field(default=24, metadata={"help": "Longest answer."})
    top: int = field(default=1, metadata={"help": "Most likely tokens to show in each cell."})
    lens: Lens = field(
        default="raw",
        metadata={"help": "raw (the paper's) or final_norm (the logit lens).", "choices": ["raw", "final_norm"]},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the policy; 0 takes the most likely token."})
    raw_prompt: bool = field(default=False, metadata={"help": "Give the prompt without the chat template."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})


def run(arguments: list[str]) -> None:
    """Sample and show."""
    (options,) = parse((SampleArguments,), arguments, "bupo sample")
    chosen = {kind: getattr(options, kind) for kind in ("layer", "attn", "ffn") if getattr(options, kind) is not None}
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} are both given: one policy is sampled at a time")
    if not options.prompt:
        raise UserError("prompt is not set: give --prompt 'some text'")
    for name in ("max_new_tokens", "top"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if options.temperature < 0:
        raise UserError(f"temperature must be 0 or more, got {options.temperature}")
    tokenizer = load_tokenizer(options.model)
    choose_template(tokenizer)
    model = load_model(options.model, dtype="auto" if torch.accelerator.is_available() else "float32").eval()
    policies = InternalPolicies(model, lens=options.lens, temperature=options.temperature or 1.0)
    policy: InternalPolicy = policies.language_model
    for kind, layer in chosen.items():
        policy = getattr(policies, kind)(layer)
    prompt = prompt_ids(
        tokenizer, options.prompt if options.raw_prompt else [{"role": "user", "content": options.prompt}]
    )
    torch.manual_seed(options.seed)
    out = policy.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.temperature > 0,
        **({} if options.temperature > 0 else {"temperature": 1.0}),
        pad_token_id=tokenizer.pad_token_id,
    )[0, len(prompt) :].tolist()
    console = Console()
    console.print(f"[bold]{policy}[/]", highlight=False)
    console.print(Text(tokenizer.decode(out)))
    view = top_tokens(policies, tokenizer, prompt, out, options.top)
    for start in range(0, len(out), COLUMNS):
        console.print(_table(view, slice(start, start + COLUMNS)))


def _table(view: dict, columns: slice) -> Table:
    """Layers as rows, the last first; positions as columns. A cell holds the layer's most likely tokens."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for token in view["tokens"][columns]:
        table.add_column(Text(token), no_wrap=True)
    for layer in range(len(view["top"]), 0, -1):
        cells = [
            Text("\n".join(text for text, _ in cell), style="bold" if cell[0][0] == token else "dim")
            for cell, token in zip(view["top"][layer - 1][columns], view["tokens"][columns], strict=True)
        ]
        table.add_row(str(layer), *cells)
    return table
