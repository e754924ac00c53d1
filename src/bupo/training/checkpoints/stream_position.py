"""The place of a run in a stream of problems, and whether a resumed stream gives the same rows again."""

import hashlib
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from bupo.data.prompts import check_not_serialized
from bupo.utils.errors import UserError

MAX_CHECKSUMS = 4096  # checksums of the last batches: data loaders read a few ahead of what is trained on


class StreamPosition:
    """The pass over a stream that a run is in, the batches of this pass that were trained on, and a checksum of their rows.

    A stream has no length: transformers takes all its passes for one epoch, and would skip the batches of a resumed run in the
    first pass. Here the pass is counted, and batches are skipped in it.

    Attributes:
        number (`int`): the pass, from 0.
        started (`int`): the micro-batches that the trainer had done when the pass began.
        first (`int`): the pass in which this start of the run began.
    """

    def __init__(self) -> None:
        self.pass_index = self.pass_start = self.first_pass = 0
        self._resumed_batches: int | None = None  # batches of the pass in which a checkpoint lies
        self.checksums: deque[tuple[int, str]] = deque(
            maxlen=MAX_CHECKSUMS
        )  # after each batch of this pass: how many, and the checksum
        self.batches_read, self.checksum = 0, ""
        self.expected_checksum: tuple[int, str] | None = None

    def begin_pass(self, number: int, passes_done: int, skipped: int) -> None:
        """Begin a pass. Batches that were trained on before the run was resumed are skipped."""
        self.pass_index, self.pass_start = number, passes_done - skipped
        self.batches_read, self.checksum = 0, ""
        self.checksums.clear()

    def wrap_collator(self, collate: Callable[[list], Any]) -> Callable[[list], Any]:
        """Return a data collator that also keeps the checksum of the rows."""

        def collated(rows: list) -> Any:
            self._record_batch(rows)
            return collate(rows)

        return collated

    def _record_batch(self, rows: list) -> None:
        for number, row in enumerate(rows):
            check_not_serialized(row.get("prompt"), "train_dataset, a stream", self.batches_read * len(rows) + number)
        text = json.dumps(rows, sort_keys=True, default=_to_json_value)
        self.batches_read, self.checksum = (
            self.batches_read + 1,
            hashlib.sha256((self.checksum + text).encode()).hexdigest(),
        )
        self.checksums.append((self.batches_read, self.checksum))
        if self.expected_checksum is not None and self.batches_read == self.expected_checksum[0]:
            if self.checksum != self.expected_checksum[1]:
                raise UserError(_ROWS_DIFFER)
            self.expected_checksum = None

    def state(self, passes_done: int, ended: bool) -> dict[str, Any]:
        """Return what a checkpoint holds.

        Args:
            passes_done (`int`): micro-batches that the trainer has done.
            ended (`bool`): whether the pass is over.
        """
        batches = passes_done - self.pass_start
        sums = dict(self.checksums)
        return {
            "pass": self.pass_index + ended,
            "batches": 0 if ended else batches,
            "sum": "" if ended else sums.get(batches, ""),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore the place of a checkpoint."""
        self.first_pass, self._resumed_batches = state["pass"], state["batches"]
        self.expected_checksum = (state["batches"], state["sum"]) if state["sum"] else None

    def get_batches_to_skip(self, checkpoint: str) -> int:
        """Return how many batches of the first pass are to be skipped.

        Raises:
            UserError: if the checkpoint does not say it.
        """
        if self._resumed_batches is None:
            raise UserError(
                f"{checkpoint} does not say where the run was in its stream of problems (train_dataset): it was made by "
                "another trainer or an earlier version; start a new run from the model that it holds"
            )
        return self._resumed_batches

    def check_position_reached(self) -> None:
        """Refuse a stream that has ended before the place where the run was.

        Raises:
            UserError: with the reason.
        """
        if self.expected_checksum is not None:
            raise UserError(_ROWS_DIFFER)


_ROWS_DIFFER = (
    "train_dataset, a stream, does not give the rows again that it gave before the checkpoint: a run cannot go on with it; "
    "give a stream that begins anew with the same rows each time it is read, or a Dataset"
)


def _to_json_value(value: Any) -> Any:
    return (
        value.tolist() if hasattr(value, "tolist") else str(value) if isinstance(value, bytes) else type(value).__name__
    )
