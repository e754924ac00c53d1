"""Position of a run in a stream of problems, and the check that a resumed stream yields the same rows again."""

import hashlib
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from bupo.data.prompts import check_not_serialized
from bupo.utils.errors import UserError

MAX_CHECKSUMS = 4096  # of the last batches: data loaders read a few batches ahead of training
_ROWS_DIFFER = (
    "train_dataset, a stream, does not yield the same rows as before the checkpoint, so the run cannot be resumed: use a "
    "stream that yields the same rows each time it is read, or a Dataset"
)


class StreamPosition:
    """The current pass over a stream, the batches of this pass that were trained on, and a checksum of their rows.

    A stream has no length: transformers counts all passes as one epoch, and would skip all batches of a resumed run in
    the first pass. This class counts passes and skips batches only in the pass that was interrupted.

    Attributes:
        pass_index (`int`): the current pass, from 0.
        pass_start (`int`): micro-batches that the trainer had processed when the pass began.
        first_pass (`int`): the pass in which this process began or resumed the run.
        checksums (`deque[tuple[int, str]]`): number of batches read in this pass, and the checksum of their rows.
        expected_checksum (`tuple[int, str]`, *optional*): the entry of `checksums` that the resumed stream must reach.
    """

    def __init__(self) -> None:
        self.pass_index = self.pass_start = self.first_pass = 0
        self._resumed_batches: int | None = None  # position of the checkpoint in its pass
        self.checksums: deque[tuple[int, str]] = deque(maxlen=MAX_CHECKSUMS)
        self.batches_read, self.checksum = 0, ""
        self.expected_checksum: tuple[int, str] | None = None

    def begin_pass(self, pass_index: int, passes_done: int, skipped: int) -> None:
        """Begin a pass.

        Args:
            pass_index (`int`): its number, from 0.
            passes_done (`int`): micro-batches that the trainer has processed.
            skipped (`int`): batches of this pass that were trained on before the run was resumed.
        """
        self.pass_index, self.pass_start = pass_index, passes_done - skipped
        self.batches_read, self.checksum = 0, ""
        self.checksums.clear()

    def wrap_collator(self, collate: Callable[[list], Any]) -> Callable[[list], Any]:
        """Return a data collator that also records the checksum of the rows."""

        def recording_collate(rows: list) -> Any:
            self._record_batch(rows)
            return collate(rows)

        return recording_collate

    def _record_batch(self, rows: list) -> None:
        for number, row in enumerate(rows):
            check_not_serialized(row.get("prompt"), "train_dataset, a stream", self.batches_read * len(rows) + number)
        text = json.dumps(rows, sort_keys=True, default=_to_json_value)
        self.batches_read += 1
        self.checksum = hashlib.sha256((self.checksum + text).encode()).hexdigest()
        self.checksums.append((self.batches_read, self.checksum))
        if self.expected_checksum is not None and self.batches_read == self.expected_checksum[0]:
            if self.checksum != self.expected_checksum[1]:
                raise UserError(_ROWS_DIFFER)
            self.expected_checksum = None

    def state(self, passes_done: int, ended: bool) -> dict[str, Any]:
        """Return the position for a checkpoint.

        Args:
            passes_done (`int`): micro-batches that the trainer has processed.
            ended (`bool`): whether the pass is over.
        """
        if ended:
            return {"pass": self.pass_index + 1, "batches": 0, "checksum": ""}
        batches = passes_done - self.pass_start
        return {"pass": self.pass_index, "batches": batches, "checksum": dict(self.checksums).get(batches, "")}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the position of a checkpoint."""
        self.first_pass, self._resumed_batches = state["pass"], state["batches"]
        self.expected_checksum = (state["batches"], state["checksum"]) if state["checksum"] else None

    def get_batches_to_skip(self, checkpoint: str) -> int:
        """Return the number of batches to skip in the first pass.

        Raises:
            UserError: if the checkpoint does not hold it.
        """
        if self._resumed_batches is None:
            raise UserError(
                f"{checkpoint} holds no position in the stream of problems (train_dataset), since another trainer made it: "
                "start a new run from the model in it"
            )
        return self._resumed_batches

    def check_position_reached(self) -> None:
        """Refuse a stream that has ended before the position of the checkpoint.

        Raises:
            UserError: with the reason.
        """
        if self.expected_checksum is not None:
            raise UserError(_ROWS_DIFFER)


def _to_json_value(value: Any) -> Any:
    """Return arrays and numbers as lists and plain numbers, bytes as text, and other objects, such as images, by their type."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, bytes) else type(value).__name__
