"""One request to a server of OpenAI's interface, with tries again: a local `vllm serve`, or any other."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from tulu_lightning.errors import InputError

__all__ = ["Reply", "RequestFailed", "check_server", "request_chat", "request_text", "with_tries"]

ANSWER_BYTES = 1 << 20
RETRIED = (408, 409, 425, 429)
"""HTTP statuses below 500 that may pass by themselves."""
REFUSED = (400, 413, 422)
"""HTTP statuses that say that this request cannot be served: it is too long, or a filter stops it."""
LONGEST_PAUSE = 30.0
"""Seconds between two tries, where the server names none."""
LONGEST_ASKED = 600.0
"""Seconds that a server may ask for; one that asks for more is not waited for."""
T = TypeVar("T")


class Reply(NamedTuple):
    """A server's answer."""

    text: str
    finish: str
    """As the server says: "stop", "length" or another word."""
    prompt_tokens: int
    tokens: int
    """Of the answer; both are 0 where the server does not count."""
    first: Mapping[str, float] | None = None
    """Log-probs of the likeliest first tokens, where the request asked for them and the server gives them."""
    model: str | None = None
    """Which model the server says that it was, often with its version; None where it says nothing."""


class RequestFailed(Exception):
    """One request came to nothing."""

    def __init__(
        self, what: str, pause: float | None, lies_in: Literal["server", "request", "either"] = "either"
    ) -> None:
        super().__init__(what)
        self.lies_in = lies_in
        """`request`: the server works, and refuses this one; `server`: others would fare no better."""
        self.pause = pause
        """Seconds to wait before another try is worth it; None if it is not."""


def check_server(where: str, url: str, api_key_env: str | None) -> None:
    """Refuse an address that is none or holds a secret, and a key that is not set or cannot be sent.

    Raises:
        InputError: one of these; what it says of a secret is where it stands.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(f"{where}.url", f"is {url!r}", "Give an address such as http://localhost:8000/v1.")
    if parts.username is not None or parts.query or parts.fragment:  # an address is written into summaries and messages
        remedy = "Give the address alone, and name the variable that holds the key in api_key_env."
        raise InputError(
            f"{where}.url", f"holds a user, a password or a query before or after {parts.hostname}", remedy
        )
    if api_key_env is not None and not os.environ.get(api_key_env):
        what = f"the environment variable {api_key_env} is not set"
        raise InputError(f"{where}.api_key_env", what, "Set it to the server's key, or leave api_key_env out.")
    if not _key(api_key_env).isprintable() or not _key(api_key_env).isascii():
        what = f"the environment variable {api_key_env} holds what no header can hold"
        raise InputError(f"{where}.api_key_env", what, "Set it to the key alone, on one line.")


def request_chat(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    seconds: float,
    api_key_env: str | None = None,
    **options: Any,
) -> Reply:
    """Ask `URL/chat/completions` once.

    Args:
        url: of the server, up to `/v1`, which is added to an address without a path.
        model: as the server names it.
        messages: the conversation.
        seconds: longest wait, answer included.
        api_key_env: environment variable that holds the key, which goes into the request and nowhere else.
        options: `temperature`, `max_tokens` and what else the server reads.

    Raises:
        RequestFailed: no answer, or one that is no chat completion.
    """
    body = {"model": model, "messages": [_plain(message) for message in messages], **options}
    return _request(_endpoint(url, "chat/completions"), body, seconds, api_key_env)


def request_text(
    url: str, model: str, prompt: str, seconds: float, api_key_env: str | None = None, **options: Any
) -> Reply:
    """Ask `URL/completions` once to go on after a prompt that is given as it is, without a chat template.

    Args and Raises: as for `request_chat`.
    """
    body = {"model": model, "prompt": prompt.encode("utf-8", "replace").decode("utf-8"), **options}
    return _request(_endpoint(url, "completions"), body, seconds, api_key_env)


def _request(url: str, body: Mapping[str, Any], seconds: float, api_key_env: str | None) -> Reply:
    headers = {"Content-Type": "application/json"}
    if api_key_env is not None:
        headers["Authorization"] = f"Bearer {_key(api_key_env)}"
    request = Request(url, json.dumps(body).encode(), headers)
    try:
        reply = _reply(json.loads(_read(_opener(url), request, seconds)))
        key = _key(api_key_env)
        return reply._replace(text=reply.text.replace(key, "(the key)")) if key else reply
    except HTTPError as error:
        told = _told(error)
        if key := _key(api_key_env):
            told = told.replace(key, "(the key)")  # some servers repeat it
        told = told[:200]
        again = error.code >= 500 or error.code in RETRIED
        pause = _asked_pause((error.headers or {}).get("Retry-After", ""))
        later = f", and asks to be left alone for {pause:,.0f} seconds" if pause > LONGEST_ASKED else ""
        again = again and not later
        lies_in = "request" if error.code in REFUSED else "either" if error.code == 500 else "server"
        raise RequestFailed(f"HTTP {error.code}: {told!r}{later}", pause if again else None, lies_in) from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        lies_in = "either" if isinstance(reason, TimeoutError) else "server"
        raise RequestFailed(f"{reason or type(error).__name__}", 0.0, lies_in) from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise RequestFailed(f"its answer is no chat completion ({type(error).__name__}: {error})", 0.0) from None


def with_tries(
    once: Callable[[], T], retries: int, backoff_seconds: float, sleep: Callable[[float], object] | None = None
) -> T:
    """Call until it does not fail, with pauses that double, or as long as the server asks for.

    Raises:
        RequestFailed: the last try failed, or one for a reason that does not pass.
    """
    pause = backoff_seconds
    for left in range(retries, -1, -1):
        try:
            return once()
        except RequestFailed as failure:
            if failure.pause is None or left == 0:
                raise
            (sleep or time.sleep)(max(failure.pause, min(LONGEST_PAUSE, pause)))
            pause *= 2
    raise AssertionError("unreachable")


def _asked_pause(header: str) -> float:
    """Seconds of a Retry-After header, which has them or a date (RFC 9110, section 10.2.3); 0 for none."""
    if header.isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _key(api_key_env: str | None) -> str:
    """The key without the line end that a file leaves behind it; empty where there is none."""
    return "" if api_key_env is None else os.environ.get(api_key_env, "").strip()


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """Role and content alone; a lone surrogate is no text to a server."""
    return {name: str(message[name]).encode("utf-8", "replace").decode("utf-8") for name in ("role", "content")}


def _reply(answer: Any) -> Reply:
    choice = answer["choices"][0]
    usage = answer.get("usage") or {}
    counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if text is None and choice.get("finish_reason") in ("length", "content_filter"):
        text = ""  # cut before the answer began, as a reasoning model may be
    found = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs")
    first = None if found is None else {str(one["token"]): float(one["logprob"]) for one in found}
    if not isinstance(text, str):
        raise TypeError(f"its text is {text!r:.40}")
    named = answer.get("model")
    model = named if isinstance(named, str) and named else None
    return Reply(text, str(choice.get("finish_reason") or "stop"), *counts, first=first, model=model)


def _endpoint(url: str, path: str) -> str:
    base = url.rstrip("/")
    return f"{base}/{path}" if urlsplit(base).path else f"{base}/v1/{path}"


class _Here(HTTPRedirectHandler):
    """Follows no server elsewhere: the key would go along."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the answer stays what it is, an error with the server's status."""


def _opener(url: str) -> OpenerDirector:
    """Opens addresses; one on this machine without the proxy that the environment may name."""
    local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    return build_opener(_Here(), ProxyHandler({})) if local else build_opener(_Here())


def _told(error: HTTPError) -> str:
    """The beginning of what a server says to its refusal; nothing where it breaks off."""
    try:
        with error:
            return error.read(1000).decode("utf-8", "replace").strip()
    except (OSError, HTTPException):
        return ""


def _read(opener: OpenerDirector, request: Request, seconds: float) -> bytes:
    """The body of the answer, all within the time: a server that sends a byte now and then is slow too."""
    end = time.monotonic() + seconds
    parts = bytearray()
    with opener.open(request, timeout=seconds) as answer:
        while part := answer.read1(1 << 16):
            parts += part
            if len(parts) > ANSWER_BYTES:
                raise ValueError(f"longer than {ANSWER_BYTES} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {seconds:g} seconds")
    return bytes(parts)
