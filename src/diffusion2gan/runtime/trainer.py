"""The loop that trains every helper network: pictures in, one loss, EMA, resumable by running it again, by ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion2gan.runtime import checkpoint
from diffusion2gan.runtime.distributed import Flags, Group, Ranks
from diffusion2gan.runtime.progress import Bar
from diffusion2gan.runtime.stop import stop_signal

CHECKPOINT_EVERY_S = 120.0


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over the first `warmup` share, then a cosine to zero. `progress` in [0, 1]."""
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def shuffled(numbers: range, count: int, seed: int) -> list[int]:
    """Which of `count` rows the pictures `numbers` of a run are: each epoch all of them, in an order of its own."""
    return [_order(count, seed, n // count)[n % count] for n in numbers]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(
        count, generator=torch.Generator().manual_seed(seed * 65_537 + epoch)
    ).tolist()


def fit(
    stage: str,
    module: nn.Module,
    loss: Callable[[range], Tensor],
    *,
    num_pictures: int,
    batch_size: int,
    peak_lr: float,
    folder: Path,
    seed: int,
    ema_decay: float = 0.999,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    max_grad_norm: float = 1.0,
    schedule: Callable[[float, float], float] = learning_rate,
    after_step: Callable[[], None] = lambda: None,
    group: Group | None = None,
) -> nn.Module:
    """Trains `module` by AdamW on `loss(picture numbers) → mean`; returns it with its averaged weights, in eval.

    Progress and optimiser state go to `folder/<stage>.safetensors` every two minutes; a finished stage is loaded.
    `schedule(progress in [0, 1], peak_lr)` is the learning rate; `after_step` may project the weights.

    Of each batch a rank of `group` takes its share; gradients are averaged, and buffers too: batch norm sees the rows
    of one rank at a time, as under torch's DDP, so there the result depends on how many there are. The first writes.
    """
    group = group or Group(Ranks())
    here = group.ranks
    share = batch_size // here.world_size
    path = folder / f"{stage}.safetensors"
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=peak_lr, betas=betas, weight_decay=weight_decay
    )
    ema = checkpoint.EMA(module, ema_decay)
    seen, there = 0, path.exists()
    group.check_same(folder, checkpoint.meta(path)["pictures_seen"] if there else 0, "pictures")
    if there:
        tensors, meta = checkpoint.load(path)
        seen, ema.num_updates = meta["pictures_seen"], meta["num_updates"]
        module.load_state_dict(checkpoint.unpack("module", tensors))
        ema.shadow = {
            key: value.to(ema.shadow[key].device)
            for key, value in checkpoint.unpack("ema", tensors).items()
        }
        checkpoint.unpack_optimizer("adam", optimizer, tensors)

    def keep() -> None:
        if not here.is_main:
            return
        tensors = checkpoint.pack("module", module) | checkpoint.pack_optimizer("adam", optimizer)
        tensors |= {f"ema/{key}": value for key, value in ema.shadow.items()}
        checkpoint.save(path, tensors, {"pictures_seen": seen, "num_updates": ema.num_updates})

    module.train()
    saved, running = time.monotonic(), None
    with stop_signal() as stopped, Bar(stage, num_pictures, seen) as bar:
        while seen < num_pictures:
            mine = range(seen + here.rank * share, seen + (here.rank + 1) * share)
            torch.manual_seed(
                hash((seed, mine.start)) % 2**31
            )  # the step's randomness depends on its place alone
            for settings in optimizer.param_groups:
                settings["lr"] = schedule(seen / num_pictures, peak_lr)
            value = loss(mine) / here.world_size
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
            flags = Flags(
                stop=stopped() is not None,
                save=here.is_main and time.monotonic() - saved > CHECKPOINT_EVERY_S,
            )
            extras = [value.detach(), *(buffer / here.world_size for buffer in buffers)]
            (value, *means), flags = group.sum(module, extras, flags)
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean)
            nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
            optimizer.step()
            after_step()
            ema.update(module)
            seen += batch_size
            last = float(value)
            running = last if running is None else 0.98 * running + 0.02 * last
            bar.advance(batch_size, f"loss {running:.4f}")
            if flags.stop or flags.save or seen >= num_pictures:
                keep()
                saved = time.monotonic()
            if flags.stop:
                raise KeyboardInterrupt
    module.load_state_dict(ema.shadow)
    return module.eval().requires_grad_(False)
