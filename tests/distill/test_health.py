"""What a run tells of itself: each number against its definition, each warning by its name."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffusion2gan.distill import health
from diffusion2gan.distill.health import (
    Health,
    accuracy,
    find_warnings,
    latent_statistics,
    logit_means,
)

WELL = {
    "loss": 0.1,
    "accuracy": 0.75,
    "accuracy_real": 0.7,
    "accuracy_fake": 0.8,
    "latent_shift": 0.05,
    "latent_std_ratio": 0.97,
}


def test_latent_statistics() -> None:
    teacher = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    same = latent_statistics(teacher, teacher)
    assert same == {"latent_shift": 0.0, "latent_std_ratio": pytest.approx(1.0)}
    channel = torch.tensor([0.0, 0.0, 0.3, -0.1]).view(4, 1, 1)
    std = teacher[:, 2].double().std()
    assert latent_statistics(teacher + channel, teacher)["latent_shift"] == pytest.approx(
        0.3 / float(std), rel=1e-5
    )
    washed = latent_statistics(1 + (teacher - 1) * 0.5, teacher)
    assert washed["latent_std_ratio"] == pytest.approx(0.5) and washed["latent_shift"] < 0.02


def test_accuracy() -> None:
    logits = [
        torch.tensor([[1.0, 2.0], [-1.0, 3.0]]).view(2, 1, 1, 2),
        torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1),
    ]
    assert accuracy(logits, real=True) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert accuracy(logits, real=False) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert accuracy(logits, False, torch.tensor([False, True])) == pytest.approx((1 / 2 + 0) / 2)
    assert accuracy(logits, False, torch.tensor([False, False])) is None
    assert logit_means(logits) == pytest.approx([1.25, 0.0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"accuracy_real": 0.97, "accuracy_fake": 0.96}, health.D_TOO_STRONG),
        ({"accuracy": 0.51}, health.D_AT_CHANCE),
        ({"latent_shift": 0.3}, health.DRIFT),
        ({"latent_std_ratio": 1.3}, health.DRIFT),
        ({"latent_std_ratio": 0.7}, health.DRIFT),
        ({"loss": 0.21}, health.DIVERGES),
        ({"skipped": 0.06}, health.SKIPS),
    ],
)
def test_each_band_has_its_name_and_remedy(change: dict[str, float], name: str) -> None:
    assert find_warnings(WELL, 0.1) == set()
    assert find_warnings(WELL | change, 0.1) == {name} and len(health.REMEDIES[name]) > 20


def test_a_warning_comes_once_after_the_start_and_again_after_recovery() -> None:
    told = Health()
    drifted = WELL | {"latent_shift": 0.4}
    said = [told.record(drifted, False) for _ in range(health.MIN_VALUES + 50)]
    assert [i + 1 for i, warnings in enumerate(said) if warnings] == [health.MIN_VALUES]
    assert (
        said[health.MIN_VALUES - 1][0].startswith("saturation drift: ")
        and "saturation drift" in told.status()
    )
    for _ in range(300):
        assert not told.record(WELL, False)
    assert told.active_warnings == [] and "drift" not in told.status()
    again = [told.record(drifted, False) for _ in range(300)]
    assert sum(map(len, again)) == 1


def test_a_discriminator_that_begins_late_is_judged_after_as_many_steps_of_its_own() -> None:
    """Its first answers, of chance, are no ailment; nor is a student it takes for real while it finds the mixed."""
    told, alone = Health(), {"loss": 0.1, "latent_shift": 0.0, "latent_std_ratio": 1.0}
    chance = alone | {"accuracy": 0.5, "accuracy_real": 0.5, "accuracy_fake": 0.5}
    young = alone | {"accuracy": 0.61, "accuracy_real": 0.92, "accuracy_fake": 0.1}
    assert not any(told.record(alone, False) for _ in range(2 * health.MIN_VALUES))
    assert not any(told.record(chance, False) for _ in range(20))
    assert not any(told.record(young, False) for _ in range(2 * health.MIN_VALUES))
    said = [warning for _ in range(2 * health.MIN_VALUES) for warning in told.record(chance, False)]
    assert len(said) == 1 and said[0].startswith(health.D_AT_CHANCE)


def test_running_averages_leave_out_what_is_not_finite_and_count_skips() -> None:
    told = Health()
    for value, skipped in ((1.0, False), (math.nan, True), (math.inf, True), (3.0, False)):
        told.record({"loss": value, "r1": value, "accuracy_mixed": None}, skipped)
    assert told.average == {"loss": 2.0, "r1": 2.0, "skipped": 0.5} and (
        told.skipped,
        told.skipped_in_a_row,
    ) == (2, 0)
    assert told.status() == "loss 2.0000 · R1 2 · 2 skipped"


def test_its_state_comes_back_from_json_as_it_was() -> None:
    told = Health()
    for number in range(health.MIN_VALUES + 3):
        told.record(WELL | {"loss": 0.1 + number / 777, "latent_shift": 0.4}, number == 2)
    for state in (told, Health()):
        back = Health.from_state(json.loads(json.dumps(state.state(), allow_nan=False)))
        assert back == state
        assert back.record(WELL, True) == state.record(WELL, True) and back == state
