"""Recipes are validated when created, and errors name the setting and its value."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pydantic
import pytest

from diffusion2gan.distill.run import load_student
from diffusion2gan.errors import UserError
from diffusion2gan.recipe import (
    RENAMED,
    Recipe,
    load_recipe,
    parse_recipe,
    shipped_recipes,
)


def test_shipped_recipes_load() -> None:
    names = shipped_recipes()
    assert "pocket" in names
    assert "pocket-demo" in names
    for name in names:
        assert load_recipe(name).total_pairs > 0


def test_settings_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('loss = "mse"\nbatch_size = 8\nlearning_rate = 1e-4\n')
    assert load_recipe(str(path)) == Recipe(loss="mse", batch_size=8, learning_rate=1e-4)

    changed = load_recipe(str(path), ["batch_size=16", " ema_decay = 0.5 ", "teacher=a=b"])
    assert changed.batch_size == 16
    assert changed.ema_decay == 0.5
    assert changed.teacher == "a=b"
    assert changed.loss == "mse"


def test_every_setting_has_a_description() -> None:
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert field.description.endswith((".", "…")), name


def test_unknown_setting_suggests_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("batchsize = 8\n")
    with pytest.raises(
        UserError, match=r"mine\.toml: unknown setting 'batchsize'; did you mean 'batch_size'"
    ):
        load_recipe(str(path))
    with pytest.raises(
        UserError, match=r"--set learning_rat=1: .*'learning_rat'; did you mean 'learning_rate'"
    ):
        load_recipe("pocket", ["learning_rat=1"])


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_renamed_setting_is_refused_with_its_new_name(old: str, new: str, tmp_path: Path) -> None:
    message = f"the setting '{old}' is now called '{new}'"
    assert new in Recipe.model_fields
    assert old not in Recipe.model_fields

    # In a recipe file
    path = tmp_path / "mine.toml"
    path.write_text(f"{old} = 4\n")
    with pytest.raises(UserError, match=rf"mine\.toml: {message}"):
        load_recipe(str(path))

    # On the command line
    with pytest.raises(UserError, match=f"--set {old}=4: {message}"):
        load_recipe("pocket", [f"{old}=4"])

    # In the folder of a run
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": {old: 4}, "pairs": {}}))
    (tmp_path / "checkpoint.safetensors").write_bytes(
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}"  # an empty safetensors file
    )
    with pytest.raises(UserError, match=rf"recipe\.json: {message}"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size=0", "batch_size = '0': .*greater than or equal to 1"),
        ("batch_size=two", "batch_size = 'two': .*integer"),
        ("loss=l1", "loss = 'l1': .*'mse'.*'e_latent_lpips'"),
        ("learning_rate=-1", "learning_rate = '-1': .*greater than 0"),
        ("ema_decay=1", "ema_decay = '1': .*less than 1"),
        ("learning_rate=nan", "learning_rate = 'nan'"),
        ("learning_rate=inf", "learning_rate = 'inf': .*finite number"),
        ("learning_rate=1e39", "learning_rate = '1e39': .*less than or equal to 1000"),
        ("pseudo_huber_c=inf", "pseudo_huber_c = 'inf': .*finite number"),
        ("weight_decay=1e999", "weight_decay = '1e999': .*finite number"),
        ("max_grad_norm=nan", "max_grad_norm = 'nan'"),
        ("adversarial_weight=-1", "adversarial_weight = '-1': .*greater than or equal to 0"),
        ("r1_weight=-1", "r1_weight = '-1': .*greater than or equal to 0"),
        ("mix_share=1", "mix_share = '1': .*less than 1"),
        ("mix_share=-0.1", "mix_share = '-0.1': .*greater than or equal to 0"),
        ("discriminator=none", "discriminator = 'none': .*'patch'"),
        (
            "gradient_accumulation_steps=5",
            "batch_size 16 cannot be divided into gradient_accumulation_steps = 5 micro-batches",
        ),
        ("seed=4294967296", "seed = '4294967296': .*less than 2147483648"),
    ],
)
def test_invalid_value_is_refused_with_setting_and_value(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("pocket", [setting])


def test_bfloat16_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="precision 'bfloat16' is for cuda, but device is 'cpu'"):
        load_recipe("pocket", ["precision=bfloat16", "device=cpu"])
    assert load_recipe("pocket", ["precision=bfloat16"]).precision == "bfloat16"


def test_only_infinity_that_means_never_is_allowed() -> None:
    """No clipping, and a checkpoint only at the end."""
    recipe = load_recipe("pocket", ["max_grad_norm=inf", "checkpoint_every_s=inf"])
    assert recipe.max_grad_norm == recipe.checkpoint_every_s == math.inf

    for name, field in Recipe.model_fields.items():
        if field.annotation is float:
            for value in ("nan", "-inf"):
                with pytest.raises(UserError, match=f"{name} = '{value}'"):
                    load_recipe("pocket", [f"{name}={value}"])


def test_mix_and_match_needs_more_than_one_pair_per_batch() -> None:
    with pytest.raises(
        UserError,
        match=r"mix_share 0\.1 takes fakes .* batch_size is 1; raise batch_size or set mix",
    ):
        load_recipe("pocket", ["adversarial_weight=1", "batch_size=1"])

    without_mixing = load_recipe("pocket", ["adversarial_weight=1", "batch_size=1", "mix_share=0"])
    assert without_mixing.batch_size == 1
    assert load_recipe("pocket-regression", ["batch_size=1"]).adversarial_weight == 0


def test_all_invalid_values_are_reported_at_once() -> None:
    with pytest.raises(UserError, match=r"mine: batch_size = 0: .*; warmup = 2: "):
        parse_recipe({"batch_size": 0, "warmup": 2}, "mine")


def test_setting_without_equals_sign_is_refused() -> None:
    with pytest.raises(UserError, match="--set 'batch_size': write it as key=value"):
        load_recipe("pocket", ["batch_size"])


def test_unknown_recipe_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="no recipe 'pocke': neither a file nor a shipped recipe; did you mean 'pocket'",
    ):
        load_recipe("pocke")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize("content", [b"batch_size: 8", b"loss = mse", b"\xff"])
def test_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.toml is not TOML"):
        load_recipe(str(path))


def test_recipe_is_immutable() -> None:
    recipe = Recipe()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.batch_size = 3  # type: ignore[misc]


def test_changed_lists_differences_and_json_keeps_all_settings() -> None:
    recipe = Recipe(seed=1)
    other = Recipe(loss="mse")
    assert recipe.changed(other) == {"seed": (1, 0), "loss": ("e_latent_lpips", "mse")}
    assert recipe.changed(parse_recipe(recipe.model_dump(), "a dump")) == {}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "batch_size = " + "9" * 5_000, "a = {b" + ".b" * 100_000]
)
def test_odd_file_is_one_message(text: str, tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text(text)
    with pytest.raises(UserError, match=r"odd\.toml is not TOML"):
        load_recipe(str(tmp_path / "odd.toml"))


def test_name_that_is_too_long_is_no_recipe() -> None:
    with pytest.raises(UserError, match="no recipe"):
        load_recipe("a" * 5_000)
