"""The adversarial losses against float64 closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion2gan.adversarial.discriminator import DiffusionDiscriminator
from diffusion2gan.adversarial.losses import (
    discriminator_loss,
    mix_and_match,
    r1_penalty,
    student_loss,
)
from diffusion2gan.teacher.conditioning import Conditioning

HEADS = [
    torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(size))
    for size in (1, 2, 4)
]
OTHER = [3 * x.flip(0) - 1 for x in HEADS]
COND = Conditioning(torch.zeros(1, 2, 12))


def softplus(logits: list[Tensor], sign: int) -> float:
    """The mean over heads of the means of log(1 + e^(sign·x)), in Python's own floats."""
    means = [[math.log1p(math.exp(sign * value)) for value in x.flatten().tolist()] for x in logits]
    return sum(sum(values) / len(values) for values in means) / len(means)


def test_the_pair_is_non_saturating() -> None:
    assert float(discriminator_loss(HEADS, OTHER)) == pytest.approx(
        softplus(HEADS, -1) + softplus(OTHER, 1), rel=1e-6
    )
    assert float(student_loss(OTHER)) == pytest.approx(softplus(OTHER, -1), rel=1e-6)
    zeros = [torch.zeros(2, 1, 3, 3)]
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))


def test_each_head_counts_alike_whatever_its_grid_and_batch_order_does_not() -> None:
    big = [x.repeat_interleave(2, -1).repeat_interleave(3, -2) for x in HEADS]
    assert float(student_loss(big)) == pytest.approx(float(student_loss(HEADS)))
    assert float(student_loss([x.flip(0) for x in HEADS[::-1]])) == pytest.approx(
        float(student_loss(HEADS))
    )


def test_gradients_point_the_right_way_and_are_large_where_the_student_loses() -> None:
    real, fake = (torch.full((1, 1, 1, 1), value, requires_grad=True) for value in (-2.0, -9.0))
    discriminator_loss([real], [fake]).backward()
    assert real.grad is not None and fake.grad is not None and real.grad < 0 < fake.grad
    (gradient,) = torch.autograd.grad(student_loss([fake]), fake)
    assert float(gradient) == pytest.approx(-1 / (1 + math.exp(-9)))  # saturating: −e⁻⁹


def test_large_logits_stay_finite_and_half_precision_is_left() -> None:
    assert (
        float(discriminator_loss([torch.full((1, 1, 1, 1), -1e4)], [torch.full((1, 1, 1, 1), 1e4)]))
        == 2e4
    )
    assert student_loss([HEADS[0].bfloat16()]).dtype == torch.float32


def test_r1_of_a_linear_discriminator_is_its_weights_length() -> None:
    """D_h(x) = Σ w_h·x at one place and x·u at all: ‖∇ΣD‖² = ‖w_1 + w_2 + u‖², whatever x."""
    generator = torch.Generator().manual_seed(0)
    w1, w2, u = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=generator).requires_grad_()

    def linear(noise: Tensor, cond: Conditioning, x: Tensor) -> list[Tensor]:
        dots = [(w * x).sum((1, 2, 3)).view(-1, 1, 1, 1) for w in (w1, w2)]
        return [*dots, (u * x).sum(1, keepdim=True)]

    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    penalty = r1_penalty(linear, x, COND, x)
    torch.testing.assert_close(penalty, (w1 + w2 + u).square().sum(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(penalty, w1)
    torch.testing.assert_close(gradient, 2 * (w1 + w2 + u), rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def trained() -> DiffusionDiscriminator:
    """A small discriminator with attention at each grid, in float64, nothing of it zero."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        )
        made = DiffusionDiscriminator(unet).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return made


def point(batch: int = 1) -> tuple[Tensor, Conditioning, Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise, latents = torch.randn(2, batch, 4, 4, 4, dtype=torch.float64, generator=generator)
    return (
        noise,
        Conditioning(torch.randn(batch, 3, 12, dtype=torch.float64, generator=generator)),
        latents,
    )


def test_r1_is_finite_differences(trained: DiffusionDiscriminator) -> None:
    noise, cond, latents = point()
    step, size = 1e-5, latents.numel()
    moves = step * torch.eye(size, dtype=torch.float64).reshape(size, *latents.shape[1:])

    def totals(x: Tensor) -> Tensor:
        many = len(x)
        with torch.no_grad():
            logits = trained(
                noise.expand(many, -1, -1, -1),
                Conditioning(cond.prompt_embeds.expand(many, -1, -1)),
                x,
            )
        return sum((x.sum((1, 2, 3)) for x in logits), torch.zeros(many))

    slopes = (totals(latents + moves) - totals(latents - moves)) / (2 * step)
    penalty = float(r1_penalty(trained, noise, cond, latents).detach())
    assert penalty == pytest.approx(float(slopes.square().sum()), rel=1e-6) and penalty > 0


def test_its_gradient_in_the_weights_is_finite_differences_too(
    trained: DiffusionDiscriminator,
) -> None:
    """The double backward, through attention: along a random direction in all weights."""
    noise, cond, latents = point()
    parameters = list(trained.parameters())
    gradients = torch.autograd.grad(
        r1_penalty(trained, noise, cond, latents), parameters, allow_unused=True
    )
    generator, step = torch.Generator().manual_seed(3), 1e-6
    direction = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters]
    expected = sum(
        float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None
    )
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=sign * step)
        values.append(float(r1_penalty(trained, noise, cond, latents).detach()))
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=-sign * step)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-4)


def test_r1_averages_over_samples_and_leaves_the_latents_alone(
    trained: DiffusionDiscriminator,
) -> None:
    noise, cond, latents = point(2)
    latents.requires_grad_()
    whole = r1_penalty(trained, noise, cond, latents)
    halves = [
        r1_penalty(trained, noise[i], cond.rows(i), latents[i]) for i in (slice(0, 1), slice(1, 2))
    ]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    whole.backward()
    assert latents.grad is None


def pairs_of(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Fakes −1, −2, …; reals 1, 2, …: a number tells where it is from."""
    real = torch.arange(1.0, len(prompts) + 1).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).contiguous()
    return -real, real


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "prompts", [list("abcdefgh"), list("aaaabbbc"), list("aaaaaaab"), list("abababab")]
)
def test_what_is_mixed_in_is_real_and_never_right(prompts: list[str]) -> None:
    fake, real = pairs_of(prompts)
    before = fake.clone()
    for seed in range(60):
        mixed_fake, mixed = mix_and_match(fake, real, prompts, 0.7, generator(seed))
        for row, prompt in enumerate(prompts):
            value = float(mixed_fake[row].unique().item())
            assert value == -(row + 1) if not mixed[row] else prompts[int(value) - 1] != prompt
    assert torch.equal(fake, before)


def test_the_share_is_right_on_average_and_donors_differ() -> None:
    prompts = list("abcdefg")
    fake, real = pairs_of(prompts)
    made = [mix_and_match(fake, real, prompts, 0.3, generator(seed)) for seed in range(400)]
    counts = torch.stack([mixed for _, mixed in made]).double()
    assert set(counts.sum(1).tolist()) == {2.0, 3.0}
    assert counts.mean().item() == pytest.approx(0.3, abs=0.015)
    assert counts.mean(0).tolist() == pytest.approx([0.3] * 7, abs=0.09)
    donors = [float(latents[0, 0, 0, 0]) for latents, mixed in made if mixed[0]]
    assert {donors.count(float(d)) > 5 for d in range(2, 8)} == {True} and 1.0 not in donors


def test_one_generator_one_mix_and_none_where_none_fits() -> None:
    prompts = list("abca")
    fake, real = pairs_of(prompts)
    a, b = (mix_and_match(fake, real, prompts, 0.5, generator(7)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for names, share in ((["a"] * 4, 0.9), (["a"], 0.9), (prompts, 0.0)):
        fake, real = pairs_of(names)
        same, mixed = mix_and_match(fake, real, names, share, generator())
        assert torch.equal(same, fake) and not mixed.any()
