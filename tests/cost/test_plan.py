"""The calculator behind docs/scale.md: its arithmetic by hand, and the document says what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion2gan.cost.plan import (
    ASSUMED,
    GPUS,
    MODELS,
    fewest_parts,
    forwards_per_pair,
    model_of,
    plan,
    table,
)
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import SHIPPED, Recipe, load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    batch_size=1024,
    total_pairs=1_024_000,
    adversarial_weight=0.1,
    device="cuda",
    precision="bfloat16",
)


def test_by_hand() -> None:
    told = plan("sd15", "h100", 64, 3e6, RECIPE)
    reached = 989e12 * 0.35
    assert told["pairs"]["pairs_per_s"] == pytest.approx(64 * reached / (100 * 2 * 340e9))
    assert told["pairs"]["disk_gib"] == pytest.approx(3e6 * 33_068 / 2**30)
    step = told["distill"]
    assert step["compute_s"] == pytest.approx(16 * 16 * 1.15 * 2 * 340e9 / reached)
    assert step["communication_s"] == pytest.approx(
        2 * 63 / 64 * (2 * 3.44e9 + 1024 * 65_536) / 50e9
    )
    assert step["steps"] == 1000 and step["hours"] == pytest.approx(step["step_s"] / 3.6)
    assert (
        step["memory_gib_per_gpu"] == pytest.approx(40 * 860e6 / 2**30 + 16 * 2.0) and step["fits"]
    )
    assert step["dollars"] == pytest.approx(step["hours"] * 64 * 3)


def test_a_run_that_is_cut_by_hand() -> None:
    """SDXL over 8 GPUs: nine numbers a parameter are shared out, four are whole; half as much again is sent."""
    both = (RECIPE.model_copy(update={"strategy": strategy}) for strategy in ("fsdp", "ddp"))
    step, held = (
        plan("sdxl", "h100", 8, 8e6, recipe, gradient_accumulation_steps=64)["distill"]
        for recipe in both
    )
    assert (
        step["memory_gib_per_gpu"] == pytest.approx((9 / 8 + 4) * 4 * 2570e6 / 2**30 + 2 * 6.0)
        and step["fits"]
    )
    assert not held["fits"] and step["compute_s"] == held["compute_s"]
    assert step["communication_s"] - held["communication_s"] == pytest.approx(
        7 / 8 * 2 * 4 * 2570e6 / 450e9
    )


def test_what_must_hold() -> None:
    assert forwards_per_pair(False) == 4 * (1 + ASSUMED.loss_share) < forwards_per_pair(True)
    few, many = plan("sd15", "h100", 8, 3e6, RECIPE), plan("sd15", "h100", 512, 3e6, RECIPE)
    assert many["pairs"]["pairs_per_s"] == pytest.approx(64 * few["pairs"]["pairs_per_s"])
    assert many["distill"]["efficiency"] < few["distill"]["efficiency"] < 1
    assert plan("sd15", "h100", 1, 3e6, RECIPE)["distill"]["communication_s"] == 0
    assert plan("sd15", "h100", 8, 3e6, RECIPE, 6.0)["pairs"]["dollars"] == pytest.approx(
        2 * few["pairs"]["dollars"]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sd51", "h100", 8), "no model 'sd51'; did you mean 'sd15'"),
        (("sd15", "h10", 8), "no GPU 'h10'; did you mean 'h100'"),
        (
            ("sd15", "h100", 3),
            "batch_size 1024 cannot be cut over 3 GPUs. Numbers of GPUs that would do: 1, 2, 4, 8, 16, 32, 64, 128, "
            "256, 512, 1024; or --set batch_size to a multiple of 3",
        ),
    ],
)
def test_wrong_words(arguments: tuple[str, str, int], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(*arguments, 3e6, RECIPE)


def test_parts_that_are_given_are_taken() -> None:
    assert (
        plan("sd15", "h100", 8, 3e6, RECIPE, gradient_accumulation_steps=32)["distill"][
            "gradient_accumulation_steps"
        ]
        == 32
    )
    with pytest.raises(
        UserError,
        match=r"in gradient_accumulation_steps = 32 parts cannot be cut over 64 GPUs.* 1, 2, 4, 8, 16, 32; ",
    ):
        plan("sd15", "h100", 64, 3e6, RECIPE, gradient_accumulation_steps=32)


def test_the_fewest_parts_that_fit() -> None:
    """SD 1.5's states are 32 GiB and a pair's activations 2: 24 rows fit 80 GiB, so 128 a GPU go in 8 parts of 16."""
    sd15, sdxl = MODELS["sd15"], MODELS["sdxl"]
    assert [fewest_parts(sd15, GPUS["h100"], n, RECIPE) for n in (8, 64, 512)] == [8, 1, 1]
    assert fewest_parts(sd15, GPUS["h200"], 8, RECIPE) == 4
    assert fewest_parts(sdxl, GPUS["h100"], 8, RECIPE) == 128  # nothing fits
    assert fewest_parts(sdxl, GPUS["h100"], 8, RECIPE.model_copy(update={"batch_size": 24})) == 3
    assert (
        fewest_parts(sdxl, GPUS["h200"], 8, RECIPE.model_copy(update={"batch_size": 72})) == 3
    )  # no power of two


FULL = sorted(path.stem for path in SHIPPED.glob("*.toml") if load_recipe(path.stem).lora_rank == 0)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("num_gpus", [1, 8])
def test_every_full_recipe_is_planned_as_distill_takes_it(name: str, num_gpus: int) -> None:
    recipe = load_recipe(name)
    parts = plan(model_of(recipe)[0], "h100", num_gpus, 1e6, recipe)["distill"][
        "gradient_accumulation_steps"
    ]
    check_ranks(recipe.model_copy(update={"gradient_accumulation_steps": parts}), num_gpus)


@pytest.mark.parametrize("name", ["sd15-lora-24gb", "sdxl-lora-24gb", "flux-lora"])
def test_a_lora_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match=r"a LoRA \(lora_rank = \d+\), and plan counts full training only"
    ):
        plan("sd15", "h100", 8, 1e6, load_recipe(name))


def test_the_model_is_the_recipes_teacher() -> None:
    assert model_of(load_recipe("sdxl")) == ("sdxl", "the recipe's teacher")
    assert model_of(load_recipe("sd15", ["teacher=/models/sd15"]))[0] == "sd15"
    name, why = model_of(load_recipe("sd3"))
    assert name == "sd15" and why.startswith(
        "assumed: the recipe's teacher 'sd3' is none of sd15, sdxl"
    )


def test_the_document_says_what_the_calculator_says() -> None:
    recipe = load_recipe("sd15")
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    for row in table((("sd15", 3e6), ("sd15", 12e6), ("sdxl", 8e6)), "h100", (8, 64, 512), recipe):
        assert row in text, row
    for row in table(
        (("sdxl", 8e6),), "h100", (8, 64, 512), recipe.model_copy(update={"strategy": "fsdp"})
    ):
        assert row in text, row
