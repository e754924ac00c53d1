"""Engine of an OpenAI-compatible server, tested with a fake server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from bupo.cli.main import main
from bupo.generation import vllm_engines
from bupo.utils.errors import UserError
from tests.evaluation.test_evaluation import evaluation
from tests.generation.test_seeded_sampling import answers, requests


class FakeServer(BaseHTTPRequestHandler):
    """OpenAI-compatible server whose text is a function of the request; every third request fails once."""

    seen: ClassVar[list[dict]] = []
    failed: ClassVar[set[int]] = set()
    broken = False

    def log_message(self, *args):
        pass

    def _reply(self, value, code=200):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self._reply({"data": [{"id": "served"}]} if self.path == "/v1/models" else {}, 200)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.broken:
            return self._reply({"error": "the prompt is too long"}, 400)
        if body["seed"] % 3 == 0 and body["seed"] not in self.failed:
            self.failed.add(body["seed"])
            return self._reply({}, 503)
        self.seen.append(body)
        text = f"\\boxed{{{body['seed'] % 50}}}"
        finish = "length" if body["seed"] % 2 else "stop"
        usage = {"completion_tokens": len(text)}
        return self._reply({"choices": [{"text": text, "finish_reason": finish}], "usage": usage})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(vllm_engines, "RETRY_DELAY", 0.01)
    FakeServer.seen, FakeServer.failed, FakeServer.broken = [], set(), False
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_answers_of_a_server(server):
    engine = vllm_engines.ServerEngine(server + "/v1", 20, 0.5, 0.9, max_concurrent_requests=4)
    found = answers(engine, requests(3))
    assert engine.model == "served" and len(found) == 36 and FakeServer.failed
    for request in requests(3):
        answer = found[request.problem, request.sample]
        assert answer.text == f"\\boxed{{{request.seed % 50}}}" and answer.truncated == bool(request.seed % 2)
    sent = {row["seed"]: row for row in FakeServer.seen}
    for request in requests(3):
        row = sent[request.seed]
        assert tuple(row["prompt"]) == request.prompt_ids
        assert (row["max_tokens"], row["temperature"], row["top_p"], row["n"]) == (20, 0.5, 0.9, 1)
        assert (row["top_k"], row["min_p"], row["repetition_penalty"]) == (
            -1,
            0,
            1,
        )  # otherwise the served model's settings apply


def test_running_requests_finish_before_an_error_is_raised(server):
    engine = vllm_engines.ServerEngine(server, 20, 1.0, 1.0, max_concurrent_requests=4)
    found, refused = [], {"n": 0}

    def answer(request, own=engine._complete):
        refused["n"] += request.problem == 5
        if request.problem == 5:
            raise UserError("no")
        return own(request)

    engine._complete = answer
    with pytest.raises(UserError, match="no"):
        for request, _ in engine(requests(3)):
            found.append(request.problem)
    assert 15 <= len(found) <= 15 + 3 + 4 and 1 <= refused["n"] <= 3 and len(FakeServer.seen) <= 22


def test_a_server_evaluates(server, tmp_path, capsys):
    assert main(evaluation(tmp_path, "--engine", "server", "--server", server)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["meta"]["served"] == "served" and summary["meta"]["engine"] == "server"
    FakeServer.broken = True
    assert main(evaluation(tmp_path, "--engine", "server", "--server", server)) == 0  # all answers are cached
    capsys.readouterr()
    assert main(evaluation(tmp_path / "new", "--engine", "server", "--server", server)) == 2
    assert 'answered 400 to /v1/completions: {"error": "the prompt is too long"}' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "server", "--server", "http://127.0.0.1:9"], "cannot be reached"),
        (["--engine", "server", "--server", "nowhere"], "cannot be reached or is no"),
        (["--engine", "server"], "engine server and its address go together"),
        (["--engine", "server", "--server", "http://127.0.0.1:80a0"], "cannot be reached or is no"),
        (
            ["--engine", "server", "--server", "http://127.0.0.1:9", "--model", ""],
            "model is not set: name the model that",
        ),
        (["--server", "http://127.0.0.1:9"], "engine server and its address go together"),
        (["--engine", "vllm", "--layer", "3"], "engine vllm samples the full model only"),
        (["--engine", "vllm"], "--engine vllm needs vLLM"),
    ],
)
def test_a_missing_engine_is_one_line(tmp_path, capsys, options, message):
    assert main(evaluation(tmp_path, *options)) == 2
    assert message in capsys.readouterr().err
