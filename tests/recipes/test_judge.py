"""`tulu judge`: what a judge is shown, how its words are read, and how far raters agree."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from tulu_lightning import cli
from tulu_lightning.data.prompt_source import PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.aspects import ASPECTS, order_shown, questionnaire, read_ratings
from tulu_lightning.recipes.making.generate import GenerateConfig, generate
from tulu_lightning.recipes.making.judge import JudgeConfig, judge
from tulu_lightning.recipes.making.pool import Decoding, Model
from tulu_lightning.recipes.making.store import read_rows
from tulu_lightning.recipes.pairs import PairsConfig, make_pairs

NA = "N/A"
SUMS = PromptSource("sums", rows="tulu_lightning.assets.arithmetic.prompt_rows", args={"count": 10})


@pytest.mark.parametrize(
    ("answer", "ratings"),
    [
        ("Text 1: 4\nGood.\nText 2: 2\nBad.\nText 3: N/A\nInvention.", [4, 2, NA]),
        ("**Text 1**: 4/5\n**Text 2**: 3 / 5\n**Text 3**: 5/5", [4, 3, 5]),
        ("Response 2: rating 5\nResponse 1 - Rating: 1\nResponse #3: 3", [1, 5, 3]),
        ("#1: 5\n#2: 4\n#3: n/a", [5, 4, NA]),
        ("1. 5\n2) 4\n3: 3", [5, 4, 3]),
        ("Rating: 5\nwhy\nRating: 2\nwhy\nRating: N/A", [5, 2, NA]),
        ("4\n2\n5", [4, 2, 5]),
        ("<think>Text 1: 1\nText 2: 1\nText 3: 1</think>\nText 1: 5\nText 2: 4\nText 3: 3", [5, 4, 3]),
        ("Text 1: 4\nText 1: 5\nText 2: 3", [5, 3, None]),
        ("Text 1: 4\nClear.\nText 2: 3\nShorter than Text 1 (2 sentences) and vague.\nText 3: 5", [4, 3, 5]),
        ("Text 1: 3.5\nText 2: 6\nText 3: 0", [None, None, None]),
        ("Text 1: 4.0\nText 2: 10\nText 3: 3.", [4, None, None]),
        ("They are all fine, I would give them four.", [None] * 3),
        ("Rating: 5\nRating: 2", [None] * 3),
        ("", [None] * 3),
    ],
)
def test_ratings_are_read_out_of_many_forms_and_never_guessed(answer, ratings):
    assert read_ratings(answer, 3) == ratings


def test_long_answers_are_read_in_linear_time():
    for junk in ("Text " * 40_000, "Rating: " * 40_000, "1. " * 40_000, " " * 200_000):
        assert read_ratings(junk, 3) == [None] * 3


def test_a_question_has_all_texts_one_aspect_and_takes_braces_as_they_are():
    messages = [{"role": "user", "content": "Say {texts} and {rubric}"}]
    system, user = questionnaire("honesty", ASPECTS["honesty"], messages, ["first {instruction}", "second"])
    assert (system["role"], user["role"]) == ("system", "user")
    text = user["content"]
    assert text.count("Say {texts} and {rubric}") == 1
    assert text.index("## Text 1\nfirst {instruction}\n") < text.index("## Text 2\nsecond\n")
    assert "from 1 to 5 or N/A" in text
    assert "or N/A" not in questionnaire("truthfulness", ASPECTS["truthfulness"], messages, ["a"])[1]["content"]


def test_own_words_of_a_question_may_hold_any_braces(responses, server, tmp_path):
    asked = "Is it {fine}? {aspect}: {rubric}{or_na}\n{instruction}\n{texts}"
    rubric = {"tone": "friendly {texts} {instruction} {or_na}, or N/A"}
    words = {"aspects": ["tone"], "rubrics": rubric, "question": asked, "system": ""}
    made = config(responses, server, tmp_path, "even", **words)
    judge(made)
    (message,) = server.requests[0]["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith(
        "Is it {fine}? tone: friendly {texts} {instruction} {or_na}, or N/A or N/A\nWhat is"
    )
    assert message["content"].count("## Text ") == 3
    with pytest.raises(InputError, match="holds rows made with question"):
        judge(replace(made, question=asked + "!"))
    with pytest.raises(InputError, match=r"question: has no \{texts\}"):
        judge(replace(made, question="{instruction}"))


# Against servers ------------------------------------------------------------------------------------------------------


QUALITY = {"good": 5, "fair": 3, "poor": 1}
"""What each writer's answers are worth; a writer answers with its name."""


def reply(request):
    """Writers say their names; judges rate by them: `even` by quality, `first` likes what is shown first."""
    texts = re.findall(r"## Text \d+\n(\w+)", request["messages"][-1]["content"])
    if not texts:
        return request["model"]
    if request["model"] == "first":
        return "\n".join(f"Text {n}: {max(1, 6 - n)}" for n, _ in enumerate(texts, start=1))
    return "\n".join(f"Text {n}: {QUALITY[text]}" for n, text in enumerate(texts, start=1))


def models(url, *names):
    return [Model(name, url=url, retries=0, backoff_seconds=0.0, give_up=5) for name in names]


@pytest.fixture
def responses(server, tmp_path):
    server.replies = reply
    generate(
        GenerateConfig(
            output=str(tmp_path / "responses"), sources=[SUMS], models=models(server.url, *QUALITY), responses=3
        )
    )
    server.requests.clear()
    return str(tmp_path / "responses")


def config(responses, server, tmp_path, *judges, **settings):
    return JudgeConfig(
        **{"input": responses, "output": str(tmp_path / "ratings"), "judges": models(server.url, *judges), **settings}
    )


def test_one_call_an_aspect_with_all_texts_in_an_order_of_its_own(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even")
    summary = judge(made)
    assert len(server.requests) == 10 * 4
    rows = list(read_rows(made.output))
    written = {row["key"]: row for row in read_rows(responses)}
    orders = Counter()
    for row in rows:
        by = {written[key]["model"]: rating for key, rating in zip(row["responses"], row["ratings"], strict=True)}
        assert by == QUALITY, "whatever the order, a rating is that of its text"
        orders[tuple(written[key]["model"] for key in row["responses"])] += 1
    assert len(orders) == 6, "all orders come up in 40 questions"
    assert Counter(row["aspect"] for row in rows) == dict.fromkeys(ASPECTS, 10)
    assert [each["mean"] for each in summary["ratings"]] == [3.0] * 4
    assert server.requests[0]["temperature"] == 0.0


def test_agreement_of_two_judges_and_of_a_judge_with_itself(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even", "first", rounds=2)
    summary = judge(made)
    told = {(each["first"], each["second"]): each for each in summary["agreement"]}
    itself = told["even, round 0", "even, round 1"]
    assert (itself["same"], itself["kappa"], itself["same_order"]) == (1.0, 1.0, 1.0)
    # `first` rates places: 5, 4, 3. The second round turns the first one's order round, and it contradicts itself.
    place = told["first, round 0", "first, round 1"]
    assert place["kappa"] == pytest.approx(-1.0)
    assert place["same_order"] == 0.0
    assert abs(told["even, round 0", "first, round 0"]["kappa"]) < 0.35
    assert len(told) == 3


def test_ratings_of_other_texts_are_refused(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even", aspects=["honesty"])
    judge(made)
    (shard,) = Path(responses).glob("rows-*.jsonl")
    shard.write_text(shard.read_text().replace('"response": "good"', '"response": "bad now"'))
    with pytest.raises(InputError, match=r"its ratings are of other texts than .* holds now"):
        judge(made)
    with pytest.raises(InputError, match="its ratings are of other texts"):
        make_pairs(PairsConfig(output=str(tmp_path / "pairs"), input=responses, ratings=made.output))


def test_a_lower_limit_tells_of_its_own_prompts_alone(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even", aspects=["honesty"])
    judge(made)
    summary = judge(replace(made, limit=2))
    assert (summary["prompts"], summary["failed"]) == (2, 0)
    assert sum(each["n"] for each in summary["ratings"]) == 6, "three responses each"


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_second_round_shows_the_texts_the_other_way_round(count):
    for key in range(20):
        first, second = (order_shown(count, 5, key, 0, number) for number in (0, 1))
        assert second == first[::-1] != first
    assert len({tuple(order_shown(count, 5, key, 0, 0)) for key in range(40)}) > 1


def test_unreadable_ratings_are_counted_and_make_no_order(responses, server, tmp_path):
    def partly(request):
        text = reply(request)
        return (
            text.replace("Text 2:", "the second one gets") if "honesty" in request["messages"][-1]["content"] else text
        )

    server.replies = partly
    made = config(responses, server, tmp_path, "even")
    summary = judge(made)
    assert {each["aspect"]: each["unreadable"] for each in summary["ratings"]} == {
        name: 10 * (name == "honesty") for name in ASPECTS
    }
    pairs = make_pairs(PairsConfig(output=str(tmp_path / "pairs"), input=responses, ratings=made.output))
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert pairs["pairs"] == 10, "two of three responses are left to each prompt"
    assert all(row["chosen_rating"] > row["rejected_rating"] for row in rows)


def test_a_mean_over_fewer_aspects_than_others_have_makes_no_pair_and_is_told(responses, server, tmp_path, capsys):
    lost = []

    def partly(request):
        text = request["messages"][-1]["content"]
        lost.extend([text] * (not lost and "honesty" in text))
        return (400, "too long", {}) if text in lost else reply(request)

    server.replies = partly
    made = config(responses, server, tmp_path, "even")
    assert judge(made)["failed"] == 1
    asked = PairsConfig(output=str(tmp_path / "pairs"), input=responses, ratings=made.output)
    summary = make_pairs(asked)
    assert summary["pairs"] == 9
    assert summary["without"] == {"a rating is missing (tulu judge asks again)": 1}
    assert "no pair of 1 prompts: a rating is missing (tulu judge asks again)" in capsys.readouterr().out
    lost[:] = ["none"]
    assert judge(made)["failed"] == 0
    summary = make_pairs(asked)
    assert (summary["pairs"], summary["without"]) == (10, {})


def test_what_a_wanted_share_leaves_out_is_counted(tiny, server, tmp_path):
    server.replies = reply
    made = GenerateConfig(
        output=str(tmp_path / "responses"), sources=[SUMS], models=models(server.url, *QUALITY), responses=2,
        model=tiny, template="tulu", on_policy_share=0.5, decoding=Decoding(max_new_tokens=2),
    )  # fmt: skip
    generate(made)
    server.replies = lambda request: "Text 1: 1\nText 2: 2"
    rated = config(made.output, server, tmp_path, "even", aspects=["honesty"])
    judge(rated)
    every = make_pairs(PairsConfig(output=str(tmp_path / "every"), input=made.output, ratings=rated.output))
    share = make_pairs(
        PairsConfig(output=str(tmp_path / "share"), input=made.output, ratings=rated.output, on_policy_share=0.0)
    )
    assert 0 < every["on_policy"] < every["pairs"]
    assert share["without"] == {**every["without"], "left out for on_policy_share": every["on_policy"]}
    assert share["pairs"] == every["pairs"] - every["on_policy"]


def test_pairs_take_the_best_against_any_lower_one(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even")
    judge(made)
    summary = make_pairs(PairsConfig(output=str(tmp_path / "pairs"), input=responses, ratings=made.output))
    assert summary["chosen_models"] == {"good": 10}
    assert set(summary["rejected_models"]) == {"fair", "poor"}
    row = json.loads((tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()[0])
    assert (row["chosen"], row["chosen_rating"]) == ("good", 5.0)
    assert "chosen_ids" not in row, "a server gives no ids"


def test_a_judge_that_goes_down_keeps_what_it_rated_and_goes_on(responses, server, tmp_path):
    made = config(responses, server, tmp_path, "even", aspects=["honesty"])
    made = replace(made, judges=[replace(made.judges[0], concurrency=1)])
    server.replies = lambda request: reply(request) if len(server.requests) <= 4 else (503, "gone", {})
    with pytest.raises(InputError, match="gave no answer to 5 requests in a row, last: HTTP 503"):
        judge(made)
    assert len(list(read_rows(made.output))) == 4
    server.replies = reply
    server.requests.clear()
    assert judge(made)["failed"] == 0
    assert len(server.requests) == 6


def test_only_prompts_that_have_all_responses_are_rated(responses, server, tmp_path):
    path = Path(responses, "rows-00000.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    summary = judge(config(responses, server, tmp_path, "even"))
    assert (summary["prompts"], summary["incomplete"]) == (9, 1)


def test_verifiers_and_models_together_give_verified_pairs(server, tmp_path):
    """Chosen by the judge; kept only where the row's verifier finds it right."""
    sums = defaultdict(str)

    def writer(request):
        text = request["messages"][-1]["content"]
        if "## Text" in text:
            return "\n".join(f"Text {n}: {n}" for n in (1, 2))
        one, other = map(int, re.findall(r"\d+", text)[:2])
        sums[text] = str(one + other)
        return str(one + other) if request["model"] == "adds" else "no idea"

    server.replies = writer
    folder = str(tmp_path / "responses")
    generate(GenerateConfig(output=folder, sources=[SUMS], models=models(server.url, "adds", "idles"), responses=2))
    made = config(folder, server, tmp_path, "even", verify=True, aspects=["honesty"])
    judge(made)
    pairs = PairsConfig(output=str(tmp_path / "pairs"), input=folder, ratings=made.output, verified=True)
    summary = make_pairs(pairs)
    assert summary["right_share"] == 0.5
    assert summary["chosen_models"] == {"adds": summary["pairs"]}
    assert summary["without"] == {"the chosen response is not verified": 10 - summary["pairs"]}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"judges": []}, "judges: there is none"),
        ({"aspects": ["honest"]}, "there is none called 'honest'.*honesty"),
        ({"aspects": []}, "aspects: is empty"),
        ({"rounds": 0}, "rounds"),
        ({"input": "/nowhere"}, "there are no rows"),
    ],
)
def test_bad_settings(responses, server, tmp_path, settings, told):
    with pytest.raises(InputError, match=told):
        judge(replace(config(responses, server, tmp_path, "even"), **settings))


def test_verify_wants_what_verifies(server, tmp_path):
    server.replies = reply
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    folder = str(tmp_path / "responses")
    prompts = [PromptSource("chat", path=str(path))]
    generate(GenerateConfig(output=folder, sources=prompts, models=models(server.url, *QUALITY), responses=3))
    with pytest.raises(InputError, match="says nothing of what verifies"):
        judge(config(folder, server, tmp_path, verify=True))


def test_a_dry_run_shows_the_first_question(responses, server, tmp_path, capsys):
    made = config(responses, server, tmp_path, "even", dry_run=True)
    assert judge(made) == {}
    said = capsys.readouterr().out
    assert "10 prompts, 40 questions to each of 1 judges" in said
    assert "## Text 3" in said
    assert not server.requests
    assert not Path(made.output).exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"response": None}, "row 1: has no field 'response'"),
        ({"tokens": None}, "row 1: has no field 'tokens'"),
        ({"prompt_key": "first"}, "row 1: prompt_key is 'first', which is no hash"),
    ],
)
def test_a_row_that_lacks_a_field_is_named(responses, server, tmp_path, change, told):
    path = Path(responses, "rows-00000.jsonl")
    first, *rest = path.read_text().splitlines(keepends=True)
    row = {name: value for name, value in (json.loads(first) | change).items() if value is not None}
    path.write_text("".join([json.dumps(row) + "\n", *rest]))
    made = config(responses, server, tmp_path, "even")
    with pytest.raises(InputError, match=told):
        judge(made)
    with pytest.raises(InputError, match=told):
        make_pairs(PairsConfig(str(tmp_path / "pairs"), responses, responses))


def test_pairs_of_another_rule_are_not_written_over(responses, server, tmp_path, capsys):
    made = config(responses, server, tmp_path, "even", aspects=["honesty"])
    judge(made)
    pairs = PairsConfig(str(tmp_path / "pairs"), responses, made.output, limit=4, dry_run=True)
    capsys.readouterr()
    assert make_pairs(pairs) == {}
    said = capsys.readouterr().out
    assert said.startswith("4 pairs of 4 prompts; the first:\n{")
    assert json.loads(said.splitlines()[1])["chosen"] == "good"
    assert not (tmp_path / "pairs").exists()
    assert make_pairs(replace(pairs, dry_run=False))["pairs"] == 4
    with pytest.raises(InputError, match="holds pairs made with seed = 0, not 1"):
        make_pairs(replace(pairs, dry_run=False, seed=1))
    assert make_pairs(replace(pairs, dry_run=False, limit=None))["pairs"] == 10


@pytest.mark.slow
def test_one_command_for_all_three_killed_in_each_of_them_makes_the_same_pairs(server, tmp_path):
    """SIGKILL while it generates, while it judges, and again: rows and pairs are those of a run that nobody killed."""

    def slow(request):
        time.sleep(0.02)
        return reply(request)

    server.replies = slow

    def command(name):
        def listed(*names):
            return [{"name": each, "url": server.url, "concurrency": 2} for each in names]

        source = {"name": "sums", "rows": SUMS.rows, "args": {"count": 30}}
        written = {
            "output": str(tmp_path / name),
            "generate": {"sources": [source], "models": listed(*QUALITY), "responses": 3},
            "judge": {"judges": listed("even"), "aspects": ["honesty", "helpfulness"]},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(written))
        return ["pairs", "--config", str(tmp_path / f"{name}.yaml")]

    def there(name):
        return sum(len(path.read_bytes().splitlines()) for path in (tmp_path / "killed" / name).glob("rows-*"))

    words = [sys.executable, "-m", "tulu_lightning", *command("killed")]
    for part, wanted in (("generate", 20), ("generate", 60), ("judge", 15), ("judge", 40)):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while there(part) < wanted and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "pairs.jsonl").exists()
    assert cli.main(words[3:]) == cli.main(command("whole")) == 0
    for part, count in (("generate", 90), ("judge", 60)):
        killed, whole = ({row["key"]: row for row in read_rows(tmp_path / name / part)} for name in ("killed", "whole"))
        assert there(part) == len(killed) == count
        assert killed == whole
    killed, whole = (sorted((tmp_path / name / "pairs.jsonl").read_text().splitlines()) for name in ("killed", "whole"))
    assert len(killed) == 30
    assert killed == whole
