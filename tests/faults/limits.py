"""What `before` of the harness may do to a run's process."""

import resource

from bupo.training.trl_internals import GRPOTrainerHooks


def _full_from_the_second_save(size: int) -> None:
    """No file may grow beyond so many bytes from the second checkpoint on, as on a disk that is full."""
    inner, calls = GRPOTrainerHooks._save_checkpoint, []

    def saving(self, model, trial):
        calls.append(1)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return inner(self, model, trial)

    GRPOTrainerHooks._save_checkpoint = saving


def no_room_for_the_model() -> None:
    _full_from_the_second_save(1 << 20)


def no_room_for_the_optimizer() -> None:
    _full_from_the_second_save(5 << 20)
