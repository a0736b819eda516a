"""A state that lies on several ranks, on disk: a folder of safetensors files, one a rank, by torch's DCP.

Its storage for Hugging Face's format keeps each part's place in the file's header as JSON. The storage that DCP takes
by itself unpickles what it reads: never load without naming this reader.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

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

REMEDY = "Put back the file it was, or take another checkpoint of the run."


def staged(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup
) -> Callable[[], None]:
    """Copies what this rank has of `tensors` to the processor's memory; the call that is returned writes it.

    All ranks must make both calls, the second in a thread if they like: it talks over `group`, which nobody else may
    use meanwhile. It returns when every rank's part is on the disk, and raises Failure where one is not.
    """
    storage = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    copied = storage.stage(tensors)

    def write() -> None:
        try:
            state_dict_saver.save(copied, storage_writer=storage, process_group=group)
        except (CheckpointException, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise Failure(
                f"the parts of a checkpoint could not be written to {folder} ({why(error)}). The checkpoint before is "
                "intact; the same command continues."
            ) from error

    return write


def why(error: BaseException) -> str:
    """The causes that DCP collects from the ranks, in a line."""
    causes = [
        f"rank {rank}: {type(one).__name__}: {one}"
        for rank, (one, _) in getattr(error, "failures", {}).items()
    ]
    return "; ".join(causes or [f"{type(error).__name__}: {error}"]).splitlines()[0]


def files(folder: Path, numels: Mapping[str, int]) -> dict[str, int]:
    """The parts' names and bytes. Raises Failure where they do not have so many numbers of each tensor."""
    there = described(HuggingFaceStorageReader(str(folder)))
    for key, numel in numels.items():
        found = sum(chunk.sizes.numel() for chunk in there[key].chunks) if key in there else 0
        if found != numel:
            raise Failure(
                f"{folder} has {found} of the {numel} numbers of {key}: with strategy=fsdp every rank writes its part, "
                "so all must see the same --out folder."
            )
    return sizes(folder)


def described(storage: HuggingFaceStorageReader) -> dict[str, TensorStorageMetadata]:
    found = storage.read_metadata().state_dict_metadata
    return {key: one for key, one in found.items() if isinstance(one, TensorStorageMetadata)}


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def read(folder: Path, expected: Mapping[str, int]) -> dict[str, Tensor]:
    """The whole tensors, by one process, from parts of any number of ranks.

    Raises Failure where the files are not those `expected` (DCP itself would leave a missing part's numbers to chance),
    or are damaged.
    """
    there = sizes(folder)
    for name in sorted({*expected, *there}):
        if expected.get(name) != there.get(name):
            has, had = (
                f"{n} bytes" if n is not None else "no such file"
                for n in (there.get(name), expected.get(name))
            )
            raise Failure(
                f"{folder / name}: {has}, and {had} when the checkpoint was written. {REMEDY}"
            )
    storage = HuggingFaceStorageReader(str(folder))
    try:
        found = described(storage)
        tensors = {
            key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in found.items()
        }
        with warnings.catch_warnings(action="ignore"):  # that it is read by one process
            state_dict_loader.load(tensors, storage_reader=storage, no_dist=True)
    except (SafetensorError, CheckpointException, KeyError, ValueError) as error:
        raise Failure(f"the parts in {folder} are damaged ({why(error)}). {REMEDY}") from error
    return tensors
