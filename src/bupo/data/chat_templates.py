"""Chat templates: the paper's by name, and the one choice for a model that every command makes.

`qwen-math` is Qwen2.5-Math's, ChatML with a system line that asks for reasoning and a boxed answer; the authors' training file
has the same line. `octothinker` is the conversation in plain text for base models that the paper's public code holds
(`orz_base` of its `rl_dataset.py`), letter for letter where a prompt is one user message; the text-start token before it, and
where system messages and later turns stand, are bupo's choice. Qwen3 without thinking is its own template with
`enable_thinking=False`, as in that code.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bupo.data.prompts import get_message_text
from bupo.models.loading import MAX_CONTEXT_MULTIPLE, ModelLimits
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

MAX_CHARACTERS_PER_TOKEN = 16  # of a token on average, at the most: in any text of people they have fewer
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
TEMPLATE_LABELS = {
    "octothinker": "octothinker, as in the paper's code"
}  # choices whose wording has changed, as they are kept


def load_chat_template(name: str) -> str:
    """A template by name, or from a `.jinja` file.

    Raises:
        UserError: if there is neither.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    with wrap_library_errors(f"chat_template {name!r:.200} cannot be read", OSError, ValueError):
        if name.endswith(".jinja") and Path(name).is_file():
            return Path(name).read_text(encoding="utf-8")
    raise UserError(f"chat_template must be {', '.join(CHAT_TEMPLATES)} or a .jinja file, got {name!r}")


def check_chat_template(name: str | None) -> None:
    """Raises [`UserError`] where a template is wanted and there is none of the name, before anything is loaded."""
    if name:
        load_chat_template(name)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> str:
    """Give a tokenizer the template that is wanted, or else the paper's for its model. Returns the choice, for people.

    OctoThinker's models, which have none, get `octothinker`. All others keep their own: Qwen3 answers without thinking, and a
    model without a template reads plain text.

    Raises:
        UserError: if there is no template of the wanted name, or it cannot be filled.
    """
    octothinker = tokenizer.chat_template is None and "octothinker" in str(tokenizer.name_or_path).lower()
    if wanted or octothinker:
        tokenizer.chat_template = load_chat_template(wanted or "octothinker")
        tokenize_prompt(
            tokenizer, [{"role": "user", "content": "1+1"}]
        )  # a broken one is refused before a model is loaded
        return TEMPLATE_LABELS.get(wanted or "octothinker", wanted or "octothinker")
    if tokenizer.chat_template is None:
        return "none (plain text; --chat_template octothinker makes it a conversation)"
    return MODEL_TEMPLATE_NO_THINKING if get_template_kwargs(tokenizer) else MODEL_TEMPLATE


def describe_chat_template(tokenizer: PreTrainedTokenizerBase, wanted: str | None = None) -> str:
    """[`set_chat_template`], as a line that says too where the wording is not the paper's."""
    choice = set_chat_template(tokenizer, wanted)
    papers = choice == MODEL_TEMPLATE_NO_THINKING or tokenizer.chat_template in CHAT_TEMPLATES.values()
    return f"chat template: {choice}" + ("" if papers else "; its wording is not the paper's")


def get_template_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Arguments for `apply_chat_template`: a model that may think before it answers does not, as in the paper."""
    return {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict], **options) -> list[int]:
    """Token ids of a prompt: messages through the chat template (or joined where there is none), text as it is.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with its template.
        prompt (`str` or `list[dict]`): text or messages.
        options: for the template, instead of `template_options`.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        prompt = join_messages(prompt)
    if isinstance(prompt, str):
        with wrap_library_errors("a prompt cannot be tokenized"):
            return list(tokenizer(prompt)["input_ids"])
    options = get_template_kwargs(tokenizer) | options
    with wrap_library_errors(lambda error: _describe_template_error(tokenizer, prompt, options, error)):
        ids = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **options))
    if not ids:
        raise UserError("the chat template makes an empty prompt of a problem: choose another chat_template")
    return ids


def _describe_template_error(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], options: dict, error: Exception
) -> str:
    """Why a template cannot be filled with messages, and the remedy where it is only that it takes no system message."""
    text = f"the chat template cannot be filled with a prompt: {summarize_error(error)}"
    others_only = [message for message in messages if message["role"] != "system"]
    if len(others_only) == len(messages):
        return text
    try:
        tokenizer.apply_chat_template(others_only, add_generation_prompt=True, tokenize=False, **options)
    except Exception:  # whatever a template raises: another message is what it cannot take
        return text
    return (
        f"{text}: it takes no system message; give --system_prompt '' (system_prompt: '' in YAML) to leave out the one of the "
        "options, or put that of the data set into the first user message"
    )


def check_prompt_characters(
    prompts: Iterable[str | Sequence[dict]], limits: ModelLimits, name: str, first: int = 0
) -> None:
    """Refuse prompts that are too long for the model by their characters alone: to tokenize millions takes minutes.

    Args:
        prompts: texts or messages, before they are tokenized.
        limits ([`~bupo.models.loading.ModelLimits`]): of the model.
        name (`str`), first (`int`, *optional*, defaults to `0`): as of `check_context`.

    Raises:
        UserError: with the first such row.
    """
    for row, prompt in enumerate(prompts, first):
        size = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        if limits.max_prompt_length and size > MAX_CHARACTERS_PER_TOKEN * limits.max_prompt_length:
            raise UserError(
                f"{_format_location(name, row)}the prompt has {size} characters, which the model's context of {limits.context_length} tokens "
                "cannot hold: leave it out"
            )


def check_prompt_tokens(prompts: Sequence[Sequence[int]], limits: ModelLimits, name: str, first: int = 0) -> None:
    """Refuse prompts that leave no room for an answer, that are far longer than the model was made for, or that hold tokens it
    does not know.

    Args:
        prompts (`list[list[int]]`): token ids.
        limits ([`~bupo.models.loading.ModelLimits`]): of the model.
        name (`str`), first (`int`, *optional*, defaults to `0`): the problems, and the row of the first of these.

    Raises:
        UserError: with the first such row.
    """
    for row, ids in enumerate(prompts, first):
        if limits.max_prompt_length and len(ids) >= limits.max_prompt_length:
            reason = (
                "leaves no room for an answer in"
                if limits.has_learned_positions
                else f"is more than {MAX_CONTEXT_MULTIPLE} times"
            )
            raise UserError(
                f"{_format_location(name, row)}the prompt has {len(ids)} tokens, which {reason} the model's context of {limits.context_length}: "
                "leave it out"
            )
        if limits.vocab_size and ids and max(ids) >= limits.vocab_size:
            raise UserError(
                f"{_format_location(name, row)}the prompt holds token {max(ids)}, and the model has embeddings for {limits.vocab_size} "
                "tokens: leave it out"
            )


def _format_location(name: str, row: int) -> str:
    return f"{name}, row {row}: " if name else ""


def join_messages(messages: Sequence[dict]) -> str:
    """Messages for a model without a chat template."""
    return "\n\n".join(map(get_message_text, messages)) + "\n"
