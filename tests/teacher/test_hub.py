"""Hub ids are found in the local cache, never downloaded; custom model code is refused."""

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
from diffusion2gan.teacher.hub import find_model
from diffusion2gan.teacher.loading import load_pipeline, load_teacher

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Folder = Callable[[str], Path]


@pytest.fixture
def cache(family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with `org/tiny` at one commit, its main revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(family_folder("sd15"), model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


def test_hub_id_in_the_cache_is_loaded(cache: Path, family_folder: Folder) -> None:
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        teacher = load_teacher(name)
        assert teacher.name == f"org/tiny@{COMMIT}"
        assert teacher.folder == find_model(name)[0]
        assert teacher.revision == load_teacher(str(family_folder("sd15"))).revision

    system = load_system("org/tiny", 1)
    assert system.revision == load_system(str(family_folder("sd15")), 1).revision
    assert load_vae("org/tiny").config.latent_channels == 4


@pytest.mark.parametrize("name", ["org/other", "org/tiny@v2"])
def test_missing_hub_id_is_reported_with_the_cache_and_the_download_command(
    name: str, cache: Path
) -> None:
    with pytest.raises(UserError) as raised:
        load_teacher(name)
    message = str(raised.value)
    repository, _, revision = name.partition("@")
    assert f"{name} is not a folder" in message
    assert str(cache) in message
    assert f"hf download {repository} --revision {revision or 'main'}" in message


def test_folder_takes_precedence_over_hub_id(
    cache: Path, family_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache)
    shutil.copytree(family_folder("sdxl"), cache / "org" / "tiny")
    assert type(load_teacher("org/tiny").pipeline).__name__ == "StableDiffusionXLPipeline"
    with pytest.raises(UserError, match="no such file"):  # a file name is not a hub id
        load_teacher("org/tiny.safetensors", config="org/tiny")


@pytest.mark.parametrize(
    ("file", "change", "component"),
    [
        ("model_index.json", {"_class_name": ["pipeline", "MyPipeline"]}, "_class_name"),
        ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "unet"),
        ("text_encoder/config.json", {"auto_map": {"AutoModel": "modeling.Mine"}}, "text_encoder"),
    ],
)
def test_custom_code_is_refused(
    file: str, change: dict[str, Any], component: str, family_folder: Folder, tmp_path: Path
) -> None:
    shutil.copytree(family_folder("sd15"), tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "model" / "pipeline.py").write_text("raise SystemExit('this ran')")

    message = rf"needs custom code \({component}\)"
    with pytest.raises(UserError, match=message):
        load_teacher(str(tmp_path / "model"))
    with pytest.raises(UserError, match=message):
        load_pipeline(tmp_path / "model")
