"""Imported networks against the published formulas, with random weights."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion2gan.errors import UserError
from diffusion2gan.perceptual.augment import apply_transform, draw_transform
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS
from diffusion2gan.perceptual.importers import import_network

WIDTHS = (32, 32, 64, 32, 64)
# The layers of each slice, in order: "C" convolution, "N" norm, "R" ReLU, "P" pool
SLICES = {
    "elatentlpips": ("CNRCNR", "CNRCNR", "CNRCNRCNR", "CNRCNRCNRP", "CNRCNRCNRP"),
    "snu": ("CNRCNR", "CNRCNR", "CNRCNRCNR", "PCNRCNRCNR", "PCNRCNRCNR"),
}


def weights(format_: str, channels: int = 4) -> dict[str, Tensor]:
    """Random weights under the published names.

    The numbers of the layers continue through all slices and count every layer.
    """
    g = torch.Generator().manual_seed(0)
    prefix, head = ("net.", "lin") if format_ == "elatentlpips" else ("", "linear")
    table: dict[str, Tensor] = {}
    number = 0
    for stage, (layers, width) in enumerate(zip(SLICES[format_], WIDTHS, strict=True), 1):
        for layer in layers:
            name = f"{prefix}slice{stage}.{number}"
            number += 1
            if layer == "C":
                table[f"{name}.weight"] = torch.randn(width, channels, 3, 3, generator=g) / (
                    3 * channels**0.5
                )
                table[f"{name}.bias"] = 0.1 * torch.randn(width, generator=g)
                channels = width
            if layer == "N":
                table[f"{name}.weight"] = 0.5 + torch.rand(width, generator=g)
                table[f"{name}.bias"] = 0.3 * torch.randn(width, generator=g)
                if format_ == "elatentlpips":
                    table[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=g)
                    table[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=g)
                    table[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for level, width in enumerate(WIDTHS):
        table[f"{head}{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    return table


def formula(format_: str, table: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """The published distance in float64, layer by layer from the names."""
    prefix, head = ("net.", "lin") if format_ == "elatentlpips" else ("", "linear")
    w = {key: value.double() for key, value in table.items()}

    def normalized_features(x: Tensor) -> list[Tensor]:
        x, maps, number = x.double(), [], 0
        for stage, layers in enumerate(SLICES[format_], 1):
            for layer in layers:
                name = f"{prefix}slice{stage}.{number}"
                number += 1
                if layer == "C":
                    x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
                elif layer == "N" and format_ == "elatentlpips":
                    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
                    scale = w[f"{name}.weight"] / (var + 1e-5).sqrt()
                    x = (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][
                        :, None, None
                    ]
                elif layer == "N":
                    groups = x.reshape(len(x), 32, -1)
                    spread = (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
                    x = ((groups - groups.mean(2, keepdim=True)) / spread).reshape(x.shape)
                    x = x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
                elif layer == "R":
                    x = x.clamp_min(0)
                else:
                    x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))

            # The slice's feature map, normalised
            squares = (x**2).sum(1, keepdim=True)
            if format_ == "elatentlpips":
                maps.append(x / (squares + 1e-8).sqrt())
            else:
                maps.append(x / (squares.sqrt() + 1e-10))
        return maps

    maps_a, maps_b = normalized_features(a), normalized_features(b)
    distance = torch.zeros(len(a), dtype=torch.float64)
    for level, (map_a, map_b) in enumerate(zip(maps_a, maps_b, strict=True)):
        weighted = (map_a - map_b) ** 2 * w[f"{head}{level}.model.1.weight"]
        distance += weighted.sum(1).mean((1, 2))
    return distance


@pytest.mark.parametrize("format_", ["elatentlpips", "snu"])
@pytest.mark.parametrize("channels", [4, 16])
def test_the_imported_distance_is_the_published_formula(
    format_: str, channels: int, tmp_path: Path
) -> None:
    table = weights(format_, channels)
    torch.save(collections.OrderedDict(table), tmp_path / "file.pth")
    messages = import_network([tmp_path / "file.pth"], format_, tmp_path / "out", WIDTHS)
    assert "licence" in messages[0] and "Licence" in (tmp_path / "out" / "README.md").read_text()
    a, b = torch.randn(2, 3, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = formula(format_, table, a, b)
    assert float(expected.min()) > 0.1
    found = LatentLPIPS.from_pretrained(tmp_path / "out")(a, b).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = ELatentLPIPS.from_pretrained(tmp_path / "out", transforms="")(a, b).double()
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)


def test_the_printed_call_computes_what_the_package_does_by_default(tmp_path: Path) -> None:
    """elatentlpips: the network under blit+geometric, plus mean |a − b| of the latents as given."""
    table = weights("elatentlpips")
    torch.save(table, tmp_path / "file.pth")
    messages = import_network([tmp_path / "file.pth"], "elatentlpips", tmp_path / "out", WIDTHS)
    call = messages[1].removeprefix(f"{tmp_path / 'out'}: ").split(" is what the package")[0]
    distance = eval(call, {"ELatentLPIPS": ELatentLPIPS})

    a, b = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    families = ("blit", "geometric")
    transform = draw_transform(3, families, torch.Generator().manual_seed(2))
    expected = formula(
        "elatentlpips", table, apply_transform(a, transform), apply_transform(b, transform)
    )
    expected += (a - b).abs().double().mean((1, 2, 3))
    found = distance(a, b, torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_layers_are_matched_by_order_and_duplicates_ignored(tmp_path: Path) -> None:
    """Layer numbers that restart in each slice, and tensors also stored under a second name."""
    table = weights("elatentlpips")
    torch.save(table, tmp_path / "one.pth")
    renamed = {}
    for key, value in table.items():
        words = key.split(".")
        if words[0] == "net":
            first = min(int(k.split(".")[2]) for k in table if k.startswith(f"net.{words[1]}."))
            words[2] = str(int(words[2]) - first)
        renamed[".".join(words)] = value
        if words[0].startswith("lin"):
            renamed["lins." + ".".join([words[0][3:], *words[1:]])] = value

    torch.save({"state_dict": renamed}, tmp_path / "two.pth")
    for name in ("one", "two"):
        import_network([tmp_path / f"{name}.pth"], "elatentlpips", tmp_path / name, WIDTHS)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_negative_head_weights_are_reported(tmp_path: Path) -> None:
    table = weights("elatentlpips")
    table["lin2.model.1.weight"][0, :3] = -1.0
    torch.save(table, tmp_path / "file.pth")
    messages = import_network([tmp_path / "file.pth"], "elatentlpips", tmp_path / "out", WIDTHS)
    assert messages[-1] == "3 head weights are negative and count as zero"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"net.slice2.9.weight": torch.zeros(48, 32, 3, 3)},
            r"net\.slice2\.9\.weight is \[48, 32, 3, 3\], \[32, 32, 3, 3\] is expected",
        ),
        (
            lambda t: t | {"lin3.model.1.weight": torch.zeros(1, 33, 1, 1)},
            r"lin3\.model\.1\.weight is \[1, 33, 1, 1\], \[1, 32, 1, 1\] is expected",
        ),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("lin4")},
            r"lin<4>\.model\.1\.weight, \[1, 64, 1, 1\], is missing",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "running" not in k},
            r"running_mean, \[32\], is missing",
        ),
        (lambda t: t | {"extra.weight": torch.zeros(3)}, r"extra\.weight, \[3\], is not expected"),
        (
            lambda t: {"layer1.0.conv1.weight": torch.zeros(64, 3, 7, 7)},
            r"slice1\.<layer 0>\.weight, .* is missing",
        ),
    ],
)
def test_another_architecture_is_refused_with_its_first_difference(
    change: object, message: str, tmp_path: Path
) -> None:
    torch.save(change(weights("elatentlpips")), tmp_path / "file.pth")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        import_network([tmp_path / "file.pth"], "elatentlpips", tmp_path / "out", WIDTHS)
    assert not (tmp_path / "out").exists()


class Evil:
    """Its pickle creates a folder when it is loaded by an unsafe reader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_needs_to_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"lin0.model.1.weight": Evil(tmp_path / "pwned")}, tmp_path / "evil.pth")
    with pytest.raises(
        UserError, match=r"it needs posix\.mkdir, and .* needs to run code is refused"
    ) as refused:
        import_network([tmp_path / "evil.pth"], "elatentlpips", tmp_path / "out")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(
        UserError, match=r"it needs torch\.nn\.modules\.linear\.Linear, and"
    ) as refused_too:
        import_network([tmp_path / "module.pth"], "elatentlpips", tmp_path / "out")
    # torch's message advises to read the file anyway, with weights_only=False
    assert "weights_only" not in f"{refused.value} {refused_too.value}"
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        import_network([tmp_path / "nowhere.pth"], "snu", tmp_path / "out")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        import_network([tmp_path / "text.pth"], "snu", tmp_path / "out")

    for new in (True, False):  # torch's two formats, truncated
        torch.save(
            {"x": torch.zeros(3000)}, tmp_path / "complete.pth", _use_new_zipfile_serialization=new
        )
        (tmp_path / "half.pth").write_bytes((tmp_path / "complete.pth").read_bytes()[:5000])
        with pytest.raises(
            UserError,
            match=r"it is truncated, damaged or not a torch checkpoint .* Download it again",
        ) as truncated:
            import_network([tmp_path / "half.pth"], "snu", tmp_path / "out")
        assert "weights_only" not in str(truncated.value)

    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="does not contain a table of tensors"):
        import_network([tmp_path / "list.pth"], "snu", tmp_path / "out")
    with pytest.raises(UserError, match="no format 'elatentlpip'; did you mean 'elatentlpips'"):
        import_network([tmp_path / "text.pth"], "elatentlpip", tmp_path / "out")
