"""A state that is sharded over ranks, on disk: a folder with one safetensors file per rank.

Written and read by torch's distributed checkpoint (DCP), with its storage for Hugging Face's
format, which keeps the position of each shard as JSON in the file's header. DCP's default storage
unpickles the files that it reads, so every load must pass the Hugging Face reader explicitly.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from diffusion2gan.errors import Failure
from diffusion2gan.runtime import integrity
from diffusion2gan.runtime.files import hash_files, translate_error

REMEDY = "Restore the original file, or use another checkpoint of the run."


def prepare_write(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup
) -> Callable[[], dict[str, str]]:
    """Copies this rank's shards of `tensors` to CPU memory; returns the function that writes them.

    All ranks must call both, the second possibly in a thread: it communicates over `group`, which
    must not be used otherwise meanwhile. When the shards of all ranks are on disk, it returns
    {file name: sha256} of them. It raises Failure if one could not be written.
    """
    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    copied = storage.stage(tensors)

    def write() -> dict[str, str]:
        try:
            # DCP flushes each file
            state_dict_saver.save(copied, storage_writer=storage, process_group=group)
            return _hash_shards(folder, group)
        except (CheckpointException, RuntimeError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failure(
                f"the shards of a checkpoint could not be written to {folder} "
                f"({describe_error(error)}). The previous checkpoint is intact; the same command "
                "continues."
            ) from error

    return write


def _hash_shards(folder: Path, group: dist.ProcessGroup) -> dict[str, str]:
    """{file name: sha256} of the shards of all ranks; each rank reads those that it has written."""
    rank = dist.get_rank(group)
    names = [path.name for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")]
    problem = None
    found: dict[str, str] = {}
    try:
        found = hash_files(folder, names)
    except OSError as error:
        problem = str(error)

    # Also to all ranks: if one has failed
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (found, problem), group=group)
    digests: dict[str, str] = {}
    for rank, (found, problem) in enumerate(gathered):
        if problem is not None:
            raise OSError(f"rank {rank}: {problem}")
        digests |= found
    return digests


def describe_error(error: BaseException) -> str:
    """One line: the errors that DCP collected from the ranks, or `error` itself."""
    causes = []
    for rank, (cause, _) in getattr(error, "failures", {}).items():
        causes.append(f"rank {rank}: {type(cause).__name__}: {cause}")
    if not causes:
        causes = [f"{type(error).__name__}: {error}"]
    return "; ".join(causes).splitlines()[0]


def check_written(folder: Path, numels: Mapping[str, int]) -> dict[str, int]:
    """Returns {file name: bytes} of the shards in `folder`.

    `numels`: the number of elements of each tensor. Raises Failure if the shards have fewer, as
    when the ranks have written to different disks.
    """
    stored = _tensor_metadata(HuggingFaceStorageReader(str(folder)))
    for key, numel in numels.items():
        found = 0
        if key in stored:
            found = sum(chunk.sizes.numel() for chunk in stored[key].chunks)
        if found != numel:
            raise Failure(
                f"{folder} has {found} of the {numel} elements of {key}: with strategy=fsdp every "
                "rank writes its shard, so --out must be one folder on a disk that all ranks share."
            )
    return file_sizes(folder)


def _tensor_metadata(storage: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    found = {}
    for key, entry in storage.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found[key] = entry
    return found


def file_sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of the shards in `folder`."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def load(
    folder: Path, expected: Mapping[str, int], digests: Mapping[str, str]
) -> dict[str, Tensor]:
    """The full tensors, read by one process from the shards of any number of ranks.

    Raises Failure if the files are not those of `expected` {name: bytes} (DCP itself would leave
    the elements of a missing shard uninitialised), or differ from their `digests` {name: sha256}.
    """
    _check_sizes(folder, expected)
    with _translated_errors(folder):
        integrity.check_files(folder, digests, REMEDY)
    storage = HuggingFaceStorageReader(str(folder))
    with _translated_errors(folder):
        # DCP loads into existing tensors
        tensors = {}
        for key, entry in _tensor_metadata(storage).items():
            tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings(action="ignore"):  # DCP warns that one process reads it
            state_dict_loader.load(tensors, storage_reader=storage, no_dist=True)
    return tensors


@contextmanager
def _translated_errors(folder: Path) -> Iterator[None]:
    """Raises Failure for the errors of reading shards in the block."""
    try:
        yield
    except (
        SafetensorError,
        CheckpointException,
        KeyError,
        ValueError,
        OSError,
        MemoryError,
        RuntimeError,
    ) as error:
        # DCP collects the errors of the ranks
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        for cause in causes:
            failure = translate_error(folder, cause)
            if failure is not None:
                raise failure from error
        raise Failure(
            f"the shards in {folder} are damaged ({describe_error(error)}). {REMEDY}"
        ) from error


def _check_sizes(folder: Path, expected: Mapping[str, int]) -> None:
    present = file_sizes(folder)
    for name in sorted({*expected, *present}):
        if expected.get(name) != present.get(name):
            now = _describe_size(present.get(name))
            before = _describe_size(expected.get(name))
            raise Failure(
                f"{folder / name}: {now}, but {before} when the checkpoint was written. {REMEDY}"
            )


def _describe_size(num_bytes: int | None) -> str:
    return "no such file" if num_bytes is None else f"{num_bytes} bytes"
