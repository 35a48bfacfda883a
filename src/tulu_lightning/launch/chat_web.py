"""The playground of `tulu chat --web`: one prompt, a column for each model, in the browser; built on gradio.

Nothing leaves the machine: gradio's telemetry is off, and the browser is told to fetch from this server only, whatever
a model writes. The page is served at the loopback address unless another is asked for.
"""

import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tulu_lightning.errors import InputError
from tulu_lightning.launch.chat import Conversation
from tulu_lightning.launch.chat_model import ChatModel, Manner

__all__ = ["build", "replies", "serve"]

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'none'; object-src 'none'"
)
CSS = """
.gradio-container { width: 100% !important; max-width: 1400px !important; margin: 0 auto !important; }
#answers { flex-wrap: wrap; }
"""
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
NARROWEST = 300
"""Pixels of a column; on a phone the columns stand one under the other."""
Messages = list[dict[str, str]]


def serve(
    models: Sequence[ChatModel], manner: Manner, system: str | None, host: str, port: int, wait: bool = True
) -> tuple[Any, str]:
    """Serve the page until Ctrl-C.

    Args:
        models: one column each.
        manner: what the settings start at.
        system: system message to start with.
        host: address to serve at.
        port: 0 takes any that is free.
        wait: whether to stay; else the page is served from a thread.

    Returns:
        What serves (its `close` ends it) and the address of the page.

    Raises:
        InputError: the address cannot be bound.
    """
    page = build(models, manner, system)
    gradio = _gradio()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            quiet=True,
            share=False,
            prevent_thread_lock=True,
            footer_links=[],
            css=CSS,
            theme=gradio.themes.Default(),
            enable_monitoring=False,
            ssr_mode=False,
            app_kwargs={"middleware": [_policy()]},
        )
    except OSError as error:
        remedy = "Give another with --port (0 takes any that is free) or --host."
        raise InputError(f"{host}:{port}", "nothing can be served there", remedy) from error
    print(f"chat: {address} (Ctrl-C ends it)", flush=True)
    if wait:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("chat: ended")
        finally:
            page.close(verbose=False)
    return page, address


def _gradio() -> Any:
    """The package, with its telemetry off, which it reads on import."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return importlib.import_module("gradio")


def _policy() -> Any:
    """A middleware that has the browser fetch from this server only."""
    middleware: Any = importlib.import_module("starlette.middleware")

    class OnlyHere:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def told(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, told)

    return middleware.Middleware(OnlyHere)


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def build(models: Sequence[ChatModel], manner: Manner, system: str | None) -> Any:
    """The page, as gradio's `Blocks`."""
    gradio = _gradio()
    with gradio.Blocks(title="tulu chat", analytics_enabled=False) as page:
        gradio.Markdown("## tulu chat")
        turn = gradio.Textbox(label="Prompt", placeholder="Say something", lines=2, max_lines=12, autofocus=True)
        with gradio.Row():
            send = gradio.Button("Send", variant="primary", min_width=90)
            stop = gradio.Button("Stop", min_width=90)
            clear = gradio.Button("New conversation", min_width=90)
        with gradio.Row(elem_id="answers"):
            columns = [
                gradio.Chatbot(
                    label=model.name,
                    elem_id=f"answers-{place}",
                    min_width=NARROWEST,
                    height=460,
                    buttons=["copy"],
                    latex_delimiters=LATEX,
                    feedback_options=None,
                    allow_tags=False,
                )
                for place, model in enumerate(models)
            ]
        with gradio.Accordion("Settings", open=False):
            told = gradio.Textbox(label="System message", value=system or "", lines=2)
            with gradio.Row():
                heat = gradio.Slider(0, 2, value=manner.temperature, step=0.05, label="Temperature")
                nucleus = gradio.Slider(0.05, 1, value=manner.top_p, step=0.05, label="top_p")
                limit = gradio.Number(manner.max_new_tokens, precision=0, minimum=1, label="Longest reply, in tokens")
                seed = gradio.Number(manner.seed, precision=0, label="Seed")

        def answer(text: str, system: str, *values: Any) -> Iterator[tuple[Any, ...]]:
            histories = values[4:]
            if None in values[:4]:
                raise gradio.Error(
                    "Settings: a number is missing. Fill in reply length and seed.", print_exception=False
                )
            chosen = Manner(values[0], values[1], int(values[2]), int(values[3]))
            if not text.strip():
                yield text, *histories
                return
            try:
                for shown in replies(models, histories, text.strip(), system.strip() or None, chosen):
                    yield "", *shown
            except InputError as error:
                raise gradio.Error(str(error), print_exception=False) from error

        inputs, outputs = [turn, told, heat, nucleus, limit, seed, *columns], [turn, *columns]
        begun = gradio.on(
            [send.click, turn.submit], answer, inputs, outputs, concurrency_limit=1, show_progress="hidden"
        )
        stop.click(None, cancels=[begun])
        clear.click(lambda: ["", *([] for _ in columns)], None, outputs, cancels=[begun])
    return page


def replies(
    models: Sequence[ChatModel], histories: Sequence[Messages], text: str, system: str | None, manner: Manner
) -> Iterator[list[Messages]]:
    """What each column shows, again after every round of pieces; the models take turns, so all are seen to write.

    Args:
        models: one a column.
        histories: of each, as gradio keeps them: `role` and `content`.
        text: the turn, the same for all.
        system: system message.
        manner: how replies are sampled.

    Raises:
        InputError: see `ChatModel.asked`; then nothing was shown.
    """
    talks = [Conversation(model, system) for model in models]
    for talk, history in zip(talks, histories, strict=True):
        talk.messages += [{"role": m["role"], "content": _plain(m["content"])} for m in history or ()]
    for talk in talks:  # before anything is shown: a turn that nobody answers would stay in the page's history
        talk.model.asked([*talk.messages, {"role": "user", "content": text}], manner)
    shown = [[*talk.messages[bool(system) :], {"role": "user", "content": text}] for talk in talks]
    yield shown
    running = {place: talk.say(text, manner) for place, talk in enumerate(talks)}
    shown = [[*each, {"role": "assistant", "content": ""}] for each in shown]
    while running:
        for place in list(running):
            piece = next(running[place], None)
            if piece is None:
                del running[place]
            else:
                shown[place][-1]["content"] += piece
        yield shown


def _plain(content: Any) -> str:
    """The text of a message, which gradio hands back as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content or ())
