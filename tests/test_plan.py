"""The calculator behind docs/scale.md: its arithmetic by hand, and the document says what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.plan import ASSUMED, forwards_per_pair, plan, table
from diffusion2gan.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(batch_size=1024, pairs_seen=1_024_000, adversarial_weight=0.1, device="cuda", precision="bfloat16")


def test_by_hand() -> None:
    told = plan("sd15", "h100", 64, 3e6, RECIPE)
    reached = 989e12 * 0.35
    assert told["pairs"]["pairs_per_s"] == pytest.approx(64 * reached / (100 * 2 * 340e9))
    assert told["pairs"]["disk_gib"] == pytest.approx(3e6 * 33_068 / 2**30)
    step = told["distill"]
    assert step["compute_s"] == pytest.approx(16 * 16 * 1.15 * 2 * 340e9 / reached)
    assert step["communication_s"] == pytest.approx(2 * 63 / 64 * (2 * 3.44e9 + 1024 * 65_536) / 50e9)
    assert step["steps"] == 1000 and step["hours"] == pytest.approx(step["step_s"] / 3.6)
    assert step["memory_gib_per_gpu"] == pytest.approx(40 * 860e6 / 2**30 + 16 * 2.0) and step["fits"]
    assert step["dollars"] == pytest.approx(step["hours"] * 64 * 3)


def test_a_run_that_is_cut_by_hand() -> None:
    """SDXL over 8 GPUs: nine numbers a parameter are shared out, four are whole; half as much again is sent."""
    cut = RECIPE.model_copy(update={"strategy": "fsdp", "accumulate": 64})
    step, held = (plan("sdxl", "h100", 8, 8e6, r)["distill"] for r in (cut, cut.model_copy(update={"strategy": "ddp"})))
    assert step["memory_gib_per_gpu"] == pytest.approx((9 / 8 + 4) * 4 * 2570e6 / 2**30 + 2 * 6.0) and step["fits"]
    assert not held["fits"] and step["compute_s"] == held["compute_s"]
    assert step["communication_s"] - held["communication_s"] == pytest.approx(7 / 8 * 2 * 4 * 2570e6 / 450e9)


def test_what_must_hold() -> None:
    assert forwards_per_pair(False) == 4 * (1 + ASSUMED.loss_share) < forwards_per_pair(True)
    few, many = plan("sd15", "h100", 8, 3e6, RECIPE), plan("sd15", "h100", 512, 3e6, RECIPE)
    assert many["pairs"]["pairs_per_s"] == pytest.approx(64 * few["pairs"]["pairs_per_s"])
    assert many["distill"]["efficiency"] < few["distill"]["efficiency"] < 1
    assert plan("sd15", "h100", 1, 3e6, RECIPE)["distill"]["communication_s"] == 0
    assert plan("sd15", "h100", 8, 3e6, RECIPE, 6.0)["pairs"]["dollars"] == pytest.approx(2 * few["pairs"]["dollars"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sd51", "h100", 8), "no model 'sd51'; did you mean 'sd15'"),
        (("sd15", "h10", 8), "no GPU 'h10'; did you mean 'h100'"),
        (("sd15", "h100", 3), "batch_size 1024 cannot be cut over 3 GPUs × accumulate 1; a multiple of 3 can"),
    ],
)
def test_wrong_words(arguments: tuple[str, str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(*arguments, 3e6, RECIPE)


def test_the_document_says_what_the_calculator_says() -> None:
    recipe = load_recipe("sd15", ["accumulate=1"])
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for row in table((("sd15", 3e6), ("sd15", 12e6), ("sdxl", 8e6)), "h100", (8, 64, 512), recipe):
        assert row in text, row
    for row in table((("sdxl", 8e6),), "h100", (8, 64, 512), recipe.model_copy(update={"strategy": "fsdp"})):
        assert row in text, row
