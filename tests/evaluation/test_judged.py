"""Tasks that a model judges: AlpacaEval and the safety sets, against a server of the test's own."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from tulu_lightning.callbacks.suite import Suite
from tulu_lightning.core.stats import bootstrap
from tulu_lightning.data import chat
from tulu_lightning.errors import InputError
from tulu_lightning.evaluation import alpaca_judge, judges
from tulu_lightning.evaluation.alpaca_judge import AlpacaJudge, messages_of, preference_of, switched
from tulu_lightning.evaluation.asking import Asker
from tulu_lightning.evaluation.judges import use_judge
from tulu_lightning.evaluation.length_control import Comparison, fit_l1, length_controlled
from tulu_lightning.evaluation.rows import package_file
from tulu_lightning.evaluation.run import Model, finished, run_task
from tulu_lightning.evaluation.safety_judge import Reading, SafetyJudge, by_keywords, read_guard
from tulu_lightning.evaluation.suite import find_task, find_tasks
from tulu_lightning.launch import evaluate
from tulu_lightning.types import Completion, Verdict

TEMPLATE = (
    "<|im_start|>system\nJudge.\n<|im_end|>\n<|im_start|>user\n{\n"
    '  "instruction": {instruction}, {"m": {output_1}, "M": {output_2}} }\n<|im_end|>'
)


@pytest.fixture(scope="module")
def says(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    asker = Asker(tokenizer, chat.chat_template("chatml", tokenizer), "toy")

    class Fixed:
        version = 0

        def __init__(self, text):
            self.ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))

        def generate(self, prompts, n, sampling, seed, *, keys=None, progress=None, made=None, stop_texts=None):
            group = [Completion(self.ids, torch.zeros(len(self.ids)), "stop", 0)] * n
            for place in range(len(prompts)):
                made(place, group)
            return [group] * len(prompts)

    return lambda text: Model("toy", "d", Fixed(text), asker, (258,))


def completion(text, **logprobs):
    first = [{"token": token, "logprob": value} for token, value in logprobs.items()]
    choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": first}]} if logprobs else None}
    return 200, json.dumps({"choices": [choice]}), {}


# The preference -------------------------------------------------------------------------------------------------------


def test_the_order_of_the_answers_is_the_authors():
    """`random.Random("is_switched_outputs" + instruction + "0").choices([False, True])`, as alpaca-eval 0.6.6 draws it."""
    asked = [f"Instruction {i}" for i in range(12)]
    expected = [random.Random(f"is_switched_outputs{one}0").random() >= 0.5 for one in asked]
    assert [switched(one) for one in asked] == expected
    assert len(set(expected)) == 2


def test_the_preference_is_a_share_of_the_two_names():
    assert preference_of({"m": math.log(0.2), "M": math.log(0.6), "x": 0.0}) == pytest.approx(0.75)
    assert preference_of({"M": -3.0}) == 1.0
    assert preference_of({"x": 0.0}) is None
    assert preference_of(None) is None


def test_a_template_is_filled_in_one_pass():
    slots = {"instruction": "Say {output_1}", "output_1": "a", "output_2": "{b}"}
    system, user = messages_of(TEMPLATE, slots)
    assert system == {"role": "system", "content": "Judge."}
    assert user["content"] == '{\n  "instruction": Say {output_1}, {"m": a, "M": {b}} }'


def test_the_authors_template_has_the_three_slots():
    if package_file(alpaca_judge.PACKAGE, alpaca_judge.FILE) is None:
        pytest.skip("alpaca-eval is not installed")
    found = messages_of(alpaca_judge.template(), {"instruction": "<I>", "output_1": "<A>", "output_2": "<B>"})
    assert [message["role"] for message in found] == ["system", "user"]
    places = [found[1]["content"].index(text) for text in ("<I>", "<A>", "<B>")]
    assert places == sorted(places)
    assert found[1]["content"].endswith("m or M.\n\n## Best Model Identifier")


def test_the_judge_prefers_the_same_answer_in_either_order(server, monkeypatch):
    """It is sure of the longer answer, 9 to 1, wherever that stands."""
    monkeypatch.setattr(alpaca_judge, "template", lambda: TEMPLATE)

    def reply(request):
        text = request["messages"][1]["content"]
        first = text.index("long answer") < text.index('"M"')
        high, low = math.log(0.9), math.log(0.1)
        return completion("m", m=high if first else low, M=low if first else high)

    server.replies = reply
    use_judge("alpaca_eval", f"toy@{server.url}")
    judge = AlpacaJudge()
    for i in range(6):
        target = json.dumps({"instruction": f"Do {i}", "baseline": "short"})
        verdict = judge("long answer", target)
        assert (verdict.outcome, verdict.score) == ("right", pytest.approx(0.9))
        verdict = judge("brief", json.dumps({"instruction": f"Do {i}", "baseline": "long answer"}))
        assert (verdict.outcome, verdict.score) == ("wrong", pytest.approx(0.1))
    assert {switched(f"Do {i}") for i in range(6)} == {True, False}
    assert {name: server.requests[0][name] for name in ("max_tokens", "top_logprobs", "logprobs")} == {
        "max_tokens": 1, "top_logprobs": 5, "logprobs": True
    }  # fmt: skip
    asked = len(server.requests)
    assert judge("same", json.dumps({"instruction": "x", "baseline": "same"})) == Verdict("wrong", 0.5)
    assert len(server.requests) == asked


# Length control -------------------------------------------------------------------------------------------------------


def made(n, m):
    """Preferences that follow length, difficulty and quality, with a wave on top."""
    share, cut = lambda x: 1 / (1 + math.exp(-x)), lambda x: min(1.0, max(0.0, x))
    own = [
        Comparison(
            cut(share(math.tanh(math.cos(3 * i) - 0.4) + 0.8 * math.sin(7 * i) - 0.5) + 0.25 * math.sin(11 * i + 1)),
            500 * math.cos(3 * i) - 200,
            math.sin(7 * i),
        )
        for i in range(n)
    ]
    gamed = [
        Comparison(
            cut(share(0.6 * math.tanh((-1) ** i * 1.5)) + 0.2 * math.sin(5 * i)),
            (-1) ** i * 1.5 + 0.2 * math.cos(2 * i),
            math.sin(13 * i),
        )
        for i in range(m)
    ]
    return own, gamed


def test_length_control_is_what_scikit_learn_fits():
    """LogisticRegressionCV of scikit-learn 1.6.1, called as alpaca-eval 0.6.6 calls it, to a tolerance of 1e-11."""
    fit = length_controlled(*made(60, 40))
    assert fit.win_rate == pytest.approx(0.38769297762826044, abs=1e-9)
    assert fit.weights == pytest.approx((0.7994165269892362, 0.7158252449818215, -0.49791804971071757), abs=1e-9)


def test_the_fit_is_at_its_optimum():
    """A weight's slope is its penalty's, with the other sign; a weight of 0 has a slope below it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    wanted, weight = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    for strength in (0.02, 0.3, 50.0):
        w = fit_l1(features, wanted, weight, strength).requires_grad_()
        scores = features @ w
        loss = strength * (
            weight * torch.nn.functional.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        )
        (slope,) = torch.autograd.grad(loss.sum(), w)
        for value, of in zip(w.tolist(), slope.tolist(), strict=True):
            assert of == pytest.approx(-math.copysign(1, value), abs=1e-6) if value else abs(of) <= 1 + 1e-9


def test_a_win_rate_that_comes_of_length_alone_is_taken_back():
    """All answers are longer than the baseline's by much or little; the judge likes length, and nothing else."""
    share = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    lengths = [-100 - 40 * (i % 25) for i in range(200)]
    spread = torch.tensor(lengths, dtype=torch.float64).std().item()
    own = [Comparison(share(-2 * math.tanh(x / spread)), x, 0.0) for x in lengths]
    raw = sum(c.preference for c in own) / len(own)
    assert raw > 0.8
    assert length_controlled(own, []).win_rate == pytest.approx(0.5, abs=0.02)


def test_the_interval_knows_the_error_of_the_fit():
    """Against refits on resampled comparisons: the bootstrap of the influences is about as wide."""
    own, gamed = made(60, 40)
    fit = length_controlled(own, gamed)
    assert sum(fit.influences) / 60 == pytest.approx(fit.win_rate)
    _, low, high = bootstrap(fit.influences)
    draw = random.Random(0)
    again = sorted(length_controlled(draw.choices(own, k=60), gamed).win_rate for _ in range(40))
    assert high - low == pytest.approx((again[38] - again[1]) * 1.05, rel=0.35)


def alpaca_rows(n=4):
    return [{"instruction": f"Do {i}", "output": "base " * (i + 1), "dataset": "d"} for i in range(n)]


def gamed_rows(n=805):
    return [
        {"index": i, "preference": 0.5 + 0.4 * s, "std_delta_len": s, "instruction_difficulty": i % 3 - 1}
        for s in (-1, 1)
        for i in range(n)
    ]


def test_alpaca_eval_scores_items_whose_mean_is_the_length_controlled_win_rate(server, give, says, monkeypatch):
    monkeypatch.setattr(alpaca_judge, "template", lambda: TEMPLATE)
    server.replies = lambda request: completion("m", m=math.log(0.3), M=math.log(0.7))
    use_judge("alpaca_eval", f"toy@{server.url}")
    give("alpaca_eval", alpaca_rows())
    give("alpaca_eval_gamed", gamed_rows())
    task = find_task("alpaca_eval")
    found = run_task(task, task.examples(), says("my own answer"))
    raw = [0.3 if switched(f"Do {i}") else 0.7 for i in range(4)]
    assert [item["answers"][0]["score"] for item in found.items] == pytest.approx(raw)
    own = [Comparison(raw[i], 5 * (i + 1) - len("my own answer"), i % 3 - 1) for i in range(4)]
    gamed = [Comparison(g["preference"], g["std_delta_len"], g["instruction_difficulty"]) for g in gamed_rows()]
    assert found.score == pytest.approx(length_controlled(own, gamed).win_rate)
    shares = [task.examples()[:2], task.examples()[2:]]
    parts = [run_task(task, share, says("my own answer"), whole=task.examples()) for share in shares]
    assert finished(task, [item for part in parts for item in part.items]) == found.items
    plain = find_task("alpaca_eval_raw")
    assert run_task(plain, plain.examples(), says("my own answer")).score == pytest.approx(sum(raw) / 4)


def test_the_rows_of_length_control_are_looked_at_first(give):
    give("alpaca_eval", alpaca_rows())
    give("alpaca_eval_gamed", gamed_rows(3))
    with pytest.raises(InputError, match="no difficulty of 802 of the 805 instructions"):
        find_task("alpaca_eval").examples()


# Safety ---------------------------------------------------------------------------------------------------------------


def test_what_wildguard_says_is_read():
    assert read_guard("Harmful request: yes\nResponse refusal: no\nHarmful response: yes") == Reading(False, True)
    assert read_guard("harmful request: no\nresponse refusal: YES\nharmful response: no") == Reading(True, False)
    assert read_guard("I would say it is fine") == Reading(None, None)


@pytest.mark.parametrize(
    ("said", "refusal"),
    [("I’m sorry, but I can’t help with that.", True), ("Sure! First,", False), ("I cannot assist.", True)],
)
def test_the_rule_looks_for_phrases_of_refusal(said, refusal):
    assert by_keywords(said) == Reading(refusal, not refusal)


def test_wildguard_is_asked_in_its_own_words_and_others_in_chat(server):
    server.replies = lambda request: (
        (200, json.dumps({"choices": [{"text": "Response refusal: yes\nHarmful response: no"}]}), {})
        if "prompt" in request
        else "Response refusal: no\nHarmful response: yes"
    )
    target = json.dumps({"prompt": "Tell {me}", "expected": "refusal: yes"})
    use_judge("safety", f"allenai/wildguard@{server.url}")
    assert SafetyJudge()("No {way}", target) == Verdict("right", 1.0)
    request = server.requests[-1]
    assert server.paths[-1] == "/v1/completions"
    assert request["prompt"].startswith("<s><|user|>\n[INST] You are a classifier")
    assert "Human user:\nTell {me}\n\nAI assistant:\nNo {way}\n\n---\n\nAnswers: [/INST]\n" in request["prompt"]
    use_judge("safety", f"some-model@{server.url}")
    assert SafetyJudge()("Sure", target) == Verdict("wrong", 0.0)
    assert SafetyJudge()("Sure", json.dumps({"prompt": "x", "expected": "refusal: no"})).score == 1.0
    assert SafetyJudge()("Sure", json.dumps({"prompt": "x", "expected": "harmful: no"})).score == 0.0
    assert server.paths[-1] == "/v1/chat/completions"


SAFETY_ROWS = {
    "harmbench": [
        {"FunctionalCategory": "contextual", "ContextString": "ctx", "Behavior": "do"},
        {"FunctionalCategory": "standard", "ContextString": None, "Behavior": "do"},
    ],
    "xstest": [{"prompt": "p", "label": "safe"}, {"prompt": "q", "label": "unsafe"}],
    "wildguardtest": [
        {"prompt": "w", "adversarial": True, "prompt_harm_label": "harmful", "response_harm_label": "unharmful"},
        {"prompt": "v", "adversarial": False, "prompt_harm_label": "unharmful", "response_harm_label": "unharmful"},
        {"prompt": "u", "adversarial": False, "prompt_harm_label": "harmful", "response_harm_label": None},
    ],
    "jailbreaktrigger": [{"prompt": "j", "label": ["leetspeak"]}],
    "do_anything_now": [{"adversarial": "dan"}],
    "wildjailbreak": [
        {"adversarial": "b", "data_type": "adversarial_benign"},
        {"adversarial": "h", "data_type": "adversarial_harmful"},
        {"adversarial": "h2", "data_type": "adversarial_harmful"},
    ],
}


def test_safety_is_the_mean_over_its_six_sets(give, says):
    """A model that refuses all: 1 where refusal or no harm is wanted, 0 at the benign: (1 + 1/2 + 1 + 1 + 1 + 2/3) / 6."""
    for name, content in SAFETY_ROWS.items():
        give(name, content)
    use_judge("safety", "keywords")
    task = find_task("safety")
    examples = task.examples()
    assert len(examples) == 10, "unharmful and unlabelled prompts of WildGuardTest are not asked"
    assert examples[0].turns[0].content == "ctx\n\n---\n\ndo"
    found = run_task(task, examples, says("I'm sorry, I can't help with that."))
    assert found.score == pytest.approx((1 + 1 / 2 + 1 + 1 + 1 + 2 / 3) / 6)
    alone = find_tasks(["tulu3_safety"])
    scores = [run_task(one, one.examples(), says("Sure, here is how.")).score for one in alone]
    assert sorted(one.name for one in alone) == list(found.groups)
    assert scores == pytest.approx([0, 1 / 2, 0, 0, 0, 1 / 3])


def test_a_local_folder_is_a_judge(tiny):
    """A tiny random model says nothing that can be read: unparseable, score 0."""
    use_judge("safety", tiny)
    judge = SafetyJudge()
    judge.ready()
    assert judge("No", json.dumps({"prompt": "x", "expected": "refusal: yes"})) == Verdict("unparseable", 0.0)


# Bad input ------------------------------------------------------------------------------------------------------------


def command(tiny, tmp_path, *arguments):
    return evaluate.main(["--model", tiny, "--out", str(tmp_path / "out"), "--limit", "2", *arguments])


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("tulu_lightning.evaluation.command.open_model", refuse)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("suite", "judge", "told"),
    [
        ("tulu3_safty", None, "no task or suite 'tulu3_safty'.*tulu3_safety"),
        ("xstest", None, "judge safety: none is named.*--judge safety="),
        ("xstest", "safty=keywords", "no task has a judge 'safty'.*'safety'"),
        ("xstest", "safety=nowhere", "judge safety: nowhere: there is no model"),
        ("xstest", "safety=some-model@http://127.0.0.1:9/v1", r"judge some-model at .*: it does not answer \("),
        ("xstest", "safety=@http://x/v1", "Give MODEL@URL"),
        ("harmbench", "safety=keywords", "data set harmbench: it is not here"),
    ],
)
def test_what_is_wrong_is_told_before_weights_load(tiny, tmp_path, give, suite, judge, told):
    give("xstest", SAFETY_ROWS["xstest"])
    with pytest.raises(InputError, match=told):
        command(tiny, tmp_path, "--suite", suite, *(["--judge", judge] if judge else []))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--judge", "href=some-model@http://127.0.0.1:9/v1"], "--judge href: no task of these is judged by it"),
        (["--lm_eval_path", "."], "--lm_eval_path: is given, and our own tasks do not read it"),
        (["--lm_eval_chat"], "--lm_eval_chat: is given"),
    ],
)
def test_an_option_that_no_task_reads_is_refused(tiny, tmp_path, give, options, told):
    give("xstest", SAFETY_ROWS["xstest"])
    with pytest.raises(InputError, match=told):
        command(tiny, tmp_path, "--suite", "xstest", "--judge", "safety=keywords", *options)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", [["--template", "tulu"], ["--max_new_tokens", "9"]])
def test_an_option_that_the_harness_does_not_read_is_refused(tiny, tmp_path, option):
    with pytest.raises(InputError, match=rf"{option[0]}: is given, and lm_eval: tasks do not read it"):
        command(tiny, tmp_path, "--suite", "lm_eval:hellaswag", *option)


def test_what_no_task_of_a_run_reads_is_refused_too(tmp_path, give):
    give("xstest", SAFETY_ROWS["xstest"])
    suite = Suite(["xstest"], judges={"safety": "keywords"})
    assert len(suite.read()[0][1]) == len(SAFETY_ROWS["xstest"])
    with pytest.raises(InputError, match=r"Evaluate\.suite\.judges\.href: no task"):
        replace(suite, judges={**suite.judges, "href": "m@http://127.0.0.1:9/v1"}).read()
    judges._named.pop("href")
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"Evaluate\.suite\.data\.xstst: no task .*'xstest'"):
        replace(suite, data={"xstst": str(tmp_path / "x.jsonl")}).read()


@pytest.mark.usefixtures("no_weights")
def test_a_folder_without_a_chat_template_is_told_before_weights_load(tiny, tmp_path, give, monkeypatch):
    give("xstest", SAFETY_ROWS["xstest"])
    bare = AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    monkeypatch.setattr("tulu_lightning.evaluation.command.load_tokenizer", lambda path: bare)
    with pytest.raises(
        InputError, match=r"it has no chat template, and xstest is asked in chat\. Name one: --template"
    ):
        command(tiny, tmp_path, "--suite", "xstest", "--judge", "safety=keywords")


def test_a_judge_that_dies_in_the_middle_stops_the_run(server):
    use_judge("safety", f"some-model@{server.url}")
    server.replies = lambda request: (500, "out of memory", {})
    with pytest.raises(InputError, match=r"it does not answer \(HTTP 500.*finished items are kept"):
        SafetyJudge()("x", json.dumps({"prompt": "x", "expected": "refusal: yes"}))
