"""vLLM in an environment of its own: `BUPO_VLLM_PYTHON` is its interpreter, as it pins another transformers."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHON = os.environ.get("BUPO_VLLM_PYTHON", ".venv-vllm/bin/python")
ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    own = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return os.environ | own | more


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(model: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """A vLLM server of a model in float32; its address, once it answers."""
    port = free_port()
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--enforce-eager", "--port", str(port), *options]
    with log.open("w") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(**variables), start_new_session=True
        )
    try:
        url, started = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                assert running.poll() is None and time.monotonic() - started < 400, log.read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        os.killpg(running.pid, 15)
        running.wait(60)
