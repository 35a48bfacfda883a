"""`PromptData`: what is kept, how it is numbered and hashed, and what a mixture's settings do."""

from dataclasses import dataclass, field, replace

import pytest

from tulu_lightning.assets.tiny import byte_tokenizer
from tulu_lightning.data import chat, prompts
from tulu_lightning.data.criteria import Keywords, Predicate
from tulu_lightning.data.mixture import order
from tulu_lightning.data.prompt_source import prompt_source
from tulu_lightning.data.prompts import FewShot, PassRate, PromptData, PromptSource
from tulu_lightning.errors import InputError
from tulu_lightning.types import Check, Verdict

TOKENIZER = byte_tokenizer()
SETTINGS = {"tokenizer": "tiny-random-llama", "template": "tulu", "max_tokens": 200, "examples_per_step": 4}


@dataclass(frozen=True)
class Judge:
    rubric: str
    url: str = field(default="http://localhost", compare=False)

    def __call__(self, response: str, target: str) -> Verdict:
        return Verdict("right", 1.0)

    def complaint(self, target: str) -> str | None:
        return None


def prompt(question, target="1", **more):
    verifier = {} if {"checks", "dataset"} & more.keys() else {"verifier": "last_number"}
    return {"messages": [{"role": "user", "content": question}], "ground_truth": target, **verifier, **more}


def data(*sources, **settings) -> PromptData:
    made = PromptData(sources=list(sources), **{**SETTINGS, **settings})
    made.setup()
    return made


def questions(*sources, **settings) -> list[str]:
    return [each.text for each in data(*sources, **settings).prompts]


def test_a_mixture_of_routed_rows_and_rows_with_several_checks(write):
    checks = [{"verifier": "last_number"}, {"verifier": "judge", "ground_truth": "be kind", "weight": 0.5}]
    routed = write([prompt("a", dataset="sums"), prompt("b", "2", dataset="MATH")], "routed")
    several = write([prompt("c", "3", checks=checks)], "several")
    found = data(
        routed,
        several,
        routes={"sums": "last_number", "MATH": "exact"},
        verifiers={"judge": Judge("kindness")},  # type: ignore[dict-item]
    )
    assert [each[1:] for each in found.prompts] == [
        ((Check("last_number", "1"),), "a", 0, "sums"),
        ((Check("exact", "2"),), "b", 1, "MATH"),
        ((Check("last_number", "3"), Check("judge", "be kind", 0.5)), "c", 2, "several"),
    ]
    assert found.verifiers["judge"] == Judge("kindness")
    assert found.verifiers["exact"] is not None
    assert found.prompts[2].weight == 1.5
    assert found.prompts[2].target == "3"


def test_the_ids_are_those_of_each_conversation_alone(write):
    texts = ["", "é日本", "<|user|> </s>", "x" * 50, "a\n\nb"]
    rows = [prompt(f"{text}{i}") for i, text in enumerate(texts)]
    system = {**prompt("hi"), "messages": [{"role": "system", "content": "Be short."}, *prompt("hi")["messages"]]}
    several = {**prompt("hi"), "messages": [*prompt("q")["messages"], {"role": "assistant", "content": "a"}] * 2}
    several["messages"] = several["messages"][:-1]
    found = data(write([*rows, system, several]))
    for each, row in zip(found.prompts, [*rows, system, several], strict=True):
        ids, _ = chat.encode(found.tokenizer, found.template, row["messages"], generation_prompt=True)
        assert each.ids == tuple(ids)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunks_change_nothing_and_what_lies_behind_the_last_row_needed_is_not_read(write, chunk, monkeypatch):
    monkeypatch.setattr(prompts, "CHUNK", chunk)
    # Every third row is too long; row 18 is broken. Without drawing, the first rows in their order are taken.
    rows = [prompt("x" * 300 if i % 3 == 1 else f"q{i}") for i in range(17)]
    source = write([*rows, {"messages": "none"}])
    kept = [f"q{i}" for i in range(17) if i % 3 != 1]
    with pytest.raises(InputError, match="row 18: messages is 'none'"):
        questions(source)
    assert questions(write(rows)) == kept
    capped = replace(write(rows), cap=5)
    counts = data(capped).manifest()["sources"]["rows"]
    assert counts["kept"] == 5
    assert counts["tried"] == 5 + counts["left_out"].get("longer than 200 tokens", 0)
    needed = set(order(capped, 17, seed=0)[: counts["tried"]])
    write([row if i in needed else {"messages": "none"} for i, row in enumerate(rows)])
    assert set(questions(capped)) == {f"q{i}" for i in needed if i % 3 != 1}


def test_a_cap_draws_the_same_rows_whatever_the_chunk(write, monkeypatch):
    source = replace(write([prompt("x" * 300 if i % 2 else f"q{i}") for i in range(60)]), cap=13)
    drawn = []
    for chunk in (1, 5, 1024):
        monkeypatch.setattr(prompts, "CHUNK", chunk)
        found = data(source, max_dropped_share=0.9)
        drawn.append((found.digest(), found.manifest()))
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][1]["sources"]["rows"]["kept"] == 13


def test_all_reasons_for_which_rows_are_left_out_are_counted(write):
    rows = [
        *(prompt(f"q{i}", pass_rate=0.5) for i in range(4)),
        *(prompt("q", pass_rate=rate) for rate in (0.0, 1.0)),
        prompt(" ", pass_rate=0.5),
        prompt("about OpenAI", pass_rate=0.5),
        prompt("x" * 300, pass_rate=0.5),
    ]
    source = prompt_source(write(rows))
    filters: list[Keywords | Predicate] = [Keywords(["openai"], roles=["user"])]
    source = replace(source, filters=filters, pass_rate=PassRate(0.1, 0.9))
    found = data(source).manifest()["sources"]["rows"]
    assert (found["rows"], found["kept"]) == (9, 4)
    assert found["left_out"] == {
        "longer than 200 tokens": 1,
        "with a pass rate outside of 0.1 to 0.9": 2,
        "with an empty message": 1,
        "with the word 'openai'": 1,
    }
    assert len(questions(replace(source, keep_empty=True))) == 5


def test_a_filter_that_would_search_nothing_is_refused(write):
    with pytest.raises(InputError, match=r"filters.roles is \['assistant', 'text'\], and the words of a prompt are"):
        data(replace(write([prompt("q")]), filters=[Keywords(["OpenAI"])]))


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"verifier": "last_numbr"}, "source 'rows': there is no verifier 'last_numbr'. Did you mean 'last_number'?"),
        (
            {"dataset": "gsm9k"},
            "source 'rows': no route leads from the dataset 'gsm9k' to a verifier. Did you mean 'gsm",
        ),
        ({"few_shot": FewShot("gsm8k_9")}, "source 'rows', few_shot.exemplars: there are none called 'gsm8k_9'. Did"),
        ({"few_shot": FewShot("no.jsonl")}, "no.jsonl: "),
    ],
)
def test_a_source_setting_that_cannot_be_meant_is_refused_before_a_row_is_read(write, settings, said):
    source = PromptSource("rows", path=write(["{"]).path, **settings)
    with pytest.raises(InputError) as caught:
        data(source)
    assert said in str(caught.value)


def test_a_dataset_without_a_route_will_do_as_a_name_beside_a_verifier(write):
    row = {**prompt("q"), "verifier": None}
    source = PromptSource("rows", path=write([row]).path, dataset="my sums", verifier="last_number")
    assert data(source).prompts[0].source == "my sums"


def test_a_route_to_no_verifier_is_refused_at_once():
    with pytest.raises(InputError, match=r"^data.routes.sums: there is no verifier 'lst_number'. Did you mean 'last_n"):
        PromptData(sources=[], routes={"sums": "lst_number"}, **SETTINGS)


def test_own_verifiers_win_and_can_be_routed_to(write):
    own = {"last_number": Judge("a"), "mine": Judge("b")}
    found = data(write([prompt("q", "sixty", dataset="d")]), verifiers=own, routes={"d": "mine"})
    assert found.prompts[0].checks == (Check("mine", "sixty"),)
    assert found.verifiers["last_number"] == Judge("a")


def test_the_digest_tells_what_judges_the_answers_but_not_where_the_judge_is(write):
    rows = [prompt("q", checks=[{"verifier": "judge", "weight": 2}])]
    other_weight = [prompt("q", checks=[{"verifier": "judge", "weight": 3}])]
    other_target = [prompt("q", "2", checks=[{"verifier": "judge", "weight": 2}])]

    def digest(rows, judge):
        return data(write(rows), verifiers={"judge": judge, "unused": judge}).digest()

    first = digest(rows, Judge("kind"))
    assert digest(rows, Judge("kind", url="http://elsewhere")) == first
    changed = [digest(rows, Judge("harsh")), digest(other_weight, Judge("kind")), digest(other_target, Judge("kind"))]
    assert len({first, *changed}) == 4


def test_the_manifest_shows_own_verifiers(write):
    found = data(write([prompt("q")]), verifiers={"judge": Judge("kind")}).manifest()["settings"]
    assert found["verifiers"]["judge"].endswith("test_prompts.Judge(rubric='kind')")
    assert "verifiers" not in data(write([prompt("q")])).manifest()["settings"]


# Exemplars --------------------------------------------------------------------------------------------------------


def test_exemplars_of_a_file_go_before_the_question_in_one_message(write):
    shots = write([{"question": " 1 + 1? ", "answer": "2. \n"}, {"question": "2 + 2?", "answer": "4."}], "shots").path
    source = prompt_source(write([{"question": "3 + 3?\n", "answer": "#### 6"}]))
    asked = {
        "release": "Question: 1 + 1?\nAnswer:2.\n\nQuestion: 2 + 2?\nAnswer:4.\n\nQuestion: 3 + 3?",
        "olmes": "Question:  1 + 1? \nAnswer: 2. \n\n\nQuestion: 2 + 2?\nAnswer: 4.\n\nQuestion: 3 + 3?\n\nAnswer:",
        "minerva": "Problem:\n 1 + 1? \n\nSolution: 2. \n\n\nProblem:\n2 + 2?\n\nSolution: 4.\n\nProblem:\n3 + 3?\n"
        "\n\nSolution:",
    }
    for style, text in asked.items():
        few = FewShot(shots, style=style)  # type: ignore[arg-type]
        (found,) = data(replace(source, read="gsm8k", verifier="last_number", few_shot=few)).prompts
        assert found.text == text
        assert TOKENIZER.decode(found.ids) == f"<|user|>\n{text}\n<|assistant|>\n"
    one = FewShot(shots, count=1)
    assert questions(replace(source, read="gsm8k", verifier="exact", few_shot=one)) == [
        "Question: 1 + 1?\nAnswer:2.\n\nQuestion: 3 + 3?"
    ]
    with pytest.raises(InputError, match=r"few_shot.count: is 3, and .*shots.jsonl has 2 exemplars. Use 1 to 2."):
        data(replace(source, read="gsm8k", few_shot=FewShot(shots, count=3)))


def test_exemplars_leave_the_system_message_alone_and_want_a_lone_question(write):
    shots = write([{"question": "a", "answer": "b"}], "shots").path
    system = {"role": "system", "content": "Be short."}
    row = {**prompt("q"), "messages": [system, *prompt("q")["messages"]]}
    source = PromptSource("rows", path=write([row]).path, few_shot=FewShot(shots))
    (found,) = data(source).prompts
    assert TOKENIZER.decode(found.ids).startswith(
        "<|system|>\nBe short.\n<|user|>\nQuestion: a\nAnswer:b\n\nQuestion: q"
    )
    row["messages"] = [*prompt("q")["messages"], {"role": "assistant", "content": "a"}, *prompt("q")["messages"]]
    write([row])
    with pytest.raises(InputError, match=r"rows.jsonl, row 1: few_shot is set, and the row has 3 turns"):
        data(source)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": 0}, "few_shot.count: is 0"),
        ({"style": "relaese"}, "few_shot.style: is 'relaese'. Did you mean 'release'?"),
    ],
)
def test_few_shot_settings_out_of_range(settings, said):
    with pytest.raises(InputError, match=f"^{said}"):
        FewShot("gsm8k_8", **settings)


@pytest.mark.parametrize("row", [{"question": "a"}, {"question": "a", "answer": 3}])
def test_an_exemplar_that_is_none_is_named(write, row):
    shots = write([{"question": "a", "answer": "b"}, row], "shots").path
    with pytest.raises(InputError, match=r"shots.jsonl, row 2: "):
        data(PromptSource("rows", path=write([prompt("q")]).path, few_shot=FewShot(shots)))
