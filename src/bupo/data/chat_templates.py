"""Chat templates of the paper, and the choice of a template for a model.

- `qwen-math`: the template of Qwen2.5-Math. It is ChatML with a system message that requests reasoning and a boxed answer; the
  authors' training file has the same message.
- `octothinker`: a conversation in plain text for base models, from the paper's public code (`orz_base` in `rl_dataset.py`). It
  is identical for a prompt of one user message. bupo adds the beginning-of-text token, and the positions of system messages and
  later turns.
- Qwen3 without thinking: the model's own template with `enable_thinking=False`, as in the paper's code.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bupo.data.prompts import get_message_text
from bupo.models.loading import MAX_CONTEXT_MULTIPLE, ModelLimits
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

MAX_CHARACTERS_PER_TOKEN = 16  # upper bound of the average; text in any language has fewer
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

CHAT_TEMPLATES = {
    "qwen-math": (
        "{%- if messages[0].role != 'system' %}<|im_start|>system\n" + BOXED_INSTRUCTION + "<|im_end|>\n{% endif %}"
        "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "octothinker": (
        "{{ bos_token or '' }}A conversation between User and Assistant. The user asks a question, and the Assistant solves "
        "it. The assistant first thinks about the reasoning process in the mind and then provides the user with the answer."
        "{% for message in messages %}"
        "{% if message.role == 'user' %} User: You must put your answer inside \\boxed{} and Your final answer will be "
        "extracted automatically by the \\boxed{} tag.{{ '\\n' + message.content + '\\n' }}"
        "{% elif message.role == 'assistant' %}{{ 'Assistant: ' + message.content + eos_token }}"
        "{% else %}{{ ' ' + message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
MODEL_TEMPLATE, MODEL_TEMPLATE_NO_THINKING = "the model's own", "the model's own, no thinking"
TEMPLATE_LABELS = {"octothinker": "octothinker, as in the paper's code"}  # labels that differ from the name


def load_chat_template(name: str) -> str:
    """Return a template by its name, or from a `.jinja` file.

    Raises:
        UserError: if it is neither a name nor a readable file.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    with wrap_library_errors(f"chat_template {name!r:.200} cannot be read", OSError, ValueError):
        if name.endswith(".jinja") and Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
    raise UserError(f"chat_template must be {', '.join(CHAT_TEMPLATES)} or a .jinja file, got {name!r}")


def check_chat_template(name: str | None) -> None:
    """Raise [`UserError`] if a template is given and does not exist. Called before any weights are loaded."""
    if name:
        load_chat_template(name)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """Set a tokenizer's template, and return a label of the choice.

    Without a name, OctoThinker's base models, which have no template, get `octothinker`. Other models keep their own template:
    Qwen3 answers without thinking, and a model without a template reads plain text.

    Raises:
        UserError: if there is no template of this name, or rendering it fails.
    """
    if not name and tokenizer.chat_template is None and "octothinker" in str(tokenizer.name_or_path).lower():
        name = "octothinker"
    if name:
        tokenizer.chat_template = load_chat_template(name)
        # refuse an invalid template before weights are loaded
        tokenize_prompt(tokenizer, [{"role": "user", "content": "1+1"}])
        return TEMPLATE_LABELS.get(name, name)
    if tokenizer.chat_template is None:
        return "none (plain text; --chat_template octothinker makes it a conversation)"
    return MODEL_TEMPLATE_NO_THINKING if get_template_kwargs(tokenizer) else MODEL_TEMPLATE


def describe_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> str:
    """Set a tokenizer's template, and return a line with the choice and a note if its wording is not the paper's."""
    choice = set_chat_template(tokenizer, name)
    in_paper = choice == MODEL_TEMPLATE_NO_THINKING or tokenizer.chat_template in CHAT_TEMPLATES.values()
    return f"chat template: {choice}" + ("" if in_paper else "; its wording is not the paper's")


def get_template_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Return the arguments for `apply_chat_template` that disable thinking, as in the paper, if the template has it."""
    return {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict], **template_kwargs) -> list[int]:
    """Return the token ids of a prompt.

    Messages are rendered by the chat template, or joined if the tokenizer has none. Text is tokenized unchanged.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with its template.
        prompt (`str` or `list[dict]`): text or messages.
        template_kwargs: arguments of the template, which override those of [`get_template_kwargs`].
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        prompt = join_messages(prompt)
    if isinstance(prompt, str):
        with wrap_library_errors("a prompt cannot be tokenized"):
            return list(tokenizer(prompt)["input_ids"])
    kwargs = get_template_kwargs(tokenizer) | template_kwargs
    with wrap_library_errors(lambda error: _describe_template_error(tokenizer, prompt, kwargs, error)):
        ids = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **kwargs))
    if not ids:
        raise UserError("the chat template renders a problem as an empty prompt: choose another chat_template")
    return ids


def _describe_template_error(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], template_kwargs: dict, error: Exception
) -> str:
    """Return why a template cannot be filled with messages, with a remedy if it only refuses the system message."""
    text = f"the chat template cannot be filled with a prompt: {summarize_error(error)}"
    without_system = [message for message in messages if message["role"] != "system"]
    if len(without_system) == len(messages):
        return text
    try:
        tokenizer.apply_chat_template(without_system, add_generation_prompt=True, tokenize=False, **template_kwargs)
    except Exception:  # a template may raise anything; the system message is not the only problem
        return text
    return (
        f"{text}: it takes no system message; give --system_prompt '' (system_prompt: '' in YAML) to leave out the one of the "
        "options, or put that of the data set into the first user message"
    )


def check_prompt_characters(
    prompts: Iterable[str | Sequence[dict]], limits: ModelLimits, name: str, first_row: int = 0
) -> None:
    """Refuse prompts whose number of characters alone is too large for the model, since tokenizing such texts takes minutes.

    Args:
        prompts: texts or messages.
        limits ([`~bupo.models.loading.ModelLimits`]): limits of the model.
        name (`str`): name of the problems, for the message.
        first_row (`int`, *optional*, defaults to `0`): row of the first prompt, for the message.

    Raises:
        UserError: with the first such row.
    """
    for row, prompt in enumerate(prompts, first_row):
        size = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        if limits.max_prompt_length and size > MAX_CHARACTERS_PER_TOKEN * limits.max_prompt_length:
            raise UserError(
                f"{_format_location(name, row)}the prompt has {size} characters, which the model's context of "
                f"{limits.context_length} tokens cannot hold: leave it out"
            )


def check_prompt_tokens(prompts: Sequence[Sequence[int]], limits: ModelLimits, name: str, first_row: int = 0) -> None:
    """Refuse prompts that are too long for the model, or that hold tokens without an embedding.

    Args:
        prompts (`list[list[int]]`): token ids.
        limits ([`~bupo.models.loading.ModelLimits`]): limits of the model.
        name (`str`), first_row (`int`, *optional*, defaults to `0`): see [`check_prompt_characters`].

    Raises:
        UserError: with the first such row.
    """
    for row, ids in enumerate(prompts, first_row):
        if limits.max_prompt_length and len(ids) >= limits.max_prompt_length:
            reason = (
                "leaves no room for an answer in"
                if limits.has_learned_positions
                else f"is more than {MAX_CONTEXT_MULTIPLE} times"
            )
            raise UserError(
                f"{_format_location(name, row)}the prompt has {len(ids)} tokens, which {reason} the model's context of "
                f"{limits.context_length}: leave it out"
            )
        if limits.vocab_size and ids and max(ids) >= limits.vocab_size:
            raise UserError(
                f"{_format_location(name, row)}the prompt holds token {max(ids)}, and the model has embeddings for "
                f"{limits.vocab_size} tokens: leave it out"
            )


def _format_location(name: str, row: int) -> str:
    return f"{name}, row {row}: " if name else ""


def join_messages(messages: Sequence[dict]) -> str:
    """Return messages as one text, for a model without a chat template."""
    return "\n\n".join(map(get_message_text, messages)) + "\n"
