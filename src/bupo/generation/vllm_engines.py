"""vLLM as an engine: offline in this process, or any OpenAI-compatible server (`vllm serve MODEL`).

Each request carries its own seed, so an answer does not depend on what else is asked for.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

from bupo.generation.seeded_sampling import CompletionRequest, SampledCompletion
from bupo.models.generation_settings import VLLM_NEUTRAL_SAMPLING
from bupo.models.loading import resolve_model_path
from bupo.utils.errors import UserError, summarize_error, wrap_library_errors

CHUNK_SIZE = 256  # requests given to vLLM at once, after which answers are kept
MAX_ATTEMPTS, RETRY_DELAY = 4, 1.0  # of a request that a server fails, seconds before the second


class ServerEngine:
    """Answers from an OpenAI-compatible server, by token ids. A key is read from `OPENAI_API_KEY`.

    Args:
        url (`str`): such as `http://localhost:8000`.
        max_new_tokens (`int`), temperature, top_p (`float`): of the sampling.
        ends (`list[int]`, *optional*): ids of tokens that end an answer, besides those that the server knows.
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
        ends: Sequence[int] = (),
        parallel: int = 64,
        timeout: float = 3600.0,
    ):
        self.headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        self.url, self.max_concurrent_requests, self.timeout = url.rstrip("/").removesuffix("/v1"), parallel, timeout
        self.options = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **VLLM_NEUTRAL_SAMPLING,
        }
        self.options |= {"stop_token_ids": list(ends)} if ends else {}
        models = self._request_json("/v1/models")
        if not models.get("data"):
            raise UserError(f"server {self.url} serves no model")
        self.model = models["data"][0]["id"]

    def __call__(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
        """Answers as they finish. After an error no more are asked for, those under way are still given, and it is raised."""
        rest, failed = iter(requests), None
        pending: dict[Future[SampledCompletion], CompletionRequest] = {}
        pool = ThreadPoolExecutor(self.max_concurrent_requests)
        try:
            while True:
                for request in islice(rest, 0 if failed else self.max_concurrent_requests - len(pending)):
                    pending[pool.submit(self._complete, request)] = request
                if not pending:
                    break
                for job in wait(pending, return_when=FIRST_COMPLETED).done:
                    request, error = pending.pop(job), job.exception()
                    if error is None:
                        yield request, job.result()
                    failed = failed or error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failed is not None:
            raise failed

    def _complete(self, request: CompletionRequest) -> SampledCompletion:
        body = {"model": self.model, "prompt": list(request.prompt_ids), "seed": request.seed, "n": 1, **self.options}
        reply = self._request_json("/v1/completions", body)
        try:
            choice = reply["choices"][0]
            return SampledCompletion(
                choice["text"], reply["usage"]["completion_tokens"], choice["finish_reason"] == "length"
            )
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"server {self.url} answered without {error}: it must give choices, with text and finish_reason, and usage"
            ) from error

    def _request_json(self, path: str, body: dict | None = None) -> dict[str, Any]:
        """The server's JSON. Tried again where the connection breaks or the server has an error of its own."""
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(MAX_ATTEMPTS):
            try:
                call = urllib.request.Request(self.url + path, data, self.headers)
                with urllib.request.urlopen(call, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                if (error.code < 500 and error.code != 429) or attempt == MAX_ATTEMPTS - 1:
                    raise UserError(
                        f"server {self.url} answered {error.code} to {path}: {_read_error_body(error)}"
                    ) from error
            except (
                OSError,
                ValueError,
                http.client.HTTPException,
            ) as error:  # unreachable, broken off, no JSON, no address
                hopeless = isinstance(error, ValueError | http.client.InvalidURL)
                if attempt == MAX_ATTEMPTS - 1 or body is None or hopeless:
                    reason = getattr(error, "reason", error)
                    raise UserError(
                        f"server {self.url} cannot be reached or is no OpenAI-compatible one: {reason}"
                    ) from error
            time.sleep(RETRY_DELAY * 2**attempt)
        raise AssertionError("the last try returns or raises")


def _read_error_body(error: urllib.error.HTTPError) -> str:
    """What a server gives as its reason, shortened."""
    return " ".join(error.read().decode(errors="replace").split())[:200]


class VllmEngine:
    """Answers by vLLM in this process.

    Args:
        model (`str`): a hub id or folder.
        max_new_tokens (`int`), temperature, top_p (`float`): of the sampling.
        ends (`list[int]`, *optional*): ids of tokens that end an answer, besides those that vLLM reads with the model.
        kwargs: of `vllm.LLM`.

    Raises:
        UserError: if vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        ends: Sequence[int] = (),
        **kwargs,
    ):
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM: {summarize_error(error)}; or serve the model and give --server"
            ) from error
        self.vllm = vllm
        self.options = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **VLLM_NEUTRAL_SAMPLING,
        }
        self.options |= {"stop_token_ids": list(ends)} if ends else {}
        path = resolve_model_path(model)
        with wrap_library_errors(f"vLLM cannot load {model!r}"):
            self.llm = vllm.LLM(path, **kwargs)

    def __call__(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
        """Answers chunk by chunk, which is how often a killed evaluation has kept them."""
        for start in range(0, len(requests), CHUNK_SIZE):
            chunk = requests[start : start + CHUNK_SIZE]
            with wrap_library_errors("vLLM refuses a prompt", ValueError):  # beyond the model's length
                outputs = self.llm.generate(
                    [{"prompt_token_ids": list(request.prompt_ids)} for request in chunk],
                    [self.vllm.SamplingParams(seed=request.seed, **self.options) for request in chunk],
                    use_tqdm=False,
                )
            for request, output in zip(chunk, outputs, strict=True):
                said = output.outputs[0]
                ids = tuple(said.token_ids)
                yield request, SampledCompletion(said.text, len(ids), said.finish_reason == "length", ids)
