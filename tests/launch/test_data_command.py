import json
import re
from pathlib import Path

import pytest

from tulu_lightning import cli

CONFIGS = Path(__file__).parents[2] / "configs"
SFT = ["--config", str(CONFIGS / "sft_tiny.yaml"), "--data.max_tokens=128"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`run(*argv)` gives the exit status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def command(*argv: str) -> tuple[int, str]:
        status = cli.main(["data", *argv])
        out, err = capsys.readouterr()
        return status, out + err

    return command


def test_inspect_shows_rows_of_the_first_step_the_doctor_and_the_mixture(run, tmp_path):
    status, said = run("inspect", *SFT, "--rows=2", "--colour=never")
    assert status == 0
    assert said.count("source 'additions': 7") == 2  # 71 or 72 tokens
    assert said.count("⟧") == 2
    assert "<|im_end|>⟧" in said
    assert "template doctor: all" in said
    assert "additions    96" in said
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"


def test_inspect_shows_the_row_asked_for_with_its_ids(run):
    status, said = run("inspect", *SFT, "--row=3", "--ids", "--colour=never")
    assert status == 0
    assert "row 3, source" in said
    assert "<|im_end|>⟨258⟩⟧" in said


def test_inspect_ends_lines_where_the_row_does(run, tmp_path):
    words = " ".join(f"word{number}" for number in range(40))  # wider than a terminal
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": f"{words}\nend"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": messages}))
    sources = '[{"name": "long", "path": "long.jsonl"}]'
    status, said = run("inspect", *SFT, f"--data.sources={sources}", "--data.max_tokens=999", "--colour=never")
    assert status == 0
    assert f"<|user|>\n{words}\n<|assistant|>\n⟦{words}\nend<|im_end|>⟧\n" in said


def test_inspect_shows_rows_beyond_those_that_a_short_run_meets(run):
    """One step of 16 rows is trained on, and 20 are asked for: those 16 first."""
    status, said = run("inspect", *SFT, "--rows=20", "--data.max_steps=1", "--colour=never")
    assert status == 0
    shown = re.findall(r"^row (\d+), source", said, re.MULTILINE)
    assert len(set(shown)) == 20


def test_a_row_by_its_number_and_a_choice_of_rows_clash(run):
    status, said = run("inspect", *SFT, "--row=3", "--source=additions")
    assert status != 0
    assert "--row: shows one row" in said


def test_inspect_says_what_was_found_of_training_and_of_validation_rows(run):
    held_out = '[{"name": "held out", "rows": "tulu_lightning.assets.arithmetic.sft_rows", "args": {"count": 5}}]'
    status, said = run("inspect", *SFT, "--rows=1", f"--data.validation={held_out}", "--colour=never")
    assert status == 0
    assert said.count("template doctor: all") == 2
    assert "validation: template doctor" in said
    assert re.search(r"^held out \(validation\) +5 +5 +5 ", said, re.MULTILINE)


DPO = ["--config", str(CONFIGS / "dpo_tiny.yaml")]


def test_inspect_shows_a_pair_as_the_model_sees_it(run):
    status, said = run("inspect", *DPO, "--row=0", "--colour=never")
    assert status == 0
    head, start, chosen, rejected = re.search(
        r"row 0, (.*?)─*\n\[shared start\]\n(.*)\n\[chosen\]\n(.*)\n\[rejected\]\n(.*?)\n─", said, re.DOTALL
    ).groups()
    question, shared = re.fullmatch(
        r"<\|user\|>\nWhat is (\d+ \+ \d+)\? Reply with only the number\.\n<\|assistant\|>\n(?:⟦(\d+)⟧)?", start
    ).groups(default="")
    right, wrong = (re.fullmatch(r"⟦(\d*)<\|im_end\|>⟧", side)[1] for side in (chosen, rejected))
    a, b = map(int, question.split(" + "))
    assert int(shared + right) == a + b != int(shared + wrong)
    prompt = len(start) - len(f"⟦{shared}⟧") * bool(shared)  # one token a byte
    sides = [prompt + len(shared + answer) + 1 for answer in (right, wrong)]
    total, scored = prompt + len(shared + right + wrong) + 2, len(shared + right + wrong) + 2
    expected = f"source 'additions': {total} tokens (chosen {sides[0]}, rejected {sides[1]}), {scored} trained"
    assert head.strip() == expected


def test_a_rejected_answer_has_a_colour_of_its_own(run):
    status, said = run("inspect", *DPO, "--row=0", "--colour=always")
    assert status == 0
    chosen, rejected = said.split("[chosen]")[1].split("[rejected]")
    assert "\x1b[1;32m" in chosen
    assert "\x1b[1;31m" in rejected
    assert "\x1b[1;32m" not in rejected.split("─")[0]


def test_stats_of_pairs_give_the_lengths_of_both_sides(run, tmp_path):
    def pair(chosen, rejected):
        return {"prompt": "q", "chosen": chosen, "rejected": rejected}

    rows = [pair("c" * 9, "r"), pair("c" * 5, "r" * 3), pair("c", "r" * 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, said = run("stats", *DPO, '--data.sources=[{"name": "pairs", "path": "pairs.jsonl"}]')
    assert status == 0
    # The prompt has 25 tokens, and every answer an end token.
    assert re.search(r"pairs +3 +35\.0 +35 +\d+ +37 +105\n", said)  # 25 + 10 + 2, 25 + 6 + 4, 25 + 2 + 6
    assert re.search(r"pairs, chosen +3 +31\.0 +31 +\d+ +35 +93\n", said)
    assert re.search(r"pairs, rejected +3 +29\.0 +29 +\d+ +31 +87\n", said)
    assert re.search(r"scored tokens of a side\n.*\npairs, chosen +3 +6\.0 +6 ", said)
    assert "pairs: the chosen side has more scored tokens in 67% of pairs" in said


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_the_other_stages_rows_can_be_looked_at_too(run, stage):
    status, said = run("inspect", "--config", str(CONFIGS / f"{stage}_tiny.yaml"), "--rows=1", "--colour=never")
    assert status == 0
    assert ("[rejected]" in said) == (stage == "dpo")
    assert "source 'additions'" in said


def test_stats_give_figures_a_histogram_and_a_picture(run):
    status, said = run("stats", *SFT, "--png=lengths.png")
    assert status == 0
    assert "additions    96" in said
    assert "additions: rows by tokens" in said
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["inspekt"], ["no such action: 'inspekt'", "Did you mean 'inspect'?"]),
        (["inspect"], ["no config is given"]),
        (["inspect", *SFT, "--row=96"], ["--row: is 96", "numbered 0 to 95"]),
        (["inspect", *SFT, "--source=addition"], ["there is no source 'addition'", "Did you mean 'additions'?"]),
        (["inspect", *SFT, "--rows=0"], ["--rows: is 0"]),
        (["inspect", *SFT, "--data.max_tokns=3"], ["max_tokns", "max_tokens"]),
        (["stats", *SFT, "--png=lengths.pdf"], ["ends with .png"]),
        (["stats", *SFT, "--bins=many"], ["invalid int value: 'many'"]),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_2(run, argv, parts):
    status, said = run(*argv)
    assert status == 2
    for part in parts:
        assert part in said
    assert "Traceback" not in said


def test_help_says_what_there_is(run):
    status, said = run("--help")
    assert status == 0
    assert "inspect" in said
    assert "stats" in said
