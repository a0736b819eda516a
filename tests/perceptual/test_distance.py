"""The latent perceptual distances against the formula in float64, and their invariances."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.perceptual.augment import (
    TRANSFORM_FAMILIES,
    Strengths,
    apply_transform,
    draw_transform,
)
from diffusion2gan.perceptual.distance import ELatentLPIPS, LatentLPIPS, normalize_features
from diffusion2gan.perceptual.vgg import STAGES, VGG, num_dropped_pools

WIDTHS = (8, 8, 8, 8, 8)


def random_network(seed: int = 0, num_dropped: int = 2) -> tuple[VGG, list[Tensor]]:
    """A random network with non-trivial batch norm statistics, and random heads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vgg = VGG(4, WIDTHS, num_dropped)
        for _ in range(3):
            vgg.train()(torch.randn(8, 4, 16, 16))
        for module in vgg.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
        return vgg.eval(), [torch.rand(width) for width in WIDTHS]


def latents(seed: int, batch: int = 3, size: int = 16) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference(vgg: VGG, heads: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Σ_l mean_hw Σ_c w_lc (f̂_lc(a) − f̂_lc(b))² in float64, with VGG-16's layers written out."""
    weights = {key: value.double() for key, value in vgg.state_dict().items()}

    def features(x: Tensor) -> list[Tensor]:
        x, maps = x.double(), []
        for stage, count in enumerate(STAGES):
            if stage > 0 and stage - 1 >= vgg.num_dropped:
                x = x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).amax((3, 5))
            for layer in range(count):
                w, n = f"stages.{stage}.{3 * layer}", f"stages.{stage}.{3 * layer + 1}"
                x = nn.functional.conv2d(x, weights[f"{w}.weight"], weights[f"{w}.bias"], padding=1)
                mean, var = (weights[f"{n}.running_{k}"][:, None, None] for k in ("mean", "var"))
                x = (x - mean) / (var + 1e-5).sqrt()
                x = (
                    x * weights[f"{n}.weight"][:, None, None] + weights[f"{n}.bias"][:, None, None]
                ).clamp_min(0)
            maps.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return maps

    return sum(
        ((fa - fb) ** 2 * head.double().clamp_min(0)[None, :, None, None]).sum(1).mean((1, 2))
        for fa, fb, head in zip(features(a), features(b), heads, strict=True)
    )  # type: ignore[return-value]


@pytest.mark.parametrize(("factor", "pools"), [(8, 3), (4, 2), (2, 1), (1, 0), (16, 4), (32, 4)])
def test_one_pool_is_dropped_per_halving_of_the_vae(factor: int, pools: int) -> None:
    assert num_dropped_pools(factor) == pools


@pytest.mark.parametrize("num_dropped", range(5))
def test_feature_maps_have_expected_channels_and_sizes(num_dropped: int) -> None:
    vgg = VGG(4, (8, 9, 10, 11, 12), num_dropped).eval()
    shapes = [feature_map.shape for feature_map in vgg(latents(0))]
    sides = [16 >> max(0, level - num_dropped) for level in range(5)]
    assert shapes == [(3, 8 + level, side, side) for level, side in enumerate(sides)]
    assert sum(isinstance(m, nn.Conv2d) for m in vgg.modules()) == 13


@pytest.mark.parametrize("num_dropped", [0, 2, 3])
def test_latent_lpips_is_the_formula(num_dropped: int) -> None:
    vgg, heads = random_network(num_dropped=num_dropped)
    heads[2][1] = -5.0  # a negative weight counts as zero
    a, b = latents(1), latents(2)
    found = LatentLPIPS(vgg, heads)(a, b)
    expected = reference(vgg, heads, a, b)
    assert found.shape == (3,) and float(expected.min()) > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_distance_is_zero_for_equal_latents_symmetric_and_never_negative() -> None:
    distance = LatentLPIPS(*random_network())
    a, b = latents(1), latents(2)
    assert torch.equal(distance(a, a), torch.zeros(3))
    torch.testing.assert_close(distance(a, b), distance(b, a), rtol=1e-6, atol=1e-7)
    near = distance(a, a + 1e-3 * b)
    assert bool((near >= 0).all()) and bool((near < 0.1 * distance(a, b)).all())
    torch.testing.assert_close(distance(a, b)[1:2], distance(a[1:2], b[1:2]))
    assert torch.isfinite(
        distance(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16) + 1e-20)
    ).all()


@pytest.mark.parametrize("ensembled", [False, True])
def test_gradient_matches_finite_differences_and_reaches_only_the_first_input(
    ensembled: bool,
) -> None:
    vgg, heads = random_network()
    distance = ELatentLPIPS(vgg, heads) if ensembled else LatentLPIPS(vgg, heads)

    def value(x: Tensor) -> Tensor:
        return distance(x, b, rng(4)).sum()

    a, b = latents(1).requires_grad_(), latents(2).requires_grad_()
    value(a).backward()
    assert a.grad is not None and b.grad is None
    assert all(p.grad is None for p in vgg.parameters())

    # Along random directions
    step = 1e-3
    for seed in range(3):
        direction = latents(10 + seed)
        with torch.no_grad():
            forward, backward = value(a + step * direction), value(a - step * direction)
        slope = float(forward - backward) / (2 * step)
        assert float((a.grad * direction).sum()) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_distance_has_no_trainable_state() -> None:
    """Whatever an outer module does: no parameters, batch norm in eval mode, the same values."""
    distance = LatentLPIPS(*random_network())
    outer = nn.ModuleDict({"distance": distance, "student": nn.Linear(1, 1)})
    a, b = latents(1), latents(2)
    before = distance(a, b)
    assert [name for name, _ in outer.named_parameters()] == ["student.weight", "student.bias"]
    assert list(distance.state_dict()) == []
    outer.train().requires_grad_(True)
    for _ in range(2):
        assert torch.equal(distance(a, b), before)
    assert not distance(a, b).requires_grad
    assert torch.equal(copy.deepcopy(distance)(a, b), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_distance_moves_to_another_dtype_and_device(dtype: torch.dtype) -> None:
    vgg, heads = random_network()
    a, b = latents(1), latents(2)
    expected = reference(vgg, heads, a, b)
    distance = LatentLPIPS(vgg, heads).to(dtype)
    found = distance(a, b)
    torch.testing.assert_close(
        found.double(), expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    torch.testing.assert_close(distance(a.to(dtype), b.to(dtype)), found, rtol=0.05, atol=1e-5)

    # The ensembled distance, and another device
    assert ELatentLPIPS(*random_network()).to(dtype)(a, b, rng()).shape == (3,)
    meta = LatentLPIPS(*random_network()).to("meta")(a.to("meta"), b.to("meta"))
    assert meta.device.type == "meta" and meta.shape == (3,)


@pytest.mark.parametrize("transforms", ["blit", "geometric", "color", "cutout", "geometric+cutout"])
def test_both_sides_get_the_same_transform_and_each_sample_its_own(transforms: str) -> None:
    distance = ELatentLPIPS(*random_network(), transforms=transforms)
    a, b = latents(1), latents(2)
    assert torch.equal(distance(a, a), torch.zeros(3))
    assert torch.equal(distance(a, b, rng(1)), distance(a, b, rng(1)))
    assert not torch.equal(distance(a, b, rng(1)), distance(a, b, rng(2)))
    generator = rng(1)
    assert not torch.equal(distance(a, b, generator), distance(a, b, generator))
    values = distance(a[:1].expand(4, -1, -1, -1), b[:1].expand(4, -1, -1, -1), rng())
    assert len(set(values.tolist())) == 4


def test_ensembled_distance_without_families_is_latent_lpips() -> None:
    vgg, heads = random_network()
    a, b = latents(1), latents(2)
    plain = LatentLPIPS(vgg, heads)(a, b)
    torch.testing.assert_close(ELatentLPIPS(vgg, heads, transforms="", num_draws=3)(a, b), plain)


def test_ensembled_distance_with_zero_strengths_is_latent_lpips() -> None:
    """All strengths zero: the same value. One that is not zero: another value."""
    network, a, b = random_network(), latents(1), latents(2)
    zero = Strengths(**dict.fromkeys(asdict(Strengths()), 0.0))
    still = ELatentLPIPS(*network, "geometric+color+cutout", strengths=zero)
    torch.testing.assert_close(
        still(a, b, rng()), LatentLPIPS(*network)(a, b), rtol=1e-4, atol=1e-5
    )
    moved = ELatentLPIPS(*network, "geometric+color+cutout", strengths=replace(zero, translate=0.3))
    assert not torch.allclose(moved(a, b, rng()), still(a, b, rng()), rtol=1e-2)


def test_draws_are_averaged() -> None:
    vgg, heads = random_network()
    a, b = latents(1), latents(2)
    one, three = ELatentLPIPS(vgg, heads), ELatentLPIPS(vgg, heads, num_draws=3)
    generator = rng(7)
    singles = torch.stack([one(a, b, generator) for _ in range(3)])
    torch.testing.assert_close(three(a, b, rng(7)), singles.mean(0))
    with pytest.raises(UserError, match="num_draws = 0"):
        ELatentLPIPS(vgg, heads, num_draws=0)


def test_wrong_shapes_and_unknown_families_are_refused() -> None:
    distance = LatentLPIPS(*random_network())
    with pytest.raises(UserError, match=r"\(3, 4, 16, 16\) and \(3, 4, 8, 8\)"):
        distance(latents(0), latents(0, size=8))
    for bad in (torch.zeros(1, 3, 16, 16), torch.zeros(4, 16, 16)):
        with pytest.raises(UserError, match=r"this network reads \[B, 4, h, w\]"):
            distance(bad, bad)
    with pytest.raises(UserError, match="'cutot'; did you mean 'cutout'"):
        ELatentLPIPS(*random_network(), transforms="cutot")


def test_latents_that_are_not_finite_too_small_or_float16_networks_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    distance = LatentLPIPS(*random_network())
    a, b = latents(1), latents(2)
    bad = a.clone()
    bad[1, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match=r"the first latents are not finite .* rows \[1\]"):
        distance(bad, b)
    with pytest.raises(UserError, match=r"the second latents are not finite .* rows \[1\]"):
        ELatentLPIPS(*random_network())(b, bad)

    # Too small, float16 network
    with pytest.raises(UserError, match=r"latents of 2×2: this network needs 4×4"):
        distance(latents(0, size=2), latents(1, size=2))
    with pytest.raises(UserError, match="float16 on a CPU"):
        LatentLPIPS(*random_network()).half()(a, b)

    # float16 latents are accepted
    torch.testing.assert_close(
        distance(a.half(), b.half()), distance(a.half().float(), b.half().float())
    )
    assert capsys.readouterr().err == ""


def test_unscaled_latents_are_warned_about_once(capsys: pytest.CaptureFixture[str]) -> None:
    distance = LatentLPIPS(*random_network())
    distance(latents(1), latents(2))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        distance(latents(1), latents(2) / 0.18215)
    message = " ".join(capsys.readouterr().err.split())
    assert message.count("standard deviation of 5.5, far from 1") == message.count("warning") == 1
    assert "latents × scaling_factor" in message


@pytest.mark.parametrize("ensembled", [False, True])
def test_compiles_to_one_graph_with_the_eager_values_and_gradients(ensembled: bool) -> None:
    """A graph break, as by an operation that waits for the host, would raise."""
    vgg, heads = random_network()
    distance = LatentLPIPS(vgg, heads)
    if ensembled:
        distance = ELatentLPIPS(vgg, heads, transforms="+".join(TRANSFORM_FAMILIES), num_draws=2)
    compiled = torch.compile(distance, fullgraph=True, backend="aot_eager")
    a, b = latents(1).requires_grad_(), latents(2)

    def value_and_gradient(function: Callable[..., Tensor], seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        value = function(a, b)
        (gradient,) = torch.autograd.grad(value.sum(), a)
        return value.detach(), gradient

    for seed in (5, 6):
        value, gradient = value_and_gradient(compiled, seed)
        expected_value, expected_gradient = value_and_gradient(distance, seed)
        torch.testing.assert_close(value, expected_value)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
        assert float(gradient.abs().sum()) > 0

    # Transforms are drawn in every call, not stored in the graph
    if ensembled:
        assert not torch.equal(compiled(a, b), compiled(a, b))


def test_target_grad_gives_the_second_input_a_gradient() -> None:
    vgg, heads = random_network()
    a, b = latents(1).requires_grad_(), latents(2).requires_grad_()
    LatentLPIPS(vgg, heads, target_grad=True)(a, b).sum().backward()
    assert a.grad is not None and b.grad is not None
    first = a.grad.clone(), b.grad.clone()

    # The distance is symmetric, and so are its gradients
    a.grad = b.grad = None
    LatentLPIPS(vgg, heads)(
        b, a
    ).sum().backward()  # the distance is symmetric, and so are its gradients
    assert a.grad is None and b.grad is not None
    torch.testing.assert_close(b.grad, first[1])
    with torch.no_grad():
        assert not LatentLPIPS(vgg, heads, target_grad=True)(a, b).requires_grad


def test_transforms_and_heads_stay_in_float32() -> None:
    """Under autocast, and in a module cast to bfloat16: only the network is in bfloat16."""
    vgg, heads = random_network()
    received: list[Tensor] = []
    distance = ELatentLPIPS(
        vgg, [head / 3 for head in heads], transforms="+".join(TRANSFORM_FAMILIES)
    ).bfloat16()
    for found, head in zip(distance._frozen[1], heads, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, head / 3)

    # Record what the network receives, without autocast and with it
    a, b = latents(1), latents(2)
    distance.features = lambda x: received.append(x) or [x]  # type: ignore[method-assign,assignment,func-returns-value]
    distance._frozen = (distance._frozen[0], [torch.ones(4)])
    plain = distance(a, b, rng(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a, b, rng(3)), plain)
    assert all(x.dtype == torch.float32 for x in received)

    # Each time the transformed target, then the transformed input
    drawn = draw_transform(3, TRANSFORM_FAMILIES, rng(3))
    expected = [apply_transform(x, drawn) for x in (b, a, b, a)]
    assert all(torch.equal(x, e) for x, e in zip(received, expected, strict=True))


@pytest.mark.parametrize("inside", [True, False])
def test_eps_inside_or_outside_the_root(inside: bool) -> None:
    f = torch.randn(2, 5, 3, 3, generator=rng()) * 0.1
    length = f.double().square().sum(1, keepdim=True)
    expected = f / (length + 0.01).sqrt() if inside else f / (length.sqrt() + 0.01)
    torch.testing.assert_close(
        normalize_features(f, 0.01, inside).double(), expected.double(), rtol=1e-5, atol=1e-7
    )


def test_eps_outside_the_root_has_the_formulas_gradient_at_zero_too() -> None:
    """f/(|f| + eps): the values are those of the plain formula, the slope at zero is 1/eps."""
    f = torch.randn(2, 5, 3, 3, generator=rng())
    f[0, :, 0, 0] = 0
    x = f.clone().requires_grad_()
    normalized = normalize_features(x, 0.01, eps_inside=False)
    assert torch.equal(normalized, f / (f.square().sum(1, keepdim=True).sqrt() + 0.01))

    (gradient,) = torch.autograd.grad(normalized.sum(), x)
    at_zero = torch.full((5,), 100.0)
    torch.testing.assert_close(gradient[0, :, 0, 0], at_zero)
    plain = f.double().requires_grad_()
    length = plain.square().sum(1, keepdim=True).sqrt()
    (expected,) = torch.autograd.grad((plain / (length + 0.01)).sum(), plain)
    assert expected[0, :, 0, 0].isnan().all()
    expected[0, :, 0, 0] = at_zero
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [LatentLPIPS, ELatentLPIPS])
def test_l1_is_added_to_the_untransformed_latents(make: type[LatentLPIPS]) -> None:
    vgg, heads = random_network()
    a, b = latents(1).requires_grad_(), latents(2).requires_grad_()
    plain = make(vgg, heads)(a, b, rng())
    found = make(vgg, heads, l1_weight=0.5)(a, b, rng())
    expected = plain + 0.5 * (a - b).abs().sum((1, 2, 3)) / (4 * 16 * 16)
    torch.testing.assert_close(found, expected)

    # The target is constant unless target_grad
    assert torch.autograd.grad(found.sum(), b, allow_unused=True) == (None,)
    with_target = make(vgg, heads, l1_weight=0.5, target_grad=True)(a, b, rng())
    assert torch.autograd.grad(with_target.sum(), b)[0].abs().max() > 0
    for weight in (-1.0, float("nan")):
        with pytest.raises(UserError, match=f"l1_weight = {weight}"):
            make(vgg, heads, l1_weight=weight)


def test_a_feature_map_after_its_pool_is_the_pooled_map() -> None:
    vgg, _ = random_network(num_dropped=3)
    before = vgg(latents(0))
    after_pool = VGG(4, WIDTHS, 3, tapped_after_pool=(4, 5))
    after_pool.load_state_dict(vgg.state_dict())

    found = after_pool.eval()(latents(0))
    for level in range(3):
        assert torch.equal(found[level], before[level])
    for level in (3, 4):
        assert torch.equal(found[level], nn.functional.max_pool2d(before[level], 2))
    assert (vgg.smallest_side, after_pool.smallest_side) == (2, 4)
    with pytest.raises(
        UserError, match="stage 3 has no pool; the stages that keep theirs are 4 … 5"
    ):
        VGG(4, WIDTHS, 3, tapped_after_pool=(3,))


def test_a_saved_network_gives_the_same_distance_after_loading(tmp_path: Path) -> None:
    distance = LatentLPIPS(*random_network())
    distance.save_pretrained(tmp_path / "full")
    a, b = latents(1), latents(2)
    assert torch.equal(LatentLPIPS.from_pretrained(tmp_path / "full")(a, b), distance(a, b))

    # Options of the ensembled distance
    loaded = ELatentLPIPS.from_pretrained(tmp_path / "full", transforms="cutout", num_draws=2)
    assert isinstance(loaded, ELatentLPIPS) and (loaded.transforms.families, loaded.num_draws) == (
        ("cutout",),
        2,
    )

    # All settings of the network and its formula
    other = LatentLPIPS(
        VGG(4, WIDTHS, 3, (5,), num_groups=4), random_network()[1], eps=1e-3, eps_inside=False
    )
    other.save_pretrained(tmp_path / "other", note="Not calibrated.")
    assert torch.equal(LatentLPIPS.from_pretrained(tmp_path / "other")(a, b), other(a, b))
    card = (tmp_path / "other" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusion2gan") and "GroupNorm (4 groups)" in card
    assert "Not calibrated." in card and "ELatentLPIPS.from_pretrained" in card

    # Half precision
    distance.save_pretrained(tmp_path / "half", torch.float16)
    half = LatentLPIPS.from_pretrained(tmp_path / "half")(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, distance(a, b), rtol=2e-2, atol=1e-3)


def test_missing_damaged_or_mismatched_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*config\.json"):
        LatentLPIPS.from_pretrained(tmp_path)

    # Damaged
    LatentLPIPS(*random_network()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(Failure, match="damaged"):
        LatentLPIPS.from_pretrained(tmp_path)

    # Of another network
    other = VGG(4, (8, 8, 8, 8, 9), 2)
    LatentLPIPS(other, random_network()[1]).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", weights)
    with pytest.raises(
        UserError, match=r"stages\.4\.0\.weight is \[9, 8, 3, 3\], \[8, 8, 3, 3\] is expected"
    ):
        LatentLPIPS.from_pretrained(tmp_path)

    # No settings
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="it contains no settings"):
        LatentLPIPS.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    weights.unlink()
    with pytest.raises(UserError, match=r"no such file: .*model\.safetensors"):
        LatentLPIPS.from_pretrained(tmp_path)
