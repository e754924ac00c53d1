"""Analysis of internal policies: entropies, divergences and similarities of every layer and module on rollouts."""
