"""`tulu prompts`: sets of prompts that programs verify, out of real rows, read by PromptData as they are."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tulu_lightning.assets.reasoning import math_rows
from tulu_lightning.data.prompt_source import FewShot, PromptSource
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.errors import InputError
from tulu_lightning.recipes.making import prompts
from tulu_lightning.recipes.making.prompts import PromptsConfig, make_prompts
from tulu_lightning.verifiers.registry import get

ROWS = "tulu_lightning.assets."
KINDS = ["keywords:existence", "length_constraints:number_words", "detectable_format:title", "punctuation:no_comma"]
SUMS = PromptSource("sums", rows=f"{ROWS}arithmetic.prompt_rows", args={"count": 20})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def math(split, **settings):
    return PromptSource("math", rows=f"{ROWS}reasoning.math_rows", args={"split": split}, read="math", **settings)


def test_math_of_4500_with_500_held_out_and_chat_with_constraints(tmp_path):
    try:
        math_rows("test", 1)
    except InputError as error:
        pytest.skip(str(error))
    chat = PromptSource("chat", rows=f"{ROWS}rows.alpaca_rows", args={"limit": 200})
    out = tmp_path / "out"
    made = PromptsConfig(str(out), [math("train")], [chat], KINDS, [math("test")])
    summary = make_prompts(made)
    rows, held = lines(out / "prompts.jsonl"), lines(out / "held_out.jsonl")
    assert len(held) == 500
    # 4,500 problems, of which a few are there twice, word for word.
    assert 4490 <= summary["sources"]["math"] <= 4500
    assert not {row["id"] for row in rows} & {row["id"] for row in held}
    chats = summary["sources"]["chat"]
    assert 190 <= chats <= 200, "a few are there twice, too"
    assert Counter(row["verifier"] for row in rows) == {"math": summary["sources"]["math"], "ifeval": chats}
    assert set(summary["constraints"]) == set(KINDS)
    for row in rows[:50]:
        assert get("math")(f"\\boxed{{{row['ground_truth']}}}", row["ground_truth"]).outcome == "right"
    for row in rows[-chats:]:
        asked = json.loads(row["ground_truth"])
        assert asked["instruction_id_list"] == row["constraints"]
        assert row["messages"][-1]["content"].endswith(row["constraint"])
        assert asked["prompt"] == row["messages"][-1]["content"]
    data = PromptData(
        sources=[PromptSource("made", path=str(out / "prompts.jsonl"))],
        tokenizer="tiny-random-llama", template="tulu", max_tokens=2048, examples_per_step=8,
    )  # fmt: skip
    data.setup()
    assert len(data.prompts) > 0.98 * len(rows), "all but those longer than max_tokens"


def test_exemplars_stand_before_the_question(tmp_path):
    file = tmp_path / "shots.jsonl"
    file.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "2 + 2?", "answer": "Two and two.\n#### 4"}) + "\n")
    shots = FewShot(str(file), style="olmes")
    make_prompts(
        PromptsConfig(str(tmp_path / "out"), [PromptSource("g", path=str(rows), read="gsm8k", few_shot=shots)])
    )
    (row,) = lines(tmp_path / "out" / "prompts.jsonl")
    assert row["messages"][0]["content"] == "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer:"
    assert (row["ground_truth"], row["verifier"]) == ("4", "gsm8k")


def test_a_held_out_prompt_is_in_no_set_to_train_on(tmp_path):
    summary = make_prompts(
        PromptsConfig(str(tmp_path / "out"), [SUMS], held_out=[PromptSource("few", rows=SUMS.rows, args={"count": 5})])
    )
    assert (summary["prompts"], summary["held_out"], summary["also_held_out"]) == (15, 5, 5)


def test_a_held_out_question_counts_also_behind_exemplars_and_before_constraints(tmp_path):
    shots, rows, held = (tmp_path / f"{name}.jsonl" for name in ("shots", "rows", "held"))
    shots.write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    questions = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(2, 10)]
    for path, some in ((rows, questions), (held, questions[:2])):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    few = PromptSource("g", path=str(rows), read="gsm8k", few_shot=FewShot(str(shots), style="olmes"))
    plain = PromptSource("h", path=str(held), read="gsm8k")
    chat = PromptSource("c", path=str(rows), read="gsm8k")
    summary = make_prompts(PromptsConfig(str(tmp_path / "out"), [few], [chat], KINDS, [plain]))
    assert (summary["prompts"], summary["held_out"], summary["also_held_out"]) == (12, 2, 4)
    texts = [row["messages"][0]["content"] for row in lines(tmp_path / "out" / "prompts.jsonl")]
    assert not any("2 + 2?" in text or "3 + 3?" in text for text in texts)
    both = [few, PromptSource("plain", path=str(rows), read="gsm8k")]
    summary = make_prompts(PromptsConfig(str(tmp_path / "both"), both, held_out=[plain]))
    assert (summary["sources"], summary["also_held_out"]) == ({"g": 6, "plain": 6}, 4), "of 8 questions 2 are held out"


def test_a_limit_lets_nothing_through_that_is_held_out(tmp_path):
    """The first prompt is held out too, as the last of six: beyond the limit of three."""
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    questions = [json.dumps({"question": f"{n} + {n}?", "answer": f"#### {2 * n}"}) + "\n" for n in range(12)]
    rows.write_text("".join(questions[:6]))
    held.write_text("".join(reversed(questions[:1] + questions[7:])))
    sources = [PromptSource("g", path=str(rows), read="gsm8k")]
    made = PromptsConfig(str(tmp_path / "out"), sources, held_out=[PromptSource("h", path=str(held), read="gsm8k")])
    summary = make_prompts(replace(made, limit=6))
    assert (summary["prompts"], summary["also_held_out"], summary["held_out"]) == (5, 1, 6)
    summary = make_prompts(replace(made, limit=3, output=str(tmp_path / "limited")))
    kept = [row["messages"][0]["content"] for row in lines(tmp_path / "limited" / "prompts.jsonl")]
    assert (kept, summary["held_out"], summary["also_held_out"]) == (["1 + 1?", "2 + 2?"], 3, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"output": ""}, "output: is empty"),
        ({"sources": []}, "sources: there is none"),
        ({"limit": 0}, "limit: is 0"),
        ({"held_out": [SUMS]}, "no prompt is left that is not held out"),
        ({"sources": [PromptSource("sft", rows=f"{ROWS}arithmetic.sft_rows", args={"count": 2})]}, "has 0 checks"),
        ({"sources": [], "constrained": [SUMS], "kinds": ["no_commas"]}, "no constraint 'no_commas'"),
    ],
)
def test_bad_input(settings, said, tmp_path):
    with pytest.raises(InputError, match=said):
        make_prompts(PromptsConfig(**{"output": str(tmp_path / "out"), "sources": [SUMS], **settings}))
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over_and_a_dry_run_writes_nothing(tmp_path, capsys):
    made = PromptsConfig(str(tmp_path / "out"), [SUMS], limit=3)
    make_prompts(PromptsConfig(str(tmp_path / "out"), [SUMS], dry_run=True))
    assert "sums: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert make_prompts(made)["prompts"] == 3
    with pytest.raises(InputError, match=r"prompts\.jsonl: is there already"):
        make_prompts(made)


def test_killed_between_its_files_it_writes_them_again(tmp_path, monkeypatch):
    held = PromptSource("few", rows=SUMS.rows, args={"count": 5})
    made = PromptsConfig(str(tmp_path / "out"), [SUMS], held_out=[held])
    whole = {"write_rows": prompts.write_rows, "write_whole": prompts.write_whole}

    def until(name, stop):
        def write(path, content):
            if path.name == stop:
                raise KeyboardInterrupt
            whole[name](path, content)

        return write

    for stop in ("held_out.jsonl", "summary.json", "prompts.jsonl"):
        with monkeypatch.context() as patch:
            for name in whole:
                patch.setattr(prompts, name, until(name, stop))
            with pytest.raises(KeyboardInterrupt):
                make_prompts(made)
    assert make_prompts(made)["prompts"] == len(lines(tmp_path / "out" / "prompts.jsonl")) == 15
    assert len(lines(tmp_path / "out" / "held_out.jsonl")) == 5
