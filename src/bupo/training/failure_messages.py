"""What a run says when something fails or nothing can be learned."""

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger

from bupo.training.config import BuPOConfig
from bupo.training.reward_environment import describe_exit, process_state_restored
from bupo.utils import distributed_launch
from bupo.utils.errors import SignalInterrupt, UserError, summarize_error

logger = get_logger(__name__)

REWARD_NOTE_PREFIX = "reward function "  # how the note on a reward's error begins

# what is said of each symptom (bupo.training.callbacks.failure_detection), from the options and what was measured
FAILURE_MESSAGES = {
    "nothing_graded": "no answer was graded, every reward was None, NaN or infinite: nothing is learned; look at what the "
    "reward function returns",
    "few_graded": "most answers got no finite reward ({graded:.0%} did) in {batches} rollout batches in a row: look at what "
    "the reward function returns for the others",
    "zero_reward": "all rewards were 0 in {batches} rollout batches in a row: nothing is learned; {zero}, and look at the "
    "answers (log_completions)",
    "equal_rewards": "all answers to each prompt got one reward (mean {reward:.3g}) in {batches} rollout batches in a row: "
    "nothing is learned; a reward must depend on the answer, and problems that are solved must make way for harder ones",
    "all_cut": "every answer was cut at max_completion_length={max_completion_length} in {batches} rollout batches in a "
    "row{masked}: raise it, or look whether the model's answers end with its eos token",
    "beyond_context": "prompts and max_completion_length={max_completion_length} come to {tokens:.0f} tokens, the model has "
    "{positions:.0f} positions: shorten either",
    "entropy_collapse": "the entropy has fallen to {entropy:.2g} nats a token: the answers are all alike; lower "
    "learning_rate, or raise temperature, epsilon_high or entropy_coef",
    "entropy_jump": "the entropy has risen to {entropy:.3g} nats a token: the weights are being destroyed; lower "
    "learning_rate, and go on from an earlier checkpoint",
    "kl_explosion": "the KL to the reference is {kl:.3g} nats a token: lower learning_rate, or raise beta",
    "policy_jump": "updates move the policy {approx_kl:.3g} nats a token from the one that sampled: lower learning_rate, "
    "steps_per_generation or num_iterations",
}


@contextmanager
def wrap_sampling_errors(where: str) -> Iterator[None]:
    """Inside, probabilities that are not finite, answers that the model has no positions for, and what vLLM refuses or leaves
    unanswered are the user's to mend.
    """
    try:
        yield
    except IndexError as error:
        if str(error) != "index out of range in self":  # an embedding's
            raise
        raise UserError(
            f"the model has no embedding for a position or a token of {where}: shorten the prompts or max_completion_length, "
            "and look whether the tokenizer is the model's"
        ) from error
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"the model's probabilities are not finite in {where}: its weights have diverged; lower "
            "learning_rate, or go on from an earlier checkpoint"
        ) from error
    except Exception as error:
        if not _is_vllm_error(error):
            raise
        raise UserError(f"vLLM gives no answers for {where}: {summarize_error(error)}") from error


def _is_vllm_error(error: Exception) -> bool:
    """Whether an error is vLLM's own, or TRL's client has not got an answer from its server. A reward's errors have a note."""
    if getattr(error, "__notes__", ()):
        return False
    refused = type(error) is Exception and str(error).startswith("Request failed")
    return refused or type(error).__module__.partition(".")[0] in ("vllm", "requests")


@contextmanager
def wrap_reward_errors(functions: Sequence[Callable], names: Sequence[str], rollout_batch: int) -> Iterator[None]:
    """Inside, reward functions run: their errors go on as they are, with a note that names the function.

    Raises:
        UserError: in place of an exit (`SystemExit`, `GeneratorExit` ...), which would end the process as if all was well.
    """

    def named(error: BaseException | None = None) -> str:
        ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)} if error else set()
        failed = [name for name, function in zip(names, functions, strict=True) if _get_code(function) in ran] or names
        return f"{REWARD_NOTE_PREFIX}{', '.join(failed)}"

    try:
        with process_state_restored(named):
            yield
    except UserError as error:
        if str(error).startswith(REWARD_NOTE_PREFIX):  # of `kept`
            raise UserError(f"rollout batch {rollout_batch}: {error}") from error
        raise
    except BaseException as error:
        note = f"{named(error)} failed in rollout batch {rollout_batch}"
        if _is_data_loader_error(error) or isinstance(error, SignalInterrupt):
            raise
        if not isinstance(error, Exception | KeyboardInterrupt):
            raise UserError(f"{note}: {_describe_exit(error)}") from error
        try:
            error.add_note(note)
        except Exception:  # a frozen class, or one with a method of its own
            raise UserError(f"{note}: {summarize_error(error)}") from error
        raise


def _describe_exit(error: BaseException) -> str:
    return describe_exit(error) if isinstance(error, SystemExit) else summarize_error(error)


def _is_data_loader_error(error: BaseException) -> bool:
    """Whether a worker process of a data loader was killed, which torch raises wherever the main thread stands."""
    return isinstance(error, RuntimeError) and summarize_error(error).startswith("RuntimeError: DataLoader worker")


def wrap_async_reward(function: Callable) -> Callable:
    """Return an asynchronous function that raises a [`UserError`] in place of an exit.

    An exit would end the thread of TRL's event loop, and the trainer would wait for its result for ever.
    """

    @functools.wraps(function)
    async def guarded(*args, **kwargs):
        try:
            return await function(*args, **kwargs)
        except (SystemExit, KeyboardInterrupt) as error:
            name = getattr(function, "__name__", type(function).__name__)
            raise UserError(f"{REWARD_NOTE_PREFIX}{name} failed: {_describe_exit(error)}") from error

    return guarded


def _get_code(function: Callable) -> object:
    """What runs when it is called, if Python wrote it."""
    return getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))


@contextmanager
def wrap_training_errors(where: Callable[[], str]) -> Iterator[None]:
    """Inside, training: what the user's functions raise or leave by becomes a [`UserError`].

    These are errors with a note of `grading`, exits of callbacks and of other functions, and killed data loader workers.

    Args:
        where (`Callable`): returns the rollout batch, for messages.
    """
    try:
        yield
    except (UserError, SignalInterrupt):
        raise
    except BaseException as error:
        notes = [note for note in getattr(error, "__notes__", ()) if str(note).startswith(REWARD_NOTE_PREFIX)]
        if notes:
            raise UserError(f"{notes[0]}: {summarize_error(error)}") from error
        if _is_data_loader_error(error):
            raise UserError(
                f"{where()}: {summarize_error(error).partition(': ')[2]} Often the memory does not suffice: set "
                "dataloader_num_workers to a smaller number or 0"
            ) from error
        left = isinstance(error, SystemExit) and not (
            distributed_launch.is_distributed() and distributed_launch.has_process_group()
        )
        if left or isinstance(error, GeneratorExit):  # in a launch the command says which process has left
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
            raise UserError(f"{where()}: the run was left in {place}: {_describe_exit(error)}") from error
        raise


def complete_last_log(rows: list[dict]) -> None:
    """Put the last metrics of `log_history` into its last row too, where TRL's own defaults leave those of a short run."""
    own = ("phase", "rollout_batch", "loss", "grad_norm", "learning_rate")
    last: dict = next((row for row in reversed(rows) if "rollout_batch" in row), {})
    rows[-1] = {name: value for name, value in last.items() if name not in own} | rows[-1]


def warn_of_failure(
    symptom: str, where: str, metrics: Mapping[str, float], batches: int, rewarded: bool, args: BuPOConfig
) -> None:
    """Say a symptom, and what to change.

    Args:
        symptom (`str`): of `SYMPTOMS`.
        where (`str`): the rollout batch.
        metrics (`dict`): that showed it.
        batches (`int`): in a row that showed it.
        rewarded (`bool`): whether any reward has ever been other than 0.
        args ([`~bupo.BuPOConfig`]): the options.
    """
    values = {
        "batches": batches,
        "max_completion_length": args.max_completion_length,
        "zero": "answers were rewarded before, so lower learning_rate"
        if rewarded
        else "take easier problems, or a reward that finds the answers",
        "masked": ", and mask_truncated_completions leaves nothing to learn" if args.mask_truncated_completions else "",
    }
    logger.warning(f"{where}: {FAILURE_MESSAGES[symptom].format(**metrics, **values)}")
