"""The judge against a server of the test's own: good, down, slow, failing, talking nonsense."""

import json
import pickle
import re
import threading

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.types import Verdict
from tulu_lightning.verifiers.chat_server import request_chat
from tulu_lightning.verifiers.judge import Judge, read_score

RUBRIC = "Rate from 0 to 10.\nQuestion: {prompt}\nReference: {target}\nAnswer: {response}\nEnd with 'Score: N'."
ERROR = Verdict("error", 0.0)


def judge(url: str, **settings) -> Judge:
    return Judge(**{"url": url, "model": "m", "rubric": RUBRIC, "retries": 1, "backoff_seconds": 0.0, **settings})


def test_the_rubric_is_filled_and_the_score_is_a_share(server):
    target = json.dumps({"prompt": "What is {target}?", "answer": "6"})
    # Braces in what is filled in are text, not slots.
    assert judge(server.url)("I say {prompt}", target) == Verdict("right", 0.7)
    (request,) = server.requests
    (message,) = request["messages"]
    expected = f"Rate from 0 to 10.\nQuestion: What is {{target}}?\nReference: {target}\nAnswer: I say {{prompt}}\nEnd"
    assert message["content"].startswith(expected)
    assert (request["model"], request["temperature"], message["role"]) == ("m", 0, "user")
    assert server.paths == ["/v1/chat/completions"]


def test_scale_threshold_and_path(server):
    server.replies = lambda request: "Score: 2"
    five = judge(server.url + "/v1/", scale_max=5, threshold=0.4, rubric="{response}")
    assert five("x", "") == Verdict("right", 0.4)
    assert judge(server.url, scale_max=5, threshold=0.41, rubric="{response}")("x", "") == Verdict("wrong", 0.4)
    assert server.paths[0] == "/v1/chat/completions"


def test_a_lone_surrogate_is_sent_as_something_a_server_can_read(server):
    assert judge(server.url, rubric="{response}")("a\ud800b", "").outcome == "right"
    assert server.requests[0]["messages"][0]["content"] == "a?b"


def test_the_key_comes_from_the_environment_and_is_told_to_the_server_alone(server, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.replies = lambda request: (401, '{"error": "bad key"}', {})
    asked = judge(server.url, api_key_env="JUDGE_KEY", rubric="{response}")
    assert asked("x", "") == ERROR
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "HTTP 401" in caplog.text
    assert "s3cret" not in caplog.text + repr(asked) + str(pickle.dumps(asked))
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY is not set"):
        judge(server.url, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize(
    ("reply", "tries", "told"),
    [
        ((500, "boom", {}), 2, "HTTP 500: 'boom'"),
        ((503, "loading", {"Retry-After": "0"}), 2, "HTTP 503"),
        ((429, "busy", {}), 2, "HTTP 429"),
        ((429, "no more today", {"Retry-After": "7200"}), 1, "asks to be left alone for 7,200 seconds"),
        ((429, "then", {"Retry-After": "Fri, 01 Jan 2010 00:00:00 GMT"}), 2, "HTTP 429"),
        ((429, "ever", {"Retry-After": "Tue, 01 Jan 2199 00:00:00 GMT"}), 1, "asks to be left alone for"),
        ((429, "hm", {"Retry-After": "soon"}), 2, "HTTP 429"),
        ((404, "no model m", {}), 1, "HTTP 404: 'no model m'"),
        ((400, "too long", {}), 1, "HTTP 400"),
        ((200, "<html>", {}), 2, "is no chat completion"),
        ((200, "{}", {}), 2, "is no chat completion"),
        ((200, '{"choices": []}', {}), 2, "is no chat completion"),
        ((200, "[1]", {}), 2, "is no chat completion"),
        (
            (200, '{"choices": [{"message": {"content": null}}]}', {}),
            2,
            "is no chat completion (TypeError: its text is None)",
        ),
        ((200, '{"choices": [{"message": {"content": ["a"]}}]}', {}), 2, "is no chat completion"),
        ((200, '{"choices": [{"message": {"content": "Score: 1"}}], "usage": [1]}', {}), 2, "is no chat completion"),
        (
            (200, '{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}', {}),
            2,
            "is no chat",
        ),
        ((302, "", {"Location": "http://127.0.0.1:9/"}), 1, "HTTP 302"),
        ("I cannot say.", 2, "has no score from 0 to 10: 'I cannot say.'"),
        ("Score: 70", 2, "has no score from 0 to 10"),
        ((200, " " * 2_000_000, {}), 2, "longer than 1048576 bytes"),
    ],
)
def test_a_server_that_fails_makes_the_outcome_error_after_the_tries_that_make_sense(
    server, reply, tries, told, caplog
):
    server.replies = lambda request: reply
    assert judge(server.url, rubric="{response}")("x", "") == ERROR
    assert len(server.requests) == tries
    assert told in caplog.text


def test_a_key_that_a_server_repeats_in_its_answer_is_not_kept(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.replies = lambda request: "You said s3cret."
    reply = request_chat(server.url, "m", [{"role": "user", "content": "x"}], 5.0, "JUDGE_KEY")
    assert reply.text == "You said (the key)."


@pytest.mark.parametrize(("asked", "pauses"), [(None, [8, 16, 30]), ("45", [45, 45, 45]), ("10", [10, 16, 30])])
def test_a_pause_is_as_long_as_the_server_asks_or_doubles_to_half_a_minute(server, monkeypatch, asked, pauses):
    waited = []
    monkeypatch.setattr("tulu_lightning.verifiers.chat_server.time.sleep", waited.append)
    server.replies = lambda request: (429, "busy", {"Retry-After": asked} if asked else {})
    assert judge(server.url, retries=3, backoff_seconds=8.0, rubric="{response}")("x", "") == ERROR
    assert waited == pauses


def test_a_failure_that_passes_is_not_told(server, caplog):
    replies = iter([(500, "", {}), "hm", "Score: 9"])
    server.replies = lambda request: next(replies)
    assert judge(server.url, retries=2, rubric="{response}")("x", "") == Verdict("right", 0.9)
    assert caplog.text == ""


@pytest.mark.parametrize("drip", [False, True])
def test_a_slow_server_is_not_waited_for(server, caplog, drip):
    done = threading.Event()

    def do_POST(self) -> None:
        if drip:  # a byte now and then keeps a socket's own time limit from ever ending
            self.send_response(200)
            self.end_headers()
        try:
            while not done.wait(0.05):
                self.wfile.write(b" " * drip)
                self.wfile.flush()
        except OSError:
            return

    server.http.RequestHandlerClass.do_POST = do_POST
    assert judge(server.url, retries=0, timeout_seconds=0.5, rubric="{response}")("x", "") == ERROR
    done.set()
    assert ("no whole answer in 0.5 seconds" if drip else "timed out") in caplog.text


def test_a_server_that_is_down_is_told_once_counted_and_ends_the_run(server, caplog):
    server.http.shutdown()
    server.http.server_close()
    asked = judge(server.url, give_up=9, rubric="{response}")
    assert [asked("x", "") for _ in range(8)] == [ERROR] * 8
    # Told at 1, 2, 4 and 8.
    assert [len(re.findall(pattern, caplog.text)) for pattern in ("gave no score: ", "times so far")] == [1, 3]
    assert "refused" in caplog.text
    with pytest.raises(
        InputError, match=rf"judge {server.url}: model 'm' gave no score for 9 responses in a row.*refused"
    ):
        asked("x", "")


def test_only_failures_in_a_row_end_the_run(server):
    server.replies = lambda request: "nothing" if "bad" in request["messages"][0]["content"] else "Score: 1"
    asked = judge(server.url, give_up=3, retries=0, rubric="{response}")
    for _ in range(4):
        assert [asked(text, "").outcome for text in ("bad", "bad", "good")] == ["error", "error", "wrong"]


def test_targets_must_fill_the_rubric():
    asked = judge("http://localhost:1")
    assert asked.complaint(json.dumps({"prompt": "?"})) is None
    assert "the rubric wants {prompt}" in (asked.complaint("plain text") or "")
    assert judge("http://localhost:1", rubric="{response} {target}").complaint("plain text") is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"url": "localhost:8000"}, "judge.url"),
        ({"rubric": "Rate it."}, "judge.rubric: has no {response}"),
        ({"threshold": 0}, "judge.threshold"),
        ({"threshold": 7}, "judge.threshold: is 7. Use a share"),
        ({"scale_max": 0}, "judge.scale_max"),
        ({"timeout_seconds": 0}, "judge.timeout_seconds"),
        ({"retries": -1}, "judge.retries"),
        ({"concurrency": 0}, "judge.concurrency"),
        ({"give_up": 0}, "judge.give_up"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(InputError, match=re.escape(told)):
        judge(**{"url": "http://localhost:1", **settings})


def test_a_judge_can_be_sent_to_another_process_and_starts_counting_anew(server):
    server.replies = lambda request: "nothing"
    asked = judge(server.url, retries=0, give_up=2, rubric="{response}")
    asked("x", "")
    copy = pickle.loads(pickle.dumps(asked))
    assert copy == asked
    assert copy("x", "") == ERROR
    with pytest.raises(InputError):
        asked("x", "")


@pytest.mark.parametrize(
    "text",
    ["score" + " " * 1_000_000, "1" + " " * 1_000_000 + "x", "9" * 1_000_000, "1/" * 500_000, "[[1" + " " * 1_000_000],
    ids=["label", "number", "digits", "fractions", "brackets"],
)
def test_a_megabyte_of_nearly_a_score_is_none(text):
    assert read_score(text, 10) is None


def test_a_judge_at_another_address_is_the_same_judge():
    here = Judge("http://127.0.0.1:8000/v1", "m", "Rate {response}. Score: N", retries=1)
    assert here == Judge("http://127.0.0.1:9000/v1", "m", "Rate {response}. Score: N", timeout_seconds=5.0)
    assert here != Judge("http://127.0.0.1:8000/v1", "m", "Rate {response} strictly. Score: N")
