"""A server that is down, slow, broken or garbled, and what the trainer then says."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tulu_lightning.rollout.client import Client
from tulu_lightning.rollout.engine import EngineError


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answers = {
            "/echo": (200, body),
            "/empty": (200, b""),
            "/garbled": (200, b"<html>"),
            "/broken": (500, b"EngineDeadError"),
            "/refused": (400, b"temperature must be in [0, 2]"),
        }
        if self.path == "/slow":
            time.sleep(1)
        status, text = answers.get(self.path, (200, b"{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text) + (5 if self.path == "/cut" else 0)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def client():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Client(f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    server.server_close()


def test_json_there_and_back(client):
    body = {"ids": [1, 2], "text": "Tülu ½"}
    assert client.post("/echo", body, 10) == json.loads(json.dumps(body))
    assert client.post("/empty", body, 10) is None


@pytest.mark.parametrize(
    ("path", "seconds", "words"),
    [
        (
            "/slow",
            0.2,
            r"the trainer waited 0\.\d s for POST /slow of the server at http://127.*: no answer within 0\.2 s",
        ),
        ("/garbled", 10, "its answer is no JSON"),
        ("/broken", 10, "it failed with status 500: EngineDeadError"),
        ("/cut", 10, "no connection"),
    ],
)
def test_what_a_restart_may_cure_is_an_engine_error(client, path, seconds, words):
    with pytest.raises(EngineError, match=words):
        client.post(path, {}, seconds)


def test_nobody_there():
    with pytest.raises(EngineError, match=r"my judge waited .* GET /health .*127\.0\.0\.1:9: no connection .*refused"):
        Client("http://127.0.0.1:9", waiting="my judge").get("/health", 1)


def test_what_a_restart_cannot_cure_is_no_engine_error(client):
    with pytest.raises(RuntimeError, match=r"refuses POST /refused \(status 400\): temperature") as caught:
        client.post("/refused", {}, 10)
    assert not isinstance(caught.value, EngineError)
