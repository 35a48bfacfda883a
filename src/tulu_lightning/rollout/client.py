"""JSON over HTTP to an engine's server, with a limit on every wait."""

import json
import socket
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tulu_lightning.rollout.engine import EngineError

__all__ = ["Client"]


class Client:
    """Talks to one server.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        waiting: who waits, for the messages.
    """

    def __init__(self, url: str, waiting: str = "the trainer") -> None:
        self.url, self.waiting = url.rstrip("/"), waiting

    def get(self, path: str, seconds: float) -> Any:
        """The answer's JSON (None if it is empty); errors as in `post`."""
        return self._answer(Request(self.url + path), f"GET {path}", seconds)

    def post(self, path: str, body: Any, seconds: float, reads: bool = True) -> Any:
        """Send JSON and read JSON.

        Args:
            path: e.g. `/v1/completions`.
            body: what to send.
            seconds: how long to wait for the answer.
            reads: whether the answer is JSON; else it is None.

        Raises:
            EngineError: no answer in time, no connection, an answer that is no JSON, or one that says that the server
                failed. The message names who waited for whom and for how long.
            RuntimeError: the server refuses the request (status 4xx).
        """
        data = json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        return self._answer(request, f"POST {path}", seconds, reads)

    def _answer(self, request: Request, what: str, seconds: float, reads: bool = True) -> Any:
        start = time.monotonic()
        try:
            with urlopen(request, timeout=seconds) as answer:
                text = answer.read()
            return json.loads(text) if text and reads else None
        except HTTPError as error:
            said = error.read().decode("utf-8", "replace").strip()[:500]
            if error.code < 500:
                raise RuntimeError(f"the server at {self.url} refuses {what} (status {error.code}): {said}") from error
            raise self._error(what, f"it failed with status {error.code}: {said}", start) from error
        except (URLError, HTTPException, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, socket.timeout):
                text = f"no answer within {seconds:g} s"
            elif isinstance(error, ValueError):
                text = f"its answer is no JSON ({error})"
            else:
                text = f"no connection ({reason or type(error).__name__})"
            raise self._error(what, text, start) from error

    def _error(self, what: str, text: str, start: float) -> EngineError:
        waited = time.monotonic() - start
        return EngineError(f"{self.waiting} waited {waited:.1f} s for {what} of the server at {self.url}: {text}")
