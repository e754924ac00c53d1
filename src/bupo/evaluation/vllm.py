"""vLLM as an engine: offline in this process, or any OpenAI-compatible server (`vllm serve MODEL`).

Each request carries its own seed, so an answer does not depend on what else is asked for.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from bupo.errors import UserError, first_line
from bupo.sampling import Answer, Request

CHUNK = 256  # requests given to vLLM at once, after which answers are kept
TRIES, PAUSE = 4, 1.0  # of a request that a server fails, seconds before the second


class ServerEngine:
    """Answers from an OpenAI-compatible server, by token ids.

    Args:
        url (`str`): such as `http://localhost:8000`.
        max_new_tokens (`int`), temperature, top_p (`float`): of the sampling.
        parallel (`int`, *optional*, defaults to `64`): requests under way at once.
        timeout (`float`, *optional*, defaults to `3600.0`): seconds an answer may take.

    Attributes:
        model (`str`): what the server serves.

    Raises:
        UserError: if the server cannot be reached, or refuses a request.
    """

    def __init__(
        self,
        url: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        parallel: int = 64,
        timeout: float = 3600.0,
    ):
        self.url, self.parallel, self.timeout = url.rstrip("/").removesuffix("/v1"), parallel, timeout
        self.options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        models = self._call("/v1/models")
        if not models.get("data"):
            raise UserError(f"server {self.url} serves no model")
        self.model = models["data"][0]["id"]

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answers as they finish."""
        with ThreadPoolExecutor(self.parallel) as pool:
            jobs = {pool.submit(self._answer, request): request for request in requests}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            finally:
                for job in jobs:
                    job.cancel()

    def _answer(self, request: Request) -> Answer:
        body = {"model": self.model, "prompt": list(request.prompt_ids), "seed": request.seed, "n": 1, **self.options}
        reply = self._call("/v1/completions", body)
        choice = reply["choices"][0]
        return Answer(choice["text"], reply["usage"]["completion_tokens"], choice["finish_reason"] == "length")

    def _call(self, path: str, body: dict | None = None) -> dict[str, Any]:
        """The server's JSON. Tried again where the connection breaks or the server has an error of its own."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(TRIES):
            try:
                call = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
                with urllib.request.urlopen(call, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                if error.code < 500 or attempt == TRIES - 1:
                    raise UserError(f"server {self.url} answered {error.code} to {path}: {_said(error)}") from error
            except (OSError, ValueError) as error:  # unreachable, broken off, no JSON, no address
                if attempt == TRIES - 1 or body is None or isinstance(error, ValueError):
                    reason = getattr(error, "reason", error)
                    raise UserError(
                        f"server {self.url} cannot be reached or is no OpenAI-compatible one: {reason}"
                    ) from error
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError("the last try returns or raises")


def _said(error: urllib.error.HTTPError) -> str:
    """What a server gives as its reason, shortened."""
    return " ".join(error.read().decode(errors="replace").split())[:200]


class VllmEngine:
    """Answers by vLLM in this process.

    Args:
        model (`str`): a hub id or folder.
        max_new_tokens (`int`), temperature, top_p (`float`): of the sampling.
        kwargs: of `vllm.LLM`.

    Raises:
        UserError: if vLLM is not installed, or cannot load the model.
    """

    def __init__(self, model: str, max_new_tokens: int, temperature: float, top_p: float, **kwargs):
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM: {first_line(error)}; or serve the model and give --server"
            ) from error
        self.vllm = vllm
        self.options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        try:
            self.llm = vllm.LLM(model, **kwargs)
        except Exception as error:
            raise UserError(f"vLLM cannot load {model!r}: {first_line(error)}") from error

    def __call__(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
        """Answers chunk by chunk."""
        for start in range(0, len(requests), CHUNK):
            chunk = requests[start : start + CHUNK]
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in chunk],
                [self.vllm.SamplingParams(seed=request.seed, **self.options) for request in chunk],
                use_tqdm=False,
            )
            for request, output in zip(chunk, outputs, strict=True):
                said = output.outputs[0]
                yield request, Answer(said.text, len(said.token_ids), said.finish_reason == "length")
