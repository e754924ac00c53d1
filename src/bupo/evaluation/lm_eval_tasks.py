"""Benchmarks of lm-eval-harness by name, with their tasks and metrics."""

import re
from dataclasses import dataclass
from pathlib import Path

from bupo.utils.errors import UserError

HARNESS_PREFIX = "harness:"


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness and the metric that is reported.

    Attributes:
        name, chat_name (`str`): the task's name for a model without and with a chat template.
        metric (`str`, *optional*): `metric,filter` as in the harness; by default the first metric.
        uses_chat_template (`bool`): whether questions are formatted with the model's chat template.
    """

    name: str
    metric: str | None = None
    chat_name: str | None = None
    uses_chat_template: bool = True

    def get_name(self, chat: bool) -> str:
        """Return the task's name for a model with or without a chat template; for a YAML file, the name in it."""
        return _read_task_name(self.yaml_path) if self.yaml_path else (self.chat_name if chat else None) or self.name

    @property
    def yaml_path(self) -> Path | None:
        return Path(self.name) if self.name.endswith(".yaml") else None


HARNESS_TASKS = {
    "mmlu-pro": HarnessTask("mmlu_pro", "exact_match,custom-extract"),
    "gpqa-diamond": HarnessTask("gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"),
    # compares the likelihoods of given answers
    "arc-c": HarnessTask("arc_challenge", "acc_norm,none", uses_chat_template=False),
    "bbh": HarnessTask("bbh", "exact_match,get-answer"),
    "humaneval": HarnessTask("humaneval", "pass@1,create_test", "humaneval_instruct"),
}


def is_harness_task(name: str) -> bool:
    """Return whether a benchmark is run by the harness."""
    return name in HARNESS_TASKS or name.startswith(HARNESS_PREFIX)


def get_task_label(name: str) -> str:
    """Return the name without the prefix `harness:` and without folder and suffix of a file."""
    name = name.removeprefix(HARNESS_PREFIX)
    return Path(name).stem if name.endswith(".yaml") else name


def get_task(name: str) -> HarnessTask:
    return HARNESS_TASKS.get(name) or HarnessTask(name.removeprefix(HARNESS_PREFIX))


def _read_task_name(path: Path) -> str:
    """Return the task's or group's name in a file, which may hold tags that plain YAML cannot parse."""
    name = re.search(r"^(?:task|group): *[\"']?([\w-]+)", path.read_text(), re.MULTILINE) if path.is_file() else None
    if name is None:
        raise UserError(f"{path} is not a file with a task or a group")
    return name[1]
