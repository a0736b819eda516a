"""`diffusion2gan recipe list` and `recipe show`."""

from __future__ import annotations

import re
from pathlib import Path

from cli.runner import assert_refused, run

from diffusion2gan.recipe import Recipe, load_recipe, shipped_recipes, summarize_recipe


def test_list_names_every_shipped_recipe_with_description_teacher_and_hardware() -> None:
    result = run("recipe", "list")
    assert result.code == 0
    names = re.findall(r"^([\w-]+)$", result.out, re.M)
    assert names == shipped_recipes() and {"pocket", "sd15", "flux-lora"} <= set(names)

    for name in names:
        summary = summarize_recipe(name)
        assert summary.description.endswith(".") and summary.description in result.out
        assert summary.teacher == load_recipe(name).teacher
        assert "GPU" in summary.hardware or "CPU" in summary.hardware
        assert f"teacher: {summary.teacher}; hardware: {summary.hardware}" in result.out


def test_show_marks_exactly_the_settings_that_the_recipe_changes() -> None:
    result = run("recipe", "show", "sd15")
    assert result.code == 0
    changed = re.findall(r"^\* (\w+) = ", result.out, re.M)
    unchanged = re.findall(r"^  (\w+) = ", result.out, re.M)
    assert set(changed) == set(load_recipe("sd15").changed(Recipe()))
    assert sorted(changed + unchanged) == sorted(Recipe.model_fields)
    assert "* batch_size = 1024  (default: 32)" in result.out


def test_show_without_a_name_prints_the_defaults() -> None:
    result = run("recipe", "show")
    assert result.code == 0 and "\n* " not in result.out
    assert "  batch_size = 32\n" in result.out
    assert "  resolution = not set\n" in result.out
    assert "  noise_input = true\n" in result.out


def test_show_describes_settings_and_lists_their_choices() -> None:
    text = " ".join(run("recipe", "show").out.split())
    assert "one of mse, pseudo_huber, latent_lpips, e_latent_lpips, pixel_lpips" in text
    assert "one of auto, float32, bfloat16" in text
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert " ".join(field.description.split()) in text, name


def test_show_reads_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('loss = "mse"\n')
    result = run("recipe", "show", path)
    assert result.code == 0
    assert re.findall(r"^\* .*", result.out, re.M) == [
        '* loss = "mse"  (default: "e_latent_lpips")'
    ]


def test_show_of_an_unknown_recipe_names_the_nearest() -> None:
    assert_refused(run("recipe", "show", "sd51"), 2, "no recipe 'sd51'", "did you mean 'sd15'")
    assert_refused(run("recipe", "shwo"), 2, "No such command 'shwo'", "'show'")
