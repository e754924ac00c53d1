"""The harness' benchmarks by name, and which of its tasks each is."""

import re
from dataclasses import dataclass
from pathlib import Path

from bupo.utils.errors import UserError

HARNESS_PREFIX = "harness:"


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, and which of its metrics is the benchmark's number. None: the first one.

    Attributes:
        name, chat_name (`str`): for a model without and with a chat template.
        metric (`str`, *optional*): as the harness writes it, `metric,filter`.
        template (`bool`): whether questions go through the chat template of a model that has one.
    """

    name: str
    metric: str | None = None
    chat_name: str | None = None
    uses_chat_template: bool = True

    def get_name(self, chat: bool) -> str:
        """The task's name for a model with or without a chat template; that in the file of one's own task."""
        return _read_task_name(self.yaml_path) if self.yaml_path else (self.chat_name if chat else None) or self.name

    @property
    def yaml_path(self) -> Path | None:
        return Path(self.name) if self.name.endswith(".yaml") else None


HARNESS_TASKS = {
    "mmlu-pro": HarnessTask("mmlu_pro", "exact_match,custom-extract"),
    "gpqa-diamond": HarnessTask("gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"),
    "arc-c": HarnessTask(
        "arc_challenge", "acc_norm,none", uses_chat_template=False
    ),  # compares the answers' likelihoods
    "bbh": HarnessTask("bbh", "exact_match,get-answer"),
    "humaneval": HarnessTask("humaneval", "pass@1,create_test", "humaneval_instruct"),
}


def is_harness_task(name: str) -> bool:
    """Whether a benchmark's name is the harness'."""
    return name in HARNESS_TASKS or name.startswith(HARNESS_PREFIX)


def get_task_label(name: str) -> str:
    """The name without what says that it is the harness', or that it is a file."""
    name = name.removeprefix(HARNESS_PREFIX)
    return Path(name).stem if name.endswith(".yaml") else name


def get_task(name: str) -> HarnessTask:
    return HARNESS_TASKS.get(name) or HarnessTask(name.removeprefix(HARNESS_PREFIX))


def _read_task_name(path: Path) -> str:
    """The task's or group's name in its file, which may hold tags that plain YAML does not know."""
    name = re.search(r"^(?:task|group): *[\"']?([\w-]+)", path.read_text(), re.MULTILINE) if path.is_file() else None
    if name is None:
        raise UserError(f"{path} is no file that names a task or a group")
    return name[1]
