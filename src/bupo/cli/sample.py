"""`bupo sample`: text sampled from an internal policy, and the most likely tokens of every layer at each position."""

from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bupo.analysis.token_view import get_top_tokens
from bupo.cli.parsing import parse_options
from bupo.data.chat_templates import check_chat_template, check_prompt_characters, check_prompt_tokens, tokenize_prompt
from bupo.data.prompt_settings import PromptSettings, read_training_prompt_settings, resolve_defaults
from bupo.models.internal_policy import InternalPolicies, InternalPolicy, Lens
from bupo.models.loading import ModelLimits, check_layers_exist, get_model_limits, load_on_device, load_tokenizer
from bupo.options.groups import ModelOptions, PromptOptions, RunOptions, SamplingOptions, check_command_options
from bupo.options.ranges import POSITIVE_INTEGER, option, redefine_option
from bupo.utils.errors import UserError
from bupo.utils.sanitize import escape_text

COLUMNS_PER_TABLE = 12  # positions per table
DEFAULTS = {"system_prompt": None, "temperature": 1.0, "top_p": 1.0}
POLICY_KINDS = ("layer", "attn", "ffn")


@dataclass
class SampleOptions(ModelOptions, PromptOptions, SamplingOptions):
    """Options of `bupo sample`. At most one of layer, attn and ffn; by default the full model is sampled."""

    prompt: str | None = option(None, help="The user message; it goes through the chat template if there is one.")
    layer: int | None = option(None, help="Sample the policy of this layer's output.", range=POSITIVE_INTEGER)
    attn: int | None = option(None, help="Sample the policy of this layer's attention.", range=POSITIVE_INTEGER)
    ffn: int | None = option(None, help="Sample the policy of this layer's FFN.", range=POSITIVE_INTEGER)
    max_new_tokens: int | None = redefine_option(
        SamplingOptions, "max_new_tokens", default=24, help="Longest answer, in tokens."
    )
    top: int = option(1, help="Most likely tokens to show in each cell.", range=POSITIVE_INTEGER)
    lens: Lens = option("raw", help="raw (the paper's) or final_norm (the logit lens).")
    raw_prompt: bool = option(False, help="Use the prompt without the chat template.")
    seed: int = redefine_option(RunOptions, "seed")

    def check(self) -> None:
        """Raise [`UserError`] for a value that is refused, or for options that contradict each other."""
        check_command_options(self)
        chosen = [kind for kind in POLICY_KINDS if getattr(self, kind) is not None]
        if len(chosen) > 1:
            raise UserError(f"{' and '.join(chosen)} are both given: one policy is sampled at a time")
        if not self.prompt:
            raise UserError("prompt is not set: give --prompt 'some text'")
        if self.raw_prompt and (self.system_prompt or self.chat_template):
            raise UserError("raw_prompt uses neither system_prompt nor chat_template: leave it out, or leave them out")
        check_chat_template(self.chat_template)


OPTIONS = (SampleOptions,)


def run(arguments: list[str]) -> None:
    """Sample an answer and print it with the tokens of every layer."""
    (options,) = parse_options(OPTIONS, arguments, "bupo sample")
    options.check()
    trained = read_training_prompt_settings(options.model, options.adapter)
    options, prompt_settings = resolve_defaults(options, trained, DEFAULTS)
    config = check_layers_exist(
        options.model, {kind: getattr(options, kind) for kind in POLICY_KINDS}, **options.get_loading_kwargs()
    )
    tokenizer = load_tokenizer(options.model, **options.get_loading_kwargs())
    prompt_settings.set_template(tokenizer)
    prompt = _tokenize_prompt(tokenizer, options, prompt_settings, get_model_limits(config))
    model = load_on_device(
        options.model, options.dtype, options.device_map, options.adapter, **options.get_loading_kwargs()
    )
    policies = InternalPolicies(model, lens=options.lens, temperature=options.temperature or 1.0)
    policy: InternalPolicy = policies.language_model
    for kind in POLICY_KINDS:
        if getattr(options, kind) is not None:
            policy = getattr(policies, kind)(getattr(options, kind))
    answer = _sample_completion(policy, tokenizer, prompt, options)
    console = Console()
    if prompt_settings.summary_line and not options.raw_prompt:
        console.print(escape_text(prompt_settings.summary_line), highlight=False, markup=False)
    console.print(f"[bold]{policy}[/]", highlight=False)
    console.print(Text(escape_text(tokenizer.decode(answer))))
    view = get_top_tokens(policies, tokenizer, prompt, answer, options.top)
    for start in range(0, len(answer), COLUMNS_PER_TABLE):
        console.print(_make_table(view, slice(start, start + COLUMNS_PER_TABLE)))


def _tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, options: SampleOptions, prompt_settings: PromptSettings, limits: ModelLimits
) -> list[int]:
    """Return the prompt's token ids. Raise [`UserError`] if they exceed the model's context."""
    check_prompt_characters([str(options.prompt)], limits, "")
    if options.raw_prompt:
        ids = tokenize_prompt(tokenizer, str(options.prompt))
    else:
        system = [{"role": "system", "content": options.system_prompt}] if options.system_prompt else []
        messages: list[dict] = [*system, {"role": "user", "content": options.prompt}]
        ids = tokenize_prompt(tokenizer, messages, **prompt_settings.template_kwargs)
    check_prompt_tokens([ids], limits, "")
    return ids


def _sample_completion(
    policy: InternalPolicy, tokenizer: PreTrainedTokenizerBase, prompt: list[int], options: SampleOptions
) -> list[int]:
    torch.manual_seed(options.seed)
    max_new_tokens, temperature, top_p = options.sampling_settings
    sampling = {"top_p": top_p} if temperature > 0 else {"do_sample": False}
    ids = torch.tensor([prompt], device=policy.stream.model.get_input_embeddings().weight.device)
    sequences = policy.generate(
        ids, attention_mask=torch.ones_like(ids), tokenizer=tokenizer, max_new_tokens=max_new_tokens, **sampling
    )
    return sequences[0, len(prompt) :].tolist()


def _make_table(view: dict, columns: slice) -> Table:
    """Return a table with layers as rows, the last layer first, and positions as columns.

    A cell holds the layer's most likely tokens. It is bold if the first of them is the sampled token.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for token in view["tokens"][columns]:
        table.add_column(Text(escape_text(token)), no_wrap=True)
    for layer in range(len(view["top"]), 0, -1):
        texts, ids = view["top"][layer - 1][columns], view["top_ids"][layer - 1][columns]
        cells = [
            Text("\n".join(escape_text(text) for text, _ in cell), style="bold" if best == sampled else "dim")
            for cell, (best, *_), sampled in zip(texts, ids, view["ids"][columns], strict=True)
        ]
        table.add_row(str(layer), *cells)
    return table
