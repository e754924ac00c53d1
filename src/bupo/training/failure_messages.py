"""Messages for errors while sampling, grading and training, and for runs that learn nothing."""

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger

from bupo.training.callbacks.failure_detection import FAILURES
from bupo.training.config import BuPOConfig
from bupo.training.reward_environment import describe_exit, process_state_restored
from bupo.utils import distributed_launch
from bupo.utils.errors import SignalInterrupt, UserError, summarize_error

logger = get_logger(__name__)

REWARD_NOTE_PREFIX = "reward function "  # begins the note on a reward function's error


@contextmanager
def wrap_sampling_errors(where: str) -> Iterator[None]:
    """Turn errors of sampling that the user can fix into a [`UserError`].

    These are probabilities that are not finite, tokens or positions without an embedding, and errors of vLLM.

    Args:
        where (`str`): the rollout batch, for messages.

    Raises:
        UserError: with the remedy.
    """
    try:
        yield
    except IndexError as error:
        if str(error) != "index out of range in self":  # torch's message for an embedding
            raise
        raise UserError(
            f"the model has no embedding for a position or a token of {where}: shorten the prompts or max_completion_length, "
            "and check that the tokenizer belongs to the model"
        ) from error
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(
            f"the model's probabilities are not finite in {where}: its weights have diverged; lower "
            "learning_rate, or resume from an earlier checkpoint"
        ) from error
    except Exception as error:
        if not _is_vllm_error(error):
            raise
        raise UserError(f"vLLM returned no answers for {where}: {summarize_error(error)}") from error


def _is_vllm_error(error: Exception) -> bool:
    """Return whether vLLM raised an error, or TRL's client because of the vLLM server."""
    if getattr(error, "__notes__", ()):  # of a reward function
        return False
    is_client_error = type(error) is Exception and str(error).startswith("Request failed")
    return is_client_error or type(error).__module__.partition(".")[0] in ("vllm", "requests")


@contextmanager
def wrap_reward_errors(functions: Sequence[Callable], names: Sequence[str], rollout_batch: int) -> Iterator[None]:
    """Add a note with the function's name to errors of reward functions.

    Args:
        functions (`list[Callable]`), names (`list[str]`): the reward functions and their names.
        rollout_batch (`int`): for the note.

    Raises:
        UserError: instead of an exit (`SystemExit`, `GeneratorExit` ...), which would end the process with success.
    """

    def describe_functions(error: BaseException | None = None) -> str:
        called = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)} if error else set()
        failed = [name for name, function in zip(names, functions, strict=True) if _get_code(function) in called]
        return f"{REWARD_NOTE_PREFIX}{', '.join(failed or names)}"

    try:
        with process_state_restored(describe_functions):
            yield
    except UserError as error:
        if str(error).startswith(REWARD_NOTE_PREFIX):  # of `process_state_restored`
            raise UserError(f"rollout batch {rollout_batch}: {error}") from error
        raise
    except BaseException as error:
        note = f"{describe_functions(error)} failed in rollout batch {rollout_batch}"
        if _is_data_loader_error(error) or isinstance(error, SignalInterrupt):
            raise
        if not isinstance(error, Exception | KeyboardInterrupt):
            raise UserError(f"{note}: {_describe_exit(error)}") from error
        try:
            error.add_note(note)
        except Exception:  # the class is frozen or overrides `add_note`
            raise UserError(f"{note}: {summarize_error(error)}") from error
        raise


def _describe_exit(error: BaseException) -> str:
    return describe_exit(error) if isinstance(error, SystemExit) else summarize_error(error)


def _is_data_loader_error(error: BaseException) -> bool:
    """Return whether a data loader worker was killed. torch raises this error anywhere in the main thread."""
    return isinstance(error, RuntimeError) and summarize_error(error).startswith("RuntimeError: DataLoader worker")


def wrap_async_reward(function: Callable) -> Callable:
    """Return an asynchronous reward function that raises a [`UserError`] instead of an exit.

    An exit would end the thread of TRL's event loop, and the trainer would wait for its result forever.
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
    """Return the code object that a call executes, or None for a function that is not written in Python."""
    return getattr(function, "__code__", getattr(type(function).__call__, "__code__", None))


@contextmanager
def wrap_training_errors(where: Callable[[], str]) -> Iterator[None]:
    """Turn errors and exits of the user's functions into a [`UserError`].

    These are errors with a note of [`wrap_reward_errors`], exits of callbacks and other functions, and killed data loader
    workers.

    Args:
        where (`Callable`): returns the rollout batch, for messages.

    Raises:
        UserError: with the rollout batch and the reason.
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
                f"{where()}: {summarize_error(error).partition(': ')[2]} The usual cause is a lack of memory: "
                "set dataloader_num_workers to a smaller number or 0"
            ) from error
        is_launched = distributed_launch.is_distributed() and distributed_launch.has_process_group()
        has_exited = isinstance(error, SystemExit) and not is_launched  # a launcher reports which process has exited
        if has_exited or isinstance(error, GeneratorExit):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            location = f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
            raise UserError(f"{where()}: the run exited in {location}: {_describe_exit(error)}") from error
        raise


def complete_last_log(rows: list[dict]) -> None:
    """Copy the last metrics of `log_history` into its last row, where TRL's own defaults put those of a short run."""
    excluded = ("phase", "rollout_batch", "loss", "grad_norm", "learning_rate")
    last: dict = next((row for row in reversed(rows) if "rollout_batch" in row), {})
    rows[-1] = {name: value for name, value in last.items() if name not in excluded} | rows[-1]


def warn_of_failure(
    failure: str, where: str, metrics: Mapping[str, float], batches: int, rewarded: bool, args: BuPOConfig
) -> None:
    """Log a warning about a failure, with what to change.

    Args:
        failure (`str`): a key of [`~bupo.training.callbacks.failure_detection.FAILURES`].
        where (`str`): the rollout batch.
        metrics (`dict`): that showed it.
        batches (`int`): rollout batches in a row that showed it.
        rewarded (`bool`): whether any reward has ever been other than 0.
        args ([`~bupo.BuPOConfig`]): the options.
    """
    context = {
        "batches": batches,
        "max_completion_length": args.max_completion_length,
        "zero_remedy": "answers were rewarded before, so lower learning_rate"
        if rewarded
        else "use easier problems, or a reward that recognises the answers",
        "masked": ", and mask_truncated_completions leaves nothing to learn" if args.mask_truncated_completions else "",
    }
    logger.warning(f"{where}: {FAILURES[failure].message.format(**metrics, **context)}")
