"""avg@k on benchmarks while a run goes: before the first rollout batch, on a schedule, and after the last."""

from collections.abc import Iterator, Sequence

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from bupo.evaluation.answers import grade_completions, sample_completions, summarize, tokenize_prompts
from bupo.evaluation.benchmarks import get_k_by_label, load_benchmarks
from bupo.generation.seeded_sampling import CompletionRequest, SampledCompletion, TransformersEngine
from bupo.models.residual_stream import unwrap_causal_lm
from bupo.training.prompt_settings import get_prompt_settings


class BenchmarkCallback(TrainerCallback):
    """Evaluates the language model policy between rollout batches, with the sampling of the rollouts.

    The random numbers are the same every time, so that two evaluations differ by the weights only; training does not see them.
    Logged for each benchmark: `eval/<benchmark>/avg@k`, its 95 % interval over problems (`.../low`, `.../high`), `strict`
    (avg@k by the strict verdicts), `pass@k`, `tokens` (mean length) and `truncated` (share); and `eval/rollout_batches`, how
    many were done.

    Args:
        trainer ([`BuPOTrainer`]): its model, tokenizer and configuration.
        benchmarks (`dict[str, Dataset]`, *optional*): problems by label; by default loaded by their names.
    """

    def __init__(self, trainer, benchmarks: dict[str, Dataset] | None = None):
        args = trainer.args
        self.trainer, self.num_samples = trainer, get_k_by_label(args.eval_benchmarks, args.eval_k)
        self.benchmarks = benchmarks or load_benchmarks(args.eval_benchmarks, args.eval_problems, seed=args.seed)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.evaluate(0)

    def on_step_end(self, args, state, control, **kwargs):
        """Before the step is logged and saved: a checkpoint holds the evaluation of its weights."""
        done = self.trainer.rollout_batch - 1
        last = state.global_step >= state.max_steps
        if last or (not self.trainer.is_inside_rollout_batch and done % args.eval_every == 0):
            self.evaluate(done)

    def evaluate(self, rollout_batches: int) -> None:
        """Sample, grade and log."""
        trainer, args = self.trainer, self.trainer.args
        own = get_prompt_settings(trainer)
        engine = TransformersEngine(
            unwrap_causal_lm(trainer.model),
            trainer.processing_class,
            args.max_completion_length,
            own.temperature,
            own.top_p,
            batch_size=args.per_device_eval_batch_size,
        )
        logs: dict[str, float] = {"eval_rollout_batches": rollout_batches}
        for label, problems in self.benchmarks.items():
            prompts = tokenize_prompts(problems, trainer.processing_class, **own.chat_template_kwargs)
            k = self.num_samples.get(label, args.eval_k)
            answers = sample_completions(self._split_across_processes(engine), prompts, k, args.seed)
            if trainer.is_world_process_zero():
                found = summarize(grade_completions(problems, answers))
                low, high = found["avg@k_interval"]
                logs |= {
                    f"eval_{label}/avg@{k}": found["avg@k"],
                    f"eval_{label}/low": low,
                    f"eval_{label}/high": high,
                    f"eval_{label}/strict": found["strict_avg@k"],
                    f"eval_{label}/pass@{k}": found["pass@k"][str(k)],
                    f"eval_{label}/tokens": found["mean_tokens"],
                    f"eval_{label}/truncated": found["truncated"] / (len(problems) * k),
                }
        due = trainer.control.should_log  # which a log takes for its own
        Trainer.log(trainer, logs)  # not GRPOTrainer's, which would empty the training metrics into this row
        trainer.control.should_log = due

    def _split_across_processes(self, engine: TransformersEngine):
        """The engine on all processes, each with its share of the requests."""
        accelerator = self.trainer.accelerator

        def share(requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
            mine = list(requests[accelerator.process_index :: accelerator.num_processes])
            # all sample as many, for a sharded model all have to run the same passes
            more = -(-len(requests) // accelerator.num_processes) - len(mine)
            own, answers = set(mine), engine([*mine, *requests[:more]])
            yield from gather_object([(request, answer) for request, answer in answers if request in own])

        return share
