"""Fixtures that every folder uses: tiny models, the real SmolLM2 where it is installed, a quiet single thread."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test asks the hub

import pytest
import torch
from torch import distributed

from tulu_lightning.assets.models import resolve_model
from tulu_lightning.errors import InputError
from tulu_lightning.types import Document, Segment

sys.path.append(str(Path(__file__).parent / "verifiers"))
from chat_toy import Server


@pytest.fixture
def server():
    """A server of OpenAI's chat interface; `server.replies` says what it answers to a request."""
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(scope="session", autouse=True)
def own_tokens(tmp_path_factory):
    """Tokenised rows and reference log-probs of the tests lie in folders of their own: what is tested is made here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TOKENS", "REFERENCE"):
            patch.setenv(f"TULU_{name}", str(tmp_path_factory.mktemp(name.lower())))
        yield


@pytest.fixture(autouse=True)
def own_process_group():
    """A sharded run of one process leaves its group to the process; the next test starts without."""
    before = distributed.is_initialized()
    yield
    if distributed.is_initialized() and not before:
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tiny() -> str:
    """Folder of a random Llama with grouped-query attention."""
    return str(resolve_model("tiny-random-llama"))


@pytest.fixture(scope="session")
def smol() -> str:
    """Folder of the real SmolLM2-135M-Instruct."""
    try:
        return str(resolve_model("smollm2-135m-instruct"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def documents():
    """Plain documents, DPO pairs and groups of four, short and long, as a function of the vocabulary's size."""

    def build(vocabulary: int, seed: int = 0) -> list[Document]:
        g = torch.Generator().manual_seed(seed)

        def segment(tokens: int, weight: float, parent: int = -1) -> Segment:
            ids = torch.randint(0, vocabulary, (tokens,), generator=g)
            return Segment(ids, torch.full((tokens,), weight), parent)

        def group(prompt: int, *children: int) -> Document:
            return Document((segment(prompt, 0), *(segment(n, 1, 0) for n in children)))

        plain = [Document((segment(n, 1),)) for n in (300, 20, 1, 33)]
        pairs = [group(30, 8, 7), group(40, 300, 5)]
        groups = [group(12, 3, 1, 4, 2), group(270, 40, 40, 30, 50)]
        chain = Document((segment(5, 0), segment(6, 1, 0), segment(7, 1, 1), segment(3, 1, 0)))
        return [*plain, *pairs, *groups, chain]

    return build
