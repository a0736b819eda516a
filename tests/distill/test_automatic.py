"""`auto` settings: what they become, and that runs with other values resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion2gan.distill.automatic import resolve_recipe
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import Recipe, load_recipe, shipped_recipes


def write_run(folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    recipe = Recipe.model_validate(settings).model_dump()
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe, "pairs": {}}))
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def test_every_shipped_recipe_has_values_on_a_cpu() -> None:
    for name in shipped_recipes():
        recipe = resolve_recipe(load_recipe(name))
        assert (recipe.device, recipe.precision) == ("cpu", "float32")
        assert recipe.perceptual == ("pocket" if recipe.teacher == "pocket" else "decoder")


@pytest.mark.usefixtures("gpu")
def test_gpu_and_its_precision_are_used() -> None:
    recipe = resolve_recipe(load_recipe("sd15"))
    assert (recipe.device, recipe.precision) == ("cuda", "bfloat16")
    recipe = resolve_recipe(load_recipe("sd15", ["device=cpu"]))
    assert (recipe.device, recipe.precision) == ("cpu", "float32")
    assert resolve_recipe(load_recipe("pocket")).precision == "float32"


def test_gpu_without_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_recipe(load_recipe("sd15")).precision == "float32"


def test_bfloat16_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="precision 'bfloat16' is for cuda, but device is 'cpu'"):
        resolve_recipe(Recipe(precision="bfloat16"))


@pytest.mark.usefixtures("gpu")
def test_run_that_was_begun_on_a_cpu_resumes_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", device="cpu", precision="float32", perceptual="networks/x")
    recipe = resolve_recipe(Recipe(precision="auto", perceptual="auto"), run)
    assert (recipe.device, recipe.precision) == ("cpu", "float32")
    assert recipe.perceptual == "networks/x"

    # Unless another device is named
    recipe = resolve_recipe(Recipe(device="cuda", precision="auto"), run)
    assert (recipe.device, recipe.precision) == ("cuda", "bfloat16")


def test_run_of_a_gpu_is_not_resumed_on_its_device_without_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", device="cuda:1", precision="bfloat16")
    recipe = resolve_recipe(Recipe(precision="auto"), run)
    assert (recipe.device, recipe.precision) == ("cpu", "float32")


def test_perceptual_network_is_the_fitted_one_or_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(teacher="models/mine.safetensors", perceptual="auto")
    assert resolve_recipe(recipe).perceptual == "decoder"
    printed = " ".join("".join(capfd.readouterr()).split())
    assert printed.count("perceptual = 'decoder': the distance on the features of the VAE's") == 1
    assert "no fitted network in networks/mine" in printed

    # Nothing is printed for a loss that does not use it
    resolve_recipe(recipe.model_copy(update={"loss": "mse"}))
    assert "".join(capfd.readouterr()) == ""

    (tmp_path / "networks" / "mine").mkdir(parents=True)
    (tmp_path / "networks" / "mine" / "config.json").write_text("{}")
    assert resolve_recipe(recipe).perceptual == "networks/mine"
    hub = recipe.model_copy(update={"teacher": "org/mine@main"})
    assert resolve_recipe(hub).perceptual == "networks/mine"
