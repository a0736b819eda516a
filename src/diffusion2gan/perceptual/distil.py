"""`diffusion2gan perceptual distil`: a network on latents that reproduces a distance of images.

Run the same command again to resume. Under torchrun the ranks share the decoding and each batch.

It needs a set of pairs and its VAE, no labels and no judgements. The set's latents and graded
perturbations of them are decoded, and the distances of the decoded images, by a network such as
standard LPIPS, are the targets. Not in the paper, which fits its network to labelled images.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion2gan.errors import UserError
from diffusion2gan.noise import noise_from_seeds
from diffusion2gan.pairs.store import Pairs, PairsSpec, open_set, present_shards, read_shard
from diffusion2gan.perceptual.agreement import choice_agreement, gradient_cosine, rank_correlation
from diffusion2gan.perceptual.augment import NO_TRANSFORMS, TransformSettings, apply_transform
from diffusion2gan.perceptual.checks import LIKELY_STD, check_precision
from diffusion2gan.perceptual.distance import LatentLPIPS, PixelLPIPS, channel_differences
from diffusion2gan.perceptual.perturb import KINDS, WITHOUT_STUDENTS, perturb
from diffusion2gan.perceptual.vgg import STAGES, VGG, WIDTHS, num_dropped_pools
from diffusion2gan.perceptual.weights import network_revision
from diffusion2gan.runtime import trainer
from diffusion2gan.runtime.cache import Cache, Rows, ensure_settings, make_cache
from diffusion2gan.runtime.distributed import Group, connect_ranks, get_ranks, resolve_device
from diffusion2gan.runtime.files import write_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.storage import Location
from diffusion2gan.runtime.transfer import to_device
from diffusion2gan.teacher.autoencoder import (
    decode,
    encode,
    load_vae,
    num_latent_channels,
    spatial_factor,
    vae_revision,
)
from diffusion2gan.teacher.loading import load_teacher

MIN_LATENTS = 200  # with fewer there is too little to learn from and to measure on
HELD_OUT_SHARE = 0.1
MIN_HELD_OUT = 20
NUM_PERTURBATIONS = 8  # of each latent
# The compact network's widths are this share of the full one's: a seventh of the multiply-adds.
COMPACT_SHARE = 3 / 8
# Encoding decoded latents returns them nearly: 0.008 of their variance is lost by the pocket VAE.
# Latents of another VAE, or of another scale, lose more than half.
MAX_ROUND_TRIP_LOSS = 0.25
NUM_CHECKED = 4
CHUNK = 128  # references per file of the cache
LOG_EPS = 1e-3  # in the logarithms of distances, as a share of the mean target
LAYER_WEIGHT = 0.5  # of the layers' differences beside that of the total


@dataclass(frozen=True)
class DistilSettings:
    """`widths`: channels of the five stages; `compact`: a cheaper network, narrower by 3/8.

    `count`: how many of the set's latents are used at most. `batch_size`: latents per step, each
    with its perturbations. `gradient_weight`: of 1 − cosine of the gradients with respect to the
    perturbed latents; 0 leaves them out. `transforms`: random transforms of the latents, the same
    for a latent and its perturbations. `precision`: of the decoder and the network on images; with
    bfloat16 the network in training runs under autocast.
    """

    widths: tuple[int, ...] = WIDTHS
    compact: bool = False
    count: int = 12_500
    epochs: int = 8
    batch_size: int = 8
    peak_lr: float = 2e-3
    gradient_weight: float = 1.0
    transforms: TransformSettings = NO_TRANSFORMS
    precision: str = "float32"
    decode_batch: int = 4
    seed: int = 0

    @property
    def network_widths(self) -> tuple[int, ...]:
        """The widths of the network that is trained."""
        if not self.compact:
            return self.widths
        return tuple(max(1, round(COMPACT_SHARE * width)) for width in self.widths)


class Learner(nn.Module):
    """The network and its heads, `(perturbed [R, K, C, h, w], x [R, C, h, w])` → [R·K, 5].

    Returns the distance of each layer: their sum is LatentLPIPS of the network.
    """

    def __init__(self, vgg: VGG, layer_means: Tensor) -> None:
        super().__init__()
        self.vgg = vgg
        # A layer's channel differences add up to about 1, so it starts near its mean target
        heads = []
        for width, mean in zip(vgg.config["widths"], layer_means.tolist(), strict=True):
            heads.append(nn.Parameter(torch.full((width,), mean)))
        self.heads = nn.ParameterList(heads)

    def forward(self, perturbed: Tensor, x: Tensor) -> Tensor:
        num_perturbations = perturbed.shape[1]
        maps = self.vgg(torch.cat([perturbed.flatten(0, 1), x]))
        perturbed_maps = []
        reference_maps = []
        for feature_map in maps:
            of_perturbed, of_reference = feature_map.split(
                [perturbed[:, :, 0, 0, 0].numel(), len(x)]
            )
            perturbed_maps.append(of_perturbed)
            reference_maps.append(of_reference.repeat_interleave(num_perturbations, 0))
        return layer_distances(
            channel_differences(perturbed_maps, reference_maps), list(self.heads)
        )

    @torch.no_grad()
    def clamp(self) -> None:
        """Projects the heads to w ≥ 0."""
        for head in self.heads:
            head.clamp_(min=0)


def layer_distances(differences: list[Tensor], heads: list[Any]) -> Tensor:
    """Σ_c w_lc · differences_lc per layer: [B, L], whose sum over layers is the distance."""
    layers = []
    for difference, head in zip(differences, heads, strict=True):
        layers.append((difference * head.float()).sum(1))
    return torch.stack(layers, 1)


def distil(
    pairs: Location,
    vae: str,
    source: str,
    out: Path,
    settings: DistilSettings,
    students: list[str] | None = None,
    device: str = "cpu",
) -> dict[str, Any] | None:
    """Trains a network on the latents of `pairs` to reproduce PixelLPIPS by `source` and `vae`.

    `source`: the network on images, a folder or `pocket`. `students`: exported students of the same
    teacher, whose images of the set's noises and prompts are further perturbations. Writes the
    network to `out`, and the held-out agreement to distil.json, which is returned. Under torchrun
    all ranks train one network; all but the main rank return None.

    The state of an interrupted run is in `out/work`, which is not needed once the network is
    written. Raises UserError if set, VAE, network and students do not fit each other.
    """
    # 1. Open the set, the VAE and the network on images, and check that they fit each other
    ranks = get_ranks()
    torch_device = resolve_device(device, "give --device cpu")
    spec = open_set(pairs)
    check_settings(settings, spec, pairs, ranks.world_size)
    decoder = load_vae(vae, torch_device)
    check_latents(pairs, spec, decoder, vae)
    dtype = getattr(torch, settings.precision)
    check_precision(dtype, torch_device)
    target = PixelLPIPS.from_pretrained(source, vae=decoder).to(torch_device, dtype)
    vgg = build_vgg(decoder, spec, settings)
    count = min(settings.count, spec.count)
    num_held_out = max(MIN_HELD_OUT, round(HELD_OUT_SHARE * count))
    work = out / "work"

    with exclusive_lock(out / "model.safetensors") if ranks.is_main else nullcontext():
        with connect_ranks(torch_device) as group:
            # 2. Images of the students
            caches: list[Cache] = []
            for student in students or []:
                folder = work / f"student-{len(caches)}"
                caches.append(
                    cache_student(folder, student, pairs, spec, count, torch_device, group)
                )

            # 3. Perturb, decode and compare every latent once; the last tenth is held out
            targets = Targets(pairs, spec, vae, source, settings, target, caches, torch_device)
            num_trained = count - num_held_out
            wants_gradient = settings.gradient_weight > 0
            train = targets.cache(work / "train", range(num_trained), wants_gradient, group)
            held_out = targets.cache(work / "held_out", range(num_trained, count), True, group)
            ensure_settings(work / "settings.json", describe_training(settings))

            # 4. Train. Seed again: ranks may have used random numbers differently while decoding,
            # and must start from the same network.
            torch.manual_seed(settings.seed + 1)
            layers = train.load_all("layers").flatten(0, 1)  # [R·K, 5]
            learner = Learner(vgg, layers.mean(0)).to(torch_device)
            mean_target = float(layers.sum(1).mean())

            def loss(numbers: range) -> Tensor:
                rows = trainer.shuffled(numbers, num_trained, settings.seed)
                batch = load_batch(train, rows, torch_device)
                with torch.autocast(torch_device.type, dtype, enabled=dtype == torch.bfloat16):
                    return distillation_loss(learner, batch, mean_target, settings.gradient_weight)

            config = trainer.FitConfig(
                num_samples=settings.epochs * num_trained,
                batch_size=settings.batch_size,
                peak_lr=settings.peak_lr,
                seed=settings.seed,
            )
            trainer.fit(
                "distil", learner, loss, config, work, after_step=learner.clamp, group=group
            )

        if not ranks.is_main:
            return None

        # 5. Measure on the held-out latents, beside the mean squared error of the latents
        heads = [head.detach().cpu() for head in learner.heads]
        distance = LatentLPIPS(vgg.cpu(), heads).to(torch_device)
        result: dict[str, Any] = {
            "held_out": measure_agreement(distance, held_out, torch_device),
            "held_out_mse": measure_agreement(MeanSquaredError(), held_out, torch_device),
            "held_out_latents": num_held_out,
            "trained_on": num_trained,
            "perturbations": NUM_PERTURBATIONS,
            "cost": measure_cost(distance, build_vgg(decoder, spec, settings, full=True), spec),
            "widths": list(settings.network_widths),
            "vae": Path(vae).name,
            "from": Path(source).name,
            "num_students": len(caches),
            **describe_training(settings),
        }

        # 6. Write the network
        agreement = result["held_out"]
        note = (
            f"Distilled from a distance of decoded images, without labels. On {num_held_out} "
            f"held-out latents: rank correlation {agreement['rank_correlation']:.3f}, 2AFC "
            f"agreement {agreement['choice_agreement']:.1%}, cosine of gradients "
            f"{agreement['gradient_cosine']:.2f}."
        )
        distance.cpu().save_pretrained(out, note=note)
        write_json(out / "distil.json", result)
        return result


# Checks


def check_settings(
    settings: DistilSettings, spec: PairsSpec, pairs: Location, world_size: int
) -> None:
    """Raises UserError for wrong widths, batches that ranks cannot share, or too few latents."""
    if len(settings.widths) != len(STAGES):
        widths = ",".join(map(str, settings.widths))
        raise UserError(
            f"--widths {widths}: {len(settings.widths)} numbers, but five are needed, one per stage"
        )
    if settings.batch_size % world_size != 0:
        raise UserError(
            f"--batch-size {settings.batch_size}: the {world_size} ranks need the same number of "
            f"latents each; give a multiple of {world_size}"
        )

    # The set
    count = min(settings.count, spec.count)
    if count < MIN_LATENTS:
        limit = "--count" if settings.count < spec.count else f"the set {pairs}"
        raise UserError(
            f"{limit} has {count} latents; at least {MIN_LATENTS} are needed to train on and to "
            "measure on. Make more pairs, or raise --count."
        )
    needed = set(range(-(-count // spec.shard_size)))
    missing = sorted(needed - set(present_shards(pairs, spec)))
    if missing:
        raise UserError(
            f"{pairs} is not complete: {len(missing)} of the {len(needed)} shards with its first "
            f"{count} pairs are missing (first: shard {missing[0]}); run the same `pairs` command "
            "again."
        )


@torch.no_grad()
def check_latents(pairs: Location, spec: PairsSpec, decoder: Any, vae: str) -> None:
    """Raises UserError if the set's latents are not those of the VAE, times its scaling factor.

    Latents of a VAE survive decoding and encoding; those of another one, or unscaled ones, do not.
    """
    channels = num_latent_channels(decoder)
    if spec.latent_shape[0] != channels:
        raise UserError(
            f"the latents in {pairs} have {spec.latent_shape[0]} channels, those of the VAE {vae} "
            f"have {channels}: give the VAE of the set's teacher, {spec.teacher}, with --vae."
        )

    latents = read_shard(pairs, 0, spec=spec).latents
    std = float(latents.std())
    low, high = LIKELY_STD
    if not low <= std <= high:
        raise UserError(
            f"the latents in {pairs} have a standard deviation of {std:.2g}, where {low} to {high} "
            "is plausible: they are not the VAE's latents × scaling_factor, as `pairs` writes them."
        )

    lost = 0.0
    latents = latents[:NUM_CHECKED].to(decoder.device)
    for i in range(len(latents)):
        x = latents[i : i + 1]
        variance = (x - x.mean((2, 3), keepdim=True)).square().mean()
        lost += float((encode(decoder, decode(decoder, x)) - x).square().mean() / variance)
    lost /= len(latents)
    if not lost <= MAX_ROUND_TRIP_LOSS:
        raise UserError(
            f"the VAE {vae} does not reproduce the latents in {pairs}: decoded and encoded again "
            f"they differ by {lost:.0%} of their variance, where {MAX_ROUND_TRIP_LOSS:.0%} is the "
            f"limit. They are of another VAE, or not × its scaling_factor; give the VAE of the "
            f"set's teacher, {spec.teacher}, with --vae."
        )


def build_vgg(decoder: Any, spec: PairsSpec, settings: DistilSettings, full: bool = False) -> VGG:
    """A randomly initialised network for the set's latents, with the full widths if `full`."""
    torch.manual_seed(settings.seed)
    widths = settings.widths if full else settings.network_widths
    vgg = VGG(spec.latent_shape[0], widths, num_dropped_pools(spatial_factor(decoder)))
    if min(spec.latent_shape[1:]) < vgg.smallest_side:
        raise UserError(
            f"latents of {spec.latent_shape[1]}×{spec.latent_shape[2]}: the network needs "
            f"{vgg.smallest_side}×{vgg.smallest_side}"
        )
    return vgg


def describe_training(settings: DistilSettings) -> dict[str, Any]:
    """The settings that the training depends on, beside those of the targets."""
    return {
        "widths": list(settings.network_widths),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "peak_lr": settings.peak_lr,
        "gradient_weight": settings.gradient_weight,
        "transforms": settings.transforms.describe(),
        "precision": settings.precision,
        "seed": settings.seed,
    }


# Targets


@dataclass(frozen=True)
class Targets:
    """Computes the perturbations of a set's latents and the distances of their images."""

    pairs: Location
    spec: PairsSpec
    vae: str
    source: str
    settings: DistilSettings
    target: PixelLPIPS
    students: list[Cache]
    device: torch.device

    def cache(self, folder: Path, numbers: range, wants_gradient: bool, group: Group) -> Cache:
        """Computes in `folder`, for each of the latents `numbers`, what is trained on.

        `latents` [C, h, w], `perturbed` [K, C, h, w], both float16; `kind` [K]; `layers` [K, 5],
        the distances of the decoded images per layer; and with `wants_gradient` `gradient`
        [K, C, h, w] float16, that of the distance with respect to `perturbed`, with a root mean
        square of 1. Ranks share the work.
        """
        settings = self.settings
        spec = {
            "pairs": set_digest(self.spec),
            "first": numbers.start,
            "count": len(numbers),
            "vae": vae_revision(self.vae),
            "from": network_revision(self.source),
            "precision": settings.precision,
            "transforms": settings.transforms.describe(),
            "students": len(self.students),
            "gradient": wants_gradient,
            "seed": settings.seed,
        }

        def read(i: int) -> Rows:
            return self.perturb_latents(numbers[i])

        def compare(rows: Rows) -> Rows:
            return rows | self.compare_images(rows["perturbed"], rows["latents"], wants_gradient)

        return make_cache(
            folder,
            spec,
            len(numbers),
            read,
            compare,
            "decoded latents",
            chunk=CHUNK,
            batch=settings.decode_batch,
            group=group,
        )

    def perturb_latents(self, number: int) -> Rows:
        """The latents `number` of the set and NUM_PERTURBATIONS perturbations of them.

        A pure function of the seed and the number. Every kind occurs equally often.
        """
        settings = self.settings
        kinds = KINDS if self.students else WITHOUT_STUDENTS
        generator = torch.Generator().manual_seed(settings.seed * 2**24 + number)
        shard, row = divmod(number, self.spec.shard_size)
        latents = read_latents(self.pairs, shard, self.spec)
        x = latents[row].float()

        perturbed = []
        kind_numbers = []
        for k in range(NUM_PERTURBATIONS):
            kind = kinds[(number * NUM_PERTURBATIONS + k) % len(kinds)]
            strength = float(torch.rand((), generator=generator))
            other = latents[int(torch.randint(len(latents), (), generator=generator))].float()
            student = None
            if self.students:
                age = int(torch.randint(len(self.students), (), generator=generator))
                student = self.students[age].load_rows("latents", [number])[0].float()
            perturbed.append(perturb(x, kind, strength, other, student, generator))
            kind_numbers.append(KINDS.index(kind))

        # One transform for the latents and all their perturbations
        together = torch.stack([x, *perturbed])
        transform = settings.transforms.draw(1, generator, "cpu")
        repeated = transform.select(torch.zeros(len(together), dtype=torch.int64))
        together = apply_transform(together, repeated, settings.transforms.resampling).half()
        return {
            "latents": together[0],
            "perturbed": together[1:],
            "kind": torch.tensor(kind_numbers),
        }

    def compare_images(self, perturbed: Tensor, latents: Tensor, wants_gradient: bool) -> Rows:
        """`layers` and `gradient`, see `cache`. Raises UserError if the decoder gives NaN."""
        target = self.target
        heads = target._frozen[1]
        with torch.no_grad():
            reference = target.features(latents.to(self.device).float())

        layers = []
        gradients = []
        for k in range(perturbed.shape[1]):
            a = perturbed[:, k].to(self.device).float().requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                differences = channel_differences(
                    target.features(a), reference, target.eps, target.eps_inside
                )
                distances = layer_distances(differences, heads)
            self.check_finite(distances)
            layers.append(distances.detach().cpu())
            if wants_gradient:
                (gradient,) = torch.autograd.grad(distances.sum(), a)
                self.check_finite(gradient)
                rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
                gradients.append((gradient / rms.clamp_min(1e-20)).half().cpu())

        rows = {"layers": torch.stack(layers, 1)}
        if wants_gradient:
            rows["gradient"] = torch.stack(gradients, 1)
        return rows

    def check_finite(self, values: Tensor) -> None:
        """Raises UserError, naming the precision, if a distance or a gradient is not finite."""
        if values.isfinite().all():
            return
        precision = self.settings.precision
        remedy = "use --precision float32 (or bfloat16)"
        if precision == "float32":
            remedy = "check the VAE's and the network's weights"
        raise UserError(
            f"the distance of decoded latents is NaN or infinite in {precision}: the decoder of "
            f"{self.vae} exceeds it, or the network in {self.source} does; {remedy}."
        )


def set_digest(spec: PairsSpec) -> str:
    """Identifies the set's pairs; not its length, so that a longer set continues a shorter one."""
    settings = {**asdict(spec), "count": None}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


@lru_cache(maxsize=4)
def read_pairs(pairs: Location, shard: int, spec: PairsSpec) -> Pairs:
    """A shard of the set, its latents float16."""
    return read_shard(pairs, shard, spec=spec, dtype=torch.float16)


def read_latents(pairs: Location, shard: int, spec: PairsSpec) -> Tensor:
    return read_pairs(pairs, shard, spec).latents


def cache_student(
    folder: Path,
    student: str,
    pairs: Location,
    spec: PairsSpec,
    count: int,
    device: torch.device,
    group: Group,
) -> Cache:
    """Computes in `folder` the `latents` that an exported student makes of the set's first pairs.

    Raises UserError if its latents have another shape than the set's.
    """
    model = load_teacher(student, device)
    if model.latent_shape != spec.latent_shape:
        raise UserError(
            f"the student {student} makes latents of shape {list(model.latent_shape)}, the set "
            f"{pairs} has {list(spec.latent_shape)}: give students of the set's teacher, "
            f"{spec.teacher}."
        )

    def read(i: int) -> Rows:
        return {"number": torch.tensor(i)}

    @torch.no_grad()
    def generate(rows: Rows) -> Rows:
        seeds = []
        prompts = []
        for number in rows["number"].tolist():
            shard, row = divmod(number, spec.shard_size)
            shard_pairs = read_pairs(pairs, shard, spec)
            seeds.append(shard_pairs.seed[row])
            prompts.append(shard_pairs.prompts[row])
        noise = noise_from_seeds(seeds, spec.latent_shape).to(device)
        latents = model.denoise(noise, model.last_timestep, model.encode(prompts))
        return {"latents": latents.half().cpu()}

    settings = {"pairs": set_digest(spec), "student": model.revision, "count": count}
    return make_cache(folder, settings, count, read, generate, "student's latents", group=group)


# Training


@dataclass(frozen=True)
class Batch:
    """Rows of a cache: `latents` [R, C, h, w], `perturbed` [R, K, C, h, w], `layers` [R·K, 5].

    `gradient` is [R·K, C, h, w], None if the cache has none.
    """

    latents: Tensor
    perturbed: Tensor
    layers: Tensor
    gradient: Tensor | None


def load_batch(cache: Cache, rows: list[int], device: torch.device) -> Batch:
    gradient = None
    if "gradient" in cache.chunks:
        gradient = to_device(cache.load_rows("gradient", rows).flatten(0, 1), device).float()
    return Batch(
        latents=to_device(cache.load_rows("latents", rows), device).float(),
        perturbed=to_device(cache.load_rows("perturbed", rows), device).float(),
        layers=to_device(cache.load_rows("layers", rows).flatten(0, 1), device),
        gradient=gradient,
    )


def distillation_loss(
    learner: Learner, batch: Batch, mean_target: float, gradient_weight: float
) -> Tensor:
    """The squared error of log distances, of the total and of the layers; and of gradients.

        L = mean (log(d + ε) − log(t + ε))² + ½ mean_l (log(d_l + ε) − log(t_l + ε))²
            + gradient_weight · mean (1 − cos(∂d/∂a, ∂t/∂a))

    d is the learner's distance, t the target, ε = `mean_target` / 1000 (a fifth of it for a layer).
    """
    perturbed = batch.perturbed
    if gradient_weight > 0:
        perturbed = perturbed.requires_grad_()
    layers = learner(perturbed, batch.latents)  # [R·K, 5]

    # Distances
    eps = LOG_EPS * mean_target
    total = log_error(layers.sum(1), batch.layers.sum(1), eps)
    per_layer = log_error(layers, batch.layers, eps / layers.shape[1])
    loss = total + LAYER_WEIGHT * per_layer
    if gradient_weight == 0:
        return loss

    # Gradients
    (gradient,) = torch.autograd.grad(layers.sum(), perturbed, create_graph=True)
    assert batch.gradient is not None
    cosine = gradient_cosine(gradient.flatten(0, 1), batch.gradient)
    return loss + gradient_weight * (1 - cosine).mean()


def log_error(distances: Tensor, targets: Tensor, eps: float) -> Tensor:
    """The mean squared difference of the logarithms of distances + eps."""
    return F.mse_loss((distances + eps).log(), (targets + eps).log())


# Measurements


class MeanSquaredError(nn.Module):
    """The mean squared difference of latents, to compare with."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


def measure_agreement(
    distance: nn.Module, cache: Cache, device: torch.device, batch_size: int = 4
) -> dict[str, Any]:
    """The agreement of `distance` with the targets in `cache`, which has gradients.

    `rank_correlation` of all distances, and by kind of perturbation; `choice_agreement`, see
    agreement.py; `gradient_cosine`, the mean over perturbations.
    """
    distances = []
    cosines = []
    for start in range(0, len(cache), batch_size):
        rows = list(range(start, min(start + batch_size, len(cache))))
        batch = load_batch(cache, rows, device)
        num_perturbations = batch.perturbed.shape[1]
        a = batch.perturbed.flatten(0, 1).requires_grad_()
        b = batch.latents.repeat_interleave(num_perturbations, 0)
        values = distance(a, b)
        (gradient,) = torch.autograd.grad(values.sum(), a)
        assert batch.gradient is not None
        cosines.append(gradient_cosine(gradient, batch.gradient).cpu())
        distances.append(values.detach().reshape(len(rows), num_perturbations).cpu())

    found = torch.cat(distances)  # [N, K]
    expected = cache.load_all("layers").sum(2)
    kinds = cache.load_all("kind")
    by_kind = {}
    for number, kind in enumerate(KINDS):
        if (kinds == number).any():
            by_kind[kind] = rank_correlation(found[kinds == number], expected[kinds == number])
    return {
        "rank_correlation": rank_correlation(found, expected),
        "rank_correlation_by_kind": by_kind,
        "choice_agreement": choice_agreement(found, expected),
        "gradient_cosine": float(torch.cat(cosines).mean()),
    }


def measure_cost(
    distance: LatentLPIPS, full: VGG, spec: PairsSpec, batch_size: int = 8, repeats: int = 15
) -> dict[str, float]:
    """Forward and backward time of the distance, and of one with the full widths, in turn.

    `ms` and `full_ms` are medians per pair of latents; `times_cheaper` is their ratio.
    """
    device = next(distance._frozen[0].parameters()).device
    heads = [torch.ones(width) for width in full.config["widths"]]
    full_distance = LatentLPIPS(full, heads).to(device)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, batch_size, *spec.latent_shape, generator=generator).to(device)
    a.requires_grad_()

    # In turn, so that other load on the machine meets both
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for index, measured in enumerate((distance, full_distance)):
            start = time.perf_counter()
            (gradient,) = torch.autograd.grad(measured(a, b).sum(), a)
            float(gradient[0, 0, 0, 0])  # waits for the device
            times[index].append(time.perf_counter() - start)
    ms, full_ms = [1000 * statistics.median(series[1:]) / batch_size for series in times]
    return {"ms": ms, "full_ms": full_ms, "times_cheaper": full_ms / ms}
