"""The health of a run: each quantity against its definition, each warning at its threshold."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from diffusion2gan.distill import health
from diffusion2gan.distill.health import (
    Health,
    accuracy,
    find_warnings,
    latent_statistics,
    logit_means,
)
from diffusion2gan.distill.metrics import StepMetrics

HEALTHY = {
    "loss": 0.1,
    "accuracy": 0.75,
    "accuracy_real": 0.7,
    "accuracy_fake": 0.8,
    "latent_shift": 0.05,
    "latent_std_ratio": 0.97,
}
DRIFTED = {**HEALTHY, "latent_shift": 0.4}


def test_latent_statistics_match_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 4, 8, 8, generator=generator) * 2 + 1

    same = StepMetrics(latent_statistics(teacher, teacher)).read()
    assert same == {"latent_shift": 0.0, "latent_std_ratio": pytest.approx(1.0)}

    # Two channels are shifted: the larger shift counts, in standard deviations of its channel
    shift = torch.tensor([0.0, 0.0, 0.3, -0.1]).view(4, 1, 1)
    std = float(teacher[:, 2].double().std())
    shifted = latent_statistics(teacher + shift, teacher)
    assert float(shifted["latent_shift"]) == pytest.approx(0.3 / std, rel=1e-5)

    # Half the standard deviation about the mean
    washed_out = latent_statistics(1 + (teacher - 1) * 0.5, teacher)
    assert float(washed_out["latent_std_ratio"]) == pytest.approx(0.5)
    assert washed_out["latent_shift"] < 0.02


def test_accuracy_is_the_mean_over_heads_of_correct_signs() -> None:
    first_head = torch.tensor([[1.0, 2.0], [-1.0, 3.0]]).view(2, 1, 1, 2)
    second_head = torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1)
    logits = [first_head, second_head]

    def measure(real: bool, rows: Tensor | None = None) -> float:
        value = accuracy(logits, real, rows)
        assert value is not None
        return float(value)

    assert measure(True) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert measure(False) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert logit_means(logits).tolist() == pytest.approx([1.25, 0.0])

    second_row = torch.tensor([False, True])
    no_row = torch.tensor([False, False])
    assert measure(False, second_row) == pytest.approx((1 / 2 + 0) / 2)
    assert accuracy(logits, False, no_row) is None


def test_step_metrics_keep_every_number_and_its_order() -> None:
    third = torch.tensor(1 / 3)
    entry = {"a": 5, "b": third, "c": None, "d": torch.tensor([0.1, math.nan], dtype=torch.float64)}
    values = StepMetrics(entry).read()
    assert list(values) == ["a", "b", "c", "d"]
    assert values["a"] == 5 and values["c"] is None
    assert values["b"] == float(third) != 1 / 3
    assert values["d"][0] == 0.1 and math.isnan(values["d"][1])
    assert StepMetrics({"a": 1}).read() == {"a": 1}


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
def test_each_threshold_gives_its_warning_and_remedy(change: dict[str, float], name: str) -> None:
    assert find_warnings(HEALTHY, lowest_loss=0.1) == set()
    assert find_warnings(HEALTHY | change, lowest_loss=0.1) == {name}
    assert len(health.REMEDIES[name]) > 20


def test_warning_is_reported_once_and_again_after_recovery() -> None:
    state = Health()

    # Once, as soon as there are enough values
    warnings = [state.record(DRIFTED, False) for _ in range(health.MIN_VALUES + 50)]
    steps_with_warnings = [number for number, new in enumerate(warnings, 1) if new]
    assert steps_with_warnings == [health.MIN_VALUES]
    assert warnings[health.MIN_VALUES - 1][0].startswith("saturation drift: ")
    assert "saturation drift" in state.status()

    # Recovery
    for _ in range(300):
        assert not state.record(HEALTHY, False)
    assert state.active_warnings == []
    assert "drift" not in state.status()

    # Again, once
    warnings = [state.record(DRIFTED, False) for _ in range(300)]
    assert sum(map(len, warnings)) == 1


def test_late_discriminator_gives_no_warning_before_it_has_enough_values() -> None:
    """Its first logits are at chance; later it may recognise only mismatched fakes, and is not."""
    state = Health()
    without_d = {"loss": 0.1, "latent_shift": 0.0, "latent_std_ratio": 1.0}
    at_chance = {**without_d, "accuracy": 0.5, "accuracy_real": 0.5, "accuracy_fake": 0.5}
    learning = {**without_d, "accuracy": 0.61, "accuracy_real": 0.92, "accuracy_fake": 0.1}

    for entry, num_steps in (
        (without_d, 2 * health.MIN_VALUES),
        (at_chance, 20),
        (learning, 2 * health.MIN_VALUES),
    ):
        assert not any(state.record(entry, False) for _ in range(num_steps))

    warnings = []
    for _ in range(2 * health.MIN_VALUES):
        warnings += state.record(at_chance, False)
    assert len(warnings) == 1
    assert warnings[0].startswith(health.D_AT_CHANCE)


def test_averages_ignore_values_that_are_not_finite_and_skips_are_counted() -> None:
    state = Health()
    for value, is_skipped in ((1.0, False), (math.nan, True), (math.inf, True), (3.0, False)):
        state.record({"loss": value, "r1": value, "accuracy_mixed": None}, is_skipped)

    assert state.average == {"loss": 2.0, "r1": 2.0, "skipped": 0.5}
    assert state.skipped == 2
    assert state.skipped_in_a_row == 0
    assert state.status() == "loss 2.0000 · R1 2 · 2 skipped"


def test_state_survives_json_exactly() -> None:
    used = Health()
    for number in range(health.MIN_VALUES + 3):
        entry = {**DRIFTED, "loss": 0.1 + number / 777}
        used.record(entry, skipped=number == 2)

    for state in (used, Health()):
        restored = Health.from_state(json.loads(json.dumps(state.state(), allow_nan=False)))
        assert restored == state
        assert restored.record(HEALTHY, True) == state.record(HEALTHY, True)
        assert restored == state


def test_state_of_version_0_1_is_read() -> None:
    state = asdict(Health(steps=3, lowest_loss=0.2, active_warnings=[health.DRIFT]))
    state["told"] = state.pop("active_warnings")
    assert Health.from_state(state).active_warnings == [health.DRIFT]
    assert "told" in state  # the argument is not changed
