"""Importance weights between sampler and trainer, and the sums that say how far apart they are."""

import math

import pytest
import torch

from tulu_lightning.core.correction import Correction, Mismatch
from tulu_lightning.errors import InputError

RATIOS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


def logps(ratios):
    """old and sampler log-probs with these ratios."""
    sampler = torch.linspace(-3, -1, len(ratios), dtype=torch.float64)
    return sampler + torch.tensor(ratios, dtype=torch.float64).log(), sampler


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (Correction(), [0.25, 0.5, 1.0, 2.0, 2.0, 2.0]),
        (Correction(cap=5.0), [0.25, 0.5, 1.0, 2.0, 4.0, 5.0]),
        (Correction("mask", low=0.4, high=5.0), [0.0, 0.5, 1.0, 2.0, 4.0, 0.0]),
        (Correction("none"), [1.0] * 6),
    ],
    ids=str,
)
def test_weights_by_hand(correction, weights):
    assert correction(*logps(RATIOS)).tolist() == pytest.approx(weights, abs=1e-12)


def slow(correction, old, sampler):
    ratio = math.exp(old - sampler)
    if correction.kind == "truncate":
        return min(ratio, correction.cap)
    if correction.kind == "mask":
        return ratio if correction.low <= ratio <= correction.high else 0.0
    return 1.0


@pytest.mark.parametrize("kind", ["truncate", "mask", "none"])
def test_weights_and_metrics_equal_plain_python(kind):
    old, sampler = torch.randn(2, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    correction = Correction(kind)
    pairs = list(zip(old.tolist(), sampler.tolist(), strict=True))
    weights = [slow(correction, *pair) for pair in pairs]
    assert correction(old, sampler).tolist() == pytest.approx(weights, abs=1e-9)
    ratios = [math.exp(o - s) for o, s in pairs]
    gaps = [abs(o - s) for o, s in pairs]
    expected = {
        "mismatch_mean": sum(gaps) / 300,
        "mismatch_max": max(gaps),
        # Samples of the sampler: exp(-d) - 1 + d with d = sampler - old, each at most 10
        "mismatch_kl": sum(min(10.0, math.exp(o - s) - 1 + s - o) for o, s in pairs) / 300,
        "ess": sum(ratios) ** 2 / (300 * sum(r * r for r in ratios)),
        "correction_mean": sum(weights) / 300,
        "correction_clipped": sum(w != r for w, r in zip(weights, ratios, strict=True)) / 300 * (kind != "none"),
    }
    found = correction.mismatch(old, sampler).metrics()
    assert found == pytest.approx(expected, abs=1e-9)
    if kind != "none":
        assert 0.05 < found["correction_clipped"] < 0.95


def test_metrics_of_two_tokens_by_hand():
    """Ratios 1 and 4: ESS 25 / (2 · 17); weights 1 and 2; |d| 0 and log 4."""
    found = Correction().mismatch(*logps([1.0, 4.0])).metrics()
    assert found == pytest.approx(
        {
            "mismatch_mean": math.log(2),
            "mismatch_max": math.log(4),
            "mismatch_kl": (4 - 1 - math.log(4)) / 2,
            "ess": 25 / 34,
            "correction_mean": 1.5,
            "correction_clipped": 0.5,
        }
    )


def test_agreement_and_no_tokens_are_the_same_numbers():
    old, _ = logps(RATIOS)
    nothing = torch.zeros(0)
    same = {"mismatch_mean": 0, "mismatch_max": 0, "mismatch_kl": 0, "correction_clipped": 0}
    for metrics in (Correction().mismatch(old, old).metrics(), Correction().mismatch(nothing, nothing).metrics()):
        assert metrics == pytest.approx({**same, "ess": 1, "correction_mean": 1})


def test_the_sums_of_parts_add_up():
    old, sampler = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    correction = Correction("mask")
    whole = correction.mismatch(old, sampler)
    first, second = (correction.mismatch(old[cut], sampler[cut]) for cut in (slice(20), slice(20, None)))
    assert first.plus(Mismatch()).plus(second) == pytest.approx(whole, rel=1e-6)
    # Two ranks: the other one's sums are added, its largest gap compared.
    ranks = first.over_ranks(
        lambda sums: sums + torch.tensor(second, dtype=torch.float64),
        lambda largest: torch.maximum(largest, torch.tensor([second.gap_max], dtype=torch.float64)),
    )
    assert ranks == pytest.approx(whole, rel=1e-6)
    assert first.gap_max != second.gap_max


def test_the_weight_has_no_gradient_and_no_infinity():
    old = torch.tensor([0.0, -500.0], requires_grad=True)
    weight = Correction("mask")(old, torch.tensor([-500.0, 0.0]))
    assert not weight.requires_grad
    assert weight.tolist() == [0.0, 0.0]
    assert all(math.isfinite(x) for x in Correction().mismatch(old, torch.tensor([-500.0, 0.0])))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"kind": "clip"}, "correction.kind"),
        ({"cap": 0.5}, "correction.cap"),
        ({"kind": "mask", "low": 1.5}, "correction.low"),
        ({"kind": "mask", "high": 0.5}, "correction.high"),
        ({"kind": "mask", "cap": 3.0}, "correction.cap"),  # not read
        ({"low": 0.1}, "correction.low"),
        ({"kind": "none", "high": 9.0}, "correction.high"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_or_not_read_are_refused(settings, key):
    with pytest.raises(InputError, match=key):
        Correction(**settings)
