"""Pairs on disk: Parquet shards, each with the description of its set."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from diffusion2gan.errors import Failure, UserError
from diffusion2gan.noise import NUM_SET_SEEDS, PAIRS_PER_SEED, pair_seed
from diffusion2gan.runtime.files import read_json, translate_error
from diffusion2gan.runtime.lock import exclusive_lock
from diffusion2gan.runtime.storage import Location, atomic_put, list_names, with_local_copy

SPEC_FILE = "pairs.json"
SPEC_KEY = b"diffusion2gan"  # key of the description in a shard's metadata
ROW_GROUP = 128


MAX_SIDE = 2**16
# The settings that are whole numbers: their least and greatest values
WHOLE_NUMBERS = {
    "count": (1, PAIRS_PER_SEED),
    "seed": (0, NUM_SET_SEEDS - 1),
    "num_inference_steps": (1, 1000),
    "shard_size": (1, 2**31),
    "format": (1, 1),
}
TEXTS = ("teacher", "revision", "prompts", "noise", "solver", "precision", "negative_prompt")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class PairsSpec:
    """The description of a set of pairs, in `pairs.json` and in the metadata of every shard.

    `revision` identifies the teacher's weights, `prompts` the list of prompts. The latents are
    [C, h, w] = `latent_shape`. `precision` is that of the network. Sets that were begun
    before a field existed have its default.
    """

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
    solver: str = "ddim"
    precision: str = "float32"
    negative_prompt: str = ""

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shard_indices(self, shard: int) -> range:
        """The indices of the pairs in a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.count))

    @classmethod
    def parse(cls, text: str | dict[str, Any], where: Path) -> PairsSpec:
        """From JSON. Raises UserError, naming the file `where`, if it is not a description."""
        try:
            values = json.loads(text) if isinstance(text, str) else text
            spec = cls(**{**values, "latent_shape": tuple(values["latent_shape"])})
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise UserError(f"{where} does not describe a set of pairs: {error}") from error
        spec.check(where)
        return spec

    def check(self, where: Path | str) -> None:
        """Raises UserError, naming the file `where`, if a value is not possible."""
        problem = None
        for key, (low, high) in WHOLE_NUMBERS.items():
            value = getattr(self, key)
            if not (_is_whole(value) and low <= value <= high):
                problem = f"{key} = {value!r}, but it is a whole number from {low} to {high}"
        for key in TEXTS:
            if not isinstance(getattr(self, key), str):
                problem = f"{key} = {getattr(self, key)!r}, but it is a text"

        # The rest
        shape = self.latent_shape
        if len(shape) != 3 or not all(_is_whole(side) and 1 <= side <= MAX_SIDE for side in shape):
            problem = f"latent_shape = {list(shape)!r}, but it is three whole numbers above 0"
        guidance = self.guidance_scale
        is_number = isinstance(guidance, int | float) and not isinstance(guidance, bool)
        if not is_number or not 0 <= guidance < math.inf:
            problem = f"guidance_scale = {guidance!r}, but it is a number of at least 0"
        if not isinstance(self.keep_noise, bool):
            problem = f"keep_noise = {self.keep_noise!r}, but it is true or false"
        if self.dtype != "float16":
            problem = f"dtype = {self.dtype!r}, but it is 'float16'"
        if problem is not None:
            raise UserError(
                f"{where} does not describe a set of pairs: it has {problem}. Restore the original "
                "file."
            )


@dataclass(frozen=True)
class Pairs:
    """A batch: `index` and `seed` (ints), `prompts`, `latents` [B, C, h, w] × scaling_factor."""

    index: list[int]
    seed: list[int]
    prompts: list[str]
    latents: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, rows: Sequence[int]) -> Pairs:
        """The pairs in these rows of the batch."""
        return Pairs(
            [self.index[i] for i in rows],
            [self.seed[i] for i in rows],
            [self.prompts[i] for i in rows],
            self.latents[list(rows)],
        )

    @classmethod
    def concat(cls, batches: Sequence[Pairs]) -> Pairs:
        index: list[int] = []
        seed: list[int] = []
        prompts: list[str] = []
        for batch in batches:
            index += batch.index
            seed += batch.seed
            prompts += batch.prompts
        return cls(index, seed, prompts, torch.cat([batch.latents for batch in batches]))


def shard_name(shard: int) -> str:
    return f"pairs-{shard:05d}.parquet"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / shard_name(shard)


def open_set(folder: Location) -> PairsSpec:
    """The description of the set in `folder`. Raises UserError if there is none."""
    if SPEC_FILE not in list_names(folder):
        raise UserError(
            f"{folder} contains no pairs ({SPEC_FILE} is missing); to make some: diffusion2gan "
            f"pairs --out {folder}"
        )
    values = with_local_copy(folder, SPEC_FILE, read_json)
    return PairsSpec.parse(values, Path(f"{folder}/{SPEC_FILE}"))


def start_set(folder: Location, spec: PairsSpec) -> None:
    """Creates the set, or checks that the existing set in `folder` is the same.

    Raises UserError, naming the settings that differ, if it is not.
    """
    if SPEC_FILE not in list_names(folder):
        spec.check(f"{folder}/{SPEC_FILE}")
        text = json.dumps(asdict(spec), indent=2, ensure_ascii=False) + "\n"
        with atomic_put(folder, SPEC_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return

    existing = asdict(open_set(folder))
    differences = []
    for key, requested in asdict(spec).items():
        if existing[key] != requested:
            differences.append(f"{key}: {existing[key]!r} in the folder, {requested!r} requested")
    if differences:
        raise UserError(
            f"{folder} already contains other pairs ({'; '.join(differences)}). To continue them, "
            "use the settings they were made with; to make a new set, choose another --out."
        )


def lock_shard(folder: Location, shard: int) -> AbstractContextManager[None]:
    """Locks a shard while it is made. Raises UserError in a second process that would make it too.

    Object stores have no locks: both processes make the shard, and the last upload remains.
    """
    if isinstance(folder, Path):
        return exclusive_lock(shard_path(folder, shard))
    return nullcontext()


def write_shard(
    folder: Location, shard: int, spec: PairsSpec, pairs: Pairs, noise: Tensor | None = None
) -> None:
    """Writes one shard atomically; latents and noise as float16."""
    # Columns
    num_bytes = int(np.prod(spec.latent_shape)) * 2
    columns = {
        "index": pa.array(pairs.index, pa.int64()),
        "seed": pa.array(pairs.seed, pa.int64()),
        "prompt": pa.array(pairs.prompts, pa.string()),
        "latents": _to_bytes(pairs.latents, num_bytes),
    }
    if noise is not None:
        columns["noise"] = _to_bytes(noise, num_bytes)
    table = pa.table(columns).replace_schema_metadata({SPEC_KEY: json.dumps(asdict(spec))})

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


def _to_bytes(tensor: Tensor, num_bytes: int) -> pa.Array:
    """[B, …] → B values of `num_bytes`, float16."""
    rows = tensor.to(torch.float16).contiguous().numpy().reshape(len(tensor), -1)
    buffers = [None, pa.py_buffer(rows.tobytes())]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(num_bytes), len(rows), buffers)


def read_shard(
    folder: Location,
    shard: int,
    *,
    spec: PairsSpec | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pairs:
    """One shard.

    Raises UserError if it is missing, Failure if it is damaged, of another set, or contains other
    pairs than those of its number.

    `spec`, if given, saves reading the set's description; `dtype` float16 is as stored.
    """
    spec = spec or open_set(folder)
    pairs = read_unchecked(folder, shard, spec)
    check_pairs(pairs, spec, shard, f"{folder}/{shard_name(shard)}")
    return replace(pairs, latents=pairs.latents.to(dtype))


def read_unchecked(folder: Location, shard: int, spec: PairsSpec) -> Pairs:
    """One shard as it is stored, float16: as `read_shard`, but it may contain any pairs."""
    table = read_table(folder, shard, spec)
    with translate_read_errors(folder, shard):
        pairs = Pairs(
            table["index"].to_pylist(),
            table["seed"].to_pylist(),
            table["prompt"].to_pylist(),
            column_to_tensor(table, "latents", spec),
        )
    check_latents_finite(pairs, f"{folder}/{shard_name(shard)}")
    return pairs


def check_pairs(pairs: Pairs, spec: PairsSpec, shard: int, name: str) -> None:
    """Raises Failure if `pairs`, read from `name`, are not those of this shard.

    Compares their indices and seeds, and looks for prompts that are missing.
    """
    indices = spec.shard_indices(shard)
    seeds = [pair_seed(spec.seed, index) for index in indices]
    if pairs.index != list(indices) or pairs.seed != seeds:
        raise Failure(
            f"{name} contains other pairs than its name indicates: its pairs are not "
            f"{indices.start}…{indices.stop - 1} (first index {pairs.index[:1]}, seed "
            f"{pairs.seed[:1]}; expected [{indices.start}], {seeds[:1]}). If the file was renamed, "
            "give it its name back; if not, move it away and run the same command again."
        )
    if not all(isinstance(prompt, str) for prompt in pairs.prompts):
        raise Failure(
            f"{name} is damaged (a pair has no prompt). Restore it from a copy, or move it away "
            "and run the same command again."
        )


def check_latents_finite(pairs: Pairs, name: str) -> None:
    """Raises Failure if a latent in `name` is not finite as float16, as which it is stored.

    In NumPy, because shards are read in threads: an operation of torch would start a further team
    of OpenMP threads there, and the training step's own team would then sleep and wake at each
    operation (a quarter of the pace on two cores).
    """
    latents = pairs.latents
    if latents.dtype != torch.float16:
        latents = latents.half()
    finite = np.isfinite(latents.numpy()).all(axis=(1, 2, 3))
    if not finite.all():
        bad = [pairs.index[row] for row in np.flatnonzero(~finite)]
        raise Failure(
            f"{name}: the latents of {len(bad)} of {len(pairs)} pairs (such as pair {bad[0]}) are "
            "not finite in float16: the teacher diverges with these settings, or its weights are "
            "damaged. Check the teacher's images, and make the set in a new folder; if the network "
            "runs in float16, use --precision bfloat16."
        )


def read_table(folder: Location, shard: int, spec: PairsSpec) -> pa.Table:
    """A shard's columns as they are stored, checksums verified. Raises as `read_shard` does."""

    def read(path: Path) -> pa.Table:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read()

    with translate_read_errors(folder, shard):
        table = with_local_copy(folder, shard_name(shard), read)
        description = (table.schema.metadata or {}).get(SPEC_KEY)
        stored_spec = None
        if description is not None:
            stored_spec = PairsSpec.parse(description.decode(), Path(shard_name(shard)))
        if stored_spec != spec:
            raise Failure(
                f"{folder}/{shard_name(shard)} belongs to another set than the one that "
                f"{folder}/{SPEC_FILE} describes{_describe_difference(stored_spec, spec)}. If "
                f"other shards differ in the same way, {SPEC_FILE} was changed: restore it. If "
                "not, move this shard to its set, and run the same `pairs` command again."
            )
        return table


def _describe_difference(stored: PairsSpec | None, spec: PairsSpec) -> str:
    """The first setting of a shard that differs from those of the set, with both values."""
    if stored is None:
        return " (it has no description)"
    requested = asdict(spec)
    for key, value in asdict(stored).items():
        if value != requested[key]:
            return f" ({key}: {value!r} in the shard, {requested[key]!r} in {SPEC_FILE})"
    return ""


@contextmanager
def translate_read_errors(folder: Location, shard: int) -> Iterator[None]:
    """Converts the errors of reading a shard to UserError (missing) or Failure (damaged)."""
    name = f"{folder}/{shard_name(shard)}"
    try:
        yield
    except FileNotFoundError:
        raise UserError(
            f"{name} is missing: the set is not complete; run the same `pairs` command again."
        ) from None
    except (pa.ArrowException, OSError, MemoryError, KeyError, ValueError) as error:
        # The operating system's errors have a number; those of the format do not
        failure = translate_error(name, error)
        if failure is not None:
            raise failure from error
        # KeyError and ValueError: altered column names or lengths
        raise Failure(
            f"{name} is damaged ({str(error).splitlines()[0]}). Restore it from a copy, or move it "
            "away and run the same `pairs` command again: it remakes only that shard."
        ) from error


def column_to_tensor(table: pa.Table, column: str, spec: PairsSpec) -> Tensor:
    """The column `latents` or `noise` as [B, C, h, w] float16, as stored."""
    arrays = []
    for chunk in table[column].chunks:
        rows = np.frombuffer(chunk.buffers()[1], np.float16).reshape(-1, *spec.latent_shape)
        arrays.append(rows[chunk.offset : chunk.offset + len(chunk)])
    return torch.from_numpy(np.concatenate(arrays))


def present_shards(folder: Location, spec: PairsSpec) -> list[int]:
    """The shards of the set that exist in `folder`."""
    names = list_names(folder)
    return [shard for shard in range(spec.num_shards) if shard_name(shard) in names]
