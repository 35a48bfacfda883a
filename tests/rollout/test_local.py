from functools import partial
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.errors import InputError
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.sampling import filtered
from tulu_lightning.types import Completion, Sampling

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 256, (n,), generator=GENERATOR).tolist() for n in (3, 17, 1, 9, 9, 30)]


@pytest.fixture(scope="module")
def model(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():  # sharper than at initialisation, so that tokens differ in probability
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="module", params=["auto", "torch", "transformers"])
def build(request):
    """Engines of each way to decode."""
    return partial(LocalEngine.from_model, decode=request.param)


@pytest.fixture(scope="module")
def engine(model, build):
    return build(model)


def teacher_forced(model, prompt, completion: Completion, temperature: float) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion.ids_L.tolist()]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return torch.log_softmax(logits / temperature, -1).gather(1, completion.ids_L[:, None])[:, 0]


def same(a: list[list[Completion]], b: list[list[Completion]]) -> bool:
    return [[c.ids_L.tolist() for c in group] for group in a] == [[c.ids_L.tolist() for c in group] for group in b]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_teacher_forced_forward(engine, model, temperature):
    out = engine.generate(PROMPTS, 3, Sampling(12, temperature), 5)
    for prompt, group in zip(PROMPTS, out, strict=True):
        for completion in group:
            expected = teacher_forced(model, prompt, completion, temperature)
            assert torch.allclose(completion.logprobs_L, expected, atol=1e-4)


def test_greedy_equals_transformers_generate_on_ragged_prompts(engine, model):
    out = engine.generate(PROMPTS, 1, Sampling(10, 0.0), 0)
    for prompt, (completion,) in zip(PROMPTS, out, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert completion.ids_L.tolist() == reference[0, len(prompt) :].tolist()
        assert torch.allclose(completion.logprobs_L, teacher_forced(model, prompt, completion, 1.0), atol=1e-4)


def test_a_row_depends_neither_on_its_neighbours_nor_on_chunks(model, engine, build):
    whole = engine.generate(PROMPTS, 4, Sampling(12), 5)
    one_by_one = build(model, max_rows=1).generate(PROMPTS, 4, Sampling(12), 5)
    by_tokens = build(model, batch_tokens=70).generate(PROMPTS, 4, Sampling(12), 5)
    assert same(whole, one_by_one)
    assert same(whole, by_tokens)
    alone = engine.generate(PROMPTS[3:4], 4, Sampling(12), 5, keys=[3])
    assert same(alone, whole[3:4])
    backwards = engine.generate(PROMPTS[::-1], 4, Sampling(12), 5, keys=[5, 4, 3, 2, 1, 0])
    assert same(backwards, whole[::-1])


def test_fewer_samples_are_the_first_of_more(engine):
    four, two = (engine.generate(PROMPTS, n, Sampling(6), 5) for n in (4, 2))
    assert same([group[:2] for group in four], two)


def test_samples_differ_and_the_seed_decides(engine):
    first = engine.generate(PROMPTS[:1], 8, Sampling(12), 5)
    assert len({tuple(c.ids_L.tolist()) for c in first[0]}) == 8
    assert same(first, engine.generate(PROMPTS[:1], 8, Sampling(12), 5))
    assert not same(first, engine.generate(PROMPTS[:1], 8, Sampling(12), 6))


def test_equal_prompts_are_computed_once_but_sampled_apart(engine, monkeypatch):
    engine.generate([[1]], 1, Sampling(1), 0)  # the way is chosen
    tokens, module = [], engine._model.get_input_embeddings()
    monkeypatch.setattr(module, "forward", lambda ids, f=module.forward: tokens.append(ids.numel()) or f(ids))
    out = engine.generate([[5, 6, 7], [8, 9], [5, 6, 7]], 2, Sampling(3), 1)
    prompts = 5 if engine._fast else 6  # without padding, and with
    assert tokens == [prompts, 6, 6]
    assert len({tuple(c.ids_L.tolist()) for c in (*out[0], *out[2])}) == 4


@pytest.mark.parametrize("shortest", [12, 13, 20])
def test_a_prefix_shared_by_all_prompts_changes_nothing(engine, model, build, shortest):
    # The shortest prompt is a prefix of the others, or nearly.
    prefix = PROMPTS[5][:shortest]
    prompts = [prefix, [*prefix, 1, 2, 3, 4], [*prefix, 9], [*PROMPTS[5][:12], 77, 78, 79]]
    out = engine.generate(prompts, 2, Sampling(8), 3)
    for prompt, group in zip(prompts, out, strict=True):
        for completion in group:
            assert torch.allclose(completion.logprobs_L, teacher_forced(model, prompt, completion, 1.0), atol=1e-4)
    assert same(out, build(model, max_rows=1).generate(prompts, 2, Sampling(8), 3))


def test_rows_stop_at_any_stop_id_and_keep_it(engine):
    free = engine.generate(PROMPTS, 4, Sampling(12), 5)
    seen = torch.cat([c.ids_L for group in free for c in group]).bincount(minlength=264)
    stops = tuple(seen.topk(3).indices.tolist())
    stopped = engine.generate(PROMPTS, 4, Sampling(12, 1.0, stops), 5)
    finishes = set()
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        hits = [i for i, token in enumerate(before.ids_L.tolist()) if token in stops]
        length = hits[0] + 1 if hits else 12
        assert after.ids_L.tolist() == before.ids_L[:length].tolist()
        assert torch.allclose(after.logprobs_L, before.logprobs_L[:length], atol=1e-5)
        assert after.finish == ("stop" if hits else "length")
        finishes.add(after.finish)
    assert finishes == {"stop", "length"}  # both happened


def test_a_stop_id_at_the_last_place_counts_as_stop(engine):
    first = engine.generate(PROMPTS[:1], 1, Sampling(1), 0)[0][0]
    stop = engine.generate(PROMPTS[:1], 1, Sampling(1, 1.0, (int(first.ids_L[0]),)), 0)[0][0]
    assert (first.finish, stop.finish) == ("length", "stop")


def test_bf16_stays_near_fp32(model, build):
    engine = build(model, torch.bfloat16)
    (group,) = engine.generate(PROMPTS[1:2], 8, Sampling(12), 1)
    gap = torch.cat([c.logprobs_L - teacher_forced(model, PROMPTS[1], c, 1.0) for c in group]).abs()
    assert all(c.logprobs_L.dtype == torch.float32 for c in group)
    assert 0 < gap.mean() < 0.1


def test_progress_counts_finished_rows(model, build):
    seen = []
    build(model, max_rows=4).generate(
        PROMPTS, 2, Sampling(3), 0, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 12), (8, 12), (12, 12)]


def test_an_answer_is_told_while_others_are_still_written(engine):
    prompts = [[5 + i, 7, 9] for i in range(5)]  # of one length, so all are written side by side
    whole = [group[0].ids_L.tolist() for group in engine.generate(prompts, 1, Sampling(12), 5)]
    stop = next(ids[2] for ids in whole if all(ids[2] not in other for other in whole if other is not ids))
    ends = [ids.index(stop) for ids in whole if stop in ids]
    assert len(ends) == 1
    assert ends[0] <= 2, "one prompt stops early, the others do not"

    def made(place, group):
        raise KeyboardInterrupt(f"{place} {group[0].finish}")

    with pytest.raises(KeyboardInterrupt, match=r"^\d stop$"):
        engine.generate(prompts, 1, Sampling(12, stop_ids=(stop,)), 5, made=made)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_completion_token_by_token(engine, temperature):
    whole = engine.generate([PROMPTS[1]], 1, Sampling(12, temperature), 3)[0][0].ids_L.tolist()
    assert list(engine.stream(PROMPTS[1], Sampling(12, temperature), 3)) == whole
    stop = whole[4]
    stopped = list(engine.stream(PROMPTS[1], Sampling(12, temperature, (stop,)), 3))
    assert stopped == whole[: whole.index(stop) + 1], "the stop token is the last one"


def test_a_stream_may_be_left_before_its_end(engine):
    stream = engine.stream(PROMPTS[1], Sampling(12, 0.0), 3)
    first = [next(stream), next(stream)]
    stream.close()
    assert torch.is_grad_enabled()
    assert list(engine.stream(PROMPTS[1], Sampling(12, 0.0), 3))[:2] == first


def test_a_folder_and_a_model_give_the_same_engine(tiny):
    folder = LocalEngine.from_folder(tiny, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert folder.fingerprint() == LocalEngine.from_model(model).fingerprint()
    assert folder.generate([], 1, Sampling(1), 0) == []


@pytest.mark.parametrize(
    ("prompts", "n", "sampling", "what"),
    [
        ([[1], []], 1, Sampling(4), "prompt 1: it is empty"),
        ([[1, 264]], 1, Sampling(4), "prompt 0: its ids span"),
        ([[-1]], 1, Sampling(4), "prompt 0: its ids span"),
        ([[1] * 4000], 1, Sampling(97), "4000 tokens and 97 new ones, the model has 4096"),
        ([[1]], 0, Sampling(4), "n is 0"),
        ([[1]], 1, Sampling(0), "max_new_tokens is 0"),
        ([[1]], 1, Sampling(4, -1.0), "temperature is -1"),
        ([[1]], 1, Sampling(4, float("nan")), "temperature is nan"),
        ([[1]], 1, Sampling(4, top_p=0.0), "top_p is 0"),
        ([[1]], 1, Sampling(4, top_p=1.1), "top_p is 1.1"),
        ([[1]], 1, Sampling(4, top_k=-1), "top_k is -1"),
    ],
)
def test_bad_requests_are_named(engine, prompts, n, sampling, what):
    with pytest.raises(InputError, match=what):
        engine.generate(prompts, n, sampling, 0)


def test_as_many_keys_as_prompts(engine):
    with pytest.raises(InputError, match="1 keys for 2 prompts"):
        engine.generate([[1], [2]], 1, Sampling(1), 0, keys=[0])


@pytest.mark.parametrize("used", [False, True])
def test_weights_that_are_not_numbers_are_reported(model, build, used):
    engine = build(model)
    if used:
        engine.generate([[1]], 1, Sampling(1), 0)
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in model.state_dict().items()}
    engine.refresh(weights.items(), 9)
    with pytest.raises(RuntimeError, match="version 9 give probabilities that are not finite"):
        engine.generate([[1]], 1, Sampling(2), 0)


@pytest.mark.parametrize("limit", ["max_rows", "batch_tokens"])
def test_limits_are_at_least_one(model, limit):
    with pytest.raises(InputError, match=f"engine.{limit}: it is 0"):
        LocalEngine.from_model(model, **{limit: 0})


@pytest.mark.parametrize(("top_p", "top_k"), [(0.8, 0), (1.0, 3), (0.9, 5)])
def test_filters_give_the_log_probs_of_what_was_sampled_from(engine, model, top_p, top_k):
    sampling = Sampling(8, 1.5, top_p=top_p, top_k=top_k)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, 4, sampling, 1), strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.ids_L.tolist()]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / 1.5
            expected = torch.log_softmax(filtered(logits, top_p, top_k), -1)
            expected = expected.gather(1, completion.ids_L[:, None])[:, 0]
            assert torch.allclose(completion.logprobs_L, expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_given_tokens_equal_a_plain_forward(engine, model, temperature):
    generator = torch.Generator().manual_seed(1)
    sequences = [
        (prompt, torch.randint(0, 256, (n,), generator=generator).tolist())
        for prompt, n in zip(PROMPTS, (5, 1, 40, 2, 9, 3), strict=True)
    ]
    for (prompt, response), found in zip(sequences, engine.logprobs(sequences, temperature), strict=True):
        done = Completion(torch.tensor(response), torch.zeros(len(response)), "length", 0)
        assert torch.allclose(found, teacher_forced(model, prompt, done, temperature), atol=1e-4)
        assert found.dtype == torch.float32
    assert engine.logprobs([]) == []


@pytest.mark.parametrize(
    ("sequence", "temperature", "what"),
    [
        (([], [1]), 1.0, "sequence 0: its prompt is empty"),
        (([1], []), 1.0, "sequence 0: its response is empty"),
        (([1], [264]), 1.0, "its ids span"),
        (([1], [2]), 0.0, "temperature is 0"),
    ],
)
def test_bad_sequences_are_named(engine, sequence, temperature, what):
    with pytest.raises(InputError, match=what):
        engine.logprobs([sequence], temperature)


def test_health_tells_version_failed_refreshes_and_the_end(model, build):
    engine = build(model, version=3)
    assert engine.health()[:2] == (True, 3)
    with pytest.raises(RefreshError):
        engine.refresh([], 4)
    assert engine.health()[:2] == (False, -1)
    with pytest.raises(RuntimeError, match="last weight refresh failed"):
        engine.logprobs([([1], [2])])
    engine.refresh(model.state_dict().items(), 5)
    assert engine.health()[:2] == (True, 5)
    engine.close()
    assert engine.health() == (False, -1, "the engine in this process was closed")


def test_the_real_model_answers_as_transformers_does(smol):
    model = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smol)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ("What is 2 + 3?", "Name a colour.", "Hi")
    ]
    engine = LocalEngine.from_model(model)
    greedy = engine.generate(prompts, 1, Sampling(6, 0.0), 0)
    sampled = engine.generate(prompts, 2, Sampling(6, 0.8), 0)
    for prompt, (best,), group in zip(prompts, greedy, sampled, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert best.ids_L.tolist() == reference[0, len(prompt) :].tolist()
        for completion in group:
            assert torch.allclose(completion.logprobs_L, teacher_forced(model, prompt, completion, 0.8), atol=1e-4)


def test_completions_can_be_trained_on(engine):
    ids, logprobs = engine.generate(PROMPTS[:1], 1, Sampling(3), 0)[0][0][:2]
    weight = torch.ones(264, requires_grad=True)
    (weight[ids] * logprobs).sum().backward()
    assert weight.grad is not None
    assert weight.grad.sum().item() == pytest.approx(logprobs.sum().item())
