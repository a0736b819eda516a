"""The calculator behind docs/scale.md: its arithmetic by hand, and that the document agrees."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusion2gan.adversarial.discriminator import DiffusionDiscriminator
from diffusion2gan.cost.plan import (
    ASSUMED,
    GPUS,
    MODELS,
    choose_model,
    fewest_micro_batches,
    forwards_per_pair,
    plan,
    table,
)
from diffusion2gan.distill.checks import check_ranks
from diffusion2gan.distill.memory import count_penalty_bytes
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import SHIPPED, Recipe, load_recipe
from diffusion2gan.teacher.conditioning import Conditioning

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    batch_size=1024,
    total_pairs=1_024_000,
    adversarial_weight=0.1,
    device="cuda",
    precision="bfloat16",
)


def test_figures_match_a_calculation_by_hand() -> None:
    stages = plan("sd15", "h100", 64, 3e6, RECIPE)
    flops_per_s = 989e12 * 0.35
    pairs = stages["pairs"]
    assert pairs["pairs_per_s"] == pytest.approx(64 * flops_per_s / (100 * 2 * 402e9))
    assert pairs["disk_gib"] == pytest.approx(3e6 * 33_068 / 2**30)

    training = stages["distill"]
    sent_bytes = 2 * 63 / 64 * (2 * 3.44e9 + 1024 * 65_536)
    assert training["compute_s"] == pytest.approx(16 * 16 * 1.15 * 2 * 402e9 / flops_per_s)
    assert training["communication_s"] == pytest.approx(sent_bytes / 50e9)
    assert training["steps"] == 1000
    assert training["hours"] == pytest.approx(training["step_s"] / 3.6)
    assert training["memory_gib_per_gpu"] == pytest.approx(40 * 860e6 / 2**30 + 16 * 2.0)
    assert training["fits"]
    assert training["dollars"] == pytest.approx(training["hours"] * 64 * 3)


@pytest.mark.parametrize(("model", "text_width"), [("sd15", 768), ("sdxl", 2048)])
def test_multiply_adds_and_parameters_match_a_count_of_the_network(
    model: str, text_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The UNet on the meta device: shapes without numbers."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    real_sizes = importlib.import_module("real_sizes")
    with torch.device("meta"):
        unet = getattr(real_sizes, f"{model}_unet")()
        latents = torch.zeros(1, *MODELS[model].latent_shape)
        text = torch.zeros(1, 77, text_width)
        added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(latents, 999, text, added_cond_kwargs=added)

    # FlopCounterMode counts a multiply-add as two
    assert counter.get_total_flops() / 2e9 == pytest.approx(MODELS[model].forward_gmacs, rel=0.002)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(
        MODELS[model].parameters, rel=0.002
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "finite_differences"])
def test_memory_of_r1_matches_a_count_of_the_network(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stable Diffusion 1.5; SDXL takes minutes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    real_sizes = importlib.import_module("real_sizes")
    with torch.device("meta"):
        discriminator = DiffusionDiscriminator(real_sizes.sd15_unet())
        row = Conditioning(torch.zeros(1, 77, 768))
    counted = count_penalty_bytes(discriminator, row, MODELS["sd15"].latent_shape, method)
    assert counted / 2**30 == pytest.approx(MODELS["sd15"].r1_gib[method], rel=0.01)


def test_exact_r1_decides_whether_a_model_fits() -> None:
    fsdp = RECIPE.model_copy(update={"strategy": "fsdp"})
    training = plan("sdxl", "h100", 8, 8e6, fsdp, gradient_accumulation_steps=64)["distill"]
    memory = (9 / 8 + 4) * 4 * 2570e6 / 2**30 + 71.8
    assert training["memory_with_r1_gib_per_gpu"] == pytest.approx(memory)
    assert training["memory_gib_per_gpu"] < 80 < memory and not training["fits"]

    without_r1 = fsdp.model_copy(update={"r1_weight": 0.0})
    training = plan("sdxl", "h100", 8, 8e6, without_r1, gradient_accumulation_steps=64)["distill"]
    assert training["memory_with_r1_gib_per_gpu"] == 0 and training["fits"]


def test_fsdp_figures_match_a_calculation_by_hand() -> None:
    """SDXL over 8 GPUs: per parameter, 9 numbers are sharded and 4 are full; more is sent."""
    figures = {}
    for strategy in ("fsdp", "ddp"):
        update = {"strategy": strategy, "r1_method": "finite_differences"}
        recipe = RECIPE.model_copy(update=update)
        stages = plan("sdxl", "h100", 8, 8e6, recipe, gradient_accumulation_steps=64)
        figures[strategy] = stages["distill"]
    fsdp = figures["fsdp"]
    ddp = figures["ddp"]

    memory = (9 / 8 + 4) * 4 * 2570e6 / 2**30 + 2 * 6.0
    assert fsdp["memory_gib_per_gpu"] == pytest.approx(memory)
    assert fsdp["fits"] and not ddp["fits"]
    assert fsdp["memory_with_r1_gib_per_gpu"] == pytest.approx(memory - 2 * 6.0 + 20.0)
    assert fsdp["compute_s"] == ddp["compute_s"]
    gathered_s = 7 / 8 * 2 * 4 * 2570e6 / 450e9
    assert fsdp["communication_s"] - ddp["communication_s"] == pytest.approx(gathered_s)


def test_more_gpus_scale_pairs_linearly_and_training_less() -> None:
    assert forwards_per_pair(False) == 4 * (1 + ASSUMED.loss_share) < forwards_per_pair(True)
    few = plan("sd15", "h100", 8, 3e6, RECIPE)
    many = plan("sd15", "h100", 512, 3e6, RECIPE)
    assert many["pairs"]["pairs_per_s"] == pytest.approx(64 * few["pairs"]["pairs_per_s"])
    assert many["distill"]["efficiency"] < few["distill"]["efficiency"] < 1
    assert plan("sd15", "h100", 1, 3e6, RECIPE)["distill"]["communication_s"] == 0
    dearer = plan("sd15", "h100", 8, 3e6, RECIPE, 6.0)
    assert dearer["pairs"]["dollars"] == pytest.approx(2 * few["pairs"]["dollars"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sd51", "h100", 8), "no model 'sd51'; did you mean 'sd15'"),
        (("sd15", "h10", 8), "no GPU 'h10'; did you mean 'h100'"),
        (
            ("sd15", "h100", 3),
            "batch_size 1024 cannot be split evenly over 3 GPUs. Possible numbers of GPUs: 1, 2, "
            "4, 8, 16, 32, 64, 128, 256, 512, 1024; or --set batch_size to a multiple of 3",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments: tuple[str, str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(*arguments, 3e6, RECIPE)


def test_given_gradient_accumulation_steps_are_used() -> None:
    stages = plan("sd15", "h100", 8, 3e6, RECIPE, gradient_accumulation_steps=32)
    assert stages["distill"]["gradient_accumulation_steps"] == 32
    message = (
        r"cannot be split evenly over 64 GPUs and gradient_accumulation_steps = 32\. "
        r".* 1, 2, 4, 8, 16, 32; "
    )
    with pytest.raises(UserError, match=message):
        plan("sd15", "h100", 64, 3e6, RECIPE, gradient_accumulation_steps=32)


def test_fewest_micro_batches_that_fit_in_memory() -> None:
    """SD 1.5's states are 32 GiB and a pair's activations 2 GiB, so 24 rows fit 80 GiB.

    128 rows per GPU are therefore split into 8 micro-batches of 16.
    """
    sd15 = MODELS["sd15"]
    sdxl = MODELS["sdxl"]
    h100 = GPUS["h100"]
    h200 = GPUS["h200"]
    assert fewest_micro_batches(sd15, h100, 8, RECIPE) == 8
    assert fewest_micro_batches(sd15, h100, 64, RECIPE) == 1
    assert fewest_micro_batches(sd15, h100, 512, RECIPE) == 1
    assert fewest_micro_batches(sd15, h200, 8, RECIPE) == 4
    assert fewest_micro_batches(sdxl, h100, 8, RECIPE) == 128  # nothing fits

    # Numbers that are not powers of two
    batch_of_24 = RECIPE.model_copy(update={"batch_size": 24})
    assert fewest_micro_batches(sdxl, h100, 8, batch_of_24) == 3
    batch_of_72 = RECIPE.model_copy(update={"batch_size": 72})
    assert fewest_micro_batches(sdxl, h200, 8, batch_of_72) == 3


FULL = sorted(path.stem for path in SHIPPED.glob("*.toml") if load_recipe(path.stem).lora_rank == 0)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("num_gpus", [1, 8])
def test_planned_micro_batches_of_full_recipes_are_valid_in_distill(
    name: str, num_gpus: int
) -> None:
    recipe = load_recipe(name)
    stages = plan(choose_model(recipe)[0], "h100", num_gpus, 1e6, recipe)
    steps = stages["distill"]["gradient_accumulation_steps"]
    check_ranks(recipe.model_copy(update={"gradient_accumulation_steps": steps}), num_gpus)


@pytest.mark.parametrize("name", ["sd15-lora-24gb", "sdxl-lora-24gb", "flux-lora"])
def test_lora_recipes_are_refused(name: str) -> None:
    message = r"a LoRA \(lora_rank = \d+\), and plan counts full training only"
    with pytest.raises(UserError, match=message):
        plan("sd15", "h100", 8, 1e6, load_recipe(name))


def test_model_is_chosen_by_the_name_of_the_recipes_teacher() -> None:
    assert choose_model(load_recipe("sdxl")) == ("sdxl", "the recipe's teacher")
    assert choose_model(load_recipe("sd15", ["teacher=/models/sd15"]))[0] == "sd15"
    name, reason = choose_model(load_recipe("sd3"))
    assert name == "sd15"
    assert reason.startswith("assumed: the recipe's teacher 'sd3' is none of sd15, sdxl")


def test_document_has_the_rows_of_the_calculator() -> None:
    text = (ROOT / "docs" / "scale.md").read_text("utf-8")
    recipe = load_recipe("sd15")
    update = {"strategy": "fsdp", "r1_method": "finite_differences"}
    fsdp = recipe.model_copy(update=update)
    sizes = (8, 64, 512)
    rows = table((("sd15", 3e6), ("sd15", 12e6), ("sdxl", 8e6)), "h100", sizes, recipe)
    rows += table((("sdxl", 8e6),), "h100", sizes, fsdp)
    for row in rows:
        assert row in text, row
