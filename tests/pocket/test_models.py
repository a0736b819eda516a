"""The pocket models: they save, load and fit together; the attributes' targets and loss."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from diffusion2gan.pocket import models, scenes
from diffusion2gan.pocket.train import attribute_loss, attribute_targets

NAMES = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS), "pattern": scenes.PATTERNS}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return models.tokenizer()


@pytest.fixture(scope="module")
def batch() -> scenes.Scenes:
    return scenes.draw(range(200), seed=2, image_size=4)


def test_every_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    ids = {word: tokenizer(word).input_ids for word in scenes.WORDS}
    assert all(len(found) == 3 for found in ids.values())
    assert len({found[1] for found in ids.values()}) == len(scenes.WORDS)
    ends = {(found[0], found[2]) for found in ids.values()}
    assert ends == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}


def test_captions_have_one_token_per_word(tokenizer: CLIPTokenizer, batch: scenes.Scenes) -> None:
    for caption in batch.captions:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(re.findall(r"[a-z]+|,", caption)) + 2 <= models.MAX_LENGTH
        assert (
            tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",").split()
            == caption.split()
        )


def test_other_words_are_split_into_characters(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("zebra 42 Ring!").input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)[1:-1]
    assert "".join(pieces) == "zebra</w>4</w>2</w>ring</w>!</w>" and "ring</w>" in pieces
    assert len(tokenizer("zebra").input_ids) > 3
    known = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert not known & set(ids[1:-1])


def test_a_saved_tokenizer_gives_the_same_tokens(
    tokenizer: CLIPTokenizer, batch: scenes.Scenes, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(tokenizer) and loaded.model_max_length == models.MAX_LENGTH
    texts = [*batch.captions[:40], "zebra", ""]
    padded = dict(padding="max_length", max_length=models.MAX_LENGTH, truncation=True)
    assert loaded(texts, **padded).input_ids == tokenizer(texts, **padded).input_ids


def test_text_encoder_and_tokenizer_have_the_same_special_tokens(tokenizer: CLIPTokenizer) -> None:
    config = models.text_encoder(len(tokenizer)).config
    assert (config.bos_token_id, config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    assert config.pad_token_id == tokenizer.pad_token_id and config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings == models.MAX_LENGTH


def test_a_saved_pipeline_generates_the_same_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = models.pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)

    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    images = []
    for pipe in (pipeline, loaded):
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad():
            out = pipe(
                ["a red ring", "a blue star on pink"],
                latents=noise.clone(),
                num_inference_steps=2,
                guidance_scale=3.0,
                output_type="pt",
            )
        images.append(out.images)

    assert type(loaded).__name__ == "StableDiffusionPipeline"
    assert images[0].shape == (2, 3, 64, 64) and torch.equal(*images)
    assert (images[0][0] - images[0][1]).abs().max() > 0


def test_latents_are_4_by_16_by_16() -> None:
    torch.manual_seed(0)
    vae, unet = models.vae(), models.unet()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, 4, 16, 16)
        assert vae.decode(latents).sample.shape == (1, 3, 64, 64)
        assert (
            unet(latents, 999, torch.zeros(1, models.MAX_LENGTH, 96)).sample.shape == latents.shape
        )
    assert (unet.config.in_channels, unet.config.sample_size) == (4, 16)


def test_the_schedule_is_that_of_stable_diffusion() -> None:
    """√β is linear from √0.00085 to √0.012; the first of any number of steps is at timestep 999."""
    scheduler = models.scheduler()
    beta = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), (1 - beta).cumprod(0), rtol=1e-4, atol=1e-7
    )
    for steps in (1, 4, 50):
        scheduler.set_timesteps(steps)
        assert int(scheduler.timesteps[0]) == 999 and len(scheduler.timesteps) == steps


def test_clip_and_vgg_shapes(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        clip = models.clip(len(tokenizer)).eval()
        ids = tokenizer(
            ["a red ring", "a disc"],
            padding="max_length",
            max_length=models.MAX_LENGTH,
            return_tensors="pt",
        )
        out = clip(input_ids=ids.input_ids, pixel_values=torch.zeros(2, 3, 64, 64))
        assert out.logits_per_image.shape == (2, 2) and out.image_embeds.shape == (2, 128)

        maps = models.latent_vgg().eval()(torch.zeros(2, 4, 16, 16))
        assert [m.shape[2] for m in maps] == [16, 16, 16, 8, 4]


def test_split_logits_separates_the_attributes() -> None:
    sizes = {
        "count": 3,
        "ground": 7,
        "shape": 8,
        "colour": 8,
        "pattern": 4,
        "shape_colour": 64,
        "shape_pattern": 32,
    }
    torch.manual_seed(0)
    logits = models.Probe().eval()(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, sum(sizes.values()))

    by_attribute = models.split_logits(logits)
    assert {name: part.shape[1] for name, part in by_attribute.items()} == sizes
    assert torch.equal(torch.cat(list(by_attribute.values()), 1), logits)


def test_attribute_targets_against_a_plain_loop(batch: scenes.Scenes) -> None:
    targets = attribute_targets(batch)
    assert set(targets) == set(models.ATTRIBUTES)
    for i in range(200):
        objects = [
            tuple(int(label[i, k]) for label in (batch.shape, batch.colour, batch.pattern))
            for k in range(int(batch.count[i]))
        ]
        assert (
            int(targets["count"][i]) == len(objects) - 1 and targets["ground"][i] == batch.ground[i]
        )

        expected = {
            "shape": {s for s, _, _ in objects},
            "colour": {c for _, c, _ in objects},
            "pattern": {p for _, _, p in objects},
            "shape_colour": {8 * s + c for s, c, _ in objects},
            "shape_pattern": {4 * s + p for s, _, p in objects},
        }
        for name, classes in expected.items():
            row = targets[name][i]
            assert len(row) == models.ATTRIBUTES[name]
            assert set(row.nonzero()[:, 0].tolist()) == classes, name
            assert row.sum() == len(classes), name


def perfect_logits(targets: dict[str, Tensor], size: float) -> Tensor:
    """Logits of ±`size`, all with the correct sign."""
    logits = []
    for name, num_classes in models.ATTRIBUTES.items():
        table = targets[name]
        if table.ndim == 1:
            table = torch.nn.functional.one_hot(table, num_classes).float()
        logits.append(size * (2 * table - 1))
    return torch.cat(logits, 1)


def test_attribute_loss_of_zero_logits(batch: scenes.Scenes) -> None:
    """ln 3 + ln 7, and ln 2 per class of the other attributes."""
    loss = attribute_loss(torch.zeros(200, 126), attribute_targets(batch))
    assert float(loss) == pytest.approx(
        math.log(3) + math.log(7) + (8 + 8 + 4 + 64 + 32) * math.log(2), rel=1e-5
    )


def test_attribute_loss_of_correct_and_wrong_logits(batch: scenes.Scenes) -> None:
    targets = attribute_targets(batch)
    logits = perfect_logits(targets, 30.0)
    assert float(attribute_loss(logits, targets)) == pytest.approx(0, abs=1e-6)

    # One wrong class in one image of 200 costs softplus(30) / 200, for each of the attributes
    for column in (3 + 7, 3 + 7 + 8, 3 + 7 + 16, 3 + 7 + 20, 125):
        wrong = logits.clone()
        wrong[5, column] *= -1
        assert float(attribute_loss(wrong, targets)) == pytest.approx(30 / 200, rel=1e-4)

    # Exchanging two logits of a softmax costs their difference
    wrong = logits.clone()
    right, other = int(targets["count"][5]), (int(targets["count"][5]) + 1) % 3
    wrong[5, [right, other]] = wrong[5, [other, right]]
    assert float(attribute_loss(wrong, targets)) == pytest.approx(60 / 200, rel=1e-4)


def test_attribute_loss_matches_float64(batch: scenes.Scenes) -> None:
    """Random logits, with the formulas written out."""
    targets = attribute_targets(batch)
    logits = torch.randn(200, 126, generator=torch.Generator().manual_seed(0))
    expected, start = 0.0, 0
    for name, num_classes in models.ATTRIBUTES.items():
        z, t = logits[:, start : start + num_classes].double(), targets[name]
        start += num_classes
        if t.ndim == 1:
            expected += float((z.exp().sum(1).log() - z[torch.arange(200), t]).mean())
        else:
            p = 1 / (1 + (-z).exp())
            expected += float(-(t * p.log() + (1 - t) * (1 - p).log()).sum(1).mean())
    assert float(attribute_loss(logits, targets)) == pytest.approx(expected, rel=1e-5)
