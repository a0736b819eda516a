"""Several processes under torchrun: which rank this one is, and the communication between them.

Every rank reads the same global batches and computes its rows of each; an optimiser step sums the
gradients over the ranks. So the result of a run does not depend on the number of ranks, nor on
whether each rank holds the full state or a shard of it (`runtime/fsdp.py`).
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
from diffusion2gan.runtime.transfer import to_device

# How long the other ranks wait for a rank that is late in a collective operation.
COLLECTIVE_TIMEOUT_S = env_number("DIFFUSION2GAN_RANK_TIMEOUT_S", 600)
# The same at a barrier, where each rank has first done a share of a long job by itself.
BARRIER_TIMEOUT_S = 6 * COLLECTIVE_TIMEOUT_S
# The start of a message: without torchrun, and with some of its options, rank 0 holds the store.
STORE_LOST = (
    "the connection to the ranks' store, which rank 0 or torchrun holds, is lost. Check the "
    "machine of rank 0"
)
# How long a rank that has finished waits for the others before its process ends.
EXIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among `world_size`, and on its machine. One process: 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def get_ranks() -> Ranks:
    """This process's ranks from torchrun's variables RANK, WORLD_SIZE and LOCAL_RANK.

    Raises UserError if they are not numbers, or RANK is not below WORLD_SIZE.
    """
    values: dict[str, int] = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise UserError(
                f"{name}={text!r} in the environment is not a rank's number. torchrun sets it; to "
                "run one process without torchrun, unset RANK, WORLD_SIZE and LOCAL_RANK."
            )
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(
            f"RANK={values['RANK']} in the environment is not below WORLD_SIZE="
            f"{values['WORLD_SIZE']}. torchrun sets both; to run one process without torchrun, "
            "unset RANK, WORLD_SIZE and LOCAL_RANK."
        )
    return Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


def rank_device(name: str) -> str:
    """The device that `name` means for this rank.

    `auto` becomes `cuda` if torch can use a GPU of this machine, and `cpu` otherwise. `cuda` under
    torchrun becomes this rank's GPU, `cuda:LOCAL_RANK`. Other names are kept.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = get_ranks()
    if name == "cuda" and ranks.world_size > 1:
        return f"cuda:{ranks.local_rank}"
    return name


def resolve_device(name: str, remedy: str = "set device=cpu") -> torch.device:
    """The device of this rank; a GPU becomes torch's current device.

    Without that, libraries that use the current device would use the first GPU on every rank.
    `name` is as in `rank_device`. Raises UserError if there is no device of that name, or if it
    cannot compute. Apple's GPUs, `mps`, are refused: nothing has been tested on them.
    """
    requested = rank_device(name)
    if requested.partition(":")[0] == "mps":
        raise UserError(
            f"device {name!r} is not supported: nothing of this program has been run on Apple's "
            f"GPUs; {remedy} or another available device"
        )

    try:
        device = torch.empty(0, device=requested).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if requested.startswith("cuda") and torch.cuda.is_available():
            reason = describe_gpus(requested)
        raise UserError(
            f"device {name!r} is not available ({reason}); {remedy} or another available device"
        ) from error
    if device.type == "meta":
        raise UserError(f"device 'meta' holds no numbers; {remedy} or another available device")

    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def describe_gpus(requested: str) -> str:
    """Why the GPU `requested` does not exist, on a machine that has others."""
    num_gpus = torch.cuda.device_count()
    existing = "cuda:0" if num_gpus == 1 else f"cuda:0 to cuda:{num_gpus - 1}"
    reason = f"{requested} does not exist: this machine has {num_gpus} GPU, {existing}"
    if get_ranks().world_size > 1:
        reason += "; under torchrun every rank needs one: lower --nproc-per-node"
    return reason


def require_single_process(job: str) -> None:
    """Raises UserError under torchrun: each process would do all of `job`, into the same files."""
    world_size = get_ranks().world_size
    if world_size > 1:
        raise UserError(
            f"{job} trains in one process, but this is one of {world_size} (WORLD_SIZE). Start it "
            "without torchrun, or with --nproc-per-node 1."
        )


@dataclass(frozen=True)
class Flags:
    """What a rank requests at an optimiser step; after `Group.sum`, what any rank requested."""

    stop: bool = False
    save: bool = False


class Group:
    """The ranks of a run and the communication between them.

    `sum` is the only communication of an optimiser step, called once per network; with fsdp,
    `unshard` comes before it. All ranks must make the same calls in the same order.
    """

    def __init__(self, ranks: Ranks, store: Any = None) -> None:
        self.ranks = ranks
        self._store = store
        self._num_collectives = 0

    def sum(
        self, module: nn.Module, extras: Sequence[Tensor], flags: Flags = Flags()
    ) -> tuple[list[Tensor], Flags]:
        """Sums the gradients of `module` (in place) and `extras` over the ranks, in one all-reduce.

        Returns the summed extras and the flags that any rank requested. Everything is sent in one
        float32 buffer. A gradient that no rank has stays None. A sharded module is resharded, and
        each rank's shard gets its shard of the gradient.
        """
        if self.ranks.world_size == 1:
            return list(extras), flags

        # Pack: the flags and which gradients exist, the extras, the gradients
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parameters = list(trained.values())
        device = parameters[0].device
        exists: list[float] = []
        gradients: list[Tensor] = []
        for parameter in parameters:
            gradient = parameter.grad
            exists.append(float(gradient is not None))
            gradients.append(torch.zeros_like(parameter) if gradient is None else gradient)
        for_host = torch.tensor([float(flags.stop), float(flags.save), *exists])
        tensors = [to_device(for_host, device), *extras, *gradients]
        buffer = torch.cat([x.detach().to(device, torch.float32).flatten() for x in tensors])

        # All-reduce
        self._run_collective(lambda: dist.all_reduce(buffer))

        # Unpack
        sums: list[Tensor] = []
        pieces = buffer.split([x.numel() for x in tensors])
        for piece, tensor in zip(pieces, tensors, strict=True):
            sums.append(piece.view(tensor.shape))
        stop, save, *has_gradient = sums[0].tolist()
        summed_extras = sums[1 : 1 + len(extras)]
        summed_gradients = sums[1 + len(extras) :]

        # Assign the gradients. Resharding replaces the parameters, so they are looked up again.
        for parameter in parameters:
            parameter.grad = None
        fsdp.reshard(module)
        current = dict(module.named_parameters())
        for name, num_ranks, gradient in zip(trained, has_gradient, summed_gradients, strict=True):
            if num_ranks > 0:
                parameter = current[name]
                parameter.grad = fsdp.shard_like(gradient.to(parameter.dtype), parameter)

        return summed_extras, Flags(stop > 0, save > 0)

    def barrier(self) -> None:
        """Waits for every rank. Raises Failure, naming those missing, after BARRIER_TIMEOUT_S."""
        self.all_gather_string("barrier", "")

    def all_gather_string(self, key: str, value: str) -> list[str]:
        """The `value` that each rank passed under `key`, in rank order. Each key is used once.

        Raises Failure, naming the missing ranks, after BARRIER_TIMEOUT_S.
        """
        if self.ranks.world_size == 1:
            return [value]

        # Publish this rank's value and wait for the others
        names = [f"{key}/{rank}" for rank in range(self.ranks.world_size)]
        try:
            self._store.set(f"{key}/{self.ranks.rank}", value)
            self._store.wait(names, timedelta(seconds=BARRIER_TIMEOUT_S))
            return [self._store.get(name).decode() for name in names]
        except RuntimeError as error:
            missing = self._ask_store(
                lambda: [name for name in names if not self._store.check([name])]
            )
            if missing is None:
                problem = STORE_LOST
            else:
                late = ", ".join(name.removeprefix(f"{key}/") for name in missing)
                problem = (
                    f"rank {late or '?'} did not finish its share within "
                    f"{BARRIER_TIMEOUT_S:.0f} s of this rank. Check the machine of that rank"
                )
            raise Failure(
                f"{problem}; finished work is kept: run the same command to continue."
            ) from error

    def check_same(self, out: Path, seen: int, what: str) -> None:
        """Raises UserError, on every rank, if the ranks find different progress in `out`.

        `seen` is this rank's progress, in units of `what`. Called once per run.
        """
        found = self.all_gather_string("seen", str(seen))
        for rank, value in enumerate(found):
            if value != found[0]:
                raise UserError(
                    f"{out}: rank 0 finds a run with {found[0]} {what}, rank {rank} one with "
                    f"{value}. All ranks must use the same folder: on several nodes, one on a "
                    "shared disk."
                )

    def wait_for_others(self) -> None:
        """Waits up to EXIT_TIMEOUT_S until the other ranks have finished too.

        A rank whose process ended right after its last collective was twice aborted on a loaded
        machine ("terminate called without an active exception"), probably because gloo's thread
        was still using the connection; the cause is not proven.
        """
        names = [f"left/{rank}" for rank in range(self.ranks.world_size)]
        with suppress(RuntimeError):
            self._store.set(f"left/{self.ranks.rank}", "")
            self._store.wait(names, timedelta(seconds=EXIT_TIMEOUT_S))

    def unshard(self, *modules: nn.Module | None) -> None:
        """Gathers the full parameters of sharded modules, until `sum`; ignores other modules."""
        for module in modules:
            if fsdp.is_sharded(module):
                self._run_collective(partial(fsdp.unshard, module))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in rank order: of one shape, and on each rank's device."""
        if self.ranks.world_size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.ranks.world_size)]
        self._run_collective(lambda: dist.all_gather(gathered, tensor))
        return gathered

    def new_gloo_group(self) -> dist.ProcessGroup:
        """A second process group of the same ranks, for communication in a background thread."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=BARRIER_TIMEOUT_S))

    def _run_collective(self, collective: Callable[[], object]) -> None:
        """Runs a collective operation. Raises Failure, naming the missing ranks, on a timeout.

        Each rank counts its collectives in the store: a rank that is behind did not take part.
        """
        self._num_collectives += 1
        start = time.monotonic()
        try:
            self._store.set(f"sum/{self.ranks.rank}", str(self._num_collectives))
            collective()
        except RuntimeError as error:
            waited_s = time.monotonic() - start
            reason = f"after {waited_s:.0f} s; {_first_line(error)}"

            # Which ranks have not started this collective?
            late = self._ask_store(self._late_ranks)
            if late is None:
                problem = f"{STORE_LOST} ({reason})"
            elif late:
                problem = (
                    f"rank {', '.join(late)} did not take part ({reason}). Check the machine of "
                    "that rank"
                )
            else:
                problem = (
                    f"the connection between the ranks broke ({reason}). Check the machines of "
                    "the other ranks"
                )
            raise Failure(
                f"step {self._num_collectives}: {problem}; what was saved is intact: run the same "
                "command to continue."
            ) from error

    def _late_ranks(self) -> list[str]:
        """The ranks that have not started this rank's latest collective."""
        late = []
        for rank in range(self.ranks.world_size):
            key = f"sum/{rank}"
            num_collectives = int(self._store.get(key)) if self._store.check([key]) else 0
            if num_collectives < self._num_collectives:
                late.append(str(rank))
        return late

    def _ask_store(self, question: Callable[[], list[str]]) -> list[str] | None:
        """The answer of the ranks' store; None if it is lost: it may be part of rank 0."""
        try:
            return question()
        except RuntimeError:
            return None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def store_prefix() -> str:
    """The prefix of this attempt's keys in the store that torchrun provides to the ranks.

    torchrun may share one store between attempts: without the number of the attempt in the keys,
    restarted ranks find the addresses of dead ones
    (https://github.com/pytorch/pytorch/issues/135712). But each node counts only its own restarts,
    so this raises UserError if several nodes may restart with a shared store. A store created anew
    for each attempt needs no number.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "attempt"

    # torchrun's store is shared between attempts
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if num_nodes > 1 and max_restarts > 0:
        raise UserError(
            f"torchrun --max-restarts {max_restarts} on {num_nodes} nodes would use one store for "
            "all attempts, and restarted ranks would wait for dead ones. Start it on every node "
            "with --rdzv-backend c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, "
            "or with --max-restarts 0."
        )
    return f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def check_torchrun(ranks: Ranks) -> None:
    """Raises UserError if the variables by which ranks find one another are missing or wrong."""
    port = os.environ.get("MASTER_PORT", "")
    is_port = port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 2**16
    if not os.environ.get("MASTER_ADDR") or not is_port:
        raise UserError(
            f"RANK and WORLD_SIZE in the environment make this rank {ranks.rank} of "
            f"{ranks.world_size}, but MASTER_ADDR and MASTER_PORT, by which the ranks find one "
            "another, are missing or wrong. Start it with torchrun; to run one process, unset RANK "
            "and WORLD_SIZE."
        )


@contextmanager
def connect_ranks(device: torch.device) -> Iterator[Group]:
    """Connects the ranks that torchrun started: nccl on cuda, gloo elsewhere.

    A single process is not connected to anything. Raises UserError if torchrun's variables are
    missing, and Failure if not all ranks connect within COLLECTIVE_TIMEOUT_S.
    """
    ranks = get_ranks()
    if ranks.world_size == 1:
        yield Group(ranks)
        return

    # Connect
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    prefix = store_prefix()
    check_torchrun(ranks)
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=dist.distributed_c10d.PrefixStore(prefix, store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        raise Failure(
            f"rank {ranks.rank} of {ranks.world_size} could not connect to the other ranks within "
            f"{COLLECTIVE_TIMEOUT_S:.0f} s ({_first_line(error)}). Check that all ranks were "
            "started and are alive; run the same command to continue."
        ) from error
    try:
        group = Group(ranks, dist.distributed_c10d._get_default_store())
        yield group
        group.wait_for_others()
    finally:
        dist.destroy_process_group()
