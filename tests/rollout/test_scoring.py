import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tulu_lightning.errors import InputError
from tulu_lightning.rollout import scoring
from tulu_lightning.types import Check, Completion, Prompt, Verdict
from tulu_lightning.verifiers import registry

sys.path.append(str(Path(__file__).parent))  # processes of the pool import it by name

import pool_verifiers


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
        runs = "here"

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


def test_checks_of_a_prompt_are_weighted_and_their_worst_outcome_counts(tokenizer):
    checks = (Check("last_number", "60", weight=1.0), Check("exact", "60", weight=3.0))
    both = Prompt((1,), checks, "?", 0)
    with scoring.Scorer() as scorer:
        found = scorer.score([(both, completion(tokenizer, text)) for text in ("60", "it is 60", "")], tokenizer)
    # 1 x right + 3 x wrong = 0.25 of the weight; a blank text is unparseable to both.
    assert found == [Verdict("right", 1.0), Verdict("wrong", 0.25), Verdict("unparseable", 0.0)]


def test_here_pool_and_thread_verdicts_come_back_in_their_places():
    own = {"pooled": pool_verifiers.Obedient(), "threaded": pool_verifiers.Threaded()}
    jobs = [scoring.Job(("pooled", "threaded", "exact")[at % 3], str(at), str(at - at % 2)) for at in range(30)]
    told = []
    with scoring.Scorer(registry.Verifiers(own), scoring.PoolLimits(workers=2)) as scorer:
        found = scorer.verdicts(jobs, lambda done, total: told.append((done, total)))
    for at, verdict in enumerate(found):
        expected = "right" if at % 3 == 1 or at % 2 == 0 else "wrong"
        assert verdict.outcome == expected, at
    assert told == [(done, 30) for done in range(1, 31)]


def test_threads_are_bounded_by_the_verifier():
    own = {"threaded": pool_verifiers.Threaded(concurrency=3)}
    with scoring.Scorer(registry.Verifiers(own)) as scorer:
        found = scorer.verdicts([scoring.Job("threaded", "x", "x")] * 40)
    assert max(verdict.score for verdict in found) <= 0.03


def test_a_server_that_is_down_stops_the_run_and_what_waits():
    own = {"threaded": pool_verifiers.Threaded(concurrency=1)}
    jobs = [scoring.Job("threaded", "down", ""), *[scoring.Job("threaded", "x", "x")] * 1000]
    with scoring.Scorer(registry.Verifiers(own)) as scorer, pytest.raises(InputError, match="server: is down"):
        scorer.verdicts(jobs)
    assert not pool_verifiers.RUNNING


def test_no_jobs_start_no_process():
    with scoring.Scorer() as scorer:
        assert scorer.verdicts([]) == []
        assert scorer.verdicts([scoring.Job("exact", "a", "a")]) == [Verdict("right", 1.0)]
        assert scorer.pool.processes == 0
