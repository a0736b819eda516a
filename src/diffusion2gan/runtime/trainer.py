"""The training loop of all networks but the student: AdamW, EMA, resumable, multi-rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Group, Ranks
from diffusion2gan.runtime.ema import EMA
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.schedule import cosine_decay
from diffusion2gan.runtime.stop import StepControl, stop_signal
from diffusion2gan.runtime.transfer import HostCopy

CHECKPOINT_EVERY_S = 120.0
LOSS_SMOOTHING = 0.98  # of the running average that the progress bar shows


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first `warmup` of the training, then a cosine to zero.

    `progress` is the share of the training done, in [0, 1].
    """
    if progress < warmup:
        return peak * progress / warmup
    return cosine_decay(progress, peak, warmup)


@dataclass(frozen=True)
class FitConfig:
    """Settings of `fit`. `num_samples` is the length of the run: epochs × size of the data set.

    `schedule(progress in [0, 1], peak_lr)` is the learning rate.
    """

    num_samples: int
    batch_size: int
    peak_lr: float
    seed: int
    ema_decay: float = 0.999
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    schedule: Callable[[float, float], float] = learning_rate


def shuffled(numbers: range, count: int, seed: int) -> list[int]:
    """Maps a run's sample numbers to rows of a data set of `count`; an epoch is a permutation."""
    return [epoch_order(count, seed, n // count)[n % count] for n in numbers]


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 65_537 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[range], Tensor],
    config: FitConfig,
    folder: Path,
    *,
    after_step: Callable[[], None] | None = None,
    group: Group | None = None,
) -> nn.Module:
    """Trains `module` on `loss(sample numbers) → mean`; returns it with its EMA weights, frozen.

    The state is saved to `folder/<stage>.safetensors` every two minutes and at the end. Called
    again, an interrupted stage resumes with bit-identical results and a finished stage is loaded.
    `after_step` may project the weights.

    Each rank of `group` computes its rows of every batch. Gradients are averaged over the ranks,
    and so are floating-point buffers: batch norm normalises by the rows of one rank, as in torch's
    DDP, so a network that has it depends on the number of ranks. The main rank writes.
    """
    group = group or Group(Ranks())
    ranks = group.ranks
    rows_per_rank = config.batch_size // ranks.world_size
    path = folder / f"{stage}.safetensors"
    on_gpu = next(module.parameters()).device.type == "cuda"
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.peak_lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True if on_gpu else None,
    )
    ema = EMA(module, config.ema_decay)

    # Resume. The key `pictures_seen` is part of the file format; it counts samples.
    seen = 0
    if path.exists():
        meta = checkpoint.meta(path)
        checkpoint.check_counts(path, meta, "pictures_seen", "num_updates")
        seen = meta["pictures_seen"]
    group.check_same(folder, seen, "samples")
    if seen > 0:
        load_state(path, module, optimizer, ema)

    # Losses that are not shown yet. On a GPU they are read a step later: the host does not wait.
    losses: deque[HostCopy] = deque()
    lag = 1 if on_gpu else 0
    running_loss = None

    module.train()
    with stop_signal() as stopped, Bar(stage, config.num_samples, seen) as bar:
        control = StepControl(stopped, ranks.is_main, CHECKPOINT_EVERY_S)
        while seen < config.num_samples:
            # This rank's rows; the randomness of a step depends only on its position in the run
            start = seen + ranks.rank * rows_per_rank
            numbers = range(start, start + rows_per_rank)
            torch.manual_seed(hash((config.seed, numbers.start)) % 2**31)

            # Forward and backward
            value = loss(numbers) / ranks.world_size
            optimizer.zero_grad(set_to_none=True)
            value.backward()

            # Average the gradients, the loss and the buffers over the ranks
            buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
            extras = [value.detach()]
            extras += [buffer / ranks.world_size for buffer in buffers]
            (value, *means), flags = group.sum(module, extras, control.request())
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean)

            # Update
            rate = config.schedule(seen / config.num_samples, config.peak_lr)
            for param_group in optimizer.param_groups:
                param_group["lr"] = rate
            nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
            optimizer.step()
            if after_step is not None:
                after_step()
            ema.update(module)
            seen += config.batch_size

            # Progress
            losses.append(HostCopy(value))
            if len(losses) > lag:
                last_loss = float(losses.popleft().read())
                if running_loss is None:
                    running_loss = last_loss
                running_loss = LOSS_SMOOTHING * running_loss + (1 - LOSS_SMOOTHING) * last_loss
            status = "" if running_loss is None else f"loss {running_loss:.4f}"
            bar.advance(config.batch_size, status)

            # Checkpoint
            if flags.stop or flags.save or seen >= config.num_samples:
                check_finite(path, module, ema)  # on every rank: all end if the training diverged
                if ranks.is_main:
                    save_state(path, module, optimizer, ema, seen)
                control.checkpoint_written()
            if flags.stop:
                raise KeyboardInterrupt

    module.load_state_dict(ema.shadow)
    return module.eval().requires_grad_(False)


def check_finite(path: Path, module: nn.Module, ema: EMA) -> None:
    """Raises Failure if a weight or its average is not finite."""
    checkpoint.check_finite(
        checkpoint.pack("module", module) | checkpoint.pack("ema", ema),
        f"the training diverged, so {path} was not written; what it contained is unchanged. Lower "
        "the learning rate and start again in another folder.",
    )


def save_state(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, seen: int
) -> None:
    tensors = checkpoint.pack("module", module)
    tensors |= checkpoint.pack_optimizer("adam", optimizer)
    tensors |= checkpoint.pack("ema", ema)
    checkpoint.save(path, tensors, {"pictures_seen": seen, "num_updates": ema.num_updates})


def load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> None:
    tensors, meta = checkpoint.load(path)
    expected = checkpoint.pack("module", module) | checkpoint.pack("ema", ema)
    found = {key: value for key, value in tensors.items() if not key.startswith("adam/")}
    checkpoint.check_weights(path, expected, found)
    module.load_state_dict(checkpoint.unpack("module", tensors))
    checkpoint.unpack_optimizer("adam", optimizer, tensors)
    ema.load_state_dict(checkpoint.unpack("ema", tensors), meta["num_updates"])
