"""Engines of vLLM: offline in this process, or any OpenAI-compatible server (`vllm serve MODEL`).

Each request has its own seed, so an answer does not depend on the other requests.
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

CHUNK_SIZE = 256  # requests per call of vLLM; its answers are saved after each call
MAX_ATTEMPTS, RETRY_DELAY = 4, 1.0  # of one request to a server; seconds before the second attempt


class ServerEngine:
    """Engine of an OpenAI-compatible server. Prompts are sent as token ids; the key is read from `OPENAI_API_KEY`.

    Args:
        url (`str`): such as `http://localhost:8000`.
        max_new_tokens (`int`), temperature, top_p (`float`): sampling settings.
        end_token_ids (`list[int]`, *optional*): tokens that end an answer, in addition to those of the server.
        max_concurrent_requests (`int`, *optional*, defaults to `64`): number of requests at once.
        timeout (`float`, *optional*, defaults to `3600.0`): seconds for one answer.

    Attributes:
        model (`str`): name of the served model.

    Raises:
        UserError: if the server cannot be reached, or refuses a request.
    """

    def __init__(
        self,
        url: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        end_token_ids: Sequence[int] = (),
        max_concurrent_requests: int = 64,
        timeout: float = 3600.0,
    ):
        self.headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self.max_concurrent_requests = max_concurrent_requests
        self.options = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            **VLLM_NEUTRAL_SAMPLING,
        }
        self.options |= {"stop_token_ids": list(end_token_ids)} if end_token_ids else {}
        models = self._request_json("/v1/models")
        if not models.get("data"):
            raise UserError(f"server {self.url} serves no model")
        self.model = models["data"][0]["id"]

    def __call__(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
        """Yield answers as they finish. After an error, yield the answers of running requests, then raise the error."""
        remaining, first_error = iter(requests), None
        pending: dict[Future[SampledCompletion], CompletionRequest] = {}
        pool = ThreadPoolExecutor(self.max_concurrent_requests)
        try:
            while True:
                free = 0 if first_error else self.max_concurrent_requests - len(pending)
                for request in islice(remaining, free):
                    pending[pool.submit(self._complete, request)] = request
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    request, error = pending.pop(future), future.exception()
                    if error is None:
                        yield request, future.result()
                    first_error = first_error or error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if first_error is not None:
            raise first_error

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
        """Return the server's JSON reply. Retry after a broken connection, a server error or a rate limit."""
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
            except (OSError, ValueError, http.client.HTTPException) as error:
                is_permanent = isinstance(error, ValueError | http.client.InvalidURL)  # not JSON, or an invalid URL
                if attempt == MAX_ATTEMPTS - 1 or body is None or is_permanent:
                    reason = getattr(error, "reason", error)
                    raise UserError(
                        f"server {self.url} cannot be reached or is no OpenAI-compatible one: {reason}"
                    ) from error
            time.sleep(RETRY_DELAY * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _read_error_body(error: urllib.error.HTTPError) -> str:
    """Return the beginning of a server's error message."""
    return " ".join(error.read().decode(errors="replace").split())[:200]


class VllmEngine:
    """Engine of vLLM in this process.

    Args:
        model (`str`): a hub id or folder.
        max_new_tokens (`int`), temperature, top_p (`float`): sampling settings.
        end_token_ids (`list[int]`, *optional*): tokens that end an answer, in addition to those that vLLM reads with the model.
        kwargs: arguments of `vllm.LLM`.

    Raises:
        UserError: if vLLM is not installed, or cannot load the model.
    """

    def __init__(
        self,
        model: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        end_token_ids: Sequence[int] = (),
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
        self.options |= {"stop_token_ids": list(end_token_ids)} if end_token_ids else {}
        path = resolve_model_path(model)
        with wrap_library_errors(f"vLLM cannot load {model!r}"):
            self.llm = vllm.LLM(path, **kwargs)

    def __call__(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[CompletionRequest, SampledCompletion]]:
        """Yield answers chunk by chunk, so that a killed evaluation loses one chunk at most."""
        for start in range(0, len(requests), CHUNK_SIZE):
            chunk = requests[start : start + CHUNK_SIZE]
            with wrap_library_errors("vLLM refuses a prompt", ValueError):  # longer than the model's context
                outputs = self.llm.generate(
                    [{"prompt_token_ids": list(request.prompt_ids)} for request in chunk],
                    [self.vllm.SamplingParams(seed=request.seed, **self.options) for request in chunk],
                    use_tqdm=False,
                )
            for request, output in zip(chunk, outputs, strict=True):
                completion = output.outputs[0]
                ids = tuple(completion.token_ids)
                yield request, SampledCompletion(completion.text, len(ids), completion.finish_reason == "length", ids)
