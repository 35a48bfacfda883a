"""`tulu generate`: who answers what, rows that survive a kill, and servers that fail."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tulu_lightning import cli
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making import models
from tulu_lightning.recipes.making.asks import prompt_key, read_asks
from tulu_lightning.recipes.making.generate import POLICY, GenerateConfig, assigned, generate
from tulu_lightning.recipes.making.pool import Decoding, Model, Question
from tulu_lightning.recipes.making.store import RowStore, read_rows
from tulu_lightning.types import Completion

SUMS = PromptSource("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 20})


@pytest.fixture
def server(server):
    server.replies = lambda request: f"{request['model']} says {request['messages'][-1]['content'][:20]}"
    return server


def pool(url, *names, **settings):
    options = {"retries": 1, "backoff_seconds": 0.0, **settings}
    return [Model(name, url=url, **options) for name in names]


def config(tmp_path, models, **settings):
    return GenerateConfig(
        **{"output": str(tmp_path / "out"), "sources": [SUMS], "models": models, "responses": 2, **settings}
    )


def rows_of(made):
    return list(read_rows(made.output))


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_come_from_rows_of_training_too_and_no_prompt_comes_twice(tmp_path):
    path = tmp_path / "rows.jsonl"
    hello, other = [{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Other"}]
    answer = {"role": "assistant", "content": "Hi"}
    rows = [[*hello, answer], hello, [*hello, answer, *other, answer], [{"role": "system", "content": "s"}, answer]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = read_asks([PromptSource("chat", path=str(path))])
    assert [ask.messages for ask in found.kept] == [hello, [*hello, answer, *other]]
    assert (found.repeated, found.left_out) == (1, 1)
    assert found.kept[0].key == prompt_key(hello)
    assert all(ask.checks == () for ask in found.kept)
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text(json.dumps({"instruction": "Hello", "output": "Hi"}) + "\n")
    both = read_asks([PromptSource("chat", path=str(path)), PromptSource("a", path=str(alpaca), read="alpaca")])
    assert len(both.kept) == 2, "the same prompt of another source is the same prompt"


def test_what_verifies_an_answer_stays_with_the_prompt_and_limits_hold():
    found = read_asks([replace(SUMS, count=7)], limit=5)
    assert len(found.kept) == 5
    assert {ask.checks[0].verifier for ask in found.kept} == {"last_number"}
    with pytest.raises(InputError, match="upsample is 2"):
        read_asks([replace(SUMS, upsample=2.0)])


# Who answers ----------------------------------------------------------------------------------------------------------


def test_models_are_drawn_anew_for_each_prompt_without_repetition(tmp_path):
    made = config(tmp_path, pool("http://127.0.0.1:1", *"abcd"), responses=2, model="tiny", on_policy_share=0.25)
    keys = [f"{n * 7919:016x}" for n in range(4000)]
    drawn = [assigned(made, key) for key in keys]
    assert all(set(each.values()) == {1} and len(each) == 2 for each in drawn)
    counts = Counter(name for each in drawn for name in each)
    assert counts[POLICY] / 4000 == pytest.approx(0.25, abs=0.03)
    # The rest is spread evenly: (2 - 0.25) / 4 of the prompts each.
    assert all(counts[name] / 4000 == pytest.approx(0.4375, abs=0.035) for name in "abcd")
    assert assigned(made, keys[5]) == drawn[5], "by the prompt and the seed alone"
    assert [assigned(replace(made, seed=1), key) for key in keys] != drawn


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"models": []}, "models: there is none"),
        ({"responses": 3}, "responses: is 3, and there are 2 models"),
        ({"responses": 0}, "responses"),
        ({"on_policy_share": 1.5}, "on_policy_share"),
        ({"limit": 0}, "limit"),
        ({"output": ""}, "output"),
        ({"models": [Model("x", url="http://a/v1"), Model("x", url="http://b/v1")]}, "two are called 'x'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, settings, told):
    with pytest.raises(InputError, match=told):
        config(tmp_path, pool("http://127.0.0.1:1", "a", "b"), **{}).__class__(
            **{"output": "o", "sources": [SUMS], "models": pool("http://127.0.0.1:1", "a", "b"), **settings}
        ).check()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "neither or both of path and url"),
        ({"path": "p", "url": "http://a"}, "neither or both"),
        ({"url": "localhost:8000"}, "Give an address"),
        ({"url": "http://a", "api_key_env": "NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE is not set"),
        ({"url": "http://a", "concurrency": 0}, "concurrency"),
        ({"url": "http://a", "requests_per_minute": 0.0}, "requests_per_minute"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(settings, told):
    with pytest.raises(InputError, match=told):
        Model("m", **settings)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_row_says_who_wrote_it_and_what_it_cost(tmp_path, server):
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}

    def reply(request):
        choice = {"message": {"content": "hi"}, "finish_reason": "length"}
        return 200, json.dumps({"choices": [choice], "usage": usage}), {}

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a", "b", price_prompt=2.0, price_tokens=10.0), limit=3)
    summary = generate(made)
    rows = rows_of(made)
    assert len(rows) == 6 == summary["responses"]
    row = rows[0]
    assert (row["tokens"], row["prompt_tokens"], row["finish"]) == (50, 1000, "length")
    assert row["cost"] == pytest.approx(1000 * 2e-6 + 50 * 10e-6)
    assert summary["cost"] == pytest.approx(6 * row["cost"])
    assert (row["prompt_key"], row["checks"][0]["verifier"]) == (prompt_key(row["messages"]), "last_number")
    request = server.requests[0]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (1.0, 1.0, 7500)


def test_a_request_that_fails_costs_its_prompt_alone_and_the_same_command_tries_it_again(tmp_path, server):
    bad = read_asks([SUMS]).kept[3].messages[-1]["content"]
    answered = server.replies

    def reply(request):
        return (500, "no", {}) if request["messages"][-1]["content"] == bad else answered(request)

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a", "b"))
    assert generate(made)["failed"] == 1
    before = rows_of(made)
    assert len(before) == 38
    server.replies, asked = answered, len(server.requests)
    summary = generate(made)
    assert (summary["failed"], len(server.requests) - asked) == (0, 2)
    assert rows_of(made)[:38] == before
    keys = Counter(row["key"] for row in rows_of(made))
    assert len(keys) == 40
    assert set(keys.values()) == {1}


@pytest.mark.parametrize(
    "reply", [(500, "down", {}), (401, "no key", {}), (200, "<html>", {}), (200, '{"choices": []}', {})]
)
def test_a_server_that_is_down_refuses_or_answers_garbage_ends_the_command(tmp_path, server, reply):
    server.replies = lambda request: reply
    made = config(tmp_path, pool(server.url, "a", "b", give_up=3, concurrency=1))
    with pytest.raises(InputError, match=r"model 'a' at .* gave no answer to 3 requests in a row, last: .*"):
        generate(made)


def test_a_sample_that_fails_takes_none_of_its_siblings_with_it(tmp_path, server):
    answered, lost = server.replies, []

    def reply(request):
        lost.extend([request["seed"]] * (not lost))  # the first request that comes fails for good, whichever it is
        return (400, "no", {}) if request["seed"] in lost else answered(request)

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a"), draw="each", responses=4, limit=5)
    assert (generate(made)["failed"], len(rows_of(made))) == (1, 19)
    before, lost[:] = rows_of(made), [-1]
    asked = len(server.requests)
    summary = generate(made)
    assert (summary["failed"], len(server.requests) - asked) == (0, 1), "only the one that is missing is asked again"
    assert rows_of(made)[:19] == before
    assert {(row["prompt_key"], row["number"]) for row in rows_of(made)} == {
        (ask.key, number) for ask in read_asks([SUMS], limit=5).kept for number in range(4)
    }


def test_what_no_server_can_answer_stops_neither_its_neighbours_nor_the_next_start(tmp_path, server):
    """A prompt that is too long fails with all of its samples (25, above give_up), and alone at the next start."""
    bad, answered = read_asks([SUMS]).kept[0].messages[-1]["content"], server.replies

    def reply(request):
        return (400, "context length", {}) if request["messages"][-1]["content"] == bad else answered(request)

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a"), draw="each", responses=25, limit=4)
    for _ in range(2):
        summary = generate(made)
        assert (summary["failed"], summary["responses"]) == (1, 3 * 25)
    server.replies = lambda request: (503, "down", {})
    with pytest.raises(InputError, match="gave no answer to 20 requests in a row, last: HTTP 503"):
        generate(made)


def test_many_prompts_that_are_refused_do_not_keep_a_killed_command_from_going_on(tmp_path, server):
    """Of 20 prompts 12 are refused: asked first at the next start, they are more in a row than give_up allows."""
    texts = [ask.messages[-1]["content"] for ask in read_asks([SUMS]).kept]
    answered, allowed = server.replies, texts[:1]

    def reply(request):
        return answered(request) if request["messages"][-1]["content"] in allowed else (400, "filtered", {})

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a", give_up=5, concurrency=1), responses=1)
    assert generate(replace(made, limit=2))["failed"] == 1
    allowed += texts[13:]
    assert generate(made)["failed"] == 12
    assert generate(replace(made, models=pool(server.url, "a", concurrency=1, give_up=5), limit=9))["failed"] == 8, (
        "eight are left over and eight were answered"
    )


def test_a_server_that_refuses_more_than_it_ever_answered_ends_the_command(tmp_path, server):
    answered = server.replies
    made = config(tmp_path, pool(server.url, "a", concurrency=1), responses=1)
    generate(replace(made, limit=2))
    server.replies = lambda request: (400, "max_tokens is too large", {})
    with pytest.raises(InputError, match=r"gave no answer \(18 times: HTTP 400: 'max_tokens is too large'\)"):
        generate(made)
    server.replies = answered
    assert generate(made)["failed"] == 0


def test_an_answer_that_was_cut_before_it_began_is_one(tmp_path, server):
    """A reasoning model that used up its tokens: content is null, finish_reason is length."""
    choice = {"message": {"content": None}, "finish_reason": "length"}
    server.replies = lambda request: (200, json.dumps({"choices": [choice]}), {})
    made = config(tmp_path, pool(server.url, "a"), responses=1, limit=1)
    assert generate(made)["failed"] == 0
    assert [(row["response"], row["finish"]) for row in rows_of(made)] == [("", "length")]
    assert len(server.requests) == 1


def test_what_was_under_way_when_a_server_was_given_up_is_kept(tmp_path, server):
    answered, first = server.replies, threading.Event()

    def reply(request):
        if first.is_set():
            return (500, "down", {})
        first.set()
        time.sleep(0.5)  # longer than all the failures of the other thread take
        return answered(request)

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a", "b", give_up=3, concurrency=2, retries=0))
    with pytest.raises(InputError, match="3 requests in a row"):
        generate(made)
    assert len(rows_of(made)) == 1
    assert len(server.requests) == 4, "none is begun after that"


def test_a_stop_does_not_wait_for_a_server(tmp_path, server):
    asked, release = threading.Event(), threading.Event()

    def reply(request):
        asked.set()
        release.wait(60)
        return "late"

    server.replies = reply
    file = tmp_path / "generate.yaml"
    file.write_text(
        f"output: {tmp_path}/out\nresponses: 1\nmodels: [{{name: a, url: '{server.url}'}}]\n"
        "sources: [{name: sums, rows: tulu_lightning.assets.arithmetic.prompt_rows, args: {count: 60}}]\n"
    )
    command = [sys.executable, "-m", "tulu_lightning", "generate", "--config", str(file)]
    # A suite that a shell runs in the background inherits that Ctrl-C is ignored; a command in a terminal does not.
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **heard) as process:
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 130
        finally:
            release.set()
        assert process.stderr.read().endswith("tulu: interrupted; run the same command again to go on\n")


def test_a_row_says_what_the_server_says_of_itself_and_why_an_answer_is_not_whole(tmp_path, server):
    def reply(request):
        choice = {"message": {"content": "hi"}, "finish_reason": "content_filter" if request["model"] == "a" else "eos"}
        said = {"model": "big-2024-08-06"} if request["model"] == "a" else {}
        return 200, json.dumps({"choices": [choice], **said}), {}

    server.replies = reply
    made = config(tmp_path, pool(server.url, "a", "b"), limit=1)
    summary = generate(made)
    told = {row["model"]: (row["version"], row["finish"]) for row in rows_of(made)}
    assert told == {"a": ("big-2024-08-06", "content_filter"), "b": ("b", "stop")}
    assert (summary["models"]["a"]["cut"], summary["models"]["b"]["cut"]) == (1, 0)


def test_nobody_listens(tmp_path):
    made = config(tmp_path, pool("http://127.0.0.1:9", "a", "b", give_up=2))
    with pytest.raises(InputError, match="refused"):
        generate(made)


def test_requests_begin_at_a_pace(tmp_path, server):
    times = []
    answered = server.replies

    def reply(request):
        times.append(time.monotonic())
        return answered(request)

    server.replies = reply
    generate(config(tmp_path, pool(server.url, "a", "b", requests_per_minute=1200.0), limit=6))
    by_model = sorted(times)[:6]
    assert by_model[-1] - by_model[0] > 4.5 * 60 / 1200


def test_the_key_is_in_the_request_and_nowhere_else(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret-7")
    generate(config(tmp_path, pool(server.url, "a", "b", api_key_env="MY_KEY"), limit=2))
    assert server.headers[0]["Authorization"] == "Bearer secret-7"
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    told = capsys.readouterr()
    assert "secret-7" not in written + told.out + told.err


def test_a_key_that_a_server_repeats_or_no_header_can_hold_is_not_told(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "secret-7\n")  # as a file leaves it
    server.replies = lambda request: (401, f"no such key: {server.headers[-1]['Authorization']}", {})
    made = config(tmp_path, pool(server.url, "a", "b", api_key_env="MY_KEY", give_up=1), limit=2)
    with pytest.raises(InputError) as caught:
        generate(made)
    assert "no such key: Bearer (the key)" in str(caught.value)
    assert server.headers[-1]["Authorization"] == "Bearer secret-7"
    told = capsys.readouterr()
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "secret" not in str(caught.value) + told.out + told.err + written
    monkeypatch.setenv("MY_KEY", "secret-7\nsecret-8")
    with pytest.raises(InputError, match="MY_KEY holds what no header can hold") as caught:
        pool(server.url, "a", api_key_env="MY_KEY")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "https://host/v1?api_key=secret", "http://secret@host"])
def test_an_address_that_holds_a_secret_is_refused_without_telling_it(url):
    with pytest.raises(InputError, match="api_key_env") as caught:
        Model("m", url=url)
    assert "secret" not in str(caught.value)


def test_the_command_takes_limit_and_dry_run(tmp_path, server, capsys):
    file = tmp_path / "generate.yaml"
    models = ", ".join(f"{{name: {name}, url: '{server.url}'}}" for name in "ab")
    file.write_text(
        f"output: {tmp_path}/out\nresponses: 2\nmodels: [{models}]\n"
        "sources: [{name: sums, rows: tulu_lightning.assets.arithmetic.prompt_rows, args: {count: 9}}]\n"
    )
    command = ["generate", "--config", str(file), "--limit", "3"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "3 prompts, 6 responses" in capsys.readouterr().out
    assert not server.requests
    assert cli.main(command) == 0
    assert len(server.requests) == 6
    assert "left" in capsys.readouterr().err  # of the time


def test_a_dry_run_shows_the_first_request_and_makes_nothing(tmp_path, capsys, tiny):
    made = config(tmp_path, [], model=tiny, template="tulu", draw="each", dry_run=True)
    assert generate(made) == {}
    said = capsys.readouterr().out
    assert "20 prompts, 40 responses" in said
    assert "<|user|>\nWhat is" in said
    assert "<|assistant|>" in said
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_and_servers_are_one_pool(tmp_path, server, tiny):
    decoding = Decoding(max_new_tokens=2)
    made = config(
        tmp_path, pool(server.url, "a", "b"), model=tiny, template="tulu", decoding=decoding, limit=6, dtype="float32"
    )
    summary = generate(made)
    rows = rows_of(made)
    assert {len(group) for group in _by_prompt(rows).values()} == {2}
    assert summary["models"][POLICY]["responses"] == 6
    for row in rows:
        assert ("ids" in row) == (row["model"] == POLICY)
    assert len(summary["start_digest"]) == 64


def test_a_checkpoint_and_its_twin_sample_by_themselves(tmp_path, tiny):
    """The same weights under two names: one seed for both would give every prompt the same answer twice."""
    twin = Model("before", path=tiny, template="tulu", dtype="float32")
    decoding = Decoding(max_new_tokens=8)
    made = config(tmp_path, [twin], model=tiny, template="tulu", dtype="float32", limit=6, decoding=decoding)
    generate(made)
    pairs = [[row["ids"] for row in group] for group in _by_prompt(rows_of(made)).values()]
    assert all(len(pair) == 2 for pair in pairs)
    assert not any(one == other for one, other in pairs)


def test_a_prompt_that_a_checkpoint_has_no_room_for_is_left_out_and_a_long_one_gets_a_shorter_answer(
    tmp_path, tiny, capsys, monkeypatch
):
    """Of 4,096 positions a prompt of 4,000 words leaves none, and the cap of 7,500 tokens is more than any leaves."""
    rows = tmp_path / "rows.jsonl"
    words = (3, 4000, 5)
    rows.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "a " * n}]}) + "\n" for n in words))
    room: list[list[int]] = []

    class Short:
        def generate(self, prompts, n, sampling, seed, *, keys):
            room.append([sampling.max_new_tokens, *map(len, prompts)])
            return [[Completion(torch.tensor([5]), torch.zeros(1), "stop", 0)] * n for _ in prompts]

        def close(self):
            pass

    monkeypatch.setattr(models, "build_engine", lambda *arguments: Short())
    made = config(
        tmp_path, [], sources=[PromptSource("x", path=str(rows))], model=tiny, template="tulu", draw="each",
        responses=1, decoding=Decoding(max_new_tokens=7500),
    )  # fmt: skip
    summary = generate(made)
    assert (summary["responses"], summary["failed"]) == (2, 1)
    (new_tokens, *lengths) = room[0]
    assert new_tokens == 3840, "15 times 256 of the 4,096 less a short prompt"
    assert max(lengths) < 256
    told = "model 'policy' has room for 4,096 tokens: 1 prompts are too long for it, 2 leave less room for an answer"
    assert told in capsys.readouterr().err
    assert generate(made)["failed"] == 1, "left over by itself it stops nothing"
    rows.write_text(rows.read_text().splitlines()[1])
    with pytest.raises(InputError, match="has room for 4,096 tokens, and every prompt is longer"):
        generate(replace(made, output=str(tmp_path / "other")))


def test_vllm_gets_the_memory_that_it_finds_and_room_for_one_sample(tiny, monkeypatch):
    """256 MB, which is enough for tests, hold 2,048 tokens of an 8B model: vLLM would not start."""
    seen = []

    def build(settings, *others):
        seen.append(settings)
        raise InputError("here", "it stops", "Look.")

    monkeypatch.setattr(models, "build_engine", build)
    question = Question("0" * 16, [{"role": "user", "content": "Hello"}])
    for wanted in (16, 7500):
        with pytest.raises(InputError, match="it stops"):
            list(models.answers(Model("m", path=tiny, template="tulu", engine="vllm"), [question], Decoding(wanted), 0))
    assert [(each.kv_cache_mb, each.max_model_len) for each in seen] == [(None, 4096), (None, 4096)]
    monkeypatch.setattr(models, "PROMPT", 1000)
    with pytest.raises(InputError, match="it stops"):
        list(models.answers(Model("m", path=tiny, template="tulu", engine="vllm"), [question], Decoding(16), 0))
    assert seen[-1].max_model_len == 1016


def test_a_server_gets_another_seed_for_each_model_prompt_and_answer(tmp_path, server):
    generate(config(tmp_path, pool(server.url, "a", "b"), draw="each", responses=2, limit=5))
    assert len({request["seed"] for request in server.requests}) == 5 * 2 * 2


def _by_prompt(rows):
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["prompt_key"], []).append(row)
    return found


# Kills ----------------------------------------------------------------------------------------------------------------


def test_a_store_drops_a_torn_line_and_refuses_a_damaged_one(tmp_path):
    with RowStore(tmp_path, "test", {"a": 1}, shard_rows=2) as store:
        store.add({"key": f"k{n}"} for n in range(5))
        with pytest.raises(ValueError, match="there already"):
            store.add([{"key": "k3"}])
        with pytest.raises(InputError, match="another process is writing it"):
            RowStore(tmp_path, "test", {"a": 1})
    assert [path.name for path in sorted(tmp_path.glob("rows-*"))] == [f"rows-0000{n}.jsonl" for n in range(3)]
    with (tmp_path / "rows-00002.jsonl").open("a") as file:
        file.write('{"key": "k5", "te')
    assert [row["key"] for row in read_rows(tmp_path)] == [f"k{n}" for n in range(5)]
    with RowStore(tmp_path, "test", {"a": 1}, shard_rows=2) as store:
        assert store.done == {f"k{n}" for n in range(5)}
        store.add([{"key": "k5"}, {"key": "k6"}])
    assert [row["key"] for row in read_rows(tmp_path)] == [f"k{n}" for n in range(7)]
    with pytest.raises(InputError, match="holds rows made with a = 1, not 2"):
        RowStore(tmp_path, "test", {"a": 2})
    first = tmp_path / "rows-00000.jsonl"
    first.write_text('{"key": "k0"\n' + first.read_text().splitlines()[1] + "\n")
    with pytest.raises(InputError, match=r"rows-00000\.jsonl, line 1"):
        RowStore(tmp_path, "test", {"a": 1})


def test_sigkill_loses_and_doubles_no_row(tmp_path, server):
    answered, release = server.replies, []

    def slow(request):
        time.sleep(0.02)
        release.append(1)
        return answered(request)

    server.replies = slow
    file = tmp_path / "generate.yaml"
    models = ", ".join(f"{{name: {name}, url: '{server.url}', concurrency: 2}}" for name in "ab")
    file.write_text(
        f"output: {tmp_path}/out\nresponses: 2\nmodels: [{models}]\n"
        "sources: [{name: sums, rows: tulu_lightning.assets.arithmetic.prompt_rows, args: {count: 60}}]\n"
    )
    command = [sys.executable, "-m", "tulu_lightning", "generate", "--config", str(file)]
    for wanted in (15, 60):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(release) < wanted and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = len(list(read_rows(tmp_path / "out")))
    assert 0 < done < 120
    assert cli.main(command[3:]) == 0
    rows = list(read_rows(tmp_path / "out"))
    assert len({row["key"] for row in rows}) == len(rows) == 120
    assert all(row["response"] == f"{row['model']} says {row['messages'][-1]['content'][:20]}" for row in rows)


def test_a_plain_source_without_a_user_turn_leaves_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "system", "content": "s"}]}) + "\n")
    with pytest.raises(InputError, match=r"no prompt is left \(1 rows left out\)"):
        read_asks([PromptSource(**{"name": "s", "path": str(path)})])
    assert Source("s", path=str(path)).upsample == 1
