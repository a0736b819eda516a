"""The adversarial losses against float64 closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffusion2gan.adversarial.discriminator import DiffusionDiscriminator
from diffusion2gan.adversarial.losses import (
    discriminator_loss,
    finite_difference_r1,
    mix_and_match,
    r1_penalty,
    student_loss,
)
from diffusion2gan.teacher.conditioning import Conditioning

# Logits of three heads
REAL = [
    torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(size))
    for size in (1, 2, 4)
]
FAKE = [3 * head.flip(0) - 1 for head in REAL]


def mean_softplus(logits: list[Tensor], sign: int) -> float:
    """The mean over heads of the mean of log(1 + e^(sign·x)), in Python's floats."""
    means = []
    for head in logits:
        values = [math.log1p(math.exp(sign * value)) for value in head.flatten().tolist()]
        means.append(sum(values) / len(values))
    return sum(means) / len(means)


# --- GAN losses ---


def test_losses_are_the_non_saturating_pair() -> None:
    expected = mean_softplus(REAL, -1) + mean_softplus(FAKE, 1)
    assert float(discriminator_loss(REAL, FAKE)) == pytest.approx(expected, rel=1e-6)
    assert float(student_loss(FAKE)) == pytest.approx(mean_softplus(FAKE, -1), rel=1e-6)

    zeros = [torch.zeros(2, 1, 3, 3)]
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))


def test_heads_have_equal_weight_whatever_their_resolution_and_order() -> None:
    expected = pytest.approx(float(student_loss(REAL)))
    enlarged = [head.repeat_interleave(2, -1).repeat_interleave(3, -2) for head in REAL]
    assert float(student_loss(enlarged)) == expected
    reordered = [head.flip(0) for head in REAL[::-1]]
    assert float(student_loss(reordered)) == expected


def test_gradients_have_the_right_sign_and_do_not_vanish_where_the_student_loses() -> None:
    real = torch.full((1, 1, 1, 1), -2.0, requires_grad=True)
    fake = torch.full((1, 1, 1, 1), -9.0, requires_grad=True)
    discriminator_loss([real], [fake]).backward()
    assert real.grad is not None and fake.grad is not None
    assert real.grad < 0 < fake.grad

    # The saturating loss would have −e⁻⁹
    (gradient,) = torch.autograd.grad(student_loss([fake]), fake)
    assert float(gradient) == pytest.approx(-1 / (1 + math.exp(-9)))


def test_large_logits_give_finite_losses_and_half_precision_gives_float32() -> None:
    real = [torch.full((1, 1, 1, 1), -1e4)]
    fake = [torch.full((1, 1, 1, 1), 1e4)]
    assert float(discriminator_loss(real, fake)) == 2e4
    assert student_loss([REAL[0].bfloat16()]).dtype == torch.float32


# --- R1 penalty ---


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_weights() -> None:
    """Two heads Σ w_i·x, with one logit each, and one head x·u per pixel: ‖w_1 + w_2 + u‖²."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 6, 5, dtype=torch.float64, generator=generator)
    w1, w2, u = weights.requires_grad_()

    def linear(noise: Tensor, cond: Conditioning, x: Tensor) -> list[Tensor]:
        first = (w1 * x).sum((1, 2, 3)).view(-1, 1, 1, 1)
        second = (w2 * x).sum((1, 2, 3)).view(-1, 1, 1, 1)
        return [first, second, (u * x).sum(1, keepdim=True)]

    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    penalty = r1_penalty(linear, x, Conditioning(torch.zeros(1, 2, 12)), x)
    expected = (w1 + w2 + u).square().sum()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)

    (gradient,) = torch.autograd.grad(penalty, w1)
    torch.testing.assert_close(gradient, 2 * (w1 + w2 + u), rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def trained() -> DiffusionDiscriminator:
    """A small discriminator with attention at each resolution, in float64; no weight is zero."""
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
        discriminator = DiffusionDiscriminator(unet).double()
        with torch.no_grad():
            for parameter in discriminator.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return discriminator


def make_inputs(batch_size: int = 1) -> tuple[Tensor, Conditioning, Tensor]:
    """(noise, cond, latents), random, in float64."""
    generator = torch.Generator().manual_seed(1)
    noise, latents = torch.randn(2, batch_size, 4, 4, 4, dtype=torch.float64, generator=generator)
    embeds = torch.randn(batch_size, 3, 12, dtype=torch.float64, generator=generator)
    return noise, Conditioning(embeds), latents


def test_r1_by_finite_differences_is_r1_along_one_direction(
    trained: DiffusionDiscriminator,
) -> None:
    """Its sum over an orthonormal basis is ‖∇_x ΣD‖², and so are its gradients."""
    noise, cond, latents = make_inputs()
    parameters = list(trained.parameters())
    penalty = r1_penalty(trained, noise, cond, latents)
    # The biases of the last layers do not change a derivative
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(penalty, parameters, **options)

    size = latents.numel()
    random = torch.randn(size, size, dtype=torch.float64, generator=make_generator())
    basis = torch.linalg.qr(random)[0]
    estimate = torch.zeros((), dtype=torch.float64)
    for direction in basis.view(size, *latents.shape):
        estimate = estimate + finite_difference_r1(trained, noise, cond, latents, direction)
    found = torch.autograd.grad(estimate, parameters, **options)
    torch.testing.assert_close(estimate, penalty, rtol=1e-3, atol=0)
    for gradient, expected_gradient in zip(found, expected, strict=True):
        error = (gradient - expected_gradient).norm()
        assert error <= 2e-3 * expected_gradient.norm() + 1e-9

    # Two samples: the mean
    noise, cond, latents = make_inputs(2)
    direction = basis[:2].reshape(latents.shape)
    both = finite_difference_r1(trained, noise, cond, latents, direction)
    single = []
    for row in (slice(0, 1), slice(1, 2)):
        inputs = noise[row], cond.rows(row), latents[row], direction[row]
        single.append(finite_difference_r1(trained, *inputs))
    torch.testing.assert_close(both, torch.stack(single).mean(), rtol=1e-6, atol=0)


def test_r1_matches_finite_differences(trained: DiffusionDiscriminator) -> None:
    noise, cond, latents = make_inputs()
    step = 1e-5
    size = latents.numel()
    moves = step * torch.eye(size, dtype=torch.float64).reshape(size, *latents.shape[1:])

    def sum_of_logits(x: Tensor) -> Tensor:
        """[B] ΣD at each row of x, all with the same noise and prompt."""
        repeated_noise = noise.expand(len(x), -1, -1, -1)
        repeated_cond = Conditioning(cond.prompt_embeds.expand(len(x), -1, -1))
        total = torch.zeros(len(x))
        with torch.no_grad():
            for head in trained(repeated_noise, repeated_cond, x):
                total = total + head.sum((1, 2, 3))
        return total

    slopes = (sum_of_logits(latents + moves) - sum_of_logits(latents - moves)) / (2 * step)
    penalty = float(r1_penalty(trained, noise, cond, latents).detach())
    assert penalty > 0
    assert penalty == pytest.approx(float(slopes.square().sum()), rel=1e-6)


def test_gradient_of_r1_matches_finite_differences(trained: DiffusionDiscriminator) -> None:
    """The double backward pass, through attention: along a random direction in all weights."""
    noise, cond, latents = make_inputs()
    parameters = list(trained.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = []
    for parameter in parameters:
        noise_like = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        direction.append(noise_like)

    # By autograd
    penalty = r1_penalty(trained, noise, cond, latents)
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    expected = 0.0
    for gradient, part in zip(gradients, direction, strict=True):
        if gradient is not None:
            expected += float((gradient * part).sum())

    # By finite differences
    def penalty_at(step: float) -> float:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        value = float(r1_penalty(trained, noise, cond, latents).detach())
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=-step)
        return value

    step = 1e-6
    slope = (penalty_at(step) - penalty_at(-step)) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-4)


def test_r1_is_the_mean_over_samples_and_gives_the_latents_no_gradient(
    trained: DiffusionDiscriminator,
) -> None:
    noise, cond, latents = make_inputs(2)
    latents.requires_grad_()
    penalty = r1_penalty(trained, noise, cond, latents)

    first, second = slice(0, 1), slice(1, 2)
    first_penalty = r1_penalty(trained, noise[first], cond.rows(first), latents[first])
    second_penalty = r1_penalty(trained, noise[second], cond.rows(second), latents[second])
    torch.testing.assert_close(penalty, (first_penalty + second_penalty) / 2)

    penalty.backward()
    assert latents.grad is None


# --- Mix-and-match ---


def make_latents(num_pairs: int) -> tuple[Tensor, Tensor]:
    """Fakes that are −1, −2, … and reals that are 1, 2, …: the value identifies the pair."""
    values = torch.arange(1.0, num_pairs + 1).view(-1, 1, 1, 1)
    real = values.expand(-1, 2, 3, 3).contiguous()
    return -real, real


def make_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "prompts", [list("abcdefgh"), list("aaaabbbc"), list("aaaaaaab"), list("abababab")]
)
def test_mixed_rows_are_real_latents_of_another_prompt(prompts: list[str]) -> None:
    fake, real = make_latents(len(prompts))
    fake_before = fake.clone()
    for seed in range(60):
        latents, is_mixed = mix_and_match(fake, real, prompts, 0.7, make_generator(seed))
        for row, prompt in enumerate(prompts):
            value = float(latents[row].unique().item())
            if is_mixed[row]:
                donor = int(value) - 1
                assert prompts[donor] != prompt
            else:
                assert value == -(row + 1)
    assert torch.equal(fake, fake_before)


def test_share_is_right_on_average_and_every_other_pair_is_a_donor() -> None:
    prompts = list("abcdefg")
    fake, real = make_latents(len(prompts))
    rows = []
    donors_of_first_row = []
    for seed in range(400):
        latents, is_mixed = mix_and_match(fake, real, prompts, 0.3, make_generator(seed))
        rows.append(is_mixed)
        if is_mixed[0]:
            donors_of_first_row.append(float(latents[0, 0, 0, 0]))

    # 0.3 of 7 rows is 2.1
    mixed = torch.stack(rows).double()
    assert set(mixed.sum(1).tolist()) == {2.0, 3.0}
    assert mixed.mean().item() == pytest.approx(0.3, abs=0.015)
    assert mixed.mean(0).tolist() == pytest.approx([0.3] * 7, abs=0.09)

    for donor in range(2, 8):
        assert donors_of_first_row.count(float(donor)) > 5
    assert 1.0 not in donors_of_first_row


def test_mixing_is_a_function_of_the_generator() -> None:
    prompts = list("abca")
    fake, real = make_latents(4)
    latents, is_mixed = mix_and_match(fake, real, prompts, 0.5, make_generator(7))
    same_latents, same_rows = mix_and_match(fake, real, prompts, 0.5, make_generator(7))
    assert torch.equal(latents, same_latents)
    assert torch.equal(is_mixed, same_rows)


@pytest.mark.parametrize("prompts", [list("abcdefgh"), list("aaaabbbc"), list("aaaaaaaa")])
def test_draws_are_those_of_a_table_of_all_pairs(prompts: list[str]) -> None:
    """Version 0.1 computed which pair may donate to which for the full batch."""
    fake, real = make_latents(len(prompts))
    ids = torch.tensor([ord(prompt) for prompt in prompts])
    for seed in range(20):
        generator = make_generator(seed)
        can_donate = ids[:, None] != ids[None, :]
        replaceable = can_donate.any(1).nonzero().flatten()
        count = int(0.6 * len(prompts) + torch.rand((), generator=generator).item())
        rows = replaceable[torch.randperm(len(replaceable), generator=generator)][:count]
        expected = fake.clone()
        if len(rows) > 0:
            weights = can_donate[rows].float()
            donors = torch.multinomial(weights, 1, generator=generator).flatten()
            expected[rows] = real[donors]

        latents, _ = mix_and_match(fake, real, prompts, 0.6, make_generator(seed))
        assert torch.equal(latents, expected)


@pytest.mark.parametrize(("prompts", "share"), [("aaaa", 0.9), ("a", 0.9), ("abca", 0.0)])
def test_nothing_is_mixed_without_another_prompt_or_without_a_share(
    prompts: str, share: float
) -> None:
    fake, real = make_latents(len(prompts))
    latents, is_mixed = mix_and_match(fake, real, list(prompts), share, make_generator())
    assert torch.equal(latents, fake)
    assert not is_mixed.any()
