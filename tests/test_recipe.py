"""A recipe is checked at birth, and says what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from diffusion2gan.errors import UserError
from diffusion2gan.recipe import SHIPPED, Recipe, load_recipe, parse_recipe


def test_the_shipped_recipes_load() -> None:
    names = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    assert "pocket" in names and "pocket-demo" in names
    for name in names:
        assert load_recipe(name).total_pairs > 0


def test_a_file_and_settings_laid_over_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('loss = "mse"\nbatch_size = 8\nlearning_rate = 1e-4\n')
    assert load_recipe(str(path)) == Recipe(loss="mse", batch_size=8, learning_rate=1e-4)
    changed = load_recipe(str(path), ["batch_size=16", " ema_decay = 0.5 ", "teacher=a=b"])
    assert (changed.batch_size, changed.ema_decay, changed.teacher, changed.loss) == (
        16,
        0.5,
        "a=b",
        "mse",
    )


def test_an_unknown_setting_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("batchsize = 8\n")
    with pytest.raises(
        UserError, match=r"mine\.toml: unknown setting 'batchsize'; did you mean 'batch_size'"
    ):
        load_recipe(str(path))
    with pytest.raises(UserError, match="'learning_rat'; did you mean 'learning_rate'"):
        load_recipe("pocket", ["learning_rat=1"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("batch_size=0", "batch_size = '0': .*greater than or equal to 1"),
        ("batch_size=two", "batch_size = 'two': .*integer"),
        ("loss=l1", "loss = 'l1': .*'mse'.*'e_latent_lpips'"),
        ("learning_rate=-1", "learning_rate = '-1': .*greater than 0"),
        ("ema_decay=1", "ema_decay = '1': .*less than 1"),
        ("learning_rate=nan", "learning_rate = 'nan'"),
        ("adversarial_weight=-1", "adversarial_weight = '-1': .*greater than or equal to 0"),
        ("r1_weight=-1", "r1_weight = '-1': .*greater than or equal to 0"),
        ("mix_share=1", "mix_share = '1': .*less than 1"),
        ("mix_share=-0.1", "mix_share = '-0.1': .*greater than or equal to 0"),
        ("discriminator=none", "discriminator = 'none': .*'patch'"),
        (
            "gradient_accumulation_steps=5",
            "batch_size 16 cannot be worked in gradient_accumulation_steps = 5 parts",
        ),
        ("precision=bfloat16", "precision 'bfloat16' is for cuda, device is 'cpu'"),
        ("seed=4294967296", "seed = '4294967296': .*less than 2147483648"),
    ],
)
def test_a_wrong_value_says_setting_and_value(setting: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_recipe("pocket", [setting])


def test_a_batch_of_one_has_nobody_to_mix_with() -> None:
    with pytest.raises(
        UserError,
        match=r"mix_share 0\.1 takes fakes .* batch_size is 1; raise batch_size or set mix",
    ):
        load_recipe("pocket", ["adversarial_weight=1", "batch_size=1"])
    assert (
        load_recipe("pocket", ["adversarial_weight=1", "batch_size=1", "mix_share=0"]).batch_size
        == 1
    )
    assert load_recipe("pocket-regression", ["batch_size=1"]).adversarial_weight == 0


def test_all_wrong_values_are_said_at_once() -> None:
    with pytest.raises(UserError, match=r"here: batch_size = 0: .*; warmup = 2: "):
        parse_recipe({"batch_size": 0, "warmup": 2}, "here")


def test_a_setting_without_equals_is_said() -> None:
    with pytest.raises(UserError, match="--set 'batch_size': write it as key=value"):
        load_recipe("pocket", ["batch_size"])


def test_no_such_recipe(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="no recipe 'pocke': neither a file nor shipped; did you mean 'pocket'"
    ):
        load_recipe("pocke")
    with pytest.raises(UserError, match="no recipe"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize("content", [b"batch_size: 8", b"loss = mse", b"\xff"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.toml is not TOML"):
        load_recipe(str(path))


def test_it_is_frozen() -> None:
    recipe = Recipe()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.batch_size = 3  # type: ignore[misc]


def test_what_changed_is_listed_and_json_keeps_all() -> None:
    ours, theirs = Recipe(seed=1), Recipe(loss="mse")
    assert ours.changed(theirs) == {"seed": (1, 0), "loss": ("e_latent_lpips", "mse")}
    assert ours.changed(parse_recipe(ours.model_dump(), "a dump")) == {}
    assert Recipe.model_validate_json(ours.model_dump_json()) == ours
