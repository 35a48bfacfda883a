"""Means over pairs, worked out by hand."""

import torch

from tulu_lightning.stages.pair_metrics import PairMetrics


def test_means_over_pairs_and_by_source() -> None:
    """Three pairs of sources b, a, b: losses 1, 2, 6 have the mean 3; a 2, b 3.5; source c has none."""
    metrics = PairMetrics(["loss", "accuracy"], ["a", "b", "c"], ["loss"])
    metrics.update({"loss": torch.tensor([1.0, 2.0]), "accuracy": torch.tensor([1.0, 0.0])}, [1, 0], 30, 12)
    metrics.update({"loss": torch.tensor([6.0]), "accuracy": torch.tensor([1.0])}, [1], 10, 4)
    found = metrics.compute()
    assert found["accuracy"] == 2 / 3
    del found["accuracy"]
    assert found == {"pairs": 3, "tokens": 40, "trained_tokens": 16, "loss": 3, "loss/a": 2, "loss/b": 3.5}


def test_no_pair_at_all_divides_by_nothing() -> None:
    assert PairMetrics(["loss"]).compute() == {"pairs": 0, "tokens": 0, "trained_tokens": 0, "loss": 0}
