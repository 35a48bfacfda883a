import pytest
import torch
from transformers import AutoTokenizer

from tulu_lightning.errors import InputError
from tulu_lightning.rollout import scoring
from tulu_lightning.types import Check, Completion, Prompt, Verdict
from tulu_lightning.verifiers import registry


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def completion(tokenizer, text: str) -> Completion:
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    return Completion(ids, torch.zeros(len(ids)), "stop", 0)


def prompt(target: str, verifier: str = "last_number") -> Prompt:
    return Prompt((1,), (Check(verifier, target),), "?", 0)


def test_special_tokens_are_not_part_of_the_response(tokenizer):
    done = completion(tokenizer, " It is 60 , don 't\n<|im_end|>")
    assert tokenizer.eos_token_id in done.ids_L.tolist()
    # White space before punctuation stays: the text is what was sampled.
    assert scoring.response_text(done, tokenizer) == " It is 60 , don 't\n"
    assert scoring.score(prompt("60", "exact"), completion(tokenizer, "60<|im_end|>"), tokenizer).outcome == "right"


def test_each_prompt_goes_to_its_own_verifier_and_order_is_kept(tokenizer):
    pairs = [
        (prompt("60"), completion(tokenizer, "it is 60<|im_end|>")),
        (prompt("60", "exact"), completion(tokenizer, "it is 60<|im_end|>")),
        (prompt("60"), completion(tokenizer, "no idea")),
        (prompt("-6"), completion(tokenizer, "-6")),
    ]
    outcomes = [verdict.outcome for verdict in scoring.score_all(pairs, tokenizer)]
    assert outcomes == ["right", "wrong", "unparseable", "right"]
    assert scoring.score(*pairs[2], tokenizer) == Verdict("unparseable", 0.0)
    assert scoring.score_all([], tokenizer) == []


def test_a_verifier_that_raises_is_an_error_and_not_the_end(tokenizer, monkeypatch, caplog):
    class Broken:
        def __call__(self, response, target):
            raise ZeroDivisionError

        def complaint(self, target):
            return None

    monkeypatch.setitem(registry.VERIFIERS, "broken", Broken())
    verdict = scoring.score(prompt("1", "broken"), completion(tokenizer, "1"), tokenizer)
    assert verdict == Verdict("error", 0.0)
    assert "verifier 'broken' failed" in caplog.text


def test_an_unknown_verifier_stops_the_run(tokenizer):
    with pytest.raises(InputError, match="no verifier 'lost_number'"):
        scoring.score(prompt("1", "lost_number"), completion(tokenizer, "1"), tokenizer)
