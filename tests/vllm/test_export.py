"""What is exported is read by vLLM: the same greedy tokens as from our own engine."""

import torch

from tulu_lightning.assets.models import load_tokenizer
from tulu_lightning.checkpoints.export import export
from tulu_lightning.data.chat import chat_template, stop_ids
from tulu_lightning.models.backbone import Backbone, PackedLM
from tulu_lightning.rollout.local import LocalEngine
from tulu_lightning.types import Sampling

PROMPTS = [[1, 2, 3], [7] * 20, list(range(5, 60))]


def test_vllm_samples_the_same_greedy_tokens_from_files_of_any_size(tiny, tmp_path):
    from tulu_lightning.rollout.vllm import VLLMEngine

    policy, generator = PackedLM(Backbone(tiny), tiny), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():  # it is no folder's weights any more
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    tokenizer = load_tokenizer(tiny)
    template = chat_template("tulu", tokenizer)
    stops = stop_ids(tokenizer, template)
    folder = export(policy.lm, tokenizer, tmp_path / "out", template.jinja, stops, max_shard_bytes=2_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    sampling = Sampling(24, 0.0, stops)
    ours, theirs = (
        kind.from_folder(str(folder), **settings)
        for kind, settings in (
            (LocalEngine, {}),
            (VLLMEngine, {"max_model_len": 128, "max_num_seqs": 8, "kv_cache_mb": 32}),
        )
    )
    try:
        wanted, got = (engine.generate(PROMPTS, 1, sampling, 0) for engine in (ours, theirs))
    finally:
        theirs.close()
    for one, other in zip(wanted, got, strict=True):
        assert one[0].ids_L.tolist() == other[0].ids_L.tolist()
    start = LocalEngine.from_folder(tiny).generate(PROMPTS, 1, sampling, 0)
    assert any(a[0].ids_L.tolist() != b[0].ids_L.tolist() for a, b in zip(start, wanted, strict=True))
