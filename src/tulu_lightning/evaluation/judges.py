"""The models that judge answers: which one a task has is named by the user, and it is asked before anything is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tulu_lightning.errors import InputError, nearest
from tulu_lightning.verifiers.chat_server import (
    Reply,
    RequestFailed,
    check_server,
    request_chat,
    request_text,
    with_tries,
)

__all__ = ["JUDGED", "KEYWORDS", "Source", "check_judges", "judge_of", "server_of", "use_judge"]

KEYWORDS = "keywords"
"""What stands in place of a judge where a rule looks for phrases of refusal."""
KEY = "TULU_JUDGE_KEY"
"""Environment variable with the key of a judge's server, where it wants one."""
JUDGED: Mapping[str, str] = {
    "alpaca_eval": "--judge alpaca_eval=gpt-4-1106-preview@https://api.openai.com/v1, or a server of your own",
    "href": "--judge href=meta-llama/Llama-3.1-70B-Instruct@http://localhost:8000/v1",
    "href_similarity": "--judge href_similarity=FacebookAI/roberta-large, or a folder of it",
    "safety": "--judge safety=allenai/wildguard@http://localhost:8000/v1, a folder of WildGuard, or safety=keywords",
}
"""Names of the judges that tasks have, with what would name one."""
SECONDS, RETRIES, BACKOFF = 120.0, 4, 1.0

_named: dict[str, "Source"] = {}
_looked_for: set[str] = set()
"""Names of judges that a task has asked for."""


@dataclass(frozen=True)
class Source:
    """A judge: a model behind a server, a model folder (`url` is empty), or `KEYWORDS`."""

    model: str
    url: str = ""

    def check(self) -> None:
        """Ask for one token.

        Raises:
            InputError: the server is down, or does not serve the model.
        """
        if not self.url:
            return
        check_server(f"judge {self.model}", self.url, None)
        try:
            self._once([{"role": "user", "content": "Say yes."}], max_tokens=1)
        except RequestFailed as failure:
            remedy = f"Start it (e.g. `vllm serve {self.model}`), or name another judge."
            raise InputError(f"judge {self.model} at {self.url}", f"it does not answer ({failure})", remedy) from None

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Reply:
        """Its answer to a conversation.

        Raises:
            InputError: none came, after as many tries as are worth it.
        """
        return self._tried(lambda: self._once(messages, **options))

    def text(self, prompt: str, **options: Any) -> Reply:
        """How it goes on after a prompt as it is. Raises as `chat`."""
        return self._tried(lambda: request_text(self.url, self.model, prompt, SECONDS, _key(), **options))

    def _once(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Reply:
        return request_chat(self.url, self.model, messages, SECONDS, _key(), **options)

    def _tried(self, once: Any) -> Reply:
        try:
            return with_tries(once, RETRIES, BACKOFF)
        except RequestFailed as failure:
            remedy = "Mend or start the server, and run the same command again: finished items are kept."
            raise InputError(f"judge {self.model} at {self.url}", f"it does not answer ({failure})", remedy) from None


def use_judge(name: str, given: str) -> None:
    """Name the judge of tasks.

    Args:
        name: one of `JUDGED`.
        given: MODEL@URL of an OpenAI-compatible server, a model folder, or `keywords` (safety).

    Raises:
        InputError: no task has such a judge, or the address is none.
    """
    if name not in JUDGED:
        raise InputError("--judge", f"no task has a judge {name!r}", nearest(name, JUDGED))
    model, _, url = given.rpartition("@") if "://" in given else (given, "", "")
    if not model:
        raise InputError(f"--judge {name}", f"is {given!r}", "Give MODEL@URL, e.g. my-model@http://localhost:8000/v1.")
    if url:
        check_server(f"--judge {name}", url, None)
    _named[name] = Source(model, url)


def check_judges(where: str = "--judge ") -> None:
    """Refuse judges that no task has: whoever named one believes that it judges.

    Args:
        where: what stands before the name in the message.

    Raises:
        InputError: a judge of `use_judge` was asked for by no task that was read.
    """
    for name in _named:
        if name not in _looked_for:
            raise InputError(f"{where}{name}", "no task of these is judged by it", "Leave it out, or name its task.")


def judge_of(name: str) -> Source:
    """The judge that was named.

    Raises:
        InputError: none was.
    """
    _looked_for.add(name)
    if name not in _named:
        raise InputError(f"judge {name}", "none is named, and its answers cannot be scored without", f"{JUDGED[name]}.")
    return _named[name]


def server_of(name: str) -> Source:
    """The judge that was named, which has to be a server.

    Raises:
        InputError: none was, or it is something else.
    """
    source = judge_of(name)
    if not source.url:
        remedy = "Give MODEL@URL of a server."
        raise InputError(f"judge {name}", f"{source.model!r} is no model behind a server", remedy)
    return source


def _key() -> str | None:
    return KEY if os.environ.get(KEY) else None
