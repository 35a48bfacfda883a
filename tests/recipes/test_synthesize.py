"""`tulu synthesize`: who asks for what, what comes back, what passes, and a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest

from tulu_lightning import cli
from tulu_lightning.assets.personas import PERSONAS
from tulu_lightning.data.decontaminate_settings import Decontaminate, Evaluation
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making.pool import Model
from tulu_lightning.recipes.making.skills import SKILLS, Skill, Written, filled, read_request
from tulu_lightning.recipes.making.store import read_rows
from tulu_lightning.recipes.making.synthesize import Personas, SynthesizeConfig, relaxed, synthesize
from tulu_lightning.recipes.making.synthesized import target_of
from tulu_lightning.verifiers.registry import get

KINDS = ["punctuation:no_comma", "detectable_format:title"]
IF = Skill("precise_if", count=6, kinds=KINDS, constraints=2)
PROSE = Skill("prose", count=4, ask="{persona} wants a text. {example}", begins="Request:", examples=["Say so."])
DATA = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 512, "examples_per_step": 2}


def reply(request):
    """Writes requests that differ by persona, and answers that keep every condition that is asked for."""
    text = request["messages"][-1]["content"]
    persona = text.split("\n")[0]
    if 'Begin with "Request:"' in text or "wants a text" in text:
        return f"Request: Tell me what {persona} does on a day like this."
    if 'Begin with "Problem:"' in text:
        return f"**Problem:** {persona} buys {len(persona)} apples and eats one. How many are left?"
    if "Exercise: Write a Python function" in text:
        return (
            "Exercise: Write a Python function twice(n) that doubles a number.\n"
            "```python\nassert twice(2) == 4\nassert twice(0) == 0\n```"
        )
    if "apples" in text:
        count = int(text.split("buys ")[1].split()[0]) - 1
        shown = {0: f"{count}", 1: f"{count}.0", 2: f"{request['seed']}"}.get(request["seed"] % 4, f"{count}")
        return f"Steps.\nFinal Answer: The final answer is ${shown}$. I hope it is correct."
    if "twice(n)" in text:
        return "```python\ndef twice(n):\n    return 2 * n\n```"
    title = "<<A day>>\n" if "title" in text else ""
    return f"{title}They work{'' if 'commas' in text else ', rest'} and sleep."


@pytest.fixture
def server(server):
    server.replies = reply
    return server


def config(server, tmp_path, *skills, **settings):
    writer = Model("writer", url=server.url, retries=0, backoff_seconds=0.0, give_up=3)
    return SynthesizeConfig(
        **{
            "writer": writer,
            "output": str(tmp_path / "out"),
            "skills": list(skills),
            "near_duplicates": None,
            **settings,
        }
    )


def lines(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]


# Skills ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SKILLS)
def test_the_papers_skills_ask_for_a_persona_and_say_how_to_begin(name):
    skill = Skill(name, kinds=KINDS).whole()
    told = filled(skill, "A {persona} with {braces}", "An {example}")
    assert told.startswith("A {persona} with {braces}\n")
    assert f'"{skill.begins}' in told
    assert ("An {example}" in told) == (name == "precise_if")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Request: Do it.", "Do it."),
        ("  **Request:** Do it.", "Do it."),
        ("<think>Request: no</think>request: Do it.\nNow.", "Do it.\nNow."),
        ("Sure! Request: Do it.", "it does not begin with 'Request:'"),
        ("Request:  ", "the request is empty"),
    ],
)
def test_a_request_is_read_or_says_why_not(text, expected):
    written = read_request(PROSE.whole(), text, "stop", "0")
    assert expected in (written.text, written.reason)
    assert read_request(PROSE.whole(), text, "length", "0").reason == "the request was cut"


def test_constraints_are_drawn_and_appended_and_one_can_be_left_away():
    texts = Counter()
    for number in range(40):
        written = read_request(replace(IF, constraints=2).whole(), "Request: Write.", "stop", str(number))
        texts[len(written.constraints)] += 1
        assert written.text == " ".join(["Write.", *(text for _, _, text in written.constraints)])
        if len(written.constraints) == 2:
            without = relaxed(written, str(number))
            assert without in [f"Write. {written.constraints[place][2]}" for place in (0, 1)]
    assert set(texts) == {1, 2}


def test_all_25_kinds_are_drawn_and_the_request_to_be_repeated_is_the_bare_one():
    skill = Skill("precise_if").whole()
    assert len(skill.kinds) == 25
    written = read_request(replace(skill, kinds=["combination:repeat_prompt"]), "Request: Name a river.", "stop", "5")
    ((kind, arguments, sentence),) = written.constraints
    assert (kind, arguments) == ("combination:repeat_prompt", {"prompt_to_repeat": "Name a river."})
    assert written.text == f"Name a river. {sentence}"
    target = target_of(written)
    assert get("ifeval")("Name a river.\nThe Elbe.", target).outcome == "right"
    assert get("ifeval")("The Elbe.", target).outcome == "wrong"


def test_tests_are_taken_out_of_the_block():
    written = read_request(
        Skill("python").whole(), reply({"messages": [{"content": SKILLS["python"]["ask"]}]}), "stop", "0"
    )
    assert written.tests == ["assert twice(2) == 4", "assert twice(0) == 0"]
    assert written.text == "Write a Python function twice(n) that doubles a number."
    assert read_request(Skill("python").whole(), "Exercise: Write it.", "stop", "0").reason == "there are no tests"


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        (Skill("precise_iff"), r"skill 'precise_iff': has no ask\. Did you mean 'precise_if'"),
        (Skill("own", ask="Write."), r"ask: does not say \{persona\}"),
        (Skill("own", ask="{persona} {example}"), r"examples: is empty"),
        (Skill("math", answers=1), r"answers: is 1\. A majority"),
        (
            Skill("precise_if", kinds=["punctuation:no_coma"]),
            r"no constraint 'punctuation:no_coma' here\. Did you mean",
        ),
        (Skill("precise_if", kinds=[]), r"kinds: is empty"),
        (Skill("precise_if", kinds=KINDS, constraints=4), r"constraints: is 4"),
        (Skill("math", count=0), r"count: is 0"),
    ],
)
def test_bad_skills(skill, said):
    with pytest.raises(InputError, match=said):
        skill.whole()


# The whole command ----------------------------------------------------------------------------------------------------


def test_every_kind_of_check_and_every_kind_of_data(server, tmp_path):
    made = config(
        server,
        tmp_path,
        IF,
        replace(PROSE, count=2),
        Skill("grade_school_math", count=8),
        Skill("python", count=1),
        relax=True,
    )
    summary = synthesize(made)
    told = summary["skills"]
    assert told["precise_if"] == {"requests": 6, "kept": 6, "left_out": told["precise_if"]["left_out"]}
    assert told["prose"]["kept"] == 2
    assert told["python"]["kept"] == 1
    sft, rlvr, pairs = (lines(tmp_path, f"{name}.jsonl") for name in ("sft", "rlvr", "pairs"))
    assert summary["sft"] == len(sft) == sum(each["kept"] for each in told.values())
    assert summary["rlvr"] == len(rlvr) == len(sft) - 2, "prose has no target"
    for row in rlvr:
        answer = next(r["messages"][1]["content"] for r in sft if r["id"] == row["id"])
        assert get(row["verifier"])(answer, row["ground_truth"]).outcome == "right"
        if row["verifier"] == "math":
            apples = int(row["messages"][0]["content"].split("buys ")[1].split()[0])
            assert float(row["ground_truth"]) == apples - 1
            assert row["agreement"] >= 0.5
    assert told["grade_school_math"]["kept"] >= 4, "a quarter of the answers is off, each in its own way"
    for pair in pairs:
        target = next(row["ground_truth"] for row in rlvr if row["id"] == pair["id"])
        assert get("ifeval")(pair["chosen"], target).outcome == "right"
        assert get("ifeval")(pair["rejected"], target).outcome == "wrong"
    two = sum(
        len(row["request"]["constraints"]) == 2
        for row in read_rows(tmp_path / "out" / "requests")
        if row["skill"] == "precise_if"
    )
    assert len(pairs) == summary["pairs"] == two > 0
    # Each is read by the data module that it is for.
    for kind, name, rows in ((SFTData, "sft", sft), (PromptData, "rlvr", rlvr), (PreferenceData, "pairs", pairs)):
        data = kind(sources=[Source(name, path=str(tmp_path / "out" / f"{name}.jsonl"))], **DATA)
        data.setup()
        assert data.manifest()["totals"]["kept"] == len(rows)


def test_what_is_cut_wrong_or_at_odds_is_left_out_with_its_reason(server, tmp_path):
    def odd(request):
        text = request["messages"][-1]["content"]
        if "Request: " in text or 'Begin with "' in text:
            return reply(request)
        if "apples" in text:
            return f"Final Answer: The final answer is ${request['seed']}$. I hope it is correct."
        return "No, this has a comma, and no title."

    server.replies = odd
    summary = synthesize(config(server, tmp_path, IF, Skill("math", count=2)))
    assert summary["sft"] == 0
    assert summary["skills"]["precise_if"]["left_out"] == {"no answer follows the constraints": 6}
    assert summary["skills"]["math"]["left_out"] == {"the answers do not agree": 2}
    left = lines(tmp_path, "left_out.jsonl")
    assert len(left) == 8
    assert all(row["persona"] in PERSONAS and row["request"] for row in left)


def test_a_majority_is_of_all_answers_and_what_came_is_kept(server, tmp_path):
    wanted = Skill("math", count=2, answers=4)
    lost = []

    def partly(request):
        text = request["messages"][-1]["content"]
        if 'Begin with "Problem:"' in text:
            return reply(request)
        lost.extend([request["seed"]] * (not lost))
        said = "Final Answer: The final answer is $7$. I hope it is correct."
        return (400, "no", {}) if request["seed"] in lost else said

    server.replies = partly
    made = config(server, tmp_path, wanted)
    summary = synthesize(made)
    assert summary["skills"]["math"]["left_out"] == {"an answer did not come": 1}
    assert len(list(read_rows(tmp_path / "out" / "answers"))) == 7
    asked, lost[:] = len(server.requests), [-1]
    summary = synthesize(made)
    assert (summary["skills"]["math"]["kept"], len(server.requests) - asked) == (2, 1)


def test_what_a_relaxed_answer_does_is_told_apart(server, tmp_path):
    def both(request):  # every answer follows every constraint, also of the relaxed request
        text = request["messages"][-1]["content"]
        return reply(request) if "Request: " in text else "<<One>>\n\nall in one word"

    server.replies = both
    summary = synthesize(config(server, tmp_path, IF, relax=True))
    told = summary["skills"]["precise_if"]
    assert told["kept"] + sum(told["left_out"].values()) == told["requests"] == 6
    assert sum(told.get("relaxed_left_out", {}).values()) + summary["pairs"] <= told["kept"]
    assert (tmp_path / "out" / "pairs.jsonl").exists()
    synthesize(config(server, tmp_path, IF))
    assert not (tmp_path / "out" / "pairs.jsonl").exists(), "without relax none is made, and none of before is left"


def test_answers_to_other_requests_are_refused(server, tmp_path):
    made = config(server, tmp_path, replace(PROSE, count=2))
    synthesize(made)
    (shard,) = (tmp_path / "out" / "requests").glob("rows-*.jsonl")
    shard.write_text(shard.read_text().replace("Tell me what", "Tell us what"))
    with pytest.raises(InputError, match="its answers are to other requests than there are now"):
        synthesize(made)


def test_near_duplicates_and_evaluation_items_go(server, tmp_path):
    test = tmp_path / "test.jsonl"
    item = f"Tell me what {PERSONAS[0]} wants a text. Say so. does on a day like this."
    others = [
        f"Which of {number} quite other questions is asked in this very place of the set?" for number in range(99)
    ]
    test.write_text("".join(json.dumps({"q": q}) + "\n" for q in (item, *others)))
    # One of a hundred items: a source may repeat so many, what is made here may not.
    held = Decontaminate([Evaluation("mine", path=str(test), fields=["q"])])
    skill = replace(PROSE, count=30)  # six of the 24 personas come twice
    summary = synthesize(config(server, tmp_path, skill, near_duplicates=0.95, decontaminate=held))
    assert summary["skills"]["prose"]["left_out"]["nearly repeats another"] == 6
    assert summary["skills"]["prose"]["left_out"]["repeats an evaluation set"] >= 1
    assert not any(row["messages"][0]["content"] == item for row in lines(tmp_path, "sft.jsonl"))
    assert summary["sft"] == 30 - sum(summary["skills"]["prose"]["left_out"].values())


def test_personas_come_once_before_any_comes_again_and_the_plan_is_the_seeds(server, tmp_path):
    synthesize(config(server, tmp_path, replace(PROSE, count=30)))
    rows = list(read_rows(tmp_path / "out" / "requests"))
    assert Counter(Counter(row["persona"] for row in rows).values()) == {1: 18, 2: 6}
    again = config(server, tmp_path / "again", replace(PROSE, count=30), limit=10)
    synthesize(again)
    keys = {row["key"] for row in rows}
    assert {row["key"] for row in read_rows(tmp_path / "again" / "out" / "requests")} < keys, (
        "--limit asks for the same ones"
    )
    synthesize(replace(again, skills=[replace(PROSE, count=30, answer=" Be brief.")]))
    assert len(list(read_rows(tmp_path / "again" / "out" / "requests"))) == 20, "another wording, other rows"
    assert len(lines(tmp_path / "again", "sft.jsonl")) == 10
    with pytest.raises(InputError, match="holds rows made with seed"):
        synthesize(replace(again, seed=1))


@pytest.mark.slow  # what holds here is held at each run by the test of that name for `tulu generate`
def test_sigkill_loses_and_doubles_no_row(server, tmp_path):
    asked = []

    def slow(request):
        time.sleep(0.02)
        asked.append(request)
        return reply(request)

    server.replies = slow
    file = tmp_path / "synthesize.yaml"
    file.write_text(
        f"output: {tmp_path}/out\nwriter: {{name: w, url: '{server.url}', concurrency: 2}}\nnear_duplicates: null\n"
        "skills: [{name: precise_if, count: 40, answers: 2, kinds: ['punctuation:no_comma']}]\n"
    )
    command = [sys.executable, "-m", "tulu_lightning", "synthesize", "--config", str(file)]
    for wanted in (15, 60):  # among the requests, and among the answers
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(asked) < wanted and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert cli.main(command[3:]) == 0
    for name, count in (("requests", 40), ("answers", 80)):
        rows = list(read_rows(tmp_path / "out" / name))
        assert len({row["key"] for row in rows}) == len(rows) == count
    assert len(lines(tmp_path, "sft.jsonl")) == 40


def test_a_dry_run_shows_the_first_request_and_asks_nothing(server, tmp_path, capsys):
    synthesize(config(server, tmp_path, PROSE, dry_run=True))
    said = capsys.readouterr().out
    assert "4 requests by 24 personas" in said
    assert "wants a text. Say so." in said
    assert server.requests == []
    assert not (tmp_path / "out").exists()


def test_requests_that_nobody_wrote_are_counted(server, tmp_path, capsys):
    refused = []

    def partly(request):
        refused.extend([request["seed"]] * (not refused and "wants a text" in request["messages"][-1]["content"]))
        return (400, "no", {}) if request["seed"] in refused else reply(request)

    server.replies = partly
    made = config(server, tmp_path, replace(PROSE, count=4))
    summary = synthesize(made)
    assert (summary["not_written"], summary["skills"]["prose"]["requests"], summary["sft"]) == (1, 3, 3)
    assert "1 requests were not written (see above why); the same command" in capsys.readouterr().out
    refused[:] = [-1]
    summary = synthesize(made)
    assert (summary["not_written"], summary["sft"]) == (0, 4)


def test_a_server_that_is_down_keeps_what_is_there(server, tmp_path):
    made = config(server, tmp_path, replace(PROSE, count=8))
    server.replies = lambda request: reply(request) if len(server.requests) <= 3 else (500, "no", {})
    with pytest.raises(InputError, match=r"gave no answer to 3 requests in a row.*run the same command again"):
        synthesize(replace(made, writer=replace(made.writer, concurrency=1)))
    assert len(list(read_rows(tmp_path / "out" / "requests"))) == 3
    server.replies = reply
    assert synthesize(made)["sft"] == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"agreement": 0}, "agreement: is 0"),
        ({"near_duplicates": 1.5}, r"near_duplicates: is 1\.5"),
        ({"relax": True, "skills": [Skill("math")]}, "relax: is set, and no skill has constraints"),
        ({"skills": [IF, IF]}, "skills: is empty or names one twice"),
        ({"personas": Personas(path="nobody.txt")}, r"there is no nobody\.txt"),
        ({"output": ""}, "output: is empty"),
    ],
)
def test_bad_settings(settings, said, server, tmp_path):
    with pytest.raises(InputError, match=said):
        synthesize(replace(config(server, tmp_path, IF), **settings))
    assert server.requests == []


def test_personas_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("One\n\n Two \nOne\n")
    assert Personas(path=str(tmp_path / "a.txt")).texts() == ["One", "Two"]
    with pytest.raises(InputError, match=r"personas\.limit: is -1"):
        Personas(path=str(tmp_path / "a.txt"), limit=-1).texts()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"latin\.txt, or it is no text in UTF-8"):
        Personas(path=str(tmp_path / "latin.txt")).texts()
    (tmp_path / "b.jsonl").write_text('{"who": "One"}\n{"who": ""}\n')
    with pytest.raises(InputError, match=r"row 2.*who is ''"):
        Personas(path=str(tmp_path / "b.jsonl"), field="who").texts()
    with pytest.raises(InputError, match=r"row 1.*has no field 'persona'"):
        Personas(path=str(tmp_path / "b.jsonl")).texts()
    assert Personas(limit=3).texts() == list(PERSONAS[:3])
    assert Written(**{"text": "a"}).reason == ""
