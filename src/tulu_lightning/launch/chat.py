"""`tulu chat`: talk to a checkpoint in the terminal or, with `--web`, in the browser; two of them side by side."""

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tulu_lightning.errors import InputError, nearest

if TYPE_CHECKING:
    from tulu_lightning.launch.chat_model import ChatModel, Manner

__all__ = ["Conversation", "Talk", "main", "parser"]

COMMANDS = {
    "/reset": "forget the conversation",
    "/system": "TEXT: set the system message and start anew; without TEXT show it, `/system none` takes it away",
    "/history": "show the conversation so far",
    "/help": "show this",
    "/quit": "leave (also Ctrl-D)",
}
COLOURS = ("cyan", "magenta")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    about = "Talk to a checkpoint in the terminal or in the browser. Lines that are piped in are turns."
    found = argparse.ArgumentParser(prog="tulu chat", description=about)
    found.add_argument("--model", required=True, metavar="DIR", help="model folder, name or hub id")
    found.add_argument("--against", metavar="DIR", help="a second model, which answers the same turns")
    found.add_argument("--system", metavar="TEXT", help="system message")
    found.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    found.add_argument("--top_p", type=float, default=1.0, help="share of probability sampled from (%(default)s)")
    found.add_argument("--max_new_tokens", type=int, default=512, help="longest reply, in tokens (%(default)s)")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--template", metavar="NAME", help="chat template; the model's own by default")
    found.add_argument("--engine", choices=("local", "vllm"), default="local")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--web", action="store_true", help="a page in the browser instead of the terminal")
    found.add_argument("--host", default="127.0.0.1", help="address that the page is served at (%(default)s)")
    found.add_argument("--port", type=int, default=7860, help="its port; 0 takes any that is free (%(default)s)")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: arguments.

    Returns:
        Exit status.

    Raises:
        InputError: a number out of its range, a model that does not open or has no chat template, or no gradio.
    """
    options = parser().parse_args(list(argv))
    _check(options)
    from tulu_lightning.launch.chat_model import Manner, open_chat_model

    manner = Manner(options.temperature, options.top_p, options.max_new_tokens, options.seed)
    paths = [options.model, *([options.against] if options.against else [])]
    with contextlib.ExitStack() as opened:
        models = []
        for path in paths:
            models.append(open_chat_model(path, options.engine, options.template, options.dtype))
            opened.callback(models[-1].close)
        if options.web:
            from tulu_lightning.launch.chat_web import serve

            serve(models, manner, options.system, options.host, options.port)
            return 0
        Talk(models, manner, options.system).run(sys.stdin)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Everything that can be known before weights load."""
    for name, ok, remedy in (
        ("temperature", options.temperature >= 0, "Use 0 (the likeliest token) or more."),
        ("top_p", 0 < options.top_p <= 1, "It lies above 0 and is at most 1."),
        ("max_new_tokens", options.max_new_tokens >= 1, "Use at least 1."),
        ("port", 0 <= options.port < 65536, "Use 0 to 65535."),
    ):
        if not ok:
            raise InputError(f"--{name}", f"is {getattr(options, name)}", remedy)
    if options.against and options.engine == "vllm":
        what = "vLLM in this process holds one model, and --against names a second"
        raise InputError("--engine", what, "Use --engine local, or one model at a time.")
    if options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("--engine", "is vllm, and there is no vLLM in this environment", "Install it, or use local.")
    if options.web and importlib.util.find_spec("gradio") is None:
        raise InputError("--web", "gradio is not installed", "Install it: pip install 'tulu-lightning[chat]'.")


class Conversation:
    """What was said to one model and what it said.

    Args:
        model: which.
        system: system message; None for the model's own default.
    """

    def __init__(self, model: "ChatModel", system: str | None) -> None:
        self.model = model
        self.messages: list[dict[str, str]] = []
        self.restart(system)

    def restart(self, system: str | None) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def tokens(self) -> int:
        """Length of the last message, in tokens; 0 where nothing was said."""
        return self.model.count(self.messages[-1]["content"]) if self.messages else 0

    def say(self, text: str, manner: "Manner") -> Generator[str, None, None]:
        """The reply to one more turn, in pieces; what was said of it stays, also when it is broken off."""
        self.messages.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in self.model.reply(self.messages, manner):
                said += piece
                yield piece
        except InputError:
            self.messages.pop()
            raise
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.append({"role": "assistant", "content": said})


def _decoded(source: Iterable[str]) -> Iterator[str]:
    """The lines of a pipe.

    Raises:
        InputError: names a line that is not UTF-8.
    """
    lines, number = iter(source), 0
    while True:
        number += 1
        try:
            line = next(lines, None)
        except UnicodeDecodeError:
            line = "\udcff"
        if line is None:
            return
        if any("\udc80" <= each <= "\udcff" for each in line):  # how Python keeps a byte that is none, in some locales
            raise InputError(f"standard input, line {number}", "is not UTF-8", "Write it in UTF-8.")
        yield line


class Talk:
    """A talk in the terminal, or with a pipe.

    Args:
        models: one, or two that answer the same turns.
        manner: how replies are sampled.
        system: system message.
    """

    def __init__(self, models: Sequence["ChatModel"], manner: "Manner", system: str | None) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True)
        self.manner, self.system = manner, system
        self.conversations = [Conversation(model, system) for model in models]
        self.live = False

    def run(self, source: Any) -> None:
        """Take turns until the lines end, or one says /quit.

        Args:
            source: lines; a terminal is asked with a prompt, and anything else is read as it comes.
        """
        self.live = source.isatty()
        if self.live:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  gives `input` a history and the arrow keys
            names = " and ".join(c.model.name for c in self.conversations)
            self._note(f"{names}. /help lists the commands; Ctrl-C stops a reply, Ctrl-D leaves.")
        for line in self._lines(source):
            text = line.strip()
            if not text:
                continue
            if text.startswith("/"):
                if self._obey(text):
                    return
            else:
                self._answer(text)

    def _lines(self, source: Any) -> Iterator[str]:
        if not self.live:
            yield from _decoded(source)
            return
        while True:
            try:
                yield input("\n> ")
            except (EOFError, KeyboardInterrupt):
                print()
                return

    def _obey(self, text: str) -> bool:
        """Do what a command says; whether to leave."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return True
        if name == "/reset":
            self._restart()
            self._note("forgotten")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/history":
            self._show()
        elif name == "/help":
            self._note("\n".join(f"{key:<9} {what}" for key, what in COMMANDS.items()))
        else:
            self._note(f"there is no command {name}. {nearest(name, COMMANDS)}")
        return False

    def _set_system(self, text: str) -> None:
        if not text:
            self._note(f"system: {self.system}" if self.system else "no system message")
            return
        self.system = None if text == "none" else text
        self._restart()
        self._note("set, and the conversation starts anew")

    def _restart(self) -> None:
        for conversation in self.conversations:
            conversation.restart(self.system)

    def _show(self) -> None:
        for conversation in self.conversations:
            self._head(conversation)
            for message in conversation.messages:
                self._note(f"{message['role']}:")
                self._say(message["content"] + "\n")

    def _answer(self, text: str) -> None:
        for place, conversation in enumerate(self.conversations):
            self._head(conversation, place)
            started = time.perf_counter()
            reply = conversation.say(text, self.manner)
            try:
                for piece in reply:
                    self._say(piece)
            except KeyboardInterrupt:
                if not self.live:
                    raise
                reply.close()
                self._say(" …")
            except InputError as error:
                if not self.live:
                    raise
                self._note(str(error))
            self._say("\n")
            if self.live:
                seconds, tokens = time.perf_counter() - started, conversation.tokens()
                self._note(f"{tokens} tokens in {seconds:.1f}s, {tokens / seconds:.1f} a second")

    def _head(self, conversation: Conversation, place: int = 0) -> None:
        if len(self.conversations) > 1:
            self.console.print(f"[{conversation.model.name}]", style=f"bold {COLOURS[place % 2]}", markup=False)

    def _say(self, text: str) -> None:
        """Words of a model: as they are, and at once."""
        if self.console.is_terminal:
            self.console.print(text, end="", markup=False, emoji=False)
        else:  # rich would make spaces of tabs
            self.console.file.write(text)
        self.console.file.flush()

    def _note(self, text: str) -> None:
        """Words of ours: to people only, so that a pipe holds nothing but replies."""
        if self.live:
            self.console.print(text, style="dim", markup=False)
        else:
            print(text, file=sys.stderr)
