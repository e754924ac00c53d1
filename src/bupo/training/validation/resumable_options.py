"""Options under which a resumed run could not be the uninterrupted one: refused by name before a run begins, or turned off."""

from accelerate.logging import get_logger

from bupo.training.config import BuPOConfig
from bupo.utils.errors import UserError

logger = get_logger(__name__)


def check_resumable(args: BuPOConfig) -> None:
    """Refuse options that make a run depend on where it was stopped.

    Raises:
        UserError: with the option, the reason and what to do.
    """
    if args.ignore_data_skip:
        raise UserError(
            "ignore_data_skip is true: a resumed run would train on problems that it has seen and leave out others; leave the "
            "option out, skipping takes no time"
        )
    if not args.dataloader_in_order and args.dataloader_num_workers > 1:
        raise UserError(
            f"dataloader_in_order is false with {args.dataloader_num_workers} dataloader_num_workers: the order of the "
            "problems would depend on which worker is faster, and no run could be resumed or repeated; leave the option out"
        )


def disable_persistent_workers(args: BuPOConfig) -> None:
    """Turn `dataloader_persistent_workers` off, with a warning.

    Workers that live on draw no random number when an epoch begins, and new ones draw one: a resumed run, which starts its
    workers at another epoch, would sample other answers.
    """
    if args.dataloader_persistent_workers:
        args.dataloader_persistent_workers = False
        logger.warning(
            "dataloader_persistent_workers is turned off: data loader workers start anew each epoch, so that a resumed run "
            "draws the same random numbers; problems load in no time either way"
        )
