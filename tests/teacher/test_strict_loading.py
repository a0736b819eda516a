"""Every weight of a model comes from its files: missing, surplus and misshapen ones are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pocket
import torch
from cli.runner import assert_refused, run
from safetensors.torch import load_file, save_file
from teacher.test_variants import save_original_format
from tiny_families import FAMILIES, ONE_EACH, kl
from torch import Tensor
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from diffusion2gan import assets
from diffusion2gan.errors import UserError
from diffusion2gan.pipelines.system import load_system
from diffusion2gan.teacher.autoencoder import load_vae
from diffusion2gan.teacher.loading import load_teacher
from diffusion2gan.teacher.strict_loading import load_model

Folder = Callable[[str], Path]
Change = Callable[[dict[str, Tensor]], str]


def weights_file(folder: Path, component: str) -> Path:
    (file,) = (folder / component).glob("*.safetensors")
    return file


def change_weights(file: Path, change: Change) -> str:
    """Applies `change` to the tensors in `file`; returns the name of the key it changed."""
    tensors = load_file(file)
    key = change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return key


def rename(tensors: dict[str, Tensor]) -> str:
    """Renames the largest tensor, of a weight that no loader can derive from others."""
    key = max(tensors, key=lambda name: tensors[name].numel())
    tensors[key + "_renamed"] = tensors.pop(key)
    return key


def remove(tensors: dict[str, Tensor]) -> str:
    key = min(tensors, key=lambda name: (tensors[name].numel(), name))
    del tensors[key]
    return key


def add(tensors: dict[str, Tensor]) -> str:
    tensors["surplus.weight"] = torch.zeros(3)
    return "surplus.weight"


def reshape(tensors: dict[str, Tensor]) -> str:
    key = max(tensors, key=lambda name: tensors[name].numel())
    tensors[key] = tensors[key][:-1].clone()
    return key


def model_components(folder: Path) -> list[str]:
    return sorted({file.parent.name for file in folder.glob("*/*.safetensors")})


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pocket.save(tmp_path_factory.mktemp("strict") / "pocket")


@pytest.mark.parametrize("change", [rename, remove, add, reshape])
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_changed_weights_are_refused_by_name(
    pocket: Path, component: str, change: Change, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)
    key = change_weights(weights_file(folder, component), change)

    for load in (load_teacher, load_system):
        with pytest.raises(UserError) as raised:
            load(str(folder))
        # transformers reports names without the prefix that its models no longer have
        assert key.removeprefix("text_model.") in str(raised.value)
        assert str(folder / component) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ONE_EACH)
def test_renamed_weights_of_every_family_are_refused(
    name: str, family_folder: Folder, tmp_path: Path
) -> None:
    components = model_components(family_folder(name))
    assert len(components) >= 3
    for component in components:
        folder = tmp_path / component
        shutil.copytree(family_folder(name), folder)
        change_weights(weights_file(folder, component), rename)
        with pytest.raises(UserError, match=f"{component} do not fit.*_renamed is not expected"):
            load_teacher(str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_and_shards_load(name: str, family_folder: Folder, tmp_path: Path) -> None:
    """Both forms load as the halved weights of the original do."""
    original = load_teacher(str(family_folder(name)))
    modules = {}
    for component, module in original.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            modules[component] = module.to(torch.bfloat16)
    original.pipeline.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    assert list(tmp_path.glob("*/*.safetensors.index.json"))

    found = load_teacher(str(tmp_path))
    for component, module in modules.items():
        weights = getattr(found.pipeline, component).state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(weights[key], value.float()), f"{component}: {key}"


def test_missing_shard_is_refused(family_folder: Folder, tmp_path: Path) -> None:
    pipeline = load_teacher(str(family_folder("sd15"))).pipeline
    pipeline.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    shard = sorted((tmp_path / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'unet'} does not load: .*{shard.name}"):
        load_teacher(str(tmp_path))


def test_weights_with_old_names_load(pocket: Path, tmp_path: Path) -> None:
    """Stable Diffusion's files have stored position ids, and the VAE attention's former names."""
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)

    def add_position_ids(tensors: dict[str, Tensor]) -> str:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        return ""

    change_weights(weights_file(folder, "text_encoder"), add_position_ids)

    former_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def use_former_names(tensors: dict[str, Tensor]) -> str:
        for key in list(tensors):
            for name, former in former_names.items():
                if f"attentions.0.{name}." in key:
                    tensors[key.replace(name, former)] = tensors.pop(key)
        return ""

    change_weights(weights_file(folder, "vae"), use_former_names)

    expected, found = load_teacher(str(pocket)), load_teacher(str(folder))
    assert torch.equal(
        found.encode(["a star"]).prompt_embeds, expected.encode(["a star"]).prompt_embeds
    )
    latents = torch.randn(1, *expected.latent_shape)
    assert torch.equal(found.decode(latents), expected.decode(latents))


def test_the_shipped_models_load() -> None:
    for name in ("pocket-teacher", "pocket-student"):
        load_system(name)


def test_shipped_student_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("teacher", "student"):
        shutil.copytree(assets.folder(name), tmp_path / name)
    key = change_weights(weights_file(tmp_path / "student", "unet"), rename)
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_system("pocket-student")


def test_separate_vae_is_checked(tmp_path: Path) -> None:
    kl(4).save_pretrained(tmp_path)
    key = change_weights(weights_file(tmp_path, "."), remove)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_vae(str(tmp_path))


def test_feature_networks_are_checked(tmp_path: Path) -> None:
    shutil.copytree(assets.folder("clip"), tmp_path / "clip")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    for kind, name in ((CLIPModel, "clip"), (Dinov2Model, "dinov2")):
        load_model(kind, tmp_path / name)
        key = change_weights(weights_file(tmp_path, name), remove)
        with pytest.raises(UserError, match=f"{key} is missing"):
            load_model(kind, tmp_path / name)


@pytest.mark.parametrize("with_accelerate", [True, False])
@pytest.mark.parametrize("part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"])
def test_single_file_of_a_unet_pipeline_is_checked(
    part: str,
    with_accelerate: bool,
    family_folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not with_accelerate:
        from diffusers.loaders import single_file_model, single_file_utils

        monkeypatch.setattr(single_file_model, "_LOW_CPU_MEM_USAGE_DEFAULT", False)
        monkeypatch.setattr(single_file_utils, "is_accelerate_available", lambda: False)

    folder, file = family_folder("sd15"), tmp_path / "model.safetensors"
    save_original_format(load_teacher(str(folder)), file)
    load_teacher(str(file), config=str(folder))

    def remove_one(tensors: dict[str, Tensor]) -> str:
        keys = [key for key in tensors if key.startswith(part) and key.endswith(".bias")]
        key = sorted(keys)[len(keys) // 2]
        del tensors[key]
        return key

    change_weights(file, remove_one)
    with pytest.raises(UserError, match=r"bias"):
        load_teacher(str(file), config=str(folder))


@pytest.mark.parametrize("name", ["flux_dev", "sd3"])
@pytest.mark.parametrize("change", [rename, remove, add, reshape])
def test_single_file_of_a_transformer_is_checked(
    name: str, change: Change, family_folder: Folder, tmp_path: Path
) -> None:
    folder, file = family_folder(name), tmp_path / "model.safetensors"
    shutil.copyfile(weights_file(folder, "transformer"), file)
    load_teacher(str(file), config=str(folder))
    key = change_weights(file, change)
    with pytest.raises(UserError, match=key):
        load_teacher(str(file), config=str(folder))


# LoRAs


LORA_LAYERS = {"unet": ["to_q", "to_k"], "text_encoder": ["q_proj", "k_proj"]}


def save_lora(folder: Path, file: Path, component: str = "unet") -> None:
    peft = pytest.importorskip("peft")
    network = getattr(load_teacher(str(folder)).pipeline, component)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=LORA_LAYERS[component]))
    state = peft.get_peft_model_state_dict(network)
    tensors = {f"{component}.{key}": torch.randn_like(value) for key, value in state.items()}
    save_file(tensors, file, {"format": "pt"})


def rename_a_matrix(tensors: dict[str, Tensor]) -> str:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key.replace("lora_A", "lora_C")] = tensors.pop(key)
    return key.removeprefix("unet.").split(".lora_A")[0]


def rename_a_layer(tensors: dict[str, Tensor]) -> str:
    for key in [key for key in tensors if "mid_block" in key]:
        tensors[key.replace("mid_block", "mad_block")] = tensors.pop(key)
    return "mad_block"


def remove_a_matrix(tensors: dict[str, Tensor]) -> str:
    key = next(key for key in tensors if "lora_A" in key)
    del tensors[key]
    return key.removeprefix("unet.").split(".lora_A")[0]


@pytest.mark.parametrize("change", [rename_a_matrix, rename_a_layer, remove_a_matrix])
def test_lora_with_missing_or_surplus_weights_is_refused(
    change: Change, family_folder: Folder, tmp_path: Path
) -> None:
    folder, file = family_folder("sd15"), tmp_path / "lora.safetensors"
    save_lora(folder, file)
    load_teacher(str(folder), loras=str(file))
    key = change_weights(file, change)
    with pytest.raises(UserError, match=key):
        load_teacher(str(folder), loras=str(file))


@pytest.mark.parametrize("change", [rename_a_matrix, remove_a_matrix])
def test_lora_of_a_text_encoder_with_missing_weights_is_refused(
    change: Change, family_folder: Folder, tmp_path: Path
) -> None:
    folder, file = family_folder("sd15"), tmp_path / "lora.safetensors"
    save_lora(folder, file, "text_encoder")
    encoder = load_teacher(str(folder), loras=str(file)).pipeline.text_encoder
    assert "load_adapter" not in vars(encoder)

    change_weights(file, change)
    with pytest.raises(UserError, match="lora_A"):
        load_teacher(str(folder), loras=str(file))


def test_components_of_older_versions_are_left_to_diffusers(
    family_folder: Folder, tmp_path: Path
) -> None:
    """Folders of Stable Diffusion name CLIPFeatureExtractor, which transformers no longer has."""
    folder = tmp_path / "teacher"
    shutil.copytree(family_folder("sd15"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "feature_extractor").mkdir()
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 32, "size": 32}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(settings))

    assert load_teacher(str(folder)).pipeline.unet is not None


# Commands


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_commands_refuse_a_renamed_weight(pocket: Path, component: str, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)
    key = change_weights(weights_file(folder, component), rename)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n")
    pairs, image = tmp_path / "pairs", tmp_path / "image.png"
    for result in (
        run("pairs", "--teacher", folder, "--prompts", prompts, "--count", 1, "--out", pairs),
        run("generate", folder, "--prompt", "a red star", "--out", image),
        run("evaluate", folder, "--out", tmp_path / "evaluation.json"),
    ):
        file_and_key = (f"{folder / component} do not fit", key.removeprefix("text_model."))
        assert_refused(result, 2, *file_and_key)
    assert not pairs.exists() and not image.exists()
    assert not (tmp_path / "evaluation.json").exists()


# Half-copied and odd folders


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_truncated_weights_are_one_message(
    pocket: Path, component: str, fraction: float, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)
    file = weights_file(folder, component)
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match=f"{folder / component} does not load") as raised:
        load_teacher(str(folder))
    assert "\n" not in str(raised.value)


def check_loads_or_refuses(folder: Path, pocket: Path) -> None:
    """Loads the teacher in `folder`, a changed copy of `pocket`; errors may only be one paragraph.

    What loads must be the same teacher: it gives the same conditioning, x0 and image.
    """
    message = f"{folder}: "
    teacher = None
    try:
        teacher = load_teacher(str(folder))
    except UserError as error:
        message = str(error)
    assert str(folder) in message and "\n" not in message
    if teacher is None:
        return

    original = load_teacher(str(pocket))
    noise = torch.randn((1, *original.latent_shape), generator=torch.Generator().manual_seed(0))
    images = []
    for loaded in (teacher, original):
        with torch.no_grad():
            cond = loaded.encode(["a large red ring"])
            x0 = loaded.denoise(noise, loaded.steps(2, "ddim")[0].timestep, cond)
            images.append(loaded.decode(x0))
    assert torch.equal(*images)


ODD_VALUES = ("[]", "3", "null", '"text"', "{}", "[" * 100_000, "", "\x00", '{"a": ')


@pytest.mark.parametrize("content", ODD_VALUES, ids=lambda value: value[:8])
@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "vae/config.json",
    ],
)
def test_odd_json_is_one_message_or_harmless(
    pocket: Path, name: str, content: str, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)
    (folder / name).write_text(content)
    check_loads_or_refuses(folder, pocket)


@pytest.mark.parametrize("value", ["x", [], None, -1, {"a": 1}, True])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet/config.json", "in_channels"),
        ("unet/config.json", "block_out_channels"),
        ("vae/config.json", "latent_channels"),
        ("text_encoder/config.json", "hidden_size"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("scheduler/scheduler_config.json", "prediction_type"),
        ("model_index.json", "unet"),
    ],
)
def test_setting_of_a_wrong_type_is_one_message_or_harmless(
    pocket: Path, name: str, key: str, value: object, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(pocket, folder)
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(settings | {key: value}))
    check_loads_or_refuses(folder, pocket)


# Numbers


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "x"])
def test_lora_scale_must_be_a_finite_number(scale: str, pocket: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.safetensors").touch()
    with pytest.raises(UserError, match="must be a number"):
        load_teacher(str(pocket), loras=f"{tmp_path / 'lora.safetensors'}@{scale}")


@pytest.mark.parametrize("guidance", [float("nan"), float("inf")])
def test_guidance_must_be_finite(guidance: float, pocket: Path) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        load_system(str(pocket), guidance_scale=guidance)
