"""A reward of the answers alone, which needs no grader: quick, and different for different answers."""

FALLS_AFTER = 9 * 2  # calls of `falling`'s clock, in rollout batches


def digits(completion_ids, **kwargs):
    """Some answers are better than others, also of a model that is right or wrong about all."""
    return [sum(token % 7 for token in ids) / (6.0 * max(1, len(ids))) for ids in completion_ids]


def falling(completion_ids, trainer_state, **kwargs):
    """Rises, then falls far below: the guard ends the first phase. By the update that a run stands at, not by its calls."""
    level = 0.9 if trainer_state.global_step < 12 else 0.1
    return [level + 0.01 * reward for reward in digits(completion_ids)]
