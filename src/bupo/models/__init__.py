"""A causal LM opened up: loading, families, the residual stream and its proof, scoring, policies."""
