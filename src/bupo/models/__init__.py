"""Causal LMs: loading, model families, the residual stream and its verification, token scoring, internal policies."""
