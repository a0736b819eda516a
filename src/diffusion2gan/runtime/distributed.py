"""Several processes under torchrun: which one this is, and the one thing they say to each other, a sum.

Every rank reads the same global batches; a step is each rank's rows of one, and the sum of the gradients. So a run does
not depend on how many ranks there are, nor on whether each holds the whole state or a part of it (`runtime/fsdp.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime import fsdp
from diffusion2gan.runtime.environment import env_number

TIMEOUT_S = env_number("DIFFUSION2GAN_RANK_TIMEOUT_S", 600)  # how long a rank may be late
PATIENCE_S = 6 * TIMEOUT_S  # and with a share that nobody else waits for in between
LEAVE_S = 10  # how long a rank that is done waits for the others before it ends


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes, the `local` one of this machine. Alone: 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def get_ranks() -> Ranks:
    """What torchrun (RANK, WORLD_SIZE, LOCAL_RANK) made of this process."""
    env = os.environ
    return Ranks(
        int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    )


def rank_device(name: str) -> str:
    """`cuda` under torchrun is this rank's own GPU; every other name stays."""
    here = get_ranks()
    return f"cuda:{here.local_rank}" if name == "cuda" and here.world_size > 1 else name


def resolve_device(name: str, remedy: str = "set device=cpu") -> torch.device:
    """This rank's own. Raises UserError where the device is unknown or not here."""
    try:
        return torch.empty(0, device=rank_device(name)).device
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"device = {name!r} is not here ({told}); {remedy} or one that is"
        ) from error


def require_single_process(job: str) -> None:
    """Raises UserError where this is one of several processes: `job` would be done by each, into the same files."""
    if (world := get_ranks().world_size) > 1:
        raise UserError(
            f"{job} trains in one process, and WORLD_SIZE says that this is one of {world}. Start it without torchrun, "
            "or with --nproc-per-node 1."
        )


@dataclass(frozen=True)
class Flags:
    """What a rank requests at an optimiser step; after `Group.sum`, what any rank requested."""

    stop: bool = False
    save: bool = False


class Group:
    """The ranks of a run. `sum` is their only communication, once an optimiser step; with fsdp, `gather` before it.

    Flags travel in the same sum: each rank passes what it requests, and all get what any of them requested.
    """

    def __init__(self, here: Ranks, store: Any = None) -> None:
        self.ranks, self._store = here, store
        self._count = 0

    def sum(
        self, module: nn.Module, extras: Sequence[Tensor], flags: Flags = Flags()
    ) -> tuple[list[Tensor], Flags]:
        """Adds up the gradients of `module` over the ranks, in place, and `extras`; returns the sums of those.

        All travel in one float32 buffer. A gradient that no rank has stays None. A module that is cut over the ranks
        is let go of, and each rank's part has its part of the sum.
        """
        if self.ranks.world_size == 1:
            return list(extras), flags
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parameters = list(named.values())
        device = parameters[0].device
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        requested = torch.tensor([float(flags.stop), float(flags.save)], device=device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        tensors = [there, requested, *extras, *gradients]
        flat = torch.cat([x.detach().to(device, torch.float32).flatten() for x in tensors])
        self._together(lambda: dist.all_reduce(flat))
        sums = [
            part.view(x.shape)
            for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
        ]
        for parameter in parameters:
            parameter.grad = None
        fsdp.reshard(module)
        held = dict(module.named_parameters())
        for name, has, gradient in zip(
            named, sums[0].tolist(), sums[len(extras) + 2 :], strict=True
        ):
            held[name].grad = (
                fsdp.shard_like(gradient.to(held[name].dtype), held[name]) if has else None
            )
        stop, save = sums[1].tolist()
        return sums[2 : len(extras) + 2], Flags(stop > 0, save > 0)

    def barrier(self) -> None:
        """Waits until every rank is here. Raises Failure, naming those that are not, after PATIENCE_S."""
        self.all_gather_string("met", "")

    def all_gather_string(self, what: str, said: str) -> list[str]:
        """What every rank `said` of this, by rank; once for each `what`. Raises Failure as `meet` does."""
        if self.ranks.world_size == 1:
            return [said]
        self._store.set(f"{what}/{self.ranks.rank}", said)
        names = [f"{what}/{rank}" for rank in range(self.ranks.world_size)]
        try:
            self._store.wait(names, timedelta(seconds=PATIENCE_S))
        except RuntimeError as error:
            late = [
                name.removeprefix(f"{what}/") for name in names if not self._store.check([name])
            ]
            raise Failure(
                f"rank {', '.join(late) or '?'} did not finish its share within {PATIENCE_S:.0f} s of this one. Look "
                "at its machine; what is made is kept, the same command continues."
            ) from error
        return [self._store.get(name).decode() for name in names]

    def check_same(self, out: Path, seen: int, what: str) -> None:
        """Raises UserError, on every rank, where they do not all find the run in `out` equally far; once a run."""
        found = self.all_gather_string("seen", str(seen))
        if len(set(found)) > 1:
            other = next(rank for rank, env_number in enumerate(found) if env_number != found[0])
            raise UserError(
                f"{out}: rank 0 finds a run of {found[0]} {what} there, rank {other} one of {found[other]}. It "
                "must be a folder that all ranks see: one on a disk that the nodes share."
            )

    def wait_for_others(self) -> None:
        """Waits some seconds for the others to be done too; whoever has gone is not missed.

        A rank that ended at once after its last exchange was aborted twice on a loaded machine ("terminate called
        without an active exception"). The guess is that gloo's thread still held the exchange; it is not proven.
        """
        self._store.set(f"left/{self.ranks.rank}", "")
        with suppress(RuntimeError):
            self._store.wait(
                [f"left/{rank}" for rank in range(self.ranks.world_size)],
                timedelta(seconds=LEAVE_S),
            )

    def unshard(self, *modules: nn.Module | None) -> None:
        """Makes modules that are cut over the ranks whole, until `sum` has their gradients; others are so anyway."""
        for module in modules:
            if fsdp.is_sharded(module):
                self._together(partial(fsdp.unshard, module))

    def all_gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's `part`, by rank: in the processor's memory, all of one shape. All must ask."""
        if self.ranks.world_size == 1:
            return [part]
        parts = [torch.empty_like(part) for _ in range(self.ranks.world_size)]
        self._together(lambda: dist.all_gather(parts, part))
        return parts

    def new_gloo_group(self) -> dist.ProcessGroup:
        """The same ranks once more, for what they say to each other beside the steps. All must ask."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_S))

    def _together(self, exchange: Callable[[], object]) -> None:
        """Raises Failure, naming the ranks that did not come, after TIMEOUT_S."""
        self._count += 1
        self._store.set(f"sum/{self.ranks.rank}", str(self._count))
        start = time.monotonic()
        try:
            exchange()
        except RuntimeError as error:
            waited = f"after {time.monotonic() - start:.0f} s"
            counts = {rank: self._count_of(rank) for rank in range(self.ranks.world_size)}
            late = [str(rank) for rank, count in counts.items() if count < self._count]
            who = (
                f"rank {', '.join(late)} did not come"
                if late
                else "the connection between the ranks broke"
            )
            raise Failure(
                f"step {self._count}: {who} ({waited}; {str(error).splitlines()[0]}). Look at its machine; what "
                "was saved is intact, the same command continues."
            ) from error

    def _count_of(self, rank: int) -> int:
        return int(self._store.get(f"sum/{rank}")) if self._store.check([f"sum/{rank}"]) else 0


def attempt() -> str:
    """What the keys of this attempt begin with, in the store that torchrun lends the ranks.

    It may lend its own, which outlives an attempt: without the number of the attempt, ranks find the addresses of dead
    ones (https://github.com/pytorch/pytorch/issues/135712). But each node counts only its own restarts. So raises
    UserError where several nodes may restart with such a store; with a store made anew nothing needs to be told apart.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "attempt"
    nodes, restarts = (
        int(env.get("GROUP_WORLD_SIZE", 1)),
        int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)),
    )
    if nodes > 1 and restarts > 0:
        raise UserError(
            f"torchrun --max-restarts {restarts} on {nodes} nodes would keep one store for all attempts, and ranks "
            "started anew would wait for dead ones. Start it on every node with --rdzv-backend c10d and "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, or with --max-restarts 0."
        )
    return f"attempt/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"


@contextmanager
def connect_ranks(device: torch.device) -> Iterator[Group]:
    """The ranks that torchrun started, connected: nccl on cuda, gloo elsewhere. Alone, nothing is connected."""
    here = get_ranks()
    if here.world_size == 1:
        yield Group(here)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=TIMEOUT_S)
    prefix = attempt()
    store, rank, world = next(rendezvous("env://", timeout=timeout))
    store = dist.distributed_c10d.PrefixStore(prefix, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    try:
        group = Group(here, dist.distributed_c10d._get_default_store())
        yield group
        group.wait_for_others()
    finally:
        dist.destroy_process_group()
