"""Chat templates by name, for models that have none or were trained in the paper's form.

`qwen-math` is ChatML with a system line that asks for reasoning and a boxed answer; `octothinker` is a conversation in plain
text, for base models. Qwen3 without thinking is its own template with `chat_template_kwargs: {enable_thinking: false}`.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bupo.errors import UserError

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

TEMPLATES = {
    "qwen-math": (
        "{%- if messages[0].role != 'system' %}<|im_start|>system\n" + BOXED + "<|im_end|>\n{% endif %}"
        "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "octothinker": (
        "{{ bos_token or '' }}A conversation between User and Assistant. The User asks a question; the Assistant reasons step "
        "by step and gives the final answer within \\boxed{}.\n"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}\nUser: {{ message.content }}"
        "{% elif message.role == 'assistant' %}\nAssistant: {{ message.content }}{{ eos_token }}"
        "{% else %}\n{{ message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n' }}Assistant:{% endif %}"
    ),
}


def chat_template(name: str) -> str:
    """A template by name, or from a `.jinja` file.

    Raises:
        UserError: if there is neither.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.endswith(".jinja") and Path(name).is_file():
        return Path(name).read_text()
    raise UserError(f"chat_template must be {', '.join(TEMPLATES)} or a .jinja file, got {name!r}")


def chosen_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict]:
    """The paper's template for a model: its name, and arguments for `apply_chat_template`.

    Qwen3 answers without thinking; a model without a chat template has a plain conversation (`octothinker`); all others have
    their own.
    """
    if tokenizer.chat_template is None:
        return "octothinker", {"chat_template": TEMPLATES["octothinker"]}
    if "enable_thinking" in tokenizer.chat_template:
        return "its own, no thinking", {"enable_thinking": False}
    return "its own", {}
