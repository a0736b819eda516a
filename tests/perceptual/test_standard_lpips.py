"""Standard LPIPS, imported, against its formula: a random trunk with real and random heads."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cli.runner import run
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS
from diffusion2gan.perceptual.importers import import_network

# torchvision's VGG-16: channels of each convolution, "M" a pool; the number of a layer counts
# convolutions, ReLUs and pools
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
WIDTHS = (64, 128, 256, 512, 512)
Tensors = dict[str, Tensor]


def random_trunk() -> Tensors:
    """`features.{number}.{weight, bias}` of VGG-16 and a classifier, with random values."""
    g = torch.Generator().manual_seed(0)
    table: Tensors = {}
    channels, number = 3, 0
    for width in VGG16:
        if isinstance(width, str):
            number += 1
            continue
        std = (2 / (9 * channels)) ** 0.5
        table[f"features.{number}.weight"] = std * torch.randn(width, channels, 3, 3, generator=g)
        table[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=g)
        channels = width
        number += 2
    assert len(table) == 26 and number == 31
    return table | {"classifier.0.weight": torch.zeros(4, 5), "classifier.0.bias": torch.zeros(4)}


def random_heads() -> Tensors:
    g = torch.Generator().manual_seed(1)
    table = {}
    for level, width in enumerate(WIDTHS):
        table[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    return table


def real_heads_file() -> Path:
    """The heads inside the lpips package, which is not imported: it needs torchvision."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        pytest.skip("the lpips package is not installed")
    return Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"


def complete_state(trunk: Tensors, heads: Tensors) -> Tensors:
    """The state dict of lpips.LPIPS(net="vgg"), in which the heads are stored twice."""
    table = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None],
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450])[None, :, None, None],
    }
    ends = (4, 9, 16, 23, 30)
    for key, value in trunk.items():
        if key.startswith("features."):
            _, number, tensor = key.split(".")
            stage = 1 + sum(int(number) >= end for end in ends)
            table[f"net.slice{stage}.{number}.{tensor}"] = value
    for key, value in heads.items():
        table[key] = value
        table[f"lins.{key[3]}{key[4:]}"] = value.clone()
    return table


def reference(trunk: Tensors, heads: Tensors, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(distance [B], layers [B] each) of images in [−1, 1], written from the paper's formula."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).to(a.dtype)[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450]).to(a.dtype)[None, :, None, None]

    def features(x: Tensor) -> list[Tensor]:
        x, maps, number = (x - shift) / scale, [], 0
        for width in VGG16:
            if width == "M":
                maps.append(x)  # relu1_2 … relu5_3
                x = F.max_pool2d(x, 2)
                number += 1
                continue
            weight = trunk[f"features.{number}.weight"].to(x.dtype)
            bias = trunk[f"features.{number}.bias"].to(x.dtype)
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            number += 2
        return [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in maps]

    layers = []
    for level, (map_a, map_b) in enumerate(zip(features(a), features(b), strict=True)):
        head = heads[f"lin{level}.model.1.weight"].to(a.dtype)
        layers.append(F.conv2d((map_a - map_b).square(), head).mean((1, 2, 3)))
    return torch.stack(layers).sum(0), layers


def images(seed: int, size: int = 48) -> Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


def save(folder: Path, **tables: object) -> list[Path]:
    files = []
    for name, table in tables.items():
        torch.save(table, folder / f"{name}.pth")
        files.append(folder / f"{name}.pth")
    return files


@pytest.fixture(params=["real", "random"])
def heads_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        return real_heads_file()
    return save(tmp_path, heads=random_heads())[0]


def test_value_layers_and_gradient_are_those_of_the_formula(
    heads_file: Path, tmp_path: Path
) -> None:
    trunk = random_trunk()
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    import_network([*save(tmp_path, trunk=trunk), heads_file], "lpips", tmp_path / "out")
    distance = LatentLPIPS.from_pretrained(tmp_path / "out")
    a, b = images(1).requires_grad_(), images(2)
    expected, expected_layers = reference(trunk, heads, a, b)
    assert float(expected.detach().min()) > 0.05

    # Value
    found = distance(a, b)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    # Layers
    for level, difference in enumerate(distance.differences(a, b)):
        layer = (difference * heads[f"lin{level}.model.1.weight"].flatten()).sum(1)
        torch.testing.assert_close(layer, expected_layers[level], rtol=0, atol=1e-6)

    # Gradient, and both against float64
    (gradient,) = torch.autograd.grad(found.sum(), a)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), a)
    assert float(expected_gradient.abs().max()) > 1e-4
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)
    exact, _ = reference(trunk, heads, a.double(), b.double())
    (exact_gradient,) = torch.autograd.grad(exact.sum(), a)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=1e-6)


def torchvision_vgg16(pretrained: bool) -> nn.Module:
    """torchvision's VGG-16 as far as the lpips package reads it: `features`."""
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG16:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    model = nn.Module()
    model.features = nn.Sequential(*layers)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_value_layers_and_gradient_are_those_of_the_lpips_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package with its own heads, and a random trunk in the place of torchvision's."""
    real_heads_file()
    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(vgg16=torchvision_vgg16)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    package = importlib.import_module("lpips").LPIPS(net="vgg", pnet_rand=True, verbose=False)
    package.load_state_dict(complete_state(random_trunk(), {}), strict=False)
    import_network(save(tmp_path, complete=package.state_dict()), "lpips", tmp_path / "out")
    distance = LatentLPIPS.from_pretrained(tmp_path / "out")

    a, b = images(1).requires_grad_(), images(2)
    found = distance(a, b)
    expected, expected_layers = package(a, b, retPerLayer=True)
    torch.testing.assert_close(found, expected.flatten(), rtol=0, atol=1e-6)
    assert float(expected.detach().min()) > 0.05
    for difference, head, layer in zip(
        distance.differences(a, b), distance._frozen[1], expected_layers, strict=True
    ):
        found_layer = (difference * head).sum(1)
        torch.testing.assert_close(found_layer, layer.flatten(), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), a)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), a)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)


def test_two_files_one_file_and_a_parallel_one_give_the_same_network(tmp_path: Path) -> None:
    trunk, heads = random_trunk(), random_heads()
    complete = complete_state(trunk, heads)
    parallel = {f"module.{key}": value for key, value in complete.items()}
    versions = {
        "two": save(tmp_path, trunk=trunk, heads=heads),
        "swapped": save(tmp_path, heads=heads, trunk=trunk),
        "together": save(tmp_path, together=trunk | heads),
        "complete": save(tmp_path, complete=complete),
        "parallel": save(tmp_path, parallel={"state_dict": parallel}),
    }
    written = set()
    for name, files in versions.items():
        import_network(files, "lpips", tmp_path / name)
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        written.add((weights, (tmp_path / name / "config.json").read_text()))
    assert len(written) == 1


def test_the_scaling_layer_is_in_the_config_and_is_used(tmp_path: Path) -> None:
    trunk, heads = random_trunk(), random_heads()
    import_network(save(tmp_path, trunk=trunk, heads=heads), "lpips", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["input_shift"] == [-0.030, -0.088, -0.188]
    assert config["input_scale"] == [0.458, 0.448, 0.450]
    assert config["has_norm"] is False and config["num_dropped"] == 0
    assert "VGG-16 without norm" in (tmp_path / "out" / "README.md").read_text()

    # Another scaling layer in the file
    complete = complete_state(trunk, heads)
    complete["scaling_layer.scale"] = torch.full((1, 3, 1, 1), 0.3)
    import_network(save(tmp_path, other=complete), "lpips", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["input_scale"] == [0.3, 0.3, 0.3]
    a, b = images(1), images(2)
    distance = LatentLPIPS.from_pretrained(tmp_path / "out")
    standard = distance(a, b)
    with pytest.raises(UserError, match="the two images differ in shape"):
        distance(a, b[:1])
    with pytest.raises(UserError, match="it compares images; for latents, decode them first"):
        distance(torch.zeros(1, 4, 48, 48), torch.zeros(1, 4, 48, 48))
    with pytest.raises(UserError, match="the first images are not finite"):
        distance(a / 0, b)
    other = LatentLPIPS.from_pretrained(tmp_path / "other")(a, b)
    assert not torch.allclose(standard, other, rtol=1e-3)

    # Saved again, and for decoded latents
    LatentLPIPS.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert torch.equal(LatentLPIPS.from_pretrained(tmp_path / "again")(a, b), standard)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = PixelLPIPS.from_pretrained(tmp_path / "out", vae="pocket")
    assert float(pixels(latents, latents.flip(0)).min()) > 0


def change(table: Tensors, key: str, *shape: int) -> Tensors:
    return table | {key: torch.zeros(*shape)}


def without(table: Tensors, start: str) -> Tensors:
    return {key: value for key, value in table.items() if not key.startswith(start)}


TRUNK, HEADS = random_trunk(), random_heads()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        # AlexNet
        (
            (change({}, "features.0.weight", 64, 3, 11, 11), HEADS),
            r"features\.0\.weight is \[64, 3, 11, 11\], \[64, 3, 3, 3\] is expected",
        ),
        # VGG-16 with batch norm
        (
            (change(without(TRUNK, "features.2."), "features.1.weight", 64), HEADS),
            r"features\.2\.weight, \[64, 64, 3, 3\], is missing; instead there is "
            r"features\.1\.weight, \[64\]",
        ),
        # The heads of AlexNet
        (
            (TRUNK, change(HEADS, "lin1.model.1.weight", 1, 192, 1, 1)),
            r"lin1\.model\.1\.weight is \[1, 192, 1, 1\], \[1, 128, 1, 1\] is expected",
        ),
        ((TRUNK,), r"lin<0>\.model\.1\.weight, \[1, 64, 1, 1\], is missing.* as two files"),
        ((HEADS,), r"features\.0\.weight, \[64, 3, 3, 3\], is missing.* \(vgg16-397923af\.pth"),
        (
            (TRUNK, HEADS | {"lin2.model.1.weight": HEADS["lin2.model.1.weight"] - 0.5}),
            r"weights of lin2 are negative \(smallest -0\.4\d+\)",
        ),
        (
            (TRUNK, HEADS, change(HEADS, "lin0.model.1.weight", 1, 9, 1, 1)),
            r"lin0\.model\.1\.weight is in more than one of the files, \[1, 64, 1, 1\] .* "
            r"\[1, 9, 1, 1\]",
        ),
        (
            (change(complete_state(TRUNK, HEADS), "scaling_layer.shift", 3),),
            r"scaling_layer\.shift is \[3\], \[1, 3, 1, 1\] is expected",
        ),
        (
            (without(complete_state(TRUNK, HEADS), "scaling_layer.shift"),),
            r"has scaling_layer\.scale but not the other one",
        ),
        (
            (without(complete_state(TRUNK, HEADS), "scaling_layer.scale"),),
            r"has scaling_layer\.shift but not the other one",
        ),
        (
            (change(complete_state(TRUNK, HEADS), "scaling_layer.scale", 1, 3, 1, 1),),
            r"a scale that is not zero",
        ),
    ],
)
def test_another_network_is_refused_and_nothing_is_written(
    tables: tuple[Tensors, ...], message: str, tmp_path: Path
) -> None:
    files = save(tmp_path, **{f"file{number}": table for number, table in enumerate(tables)})
    with pytest.raises(UserError, match=message):
        import_network(files, "lpips", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_calls_that_compute_what_the_package_does(tmp_path: Path) -> None:
    trunk, heads = save(tmp_path, trunk=TRUNK, heads=HEADS)
    out = tmp_path / "out"
    result = run(
        "perceptual", "import", str(trunk), str(heads), "--format", "lpips", "--out", str(out)
    )
    assert result.code == 0
    printed = result.out
    assert f"LatentLPIPS.from_pretrained({str(out)!r}) is what the package computes" in printed
    assert f"PixelLPIPS.from_pretrained({str(out)!r}, vae=VAE)" in printed
    (tmp_path / "new").touch()
    for file in out.iterdir():
        assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, file.name
