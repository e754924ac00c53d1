"""Options of an evaluation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bupo.evaluation.answers import GRADING_DEADLINE
from bupo.evaluation.benchmarks import BENCHMARKS, get_k_by_label, split_k, split_names
from bupo.evaluation.lm_eval_tasks import HARNESS_TASKS, is_harness_task
from bupo.evaluation.paper_preset import PAPER_K, PAPER_SAMPLING, Preset
from bupo.models.internal_policy import Lens
from bupo.options.groups import (
    BatchedSamplingOptions,
    ColumnOptions,
    DatasetOptions,
    ModelOptions,
    PromptOptions,
    RunOptions,
    check_command_options,
)
from bupo.options.ranges import POSITIVE, POSITIVE_INTEGER, option, redefine_option
from bupo.utils import distributed_launch
from bupo.utils.errors import UserError

DEFAULT_K = 16
# used where neither the caller nor the model's training run sets a value
FALLBACK_OPTIONS = {
    "benchmarks": ["arithmetic"],
    "system_prompt": None,
    "max_new_tokens": 1024,
    "temperature": 1.0,
    "top_p": 1.0,
}
PAPER_OPTIONS = {**PAPER_SAMPLING, "benchmarks": list(PAPER_K)}
EngineName = Literal["transformers", "vllm", "server", "cached"]


@dataclass
class EvalOptions(ModelOptions, ColumnOptions, PromptOptions, BatchedSamplingOptions, RunOptions):
    """Options of `bupo.evaluate` and `bupo eval`."""

    model: str = option(
        "",
        help="Hub id, folder, .gguf file, or embedded (the default). With server: the model that it serves.",
    )
    benchmarks: list[str] | None = option(
        None,
        help=f"Separate arguments, or one with commas: {', '.join(BENCHMARKS)}, LABEL=FILE, reasoning_gym:NAME, arithmetic "
        "(the default), each with an optional :K for K answers per problem (aime24:32,math500:16); by lm-eval-harness "
        f"{', '.join(HARNESS_TASKS)}, harness:TASK.",
    )
    preset: Preset | None = option(
        None,
        help="paper: the paper's benchmarks, answers per problem, sampling and answer length, where not given.",
        choices=get_args(Preset),
    )
    size: int | None = redefine_option(
        DatasetOptions, "size", help="The first N problems of each benchmark (of each task, in the harness)."
    )
    k: int | None = option(
        None,
        help="Answers per problem for benchmarks without :K; by default 16.",
        range=POSITIVE_INTEGER,
    )
    layer: int | None = option(None, help="Evaluate the policy of this layer's output.", range=POSITIVE_INTEGER)
    lens: Lens = option("raw", help="Lens of --layer: raw (the paper's) or final_norm.")
    engine: EngineName = option(
        "transformers",
        help="Sampler: transformers, vllm in this process, an OpenAI-compatible server, or cached: no sampling, the answers in "
        "the output folder are graded.",
    )
    server: str | None = option(None, help="Address of the server, such as http://localhost:8000.")
    compare: str | None = option(
        None, help="Folder of another evaluation of the same problems, for paired differences."
    )
    deadline: float = option(GRADING_DEADLINE, help="Seconds that grading an answer may take.", range=POSITIVE)
    run_code: bool = option(False, help="Let humaneval run the code that the model writes, on this machine.")
    output: str = redefine_option(RunOptions, "output", default="runs/eval")

    @property
    def benchmark_names(self) -> list[str]:
        """Names of the benchmarks, split at commas."""
        return split_names(self.benchmarks or [])

    def get_k_by_label(self, labels: Iterable[str] = ()) -> dict[str, int]:
        """Return the answers per problem by label, for the options' benchmarks and additional `labels`."""
        preset = PAPER_K if self.preset else {}
        additional = {label: self.k or preset.get(label, DEFAULT_K) for label in labels}
        return get_k_by_label(self.benchmark_names, self.k, preset, DEFAULT_K) | additional

    def check(self) -> None:
        """Raises [`UserError`] for a value that is none, and for options that contradict each other."""
        named = [self.benchmarks] if isinstance(self.benchmarks, str) else self.benchmarks
        check_command_options(replace(self, benchmarks=named))
        for name in self.benchmark_names:
            split_k(name)
        self._check_engine()

    def check_k(self, ks: Mapping[str, int]) -> None:
        """Raise [`UserError`] if several answers per problem would be identical. Needs resolved options."""
        for label, k in ks.items():
            if self.temperature == 0 and k > 1:
                raise UserError(f"temperature 0 gives {k} identical answers: set k to 1 for {label}")

    def _check_engine(self) -> None:
        if distributed_launch.is_distributed():  # every process would sample everything into the same files
            raise UserError(
                "bupo eval is one process: for several GPUs give device_map auto, or serve the model with vLLM"
            )
        if self.engine != "transformers" and self.layer is not None:
            raise UserError(f"engine {self.engine} samples the full model only: an internal policy needs transformers")
        if self.engine != "transformers" and self.adapter:
            raise UserError(f"engine {self.engine} takes no adapter: merge it, or evaluate with transformers")
        if (self.engine == "server") != bool(self.server):
            raise UserError("engine server and its address go together: --engine server --server http://localhost:8000")
        if self.server and not self.model:
            raise UserError("model is not set: name the model that the server serves, for its tokenizer and template")
        if any(is_harness_task(name) for name in self.benchmark_names) and self.engine != "transformers":
            raise UserError(f"lm-eval-harness runs with engine transformers here, not {self.engine}")
