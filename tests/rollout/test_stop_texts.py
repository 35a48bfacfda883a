"""Texts that end a sample: where they end it, and that nothing else changes."""

from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.scoring import response_text
from tulu_lightning.rollout.stop_texts import EVERY, StopTexts
from tulu_lightning.types import Sampling

LONG = [[5 + i, 7, 9] for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module", params=["auto", "torch", "transformers"])
def engine(request, tiny):
    return LocalEngine.from_model(AutoModelForCausalLM.from_pretrained(tiny), max_rows=4, decode=request.param)


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_a_text_ends_where_its_last_token_is_whatever_was_seen_before(tokenizer):
    ids = encoded(tokenizer, "One line.\n\nQuestion: another?\n\nMore.")
    stops = StopTexts(["\n\n", "Question:"], tokenizer)
    first = next(n for n in range(len(ids)) if "\n\n" in tokenizer.decode(ids[:n]))
    for seen in range(first):
        assert stops.end(ids, seen) == first
        assert stops.end(ids[: first - 1], min(seen, first - 1)) is None
    assert StopTexts(["another?"], tokenizer).end(ids, first) == next(
        n for n in range(len(ids)) if "another?" in tokenizer.decode(ids[:n])
    )
    assert StopTexts(["nowhere"], tokenizer).end(ids) is None
    assert stops.end([]) is None
    assert StopTexts([], tokenizer).end(ids) is None


def test_a_special_token_is_no_text(tokenizer):
    ids = [*encoded(tokenizer, "a"), tokenizer.convert_tokens_to_ids("<|im_end|>"), *encoded(tokenizer, "b")]
    assert StopTexts(["<|im_end|>"], tokenizer).end(ids) is None
    with pytest.raises(InputError, match="one of them is empty"):
        StopTexts(["a", ""], tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_those_without_up_to_the_text(engine, tokenizer, temperature):
    sampling = Sampling(5 * EVERY - 3, temperature)
    whole = engine.generate(LONG, 2, sampling, 3)
    # A text that completes at a token in the middle of some sample, and at other places or nowhere in others.
    middle = whole[2][1].ids_L.tolist()
    text = tokenizer.decode(middle[10:13])
    stops = StopTexts([text], tokenizer)
    cut = engine.generate(LONG, 2, sampling, 3, stop_texts=stops)
    places = set()
    for before, after in zip(chain(*whole), chain(*cut), strict=True):
        ids = before.ids_L.tolist()
        end = next(
            (
                n
                for n in range(1, len(ids) + 1)
                if text in response_text(before._replace(ids_L=before.ids_L[:n]), tokenizer)
            ),
            None,
        )
        assert after.ids_L.tolist() == ids[:end]
        assert after.finish == ("length" if end is None else "stop")
        torch.testing.assert_close(after.logprobs_L, before.logprobs_L[:end])
        places.add(end)
    assert len(places) > 1


def test_a_text_in_the_last_tokens_ends_a_sample_that_ends_anyway(engine, tokenizer):
    sampling = Sampling(EVERY + 3, 0.0)
    (group,) = engine.generate(LONG[:1], 1, sampling, 3)
    text = response_text(group[0]._replace(ids_L=group[0].ids_L[EVERY + 1 : EVERY + 2]), tokenizer)
    (cut,) = engine.generate(LONG[:1], 1, sampling, 3, stop_texts=StopTexts([text], tokenizer))
    ids = group[0].ids_L.tolist()
    end = next(n for n in range(1, len(ids) + 1) if text in tokenizer.decode(ids[:n]))
    assert (cut[0].ids_L.tolist(), cut[0].finish) == (ids[:end], "stop")
