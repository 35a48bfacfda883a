"""What every engine does, whatever runs it. Those on vLLM run where it is installed (`make test-vllm`)."""

import importlib.util
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tulu_lightning.errors import InputError
from tulu_lightning.models.lora import Lora, adapt
from tulu_lightning.models.weights import plain_weights
from tulu_lightning.rollout.canary import canaries, prove, tolerance_of
from tulu_lightning.rollout.engine import RefreshError
from tulu_lightning.rollout.fingerprint import fingerprint
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.rollout.stop_texts import StopTexts
from tulu_lightning.types import Sampling

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 256, (n,), generator=GENERATOR).tolist() for n in (3, 17, 1, 9, 140)]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SQUARE = "model.layers.1.self_attn.o_proj.weight"
VLLM = importlib.util.find_spec("vllm") is not None
KINDS = [
    "local",
    *(
        pytest.param(kind, marks=[pytest.mark.vllm, pytest.mark.skipif(not VLLM, reason="vLLM is not installed")])
        for kind in ("vllm", "server")
    ),
]


def build(kind: str, folder: str):
    if kind == "local":
        return LocalEngine.from_folder(folder)
    settings = {"max_model_len": 256, "kv_cache_mb": 64}
    if kind == "vllm":
        from tulu_lightning.rollout.vllm import VLLMEngine

        return VLLMEngine.from_folder(folder, max_num_seqs=16, **settings)
    from tulu_lightning.rollout.server import ServerEngine

    return ServerEngine.started(folder, **settings)


@pytest.fixture(scope="module", params=KINDS)
def held_engine(request, tiny):
    engine = build(request.param, tiny)
    yield engine
    engine.close()


def sharp(folder):
    """A model with weights larger than at initialisation, so that tokens differ in probability."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def trainer(tiny):
    """A model whose weights the engine holds."""
    return sharp(tiny)


@pytest.fixture
def engine(held_engine, trainer):
    held_engine.refresh(trainer.state_dict().items(), 7)
    return held_engine


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model) -> dict[str, torch.Tensor]:
    """Other weights, the embedding (and so the tied head) included."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor + 0.2 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator)
        for name, tensor in copies(model).items()
    }
    weights[HEAD] = weights[EMBED]
    return weights


def scores(model, sequences, temperature=1.0, weights=None) -> list[torch.Tensor]:
    """The reference: a plain forward of transformers."""
    result = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            out = torch.func.functional_call(model, weights or {}, (ids,), {"use_cache": False})
        logits = out.logits[0, len(prompt) - 1 : -1].float() / temperature
        result.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return result


def ids(groups) -> list[list[list[int]]]:
    return [[completion.ids_L.tolist() for completion in group] for group in groups]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_a_plain_forward(engine, trainer, temperature):
    out = engine.generate(PROMPTS, 2, Sampling(8, temperature), 5)
    for prompt, group in zip(PROMPTS, out, strict=True):
        for completion in group:
            (expected,) = scores(trainer, [(prompt, completion.ids_L.tolist())], temperature)
            assert torch.allclose(completion.logprobs_L, expected, atol=1e-3)
            assert (completion.ids_L.dtype, completion.logprobs_L.dtype) == (torch.int64, torch.float32)
            assert (completion.finish, completion.version, len(completion.ids_L)) == ("length", 7, 8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_given_tokens_equal_a_plain_forward(engine, trainer, temperature):
    if not hasattr(engine, "logprobs"):
        pytest.skip("this engine does not score yet")
    given = [(PROMPTS[0], [5, 9, 258]), (PROMPTS[4], [1]), ([256], [0, 263, 7, 7])]
    found = engine.logprobs(given, temperature)
    assert [part.dtype for part in found] == [torch.float32] * 3
    for part, expected in zip(found, scores(trainer, given, temperature), strict=True):
        assert torch.allclose(part, expected, atol=1e-3)


def test_greedy_takes_the_most_likely_token(engine, trainer):
    prompts = PROMPTS[:2]
    out = engine.generate(prompts, 2, Sampling(5, 0.0), 0)
    for prompt, group in zip(prompts, out, strict=True):
        reference = trainer.generate(
            torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert [c.ids_L.tolist() for c in group] == [reference[0, len(prompt) :].tolist()] * 2
        (expected,) = scores(trainer, [(prompt, group[0].ids_L.tolist())])  # of softmax(logits), for temperature 0
        assert torch.allclose(group[0].logprobs_L, expected, atol=1e-3)


def test_truncated_sampling_keeps_to_the_most_likely_tokens(engine):
    prompt = [PROMPTS[1]]
    ((greedy,),) = engine.generate(prompt, 1, Sampling(1, 0.0), 0)
    (two,) = engine.generate(prompt, 48, Sampling(1, 1.5, top_k=2), 0)
    (nucleus,) = engine.generate(prompt, 8, Sampling(1, 1.5, top_p=1e-6), 0)
    assert len({int(c.ids_L) for c in two}) == 2
    assert int(greedy.ids_L) in {int(c.ids_L) for c in two}
    assert {int(c.ids_L) for c in nucleus} == {int(greedy.ids_L)}


def test_samples_are_distinct_and_the_seed_decides(engine):
    first = ids(engine.generate(PROMPTS[:2], 4, Sampling(8), 5))
    assert all(len({tuple(sample) for sample in group}) == 4 for group in first)
    assert first == ids(engine.generate(PROMPTS[:2], 4, Sampling(8), 5))
    assert first != ids(engine.generate(PROMPTS[:2], 4, Sampling(8), 6))


def test_a_sample_depends_on_its_key_and_place_alone(engine):
    whole = ids(engine.generate(PROMPTS, 3, Sampling(8), 5))
    backwards = engine.generate(PROMPTS[::-1], 3, Sampling(8), 5, keys=[4, 3, 2, 1, 0])
    assert ids(backwards) == whole[::-1]
    assert ids(engine.generate(PROMPTS[3:4], 3, Sampling(8), 5, keys=[3])) == whole[3:4]
    assert [group[:2] for group in whole] == ids(engine.generate(PROMPTS, 2, Sampling(8), 5))


def test_equal_prompts_are_sampled_apart(engine):
    out = ids(engine.generate([PROMPTS[0], PROMPTS[0]], 2, Sampling(8), 5))
    assert len({tuple(sample) for group in out for sample in group}) == 4


def test_a_stop_token_ends_a_sample_and_is_kept_and_no_other_token_does(engine):
    free = engine.generate(PROMPTS[:4], 4, Sampling(12), 5)
    seen = torch.cat([c.ids_L for group in free for c in group]).bincount(minlength=264)
    stops = tuple(seen.topk(3).indices.tolist())
    stopped = engine.generate(PROMPTS[:4], 4, Sampling(12, 1.0, stops), 5)
    finishes = set()
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        hits = [i for i, token in enumerate(before.ids_L.tolist()) if token in stops]
        length = hits[0] + 1 if hits else 12
        assert after.ids_L.tolist() == before.ids_L[:length].tolist()
        assert after.finish == ("stop" if hits else "length")
        finishes.add(after.finish)
    assert finishes == {"stop", "length"}


def test_the_checkpoints_own_end_token_stops_nobody_unless_asked(engine, trainer):
    eos = trainer.config.eos_token_id
    out = engine.generate(PROMPTS[:3], 8, Sampling(60, 2.0), 2)
    assert any(eos in c.ids_L.tolist()[:-1] for c in chain(*out))
    assert {c.finish for c in chain(*out)} == {"length"}


def test_progress_ends_at_all_rows(engine):
    calls = []
    engine.generate(PROMPTS, 2, Sampling(3), 0, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10)
    assert calls == sorted(calls)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_prompt_is_told_once_with_all_that_it_made(engine, temperature):
    told = {}

    def made(place, group):
        assert place not in told
        told[place] = [(c.ids_L.tolist(), c.finish) for c in group]

    out = engine.generate(PROMPTS, 2, Sampling(3, temperature), 0, made=made)
    assert [told[place] for place in range(len(PROMPTS))] == [[(c.ids_L.tolist(), c.finish) for c in g] for g in out]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_ends_a_sample_where_it_is_complete(engine, tiny, temperature):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    whole = engine.generate(PROMPTS, 2, Sampling(30, temperature), 4)
    read = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    letters = [c for c in read(whole[0][1].ids_L.tolist())[5:] if c.isascii() and c.isalnum()]
    stops = StopTexts([letters[0]], tokenizer)
    cut = engine.generate(PROMPTS, 2, Sampling(30, temperature), 4, stop_texts=stops)
    finishes = set()
    for before, after in zip(chain(*whole), chain(*cut), strict=True):
        ids = before.ids_L.tolist()
        end = next((n for n in range(1, len(ids) + 1) if letters[0] in read(ids[:n])), None)
        assert after.ids_L.tolist() == ids[:end]
        assert after.finish == ("length" if end is None else "stop")
        assert len(after.logprobs_L) == len(after.ids_L)
        finishes.add(after.finish)
    assert "stop" in finishes


def test_no_prompts_no_samples(engine):
    assert engine.generate([], 2, Sampling(3), 0) == []


@pytest.mark.parametrize(
    ("prompts", "n", "sampling", "words"),
    [
        ([[1], []], 1, Sampling(3), "prompt 1: it is empty"),
        ([[264]], 1, Sampling(3), "knows 264 tokens"),
        ([[-1]], 1, Sampling(3), "knows 264 tokens"),
        ([[1] * 5000], 1, Sampling(3), "5000 tokens and 3 new ones"),
        ([[1]], 0, Sampling(3), "n is 0"),
        ([[1]], 1, Sampling(0), "max_new_tokens is 0"),
        ([[1]], 1, Sampling(3, -1.0), "temperature is -1.0"),
    ],
)
def test_what_no_model_can_read_is_refused(engine, prompts, n, sampling, words):
    with pytest.raises(InputError, match=words):
        engine.generate(prompts, n, sampling, 0)


def test_one_key_a_prompt(engine):
    with pytest.raises(InputError, match="1 keys for 2 prompts"):
        engine.generate([[1], [2]], 1, Sampling(1), 0, keys=[0])


# -- weights --


def test_after_a_refresh_the_engine_is_on_the_new_weights(engine, trainer):
    prompt = PROMPTS[4]  # longer than a block of a prefix cache
    old = engine.generate([prompt], 1, Sampling(6), 0)[0][0]
    weights = moved(trainer)
    engine.refresh(weights.items(), 8)
    new = engine.generate([prompt], 1, Sampling(6), 0)[0][0]
    assert (engine.version, old.version, new.version) == (8, 7, 8)
    (expected,) = scores(trainer, [(prompt, new.ids_L.tolist())], weights=weights)
    assert torch.allclose(new.logprobs_L, expected, atol=1e-3)
    (before,) = scores(trainer, [(prompt, new.ids_L.tolist())])
    assert (before - expected).abs().max() > 0.1  # else the test could not see old weights
    assert engine.fingerprint() == fingerprint(weights.items())


def test_adapters_arrive_merged(engine, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    adapt(model, Lora(r=4), tiny)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    engine.refresh(plain_weights(model), 8)
    completion = engine.generate([PROMPTS[1]], 1, Sampling(6), 0)[0][0]
    given = [(PROMPTS[1], completion.ids_L.tolist())]
    (expected,) = scores(model, given)
    assert torch.allclose(completion.logprobs_L, expected, atol=1e-3)
    (without,) = scores(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval(), given)
    assert (without - expected).abs().max() > 0.1


@pytest.mark.parametrize("left_out", [EMBED, HEAD])
def test_of_tied_tensors_one_is_enough(engine, trainer, left_out):
    weights = moved(trainer)
    kept = {name: tensor for name, tensor in weights.items() if name != left_out}
    engine.refresh(kept.items(), 8)
    assert engine.fingerprint() == fingerprint(weights.items())
    completion = engine.generate([PROMPTS[1]], 1, Sampling(6), 0)[0][0]
    (expected,) = scores(trainer, [(PROMPTS[1], completion.ids_L.tolist())], weights=weights)
    assert torch.allclose(completion.logprobs_L, expected, atol=1e-3)


def test_a_skipped_tensor_is_named_and_the_engine_samples_no_more_until_it_is_whole_again(engine, trainer):
    weights = moved(trainer)
    del weights[SQUARE]
    with pytest.raises(RefreshError, match=f"not delivered: {SQUARE}") as caught:
        engine.refresh(weights.items(), 8)
    assert caught.value.problems == {"not delivered": (SQUARE,)}
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="last weight refresh failed"):
        engine.generate([[1]], 1, Sampling(1), 0)
    whole = moved(trainer)
    engine.refresh(whole.items(), 9)
    completion = engine.generate([PROMPTS[1]], 1, Sampling(6), 0)[0][0]
    (expected,) = scores(trainer, [(PROMPTS[1], completion.ids_L.tolist())], weights=whole)
    assert completion.version == 9
    assert torch.allclose(completion.logprobs_L, expected, atol=1e-3)


def test_a_square_transposed_on_the_way_is_named_by_the_senders_fingerprint(engine, trainer):
    weights = moved(trainer)
    expected = fingerprint(weights.items(), engine.dtype)
    weights[SQUARE] = weights[SQUARE].T
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 8, expected=expected)
    assert caught.value.problems == {"not held as expected": (SQUARE,)}


def test_a_square_transposed_before_anybody_looked_is_caught_by_the_canaries(engine, trainer):
    if not hasattr(engine, "logprobs"):
        pytest.skip("this engine does not score yet")
    weights, sent = moved(trainer), moved(trainer)
    sent[SQUARE] = sent[SQUARE].T
    engine.refresh(sent.items(), 8)

    def own(sequences):
        return scores(trainer, sequences, weights=weights)

    def differing():
        held = engine.fingerprint()
        return {"not held": [name for name, word in fingerprint(weights.items()).items() if held[name] != word]}

    with pytest.raises(RefreshError, match="log-probs of given tokens differ") as caught:
        prove(engine, own, canaries(264), tolerance_of(torch.float32), differing=differing)
    assert caught.value.problems["not held"] == (SQUARE,)
    engine.refresh(weights.items(), 9)
    proof = prove(engine, own, canaries(264), tolerance_of(torch.float32))
    assert proof.tokens == 2 * 8 + 2 * 4
    assert proof.maximum < 1e-3


@pytest.mark.parametrize("order", [(EMBED, HEAD), (HEAD, EMBED)])
def test_a_tied_head_that_differs_from_its_embedding_is_caught(engine, trainer, order):
    weights = moved(trainer)
    weights[HEAD] = weights[HEAD] * 1.01
    for name in order:
        weights[name] = weights.pop(name)  # sent in this order
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 8)
    assert set(caught.value.problems["not held as sent"]) <= {EMBED, HEAD}


def test_unknown_names_and_other_shapes_are_listed(engine, trainer):
    weights = moved(trainer)
    weights["value_head.weight"] = torch.zeros(1, 32)
    weights[SQUARE] = torch.zeros(32, 16)
    with pytest.raises(RefreshError) as caught:
        engine.refresh(weights.items(), 8)
    assert caught.value.problems["unknown"] == ("value_head.weight",)
    assert caught.value.problems["of another shape"] == (f"{SQUARE} (32, 16) for (256, 256)",)
    assert caught.value.problems["not delivered"] == (SQUARE,)


def test_nothing_of_the_trainers_process_is_touched(engine, trainer):
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    engine.refresh(moved(trainer).items(), 8)
    engine.generate(PROMPTS[:2], 2, Sampling(4), 1)
    if hasattr(engine, "logprobs"):
        engine.logprobs([([1], [2])])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_a_living_engine_is_well(engine):
    if not hasattr(engine, "health"):
        pytest.skip("this engine does not tell its health yet")
    health = engine.health()
    assert (health.alive, health.version) == (True, 7)
