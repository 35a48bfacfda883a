"""Tasks: how they are asked, kept, scored and compared, with an engine that says what it is told to."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from itertools import combinations, islice

import pytest
import torch
from transformers import AutoTokenizer

from tulu_lightning import cli
from tulu_lightning.core.gain import Paired, gain
from tulu_lightning.core.stats import bootstrap, wilson
from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation import rows as rows_module
from tulu_lightning.evaluation.asking import Asker, answer_text
from tulu_lightning.evaluation.command import show
from tulu_lightning.evaluation.result import Item, TaskResult, compare_results, pass_at_k
from tulu_lightning.evaluation.rows import DataSet, check_used, use_file
from tulu_lightning.evaluation.run import Model, run_task
from tulu_lightning.evaluation.sheet import Sheet
from tulu_lightning.evaluation.shots import conversation, one_text
from tulu_lightning.evaluation.suite import find_tasks
from tulu_lightning.evaluation.task import Example, Task, Turn, shares
from tulu_lightning.rollout.scoring import Scorer
from tulu_lightning.types import Completion, Verdict
from tulu_lightning.verifiers.code import Code


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def asked(row, place):
    return Example(
        f"sums/{place}", (Turn("user", f"What is {row}?"),), str(row), group="even" if row % 2 == 0 else "odd"
    )


def task(**changes):
    settings = {"name": "sums", "version": 1, "skill": "Math", "rows": lambda: range(5), "example": asked}
    return Task(**{**settings, "verifier": "last_number", **changes})


class Parrot:
    """An engine whose answer to prompt i, sample j is `say(key, j)`; it fails once `patience` prompts were answered."""

    version = 0

    def __init__(self, tokenizer, say, patience=math.inf):
        self.tokenizer, self.say, self.patience, self.asked = tokenizer, say, patience, []

    def generate(self, prompts, n, sampling, seed, *, keys=None, progress=None, made=None, stop_texts=None):
        groups, self.stop_texts = [], stop_texts
        for place, ids in enumerate(prompts):
            if len(self.asked) == self.patience:
                raise RuntimeError("out of patience")
            self.asked.append(self.tokenizer.decode(ids))
            groups.append([self.one(self.say(self.asked[-1], j)) for j in range(n)])
            made(place, groups[-1])
        return groups

    def one(self, text):
        ids = torch.tensor(self.tokenizer.encode(text + "<|im_end|>", add_special_tokens=False))
        return Completion(ids, torch.zeros(len(ids)), "stop", 0)

    def logprobs(self, sequences, temperature=1.0):
        return [torch.full((len(response),), -1.0) for _, response in sequences]


def model(tokenizer, say=lambda text, j: "3", digest="d", **settings):
    asker = Asker(tokenizer, chat.chat_template("chatml", tokenizer), "toy")
    return Model("toy", digest, Parrot(tokenizer, say, **settings), asker, (258,))


def result(scores, groups=None, average="micro", **changes):
    items = tuple(
        Item(key=f"k/{i}", group=g, target="", score=s, answers=[])
        for i, (s, g) in enumerate(zip(scores, groups or [""] * len(scores), strict=True))
    )
    settings = {"task": "t", "version": 1, "settings": "s", "metric": "m", "model": "a", "model_digest": "d"}
    return TaskResult(**{**settings, "average": average, "template": "", "items": items, **changes})


@pytest.mark.parametrize(("right", "samples", "k"), [(0, 5, 2), (1, 4, 2), (3, 6, 4), (6, 6, 1), (5, 20, 10)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(right, samples, k):
    draws = list(combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_refuses_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="k = 5"):
        pass_at_k(1, 4, 5)


def test_macro_counts_groups_and_micro_items():
    scores, groups = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert result(scores, groups).score == 0.75
    assert result(scores, groups, "macro").score == 0.5
    assert result(scores, groups, "macro").groups == {"a": (1.0, 3), "b": (0.0, 1)}


def test_intervals():
    assert result([1.0, 0.0, 1.0]).interval == wilson(2, 3)
    halves = [0.5, 0.25, 1.0, 0.0] * 20
    _, low, high = bootstrap(halves)
    assert result(halves).interval == pytest.approx((low, high), abs=0.01)
    assert result([0.0] * 9 + [0.001]).interval[0] == 0.0, "a score is not below 0"
    low, high = result([0.5] * 20).interval
    assert low < 0.5 < high, "twenty equal scores are no certainty"


def test_an_interval_over_groups_has_the_spread_of_stratified_draws():
    """Two groups of 40 and 10 coins: the variance of the mean of means is the mean of s²/n over 2², s² = p(1-p) n/(n-1)."""
    scores, groups = [1.0, 0.0] * 20 + [1.0, 0.0] * 5, ["a"] * 40 + ["b"] * 10
    low, high = result(scores, groups, "macro").interval
    spread = math.sqrt((0.25 / 39 + 0.25 / 9) / 4 + 2 / 50**2)  # the last: an item gained or lost by chance
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_a_paired_difference_is_over_the_same_items():
    before, after = result([0.0, 1.0, 0.0, 0.0] * 30), result([1.0, 1.0, 0.0, 0.0] * 30)
    found = compare_results(before, after)
    assert (found.difference, found.low, found.high) == gain(Paired(before.per_item, after.per_item), 0.95)
    assert found.n == 120


@pytest.mark.parametrize(
    ("changes", "what"), [({"settings": "x"}, "settings"), ({"version": 2}, "version"), ({"task": "u"}, "task")]
)
def test_results_of_other_tasks_do_not_compare(changes, what):
    with pytest.raises(InputError, match=f"the {what} differs"):
        compare_results(result([1.0]), result([1.0], **changes))


def test_results_come_back_from_their_file(tmp_path):
    kept = result([1.0, 0.5], ["a", "b"], "macro")
    kept.to_json(tmp_path / "t.json")
    assert TaskResult.from_json(tmp_path / "t.json") == kept
    assert json.loads((tmp_path / "t.json").read_text())["summary"]["score"] == 0.75
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a task's result"):
        TaskResult.from_json(tmp_path / "t.json")


def test_a_task_is_asked_judged_and_scored(tokenizer):
    given = task(average="macro")
    found = run_task(given, given.examples(), model(tokenizer, lambda text, j: "it is 2, or 4"))
    assert [item["score"] for item in found.items] == [0, 0, 0, 0, 1]
    assert found.score == pytest.approx((1 / 3 + 0) / 2), "one of three even rows, none of two odd ones"
    assert found.items[4]["answers"][0] == {
        "text": "it is 2, or 4", "outcome": "right", "score": 1.0, "tokens": 14, "finish": "stop"
    }  # fmt: skip
    assert found.settings == given.settings(given.examples())


def test_an_item_keeps_the_end_of_what_was_asked(tokenizer):
    def long(row, place):
        return asked(row, place)._replace(turns=(Turn("user", "a" * 1990 + f"What is {row}?"),))

    given = task(rows=lambda: [7])
    assert run_task(given, given.examples(), model(tokenizer)).items[0]["prompt"] == "What is 7?"
    given = task(rows=lambda: [7, 10], example=long)
    whole, cut = (item["prompt"] for item in run_task(given, given.examples(), model(tokenizer)).items)
    assert whole == "a" * 1990 + "What is 7?", "2,000 characters"
    assert cut == "… " + "a" * 1989 + "What is 10?", "2,001, of which the first is left out"


def test_prefixes_and_stops(tokenizer):
    def with_prefix(row, place):
        return asked(row, place)._replace(prefix="Answer: ")

    given = task(example=with_prefix, stops=("\n",), rows=lambda: [7])
    toy = model(tokenizer, lambda text, j: "7\nand 9")
    found = run_task(given, given.examples(), toy)
    assert toy.engine.asked[0].endswith("<|im_start|>assistant\nAnswer: ")
    assert found.items[0]["answers"][0]["text"] == "Answer: 7"
    assert found.score == 1.0
    assert answer_text("a\n\nQ: b", "", ("Q:", "\n\n")) == "a"


def test_pass_at_k_of_samples(tokenizer):
    given = task(samples=4, k=2, temperature=0.8, rows=lambda: [3])
    found = run_task(given, given.examples(), model(tokenizer, lambda text, j: "3" if j == 1 else "5"))
    assert found.score == 0.5
    assert len(found.items[0]["answers"]) == 4


def test_the_engine_is_told_what_texts_end_an_answer(tokenizer):
    toy = model(tokenizer, lambda text, j: "3\n\nQuestion: 4")
    for stops, texts in (((), None), (("\n\n", "Q:"), ("\n\n", "Q:"))):
        given = task(stops=stops)
        found = run_task(given, given.examples(), toy)
        assert (toy.engine.stop_texts and toy.engine.stop_texts.texts) == texts
        assert found.items[0]["answers"][0]["text"] == ("3" if stops else "3\n\nQuestion: 4")


def test_a_run_that_broke_off_goes_on_and_ends_as_one_that_did_not(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tulu_lightning.evaluation.run.SERVED", 2)
    given, say = task(), lambda text, j: text.split("is ")[1][0] + "\u2028"  # which is no end of a line of JSON
    sheet = tmp_path / "sums.jsonl"
    with pytest.raises(RuntimeError, match="patience"):
        run_task(given, given.examples(), model(tokenizer, say, patience=3), sheet)
    with sheet.open("a") as file:
        file.write('{"key": "sums/3", "gro')  # a kill in the middle of a line
    again = model(tokenizer, say)
    told = []
    found = run_task(given, given.examples(), again, sheet, progress=lambda done, total: told.append(done))
    assert len(again.engine.asked) == 2, "two of five were judged, and one more was answered"
    assert told == [3, 5]
    assert found == run_task(given, given.examples(), model(tokenizer, say))
    assert found.score == 1.0
    other = model(tokenizer, say, digest="other weights")
    run_task(given, given.examples(), other, sheet)
    assert len(other.engine.asked) == 5, "another model's items are not gone on with"


def test_a_judge_that_fails_in_the_middle_is_not_asked_twice_for_a_verdict(tokenizer, tmp_path, monkeypatch):
    given, sheet, each, asked = task(), tmp_path / "sums.jsonl", Scorer.each, []

    def dying(scorer, jobs):
        yield from islice(each(scorer, jobs), 3)
        raise RuntimeError("the judge is down")

    monkeypatch.setattr(Scorer, "each", dying)
    with pytest.raises(RuntimeError, match="judge"):
        run_task(given, given.examples(), model(tokenizer), sheet)
    monkeypatch.setattr(Scorer, "each", lambda scorer, jobs: asked.append(len(jobs)) or each(scorer, jobs))
    found = run_task(given, given.examples(), model(tokenizer), sheet)
    assert asked == [2]
    assert found == run_task(given, given.examples(), model(tokenizer))


def test_a_kill_costs_the_answers_that_are_being_written_and_no_other(tokenizer, tmp_path):
    """All five are asked at once, and the third one never ends."""
    given, sheet = task(samples=2, k=2, temperature=0.5), tmp_path / "sums.jsonl"
    with pytest.raises(RuntimeError, match="patience"):
        run_task(given, given.examples(), model(tokenizer, patience=2), sheet)
    kept = [json.loads(line) for line in sheet.read_text().splitlines()[1:]]
    assert [(line["key"], len(line["said"])) for line in kept] == [("sums/0", 2), ("sums/1", 2)]
    again = model(tokenizer)
    found = run_task(given, given.examples(), again, sheet)
    assert len(again.engine.asked) == 3
    assert found == run_task(given, given.examples(), model(tokenizer))
    kept = Sheet(sheet, json.loads(sheet.read_text().splitlines()[0]))
    assert (len(kept.items), kept.said) == (5, {})
    assert len(sheet.read_text().splitlines()) == 6, "judged answers stand once"


def test_answers_to_another_question_under_the_same_key_are_not_judged(tokenizer, tmp_path):
    first, sheet = task(), tmp_path / "sums.jsonl"
    with pytest.raises(RuntimeError, match="patience"):
        run_task(first, first.examples(), model(tokenizer, patience=2), sheet)
    second = task(rows=lambda: [0, 7, 8])
    again = model(tokenizer, lambda text, j: text.split("is ")[1][0])
    found = run_task(second, second.examples(), again, sheet)
    assert again.engine.asked == [text for text in again.engine.asked if "7?" in text or "8?" in text]
    assert [item["score"] for item in found.items] == [0.0, 1.0, 1.0], "the first one's answer, 3, is kept"


def asked_again(tokenizer, sheet, given, **changes):
    """How many prompts a second run asks that finds the sheet of a first one of three examples."""
    say = lambda text, j: "1"  # noqa: E731
    first = task(rows=lambda: list(range(3)))
    run_task(first, first.examples(), model(tokenizer, say), sheet)
    again = model(tokenizer, say)._replace(**changes)
    run_task(given, given.examples(), again, sheet)
    return len(again.engine.asked)


def test_runs_of_other_limits_share_what_is_finished(tokenizer, tmp_path):
    longer, shorter = task(), task(rows=lambda: list(range(2)))
    assert asked_again(tokenizer, tmp_path / "a", longer) == 2, "five less the three that are there"
    assert asked_again(tokenizer, tmp_path / "b", shorter) == 0
    kept = [json.loads(line) for line in (tmp_path / "b").read_text().splitlines()]
    assert [each["key"] for each in kept[1:]] == ["sums/0", "sums/1", "sums/2"], "a quick look takes nothing away"


def test_items_of_another_manner_of_asking_are_not_taken(tokenizer, tmp_path):
    same = task(rows=lambda: list(range(3)))
    assert asked_again(tokenizer, tmp_path / "a", same) == 0
    assert asked_again(tokenizer, tmp_path / "b", same, manner=("vllm", "bfloat16")) == 3
    assert asked_again(tokenizer, tmp_path / "c", same, stop_ids=(1, 2, 3)) == 3
    template = chat.chat_template("tulu", tokenizer)
    assert asked_again(tokenizer, tmp_path / "d", same, asker=Asker(tokenizer, template, "toy")) == 3
    assert asked_again(tokenizer, tmp_path / "e", replace(same, max_new_tokens=7)) == 3
    other = task(rows=lambda: [0, 1, 5])  # the third question is another under the same key
    assert asked_again(tokenizer, tmp_path / "f", other) == 1


def test_many_samples_make_few_examples_a_write(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tulu_lightning.evaluation.run.SERVED", 8)
    given, told = task(samples=4, k=2, temperature=0.8), []
    run_task(given, given.examples(), model(tokenizer, lambda t, j: "1"), None, progress=lambda d, n: told.append(d))
    assert told == [0, 2, 4, 5], "eight answers at a time are two examples"


def test_a_limit_takes_rows_from_everywhere():
    given = task(rows=lambda: list(range(10)))
    assert [example.target for example in given.examples(4)] == ["0", "2", "5", "7"]
    assert len(given.examples(20)) == 10


def test_a_limit_takes_items_of_every_group_where_groups_count_the_same():
    sizes = {"a": 100, "b": 10, "c": 3}
    rows = [group for group, size in sizes.items() for _ in range(size)]
    given = task(rows=lambda: rows, example=lambda row, place: asked(place, place)._replace(group=row), average="macro")
    # One each; then five times to whoever has the most items for each of its own: 100, 50, 33, 25 and 20 of a.
    taken = given.examples(8)
    assert [example.group for example in taken] == ["a"] * 6 + ["b", "c"]
    assert [example.key for example in taken[:3]] == ["sums/0", "sums/16", "sums/33"]
    assert len(given.examples(2)) == 2
    assert shares([2, 1, 40], 43) == [2, 1, 40]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "task sums: its data set has no rows"),
        ([{"question": "q"}], r"task sums, row 1: has no field 'answer' \(it has: question\)"),
        (["text"], "task sums, row 1: is not as the task reads it"),
        ([{"answer": "#### 1"}, None], "task sums, row 2: is not as the task reads it"),
    ],
)
def test_rows_that_are_none_of_the_tasks_are_named(rows, said):
    given = task(rows=lambda: rows, example=lambda row, place: asked(int(row["answer"].split()[-1]), place))
    with pytest.raises(InputError, match=said):
        given.examples()


def test_a_prompt_without_room_for_its_answer_is_named(tokenizer):
    given = task(max_new_tokens=50)
    asker = Asker(tokenizer, chat.chat_template("chatml", tokenizer), "toy")
    longest = max(map(len, asker.prompts(given, given.examples())))
    asker.check_room(given, given.examples(), longest + 50, "")
    asker.check_room(given, given.examples(), None, "")
    said = rf"task sums: the longest prompt, sums/\d, has {longest} tokens and answers up to 50; toy has {longest + 49} positions"
    with pytest.raises(InputError, match=said):
        asker.check_room(given, given.examples(), longest + 49, "Lower it.")
    asker.check_room(given.capped(49), given.examples(), longest + 49, "")
    assert given.capped(60) is given.capped(None) is given


def test_choices_are_ranked_by_their_log_probs(tokenizer):
    class Shortest:
        runs = "here"

        def __call__(self, response, target):
            values = json.loads(response)
            right = values.index(max(values)) == int(target)
            return Verdict("right" if right else "wrong", float(right))

        def complaint(self, target):
            return None

    def choose(row, place):
        return Example(f"c/{place}", (Turn("text", "Pick: "),), "1", choices=("aaa", "b", "cc"))

    given = task(example=choose, chat=False, verifier="shortest", own=Shortest(), rows=lambda: [0])
    found = run_task(given, given.examples(), model(tokenizer))
    assert found.score == 1.0
    assert json.loads(found.items[0]["answers"][0]["text"]) == [-4.0, -2.0, -3.0], (
        "the prompt's last space is the choice's"
    )


def test_shots_are_turns_or_one_text():
    shots = [("Q: 2?\nA:", "2")]
    assert one_text("Q: 3?\nA:", shots) == "Q: 2?\nA: 2\n\nQ: 3?\nA:"
    turns = conversation("Q: 3?\nA:", shots, system="Add.")
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[0].content == "Add.\n\nQ: 2?\nA:"
    assert conversation("Q: 3?\nA:", shots, multi_turn=False) == (Turn("user", one_text("Q: 3?\nA:", shots)),)


def test_rows_come_from_a_file_of_the_users(tmp_path):
    data = DataSet("toy set", hub="nobody/nothing")
    with pytest.raises(InputError, match=r"data set toy set: it is not here.*--data toy set=FILE\.jsonl"):
        data.read()
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    use_file("toy set", tmp_path / "rows.jsonl")
    assert data.read() == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: the line is not JSON"):
        data.read()
    with pytest.raises(InputError, match="no such file"):
        use_file("toy set", tmp_path / "none.jsonl")


def test_an_unknown_suite_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"no task or suite 'tulu_dev'.*tulu3_dev"):
        find_tasks(["tulu_dev"])
    assert [each.name for each in find_tasks(["gsm8k", "gsm8k"])] == ["gsm8k"]


def test_a_model_without_a_template_is_refused_in_chat(tokenizer):
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    given = task()
    with pytest.raises(
        InputError, match=r"toy: it has no chat template, and sums is asked in chat\. Name one: --template"
    ):
        Asker(bare, None, "toy").prompts(given, given.examples())


def test_the_models_own_template_is_used_without_a_name(tokenizer):
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    given = task()
    assert own.decode(Asker(own, None, "toy").prompts(given, given.examples())[0]) == "[user]What is 0?[assistant]"


class Own:
    """A verifier without a `__repr__`: Python's names its address, another one in each process."""

    share = 0.5

    def __init__(self, words=("a",), reader=None):
        self.words, self.reader, self._calls = words, reader, object()

    def __call__(self, response, target):
        return Verdict("wrong", 0.0)

    def complaint(self, target):
        return None


class Stricter(Own):
    """The same settings, another class."""


@dataclass(frozen=True)
class Around(Own):
    """Its own repr is that of its fields, one of which has none."""

    inner: object = None
    share: float = 0.5


@pytest.mark.parametrize("make", [Own, lambda: Own(["b"], reader=object()), lambda: Around(Own())])
def test_the_settings_of_a_verifier_hold_no_address(make):
    first, second = make(), make()
    assert repr(first) != repr(second)
    assert task(own=first).settings([]) == task(own=second).settings([])


def test_the_settings_of_a_verifier_tell_what_it_is_and_how_it_is_set():
    different = [Own(), Own(["b"]), Stricter(), Around(Own()), Around(Own(), 0.25)]
    assert len({task(own=own).settings([]) for own in different}) == len(different)
    content = f'{__name__}.Own {{"reader": null, "share": 0.5, "words": ["a"]}}'
    drawn = [4096, 0.0, 1.0, 1, 1, [], True]
    whole = json.dumps(["sums", 1, drawn, ["last_number", content, "micro"], []])
    assert task(own=Own()).settings([]) == hashlib.sha256(whole.encode()).hexdigest()[:16]


def test_a_repr_that_says_how_a_verifier_is_set_stands_in_the_settings_as_it_always_did():
    assert task(verifier="code", own=Code(seconds=10.0)).settings([]) == "2446161bc7a710b6"


def test_settings_that_cannot_work():
    with pytest.raises(InputError, match=r"task sums\.samples"):
        task(samples=4)
    with pytest.raises(InputError, match=r"task sums\.k"):
        task(samples=4, k=5, temperature=1.0)


def test_a_file_that_no_task_reads_is_refused(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"question": "q"}\n')
    use_file("sum", tmp_path / "rows.jsonl")
    monkeypatch.setattr(rows_module, "_read", {"sums"})
    with pytest.raises(InputError, match=r"--data sum: no task of these reads a data set 'sum'. Did you mean 'sums'"):
        check_used()
    use_file("sums", tmp_path / "rows.jsonl")
    assert DataSet(name="sums").read() == [{"question": "q"}]


@pytest.mark.parametrize("option", ["--data", "--judge"])
def test_an_option_without_its_value_is_refused(option, capsys):
    assert cli.main(["eval", "--model", "m", "--suite", "gsm8k", option, "gsm8k"]) == 2
    assert f"{option}: is 'gsm8k'" in capsys.readouterr().err


def test_a_file_of_results_that_cannot_be_read_is_put_aside(tmp_path, capsys):
    (tmp_path / "results.json").write_text('[{"task": "gsm8')
    show([[result([1.0, 0.0])]], tmp_path)
    assert (tmp_path / "results.unreadable.json").read_text() == '[{"task": "gsm8'
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1
    assert "results.json is no list of results (JSONDecodeError)" in capsys.readouterr().err


def test_the_mean_over_tasks_has_an_interval(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    one, other = [
        result(scores, task=name) for name, scores in (("a", [1.0] * 30 + [0.0] * 10), ("b", [1.0, 0.0] * 20))
    ]
    show([[one, other]], tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mean" in line]
    (l1, h1), (l2, h2) = one.interval, other.interval
    low, high = 0.625 - math.hypot(0.75 - l1, 0.5 - l2) / 2, 0.625 + math.hypot(h1 - 0.75, h2 - 0.5) / 2
    assert f"62.5 [{100 * low:.1f}, {100 * high:.1f}]" in line
    show([[one, other], [replace(other, task="a"), replace(one, task="b")]], tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "mean" in line]
    assert re.search(r"\+0\.0 \[-\d+\.\d, \+\d+\.\d\]", line)


def test_a_metric_beyond_shares_has_its_own_interval_and_no_part_in_the_mean(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    bleu = result([20.0, 30.0] * 20, task="bleu", bounded=False)
    low, high = bleu.interval
    assert 20 < low < bleu.score == 25 < high < 30
    show([[bleu, result([1.0, 0.0], task="a"), result([0.0, 0.0], task="b")]], tmp_path)
    said = capsys.readouterr().out
    assert f"25.0 [{low:.1f}, {high:.1f}]" in said
    assert re.search(r"mean +25\.0 \[", said)  # of a and b


def test_the_settings_hash_knows_template_engine_dtype_and_seed(tiny):
    tokenizer, given = AutoTokenizer.from_pretrained(tiny), task()
    toy = model(tokenizer)._replace(manner=("local", "float32"))
    tokenizer.chat_template = chat.chat_template("chatml", tokenizer).jinja

    def hash_of(seed=0, **changes):
        return run_task(given, given.examples(), toy._replace(**changes), seed=seed).settings

    own = Asker(tokenizer, None, "toy")
    hashes = [hash_of(), hash_of(seed=1), hash_of(manner=("local", "bfloat16")), hash_of(asker=own)]
    assert len(set(hashes)) == 4
    assert hash_of(digest="e", name="another") == hashes[0]


def test_results_of_other_commands_stay(tmp_path, capsys):
    coins, again, sums = result([1.0, 0.0]), result([1.0, 1.0]), result([0.0, 1.0], task="sums")
    show([[coins]], tmp_path)
    show([[sums]], tmp_path)
    show([[again]], tmp_path)
    show([[replace(coins, model_digest="e")], [coins]], tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [(each["task"], each["model_digest"], each["score"]) for each in kept] == [
        ("sums", "d", 0.5), ("t", "d", 1.0), ("t", "e", 0.5)
    ]  # fmt: skip
    assert kept[2]["against"]["model_digest"] == "d"
