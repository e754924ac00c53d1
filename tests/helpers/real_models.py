"""Pretrained models that `make test-models` installs: SmolLM2-135M and Gemma 3 270M."""

from functools import cache
from pathlib import Path

import pytest
import torch

from bupo.models.loading import load_model, load_tokenizer

MODELS = Path(__file__).parents[2] / "models"


@cache
def real_model(name: str):
    """Load `smollm2-135m` or `gemma-3-270m` in fp32, and its tokenizer."""
    path = MODELS / f"{name}.gguf"
    if not path.exists():
        pytest.fail(f"{path} is missing: run make test-models")
    return load_model(str(path), dtype=torch.float32).eval(), load_tokenizer(str(path))
