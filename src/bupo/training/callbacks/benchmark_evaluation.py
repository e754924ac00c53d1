"""Benchmark evaluation (avg@k) during training: before the first rollout batch, every few batches, and after the last."""

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
    """Callback that evaluates the language model policy between rollout batches, with the sampling options of the rollouts.

    Each evaluation uses the same random numbers, which are separate from those of training: two evaluations differ by
    the weights only. It logs for each benchmark `eval/<benchmark>/avg@k`, its 95 % interval over problems (`.../low`,
    `.../high`), `strict` (avg@k by the strict verdicts), `pass@k`, `tokens` (mean length) and `truncated` (share), and
    once `eval/rollout_batches` (batches done).

    Args:
        trainer ([`BuPOTrainer`]): its model, tokenizer and configuration.
        benchmarks (`dict[str, Dataset]`, *optional*): problems by label; by default loaded by the names in `eval_benchmarks`.
    """

    def __init__(self, trainer, benchmarks: dict[str, Dataset] | None = None):
        args = trainer.args
        self.trainer, self.num_samples = trainer, get_k_by_label(args.eval_benchmarks, args.eval_k)
        self.benchmarks = benchmarks or load_benchmarks(args.eval_benchmarks, args.eval_problems, seed=args.seed)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.evaluate(0)

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluate before the step is logged and saved, so that a checkpoint holds the evaluation of its weights."""
        done = self.trainer.rollout_batch - 1
        last = state.global_step >= state.max_steps
        if last or (not self.trainer.is_inside_rollout_batch and done % args.eval_every == 0):
            self.evaluate(done)

    def evaluate(self, rollout_batches: int) -> None:
        """Sample and grade answers to all benchmarks and log the metrics.

        Args:
            rollout_batches (`int`): batches done.
        """
        trainer, args = self.trainer, self.trainer.args
        settings = get_prompt_settings(trainer)
        engine = TransformersEngine(
            unwrap_causal_lm(trainer.model),
            trainer.processing_class,
            args.max_completion_length,
            settings.temperature,
            settings.top_p,
            batch_size=args.per_device_eval_batch_size,
        )
        logs: dict[str, float] = {"eval_rollout_batches": rollout_batches}
        for label, problems in self.benchmarks.items():
            prompts = tokenize_prompts(problems, trainer.processing_class, **settings.chat_template_kwargs)
            k = self.num_samples.get(label, args.eval_k)
            answers = sample_completions(self._split_across_processes(engine), prompts, k, args.seed)
            if trainer.is_world_process_zero():
                summary = summarize(grade_completions(problems, answers))
                low, high = summary["avg@k_interval"]
                logs |= {
                    f"eval_{label}/avg@{k}": summary["avg@k"],
                    f"eval_{label}/low": low,
                    f"eval_{label}/high": high,
                    f"eval_{label}/strict": summary["strict_avg@k"],
                    f"eval_{label}/pass@{k}": summary["pass@k"][str(k)],
                    f"eval_{label}/tokens": summary["mean_tokens"],
                    f"eval_{label}/truncated": summary["truncated"] / (len(problems) * k),
                }
        should_log = trainer.control.should_log  # logging resets it
        Trainer.log(trainer, logs)  # GRPOTrainer's would move the training metrics into this row
        trainer.control.should_log = should_log

    def _split_across_processes(self, engine: TransformersEngine):
        """Return an engine that splits the requests between processes and gathers the answers."""
        accelerator = self.trainer.accelerator

        def sample(requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
            share = list(requests[accelerator.process_index :: accelerator.num_processes])
            # processes of a sharded model must run the same number of forward passes: pad to the largest share
            missing = -(-len(requests) // accelerator.num_processes) - len(share)
            share_set, answers = set(share), engine([*share, *requests[:missing]])
            yield from gather_object([(request, answer) for request, answer in answers if request in share_set])

        return sample
