"""Talking to a checkpoint: turns, commands, pipes, streams, and what is refused before weights load."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tulu_lightning import cli
from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.data import chat as templates
from tulu_lightning.errors import InputError
from tulu_lightning.launch import chat
from tulu_lightning.launch.chat import Conversation, Talk
from tulu_lightning.launch.chat_model import Manner, open_chat_model, stream_in_pieces, words
from tulu_lightning.launch.chat_web import replies
from tulu_lightning.types import Sampling

MANNER = Manner(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> str:
    """The tiny model with a chat template of its own, as an exported checkpoint has."""
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny, path)
    tokenizer = load_tokenizer(str(path))
    (path / "chat_template.jinja").write_text(templates.chat_template("tulu", tokenizer).jinja)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    opened = open_chat_model(folder)
    yield opened
    opened.close()


def said(model, *turns: str, system: str | None = None) -> str:
    talk = Conversation(model, system)
    return "".join("".join(talk.say(turn, MANNER)) for turn in turns)


def test_a_turn_is_asked_in_the_models_own_template(model):
    asked = model.tokenizer.decode(model.prompt([{"role": "user", "content": "Hi"}]))
    assert asked == "<|user|>\nHi\n<|assistant|>\n"


def test_a_named_template_takes_its_place_and_stops_at_its_end(smol):
    tokenizer = load_tokenizer(smol)
    opened = open_chat_model(smol, template="chatml")
    assert opened.tokenizer.decode(opened.prompt([{"role": "user", "content": "Hi"}])) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in opened.stops
    opened.close()


def test_the_pieces_of_a_reply_are_the_text_of_its_tokens(model):
    messages = [{"role": "user", "content": "1 + 1?"}]
    sampling = Sampling(12, 0.0, model.stops)
    ids = model.engine.generate([model.prompt(messages)], 1, sampling, 0)[0][0].ids_L.tolist()
    kept = [token for token in ids if token not in model.stops]
    assert "".join(model.reply(messages, MANNER)) == model.tokenizer.decode(kept)


def test_an_engine_without_a_stream_is_asked_piece_by_piece(model, monkeypatch):
    monkeypatch.setattr("tulu_lightning.launch.chat_model.PIECE", 5)
    prompt, sampling = model.prompt([{"role": "user", "content": "1 + 1?"}]), Sampling(12, 0.0)
    whole = list(model.engine.stream(prompt, sampling, 0))
    assert list(stream_in_pieces(model.engine, prompt, sampling, 0)) == whole
    stop = whole[7]
    sampling = Sampling(12, 0.0, (stop,))
    assert list(stream_in_pieces(model.engine, prompt, sampling, 0)) == whole[: whole.index(stop) + 1]


def test_a_character_of_several_tokens_waits_for_the_last(smol):
    tokenizer = load_tokenizer(smol)
    ids = tokenizer.encode("né 你 🙂", add_special_tokens=False)
    assert any(tokenizer.decode([one]).endswith("\ufffd") for one in ids), "some characters are several tokens"
    pieces = list(words(tokenizer, iter(ids), ()))
    assert "".join(pieces) == "né 你 🙂"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(words(tokenizer, iter([*ids, 5, 6]), (5,))) == "né 你 🙂", "nothing of the stop token or after"


def test_what_was_said_stays_in_the_conversation(model):
    talk = Conversation(model, "Be brief.")
    first = "".join(talk.say("Hi", MANNER))
    assert talk.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first},
    ]
    assert said(model, "Hi", "And?", system="Be brief.") == first + "".join(talk.say("And?", MANNER))


def test_a_reply_broken_off_leaves_what_was_said(model):
    talk = Conversation(model, None)
    reply = talk.say("Hi", MANNER)
    first = next(reply)
    reply.close()
    assert talk.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]


def test_a_conversation_without_room_for_an_answer_is_refused_and_can_go_on(model):
    talk = Conversation(model, None)
    with pytest.raises(InputError, match=r"tokens long.*/reset"):
        list(talk.say("x" * model.positions, MANNER))
    assert talk.messages == []
    assert "".join(talk.say("Hi", MANNER)) == said(model, "Hi")


def test_a_long_reply_ends_where_the_models_positions_do(model):
    opened = model.positions
    prompt = model.prompt([{"role": "user", "content": "Hi"}])
    model.positions = len(prompt) + 3
    try:
        assert model.count("".join(model.reply([{"role": "user", "content": "Hi"}], MANNER))) <= 3
    finally:
        model.positions = opened


def talk_by_pipe(monkeypatch, capsys, *argv: str, lines: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = cli.main(["chat", *argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_piped_lines_are_turns_and_only_replies_are_written(folder, model, monkeypatch, capsys):
    lines = "Hi\n\nAnd?\n/reset\nHi\n/quit\nnever asked\n"
    status, out, err = talk_by_pipe(monkeypatch, capsys, "--model", folder, "--max_new_tokens", "12", lines=lines)
    assert status == 0
    first = said(model, "Hi")
    both = said(model, "Hi", "And?")
    assert out == f"{first}\n{both.removeprefix(first)}\n{first}\n"
    assert err == "forgotten\n"


def test_a_pipe_gets_a_reply_byte_for_byte(model, capsys):
    Talk([model], MANNER, None)._say("a\tb\r\n  [bold]:smile:")
    assert capsys.readouterr().out == "a\tb\r\n  [bold]:smile:"


def test_a_line_that_is_no_utf_8_is_named(folder, monkeypatch, capsys):
    lines = "Hi\n\udcff\udcfe\n"  # as Python reads b"\xff\xfe" from a pipe
    status, _, err = talk_by_pipe(monkeypatch, capsys, "--model", folder, "--max_new_tokens", "4", lines=lines)
    assert status == 2
    assert "standard input, line 2: is not UTF-8" in err


def test_two_models_answer_the_same_turns_each_under_its_name(folder, tiny, model, monkeypatch, capsys):
    argv = ("--model", folder, "--against", folder, "--max_new_tokens", "12", "--system", "Be brief.")
    status, out, _ = talk_by_pipe(monkeypatch, capsys, *argv, lines="Hi")
    assert status == 0
    reply = said(model, "Hi", system="Be brief.")
    assert out.replace("\n", "") == f"[{folder}]{reply}[{folder}]{reply}".replace("\n", "")


def test_commands(model, capsys):
    talk = Talk([model], MANNER, None)
    assert talk._obey("/quit")
    for line in ("/system", "/system Be brief.", "/system", "/histry", "/help", "/history"):
        assert not talk._obey(line)
    err = capsys.readouterr().err
    assert err.index("no system message") < err.index("starts anew") < err.index("system: Be brief.")
    assert "Did you mean '/history'?" in err
    assert talk.conversations[0].messages == [{"role": "system", "content": "Be brief."}]
    talk._obey("/system none")
    assert talk.conversations[0].messages == []


def test_markup_in_a_reply_is_written_as_it_is(model, capsys):
    Talk([model], MANNER, None)._say("[bold]x[/bold] :smile: \x1b")
    assert "[bold]x[/bold] :smile:" in capsys.readouterr().out


def test_a_folder_without_a_chat_template_is_refused_before_weights_load(tiny, monkeypatch):
    monkeypatch.setattr("tulu_lightning.launch.chat_model.build_engine", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=r"no chat template.*--template \(tulu"):
        chat.main(["--model", tiny])


def test_a_template_that_refuses_a_system_message_is_named(folder, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    (path / "chat_template.jinja").write_text(refusing)
    opened = open_chat_model(str(path))
    with pytest.raises(InputError, match=r"no system here.*Leave out --system"):
        opened.prompt([{"role": "system", "content": "a"}])
    opened.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--port", "70000"], "--port"),
        (["--engine", "vllm", "--against", "b"], "holds one model"),
    ],
)
def test_bad_options_are_named_before_anything_loads(options, said):
    with pytest.raises(InputError, match=said):
        chat.main(["--model", "a", *options])


@pytest.mark.parametrize(("module", "options"), [("gradio", ["--web"]), ("vllm", ["--engine", "vllm"])])
def test_what_is_not_installed_is_said_before_anything_loads(module, options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"Install it"):
        chat.main(["--model", "a", *options])


def test_the_columns_of_the_page_are_written_in_turns(model):
    shown = [json.loads(json.dumps(each)) for each in replies([model, model], [[], []], "Hi", None, MANNER)]
    assert shown[0] == [[{"role": "user", "content": "Hi"}]] * 2
    assert [[message["content"] for message in column] for column in shown[-1]] == [["Hi", said(model, "Hi")]] * 2
    assert len(shown[1][0][1]["content"]) < len(said(model, "Hi"))


def test_the_page_hands_back_messages_in_parts_and_the_talk_goes_on(model):
    first = said(model, "Hi")
    held = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"role": "assistant", "content": first}]
    *_, last = replies([model], [held], "And?", "Be brief.", MANNER)
    talk = Conversation(model, "Be brief.")
    talk.messages += [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": first}]
    expected = "".join(talk.say("And?", MANNER))
    assert [message["content"] for message in last[0]] == ["Hi", first, "And?", expected]


def test_a_turn_for_which_there_is_no_room_is_not_shown(model):
    long = [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "Yes."}]
    running = replies([model, model], [[], long], "And?", None, MANNER)
    with pytest.raises(InputError, match=r"the model has 4096 positions. Start a new conversation"):
        next(running)


@pytest.mark.slow
def test_a_terminal_is_asked_with_a_prompt_and_ctrl_d_leaves(folder):
    import os
    import pty
    import subprocess

    leader, follower = pty.openpty()
    code = "import sys; from tulu_lightning.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "chat", "--model", folder, "--max_new_tokens", "8"]
    process = subprocess.Popen(argv, stdin=follower, stdout=follower, stderr=follower, cwd=Path.cwd())
    os.close(follower)
    seen = b""
    sent = False
    while True:
        try:
            seen += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        if not sent and b"> " in seen:
            os.write(leader, b"Hi\n/quit\n")
            sent = True
    assert process.wait(timeout=60) == 0
    text = seen.decode(errors="replace")
    assert "/help lists the commands" in text
    assert "tokens in" in text
