"""A hub's ids: found in the cache as it lies on disk, never fetched; code that comes with a model is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.teacher.autoencoder import load_vae
from diffusion2gan.teacher.hub import find
from diffusion2gan.teacher.loading import load_pipeline, load_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Folder = Callable[[str], Path]


@pytest.fixture
def cache(family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own layout, holding `org/tiny` at one commit, which is its main."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(family_folder("sd15"), model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_an_id_in_the_cache_is_the_model_there(cache: Path, family_folder: Folder) -> None:
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        teacher = load_teacher(name)
        assert teacher.name == f"org/tiny@{COMMIT}" and teacher.folder == find(name)[0]
        assert teacher.revision == load_teacher(str(family_folder("sd15"))).revision
    assert (
        load_system("org/tiny", 1).revision == load_system(str(family_folder("sd15")), 1).revision
    )
    assert load_vae("org/tiny").config.latent_channels == 4


@pytest.mark.parametrize("name", ["org/other", "org/tiny@v2"])
def test_an_id_that_is_not_there_tells_where_it_looked(name: str, cache: Path) -> None:
    with pytest.raises(UserError) as told:
        load_teacher(name)
    repository, _, revision = name.partition("@")
    for part in (
        str(cache),
        f"hf download {repository} --revision {revision or 'main'}",
        "is not a folder here",
    ):
        assert part in str(told.value)


def test_a_folder_here_comes_first(
    cache: Path, family_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    shutil.copytree(family_folder("sdxl"), cache / "org" / "tiny")
    assert type(load_teacher("org/tiny").pipeline).__name__ == "StableDiffusionXLPipeline"
    with pytest.raises(UserError, match="no such file"):  # a file's name is no id
        load_teacher("org/tiny.safetensors", config="org/tiny")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}, "_class_name"),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "unet"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "modeling.Mine"}}, "text_encoder"),
    ],
)
def test_code_of_a_models_own_is_refused(
    file: str, change: dict[str, Any], told: str, family_folder: Folder, tmp_path: Path
) -> None:
    shutil.copytree(family_folder("sd15"), tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "model" / "pipeline.py").write_text("raise SystemExit('this ran')")
    for load in (
        lambda: load_teacher(str(tmp_path / "model")),
        lambda: load_pipeline(tmp_path / "model"),
    ):
        with pytest.raises(UserError, match=f"asks for code of its own \\({told}\\)"):
            load()
