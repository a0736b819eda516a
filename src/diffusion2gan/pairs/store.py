"""Pairs on disk: Parquet shards that carry all that is needed to read, check and remake them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.runtime.files import read_json
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.storage import Location, atomic_put, list_names, with_local_copy

SPEC_FILE = "pairs.json"
ROW_GROUP = 128


@dataclass(frozen=True)
class PairsSpec:
    """What a set of pairs is made of; written into `pairs.json` and every shard."""

    teacher: str
    revision: str
    prompts: str
    count: int
    seed: int
    num_inference_steps: int
    guidance_scale: float
    latent_shape: tuple[int, int, int]
    shard_size: int
    keep_noise: bool = False
    noise: str = "torch.Generator('cpu').manual_seed(seed), randn(latent_shape), float32"
    dtype: str = "float16"
    format: int = 1

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard_indices(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    @classmethod
    def parse(cls, text: str | dict[str, Any], where: Path) -> PairsSpec:
        try:
            values = json.loads(text) if isinstance(text, str) else text
            return cls(**{**values, "latent_shape": tuple(values["latent_shape"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise UserError(f"{where} does not describe a set of pairs: {error}") from error


@dataclass(frozen=True)
class Pairs:
    """A batch: `index`, `seed` (ints), `prompts`, `latents` [B, C, h, w] float32 × scaling_factor."""

    index: list[int]
    seed: list[int]
    prompts: list[str]
    latents: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> Pairs:
        """The pairs at these places of the batch."""
        return Pairs(
            [self.index[i] for i in rows],
            [self.seed[i] for i in rows],
            [self.prompts[i] for i in rows],
            self.latents[list(rows)],
        )

    @classmethod
    def concat(cls, parts: Sequence[Pairs]) -> Pairs:
        return cls(
            [i for part in parts for i in part.index],
            [s for part in parts for s in part.seed],
            [p for part in parts for p in part.prompts],
            torch.cat([part.latents for part in parts]),
        )


def shard_name(shard: int) -> str:
    return f"pairs-{shard:05d}.parquet"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / shard_name(shard)


def open_set(folder: Location) -> PairsSpec:
    """The description of the set in `folder`. Raises UserError where there is none."""
    where = Path(f"{folder}/{SPEC_FILE}")
    if SPEC_FILE not in list_names(folder):
        raise UserError(
            f"{folder} holds no pairs ({SPEC_FILE} is missing); make some: diffusion2gan pairs --out {folder}"
        )
    return PairsSpec.parse(with_local_copy(folder, SPEC_FILE, read_json), where)


def start_set(folder: Location, spec: PairsSpec) -> None:
    """Creates the set, or checks that the one in `folder` is the same, so that it can be continued."""
    if SPEC_FILE not in list_names(folder):
        with atomic_put(folder, SPEC_FILE) as temporary:
            temporary.write_text(
                json.dumps(asdict(spec), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return
    there, wanted = asdict(open_set(folder)), asdict(spec)
    differ = [
        f"{key}: {there[key]!r} there, {wanted[key]!r} asked"
        for key in wanted
        if there[key] != wanted[key]
    ]
    if differ:
        raise UserError(
            f"{folder} already holds other pairs ({'; '.join(differ)}). Repeat the settings it was made with to "
            "continue it, or choose another --out."
        )


def lock_shard(folder: Location, shard: int) -> AbstractContextManager[None]:
    """Held while a shard is made: a second process that would make it is refused. Object stores know no locks."""
    return exclusive_lock(shard_path(folder, shard)) if isinstance(folder, Path) else nullcontext()


def write_shard(
    folder: Location, shard: int, spec: PairsSpec, pairs: Pairs, noise: Tensor | None = None
) -> None:
    """Writes one shard whole or not at all."""
    size = int(np.prod(spec.latent_shape)) * 2
    columns = {
        "index": pa.array(pairs.index, pa.int64()),
        "seed": pa.array(pairs.seed, pa.int64()),
        "prompt": pa.array(pairs.prompts, pa.string()),
        "latents": _to_bytes(pairs.latents, size),
    }
    if noise is not None:
        columns["noise"] = _to_bytes(noise, size)
    table = pa.table(columns).replace_schema_metadata({"diffusion2gan": json.dumps(asdict(spec))})
    with atomic_put(folder, shard_name(shard)) as temporary:
        pq.write_table(
            table,
            temporary,
            row_group_size=ROW_GROUP,
            compression="zstd",
            write_page_checksum=True,
            use_dictionary=["prompt"],
            write_statistics=["index", "seed"],
        )


def _to_bytes(tensor: Tensor, size: int) -> pa.Array:
    rows = tensor.to(torch.float16).contiguous().numpy().reshape(len(tensor), -1)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(rows), [None, pa.py_buffer(rows.tobytes())]
    )


def read_shard(
    folder: Location,
    shard: int,
    row_groups: Sequence[int] | None = None,
    spec: PairsSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pairs:
    """One shard, or some of its row groups. Raises Failure where it is cut off, altered or not of this set.

    `spec` saves a look at the folder's description; `dtype` float16 is as stored.
    """
    spec = spec or open_set(folder)
    table = read_table(folder, shard, spec, row_groups)
    with _told_damage(folder, shard):
        return _from_table(table, spec, dtype)


def read_table(
    folder: Location, shard: int, spec: PairsSpec, row_groups: Sequence[int] | None = None
) -> pa.Table:
    """A shard's columns as they are stored. Raises as `read_shard` does."""

    def read(path: Path) -> pa.Table:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read() if row_groups is None else file.read_row_groups(list(row_groups))

    with _told_damage(folder, shard):
        table = with_local_copy(folder, shard_name(shard), read)
        described = (table.schema.metadata or {}).get(b"diffusion2gan")
        if (
            described is None
            or PairsSpec.parse(described.decode(), Path(shard_name(shard))) != spec
        ):
            raise Failure(
                f"{folder}/{shard_name(shard)} belongs to another set than {folder}/{SPEC_FILE} describes; delete it "
                "and continue."
            )
        return table


@contextmanager
def _told_damage(folder: Location, shard: int) -> Iterator[None]:
    name = f"{folder}/{shard_name(shard)}"
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{name} is missing: the set is not complete; run the same `pairs` command again."
        ) from None
    except (
        pa.ArrowException,
        OSError,
        KeyError,
        ValueError,
    ) as error:  # the last two: altered names or lengths
        raise Failure(
            f"{name} is damaged ({str(error).splitlines()[0]}). Delete that file and run the same `pairs` command "
            "again: it remakes only that shard."
        ) from error


def _from_table(table: pa.Table, spec: PairsSpec, dtype: torch.dtype) -> Pairs:
    return Pairs(
        table["index"].to_pylist(),
        table["seed"].to_pylist(),
        table["prompt"].to_pylist(),
        column_to_tensor(table, "latents", spec).to(dtype),
    )


def column_to_tensor(table: pa.Table, column: str, spec: PairsSpec) -> Tensor:
    """A column of latents or noise, [B, C, h, w] float16 as stored."""
    parts = [
        np.frombuffer(chunk.buffers()[1], np.float16).reshape(-1, *spec.latent_shape)[
            chunk.offset :
        ][: len(chunk)]
        for chunk in table[column].chunks
    ]
    return torch.from_numpy(np.concatenate(parts))


def present_shards(folder: Location, spec: PairsSpec) -> list[int]:
    there = list_names(folder)
    return [shard for shard in range(spec.num_shards) if shard_name(shard) in there]
