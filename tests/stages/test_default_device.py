"""On a single GPU Lightning makes it the default device while networks are built. They are built on the host all the same.

Here the default is `meta`, whose tensors hold no numbers: whatever took it would differ.
"""

from dataclasses import replace

import pytest
import stage_runs as runs
import torch

from tulu_lightning.core.preference import DPO as DPOLoss
from tulu_lightning.models.lora import Lora
from tulu_lightning.models.quantize import Quantize
from tulu_lightning.stages.dpo import DPO

LORA = Lora(r=4, alpha=8)
NETWORKS = [(name, {}) for name in runs.STAGES] + [("ppo", {"lora": LORA}), ("reward", {"lora": LORA})]


@pytest.mark.parametrize(("name", "backbone"), [*NETWORKS, ("sft", {"lora": LORA, "quantize": Quantize()})])
def test_networks_are_built_on_the_host_whatever_the_default_device(name, backbone):
    if "quantize" in backbone:
        pytest.importorskip("bitsandbytes")
    built = []
    for default in ("cpu", "meta"):
        stage = runs.STAGES[name][0]()
        stage.backbone = replace(stage.backbone, **backbone)
        torch.manual_seed(0)  # of a critic's fresh head
        with torch.device(default):
            stage.configure_model()
        built.append(runs.weights(stage) | {f"buffer {key}": x for key, x in stage.named_buffers()})
    assert built[0].keys() == built[1].keys()
    assert all(torch.equal(tensor, built[1][key]) for key, tensor in built[0].items())


def test_the_copy_that_a_live_reference_asks_is_too():
    stage = DPO(runs.dpo().backbone, runs.dpo().optimizer, DPOLoss(), reference="live")
    with torch.device("meta"):
        stage.configure_model()
    copies = stage.reference._copy.parameters()
    assert {parameter.device.type for parameter in copies} == {"cpu"}
