"""Loads models so that every weight comes from a file.

The loaders of diffusers and transformers replace a weight that a file lacks by random numbers, and
ignore one that they do not know; both only log it. The functions of this module refuse both.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion2gan.errors import Diffusion2GANError, UserError
from diffusion2gan.runtime.files import check_downloaded, is_hidden, read_json, translate_error
from diffusion2gan.teacher import hub

# Entries that are recomputed, or that belong to an output layer which the model does not have.
HARMLESS = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale|lm_head\.weight|text_projection\.weight)$"
)

# Where the classes of a component are, by the library that model_index.json names
COMPONENT_MODULES = {
    "diffusers": "diffusers",
    "transformers": "transformers",
    "stable_diffusion": "diffusers.pipelines.stable_diffusion.safety_checker",
}

# Weights in a model's folder: NAME.safetensors, with a variant NAME.fp16.safetensors, or in shards
# NAME.fp16-00001-of-00002.safetensors (formerly NAME-00001-of-00002.fp16.safetensors)
SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS_FILE = re.compile(
    rf"(?P<name>model|diffusion_pytorch_model)(?P<old_shard>{SHARD})(?:\.(?P<variant>\w+?))?"
    rf"(?P<shard>{SHARD})\.safetensors"
)

# How the names begin in the state dict of a network inside a data-parallel wrapper, or compiled
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

# diffusers' warning about a single file
UNUSED = re.compile(r"were not used when initializing .*\n? *\['(.*)'\]", re.DOTALL)

NUM_NAMED = 3  # keys that a message names
MESSAGE_LENGTH = 300  # of a library's warning
REMEDY = (
    "It may be incomplete, damaged, or not belong to its settings: compare it with the original, "
    "or copy or download it again."
)


@contextmanager
def translated_errors(description: str, problem: str = "does not load") -> Iterator[None]:
    """Raises UserError `{description} {problem}: …` in place of any error of the libraries.

    Incomplete and damaged folders raise all kinds of errors in them. Raises Failure for errors of
    the machine, such as too little memory. This package's errors stay as they are.
    """
    try:
        yield
    except (Diffusion2GANError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        failure = translate_error(description, error)
        if failure is not None:
            raise failure from error
        raise UserError(f"{description} {problem}: {describe_error(error)}. {REMEDY}") from error


def describe_error(error: Exception) -> str:
    """The first line of an error's message, or its name if that does not explain it."""
    message = str(error).strip()
    if not message or isinstance(error, LookupError | AttributeError | TypeError | RecursionError):
        message = f"{type(error).__name__}: {message}"
    return message.splitlines()[0].rstrip(".: ")


def load_model(kind: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` for a model class of diffusers or transformers.

    Safetensors only, from disk alone. Where there are only weights of a variant, such as fp16,
    these are loaded; prefixes of a wrapper (WRAPPER_PREFIXES) are removed from the names. Raises
    UserError, naming the keys, if the files lack a weight of the model, or have one that it does
    not have or that has another shape.
    """
    is_transformers = kind.__module__.startswith("transformers.")
    if is_transformers:
        # Otherwise it raises an error that does not name the keys
        options |= {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options["torch_dtype"] = dtype

    check_files_downloaded(folder)
    options["variant"] = find_variant(folder)
    with (
        translated_errors(f"the {kind.__name__} in {folder}"),
        without_wrapper_prefix(folder) as source,
    ):
        model, report = kind.from_pretrained(
            source, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )

    mismatched = []
    for key, found, expected in report["mismatched_keys"]:
        mismatched.append(f"{key} ({list(found)} instead of {list(expected)})")
    for error in report["error_msgs"]:
        mismatched.append(str(error).strip().splitlines()[0])
    check_keys(
        f"the {kind.__name__} in {folder}",
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        mismatched=mismatched,
    )
    check_not_on_meta(f"the {kind.__name__} in {folder}", model)
    return model


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files with a model's weights in its folder, of all variants."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if WEIGHTS_FILE.fullmatch(path.name))


def check_files_downloaded(folder: Path) -> None:
    """Raises UserError if a file that a component is read from is a Git LFS pointer."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in (".json", ".txt", ".model") or path.suffix == ".safetensors"
        if is_read and not is_hidden(path):
            check_downloaded(path)


def find_variant(folder: Path) -> str | None:
    """The variant of the weights in a model's folder; None if they have none, or are missing.

    Weights without a variant come first. Raises UserError if there are several variants and no
    such weights, or only pickles.
    """
    variants = set()
    for path in find_weights(folder):
        match = WEIGHTS_FILE.fullmatch(path.name)
        variants.add(match["variant"] if match else None)
    if not variants and any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights in .bin files only. These are pickles, which can run code "
            "when they are loaded, so they are refused. If you trust them, load the pipeline in "
            "diffusers and save it again with save_pretrained, which writes safetensors."
        )
    if not variants or None in variants:
        return None
    if len(variants) > 1:
        listed = ", ".join(sorted(str(variant) for variant in variants))
        raise UserError(
            f"{folder} has weights of several variants ({listed}) and none without one. Copy the "
            "pipeline to another folder with the files of one variant only, and give that folder."
        )
    return variants.pop()


def wrapper_prefix(keys: Iterable[str]) -> str:
    """The prefix of a wrapper that all `keys` have, or an empty string."""
    keys = list(keys)
    prefix = ""
    while keys:
        longer = [p for p in WRAPPER_PREFIXES if all(k.startswith(prefix + p) for k in keys)]
        if not longer:
            break
        prefix += longer[0]
    return prefix


def is_stock_layout(folder: Path) -> bool:
    """Whether the weights in a model's folder have the names that its class gives them."""
    files = find_weights(folder)
    keys: list[str] = []
    for file in files:
        keys += read_shapes(file)
    return bool(files) and not wrapper_prefix(keys)


@contextmanager
def without_wrapper_prefix(folder: Path) -> Iterator[Path]:
    """Yields a model's folder, or a temporary copy whose weights' names have no wrapper prefix."""
    files = find_weights(folder)
    keys: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            keys += opened.keys()
    prefix = wrapper_prefix(keys)
    if not prefix:
        yield folder
        return

    with tempfile.TemporaryDirectory(prefix="diffusion2gan-") as name:
        # The settings; an index of shards names the weights
        temporary = Path(name)
        for path in folder.glob("*.json"):
            if ".safetensors.index" not in path.name:
                shutil.copyfile(path, temporary / path.name)
                continue
            index = read_json(path)
            weight_map = {k.removeprefix(prefix): v for k, v in index["weight_map"].items()}
            text = json.dumps({**index, "weight_map": weight_map})
            (temporary / path.name).write_text(text, encoding="utf-8")

        # The weights
        for file in files:
            tensors = {k.removeprefix(prefix): v for k, v in load_file(file).items()}
            save_file(tensors, temporary / file.name, {"format": "pt"})
        yield temporary


def load_pipeline(pipeline_class: Any, folder: Path, components: dict[str, Any]) -> Any:
    """`pipeline_class.from_pretrained(folder)`, with every weight from a file.

    `components` are used in place of those in the folder; the folder's models are loaded by
    `load_model`, because a pipeline's loader does not report their keys.
    """
    components = dict(components)
    with translated_errors(f"the pipeline in {folder}"):
        for name, entry in hub.read_index(folder).items():
            if not isinstance(entry, list) or name.startswith("_") or name in components:
                continue
            library, class_name = entry
            if library is None:
                continue
            check_files_downloaded(folder / name)
            # Other components are left to diffusers, which knows the names of older versions,
            # such as CLIPFeatureExtractor
            kind = getattr(import_module(COMPONENT_MODULES[library]), class_name, None)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                components[name] = load_model(kind, folder / name)

        pipeline = pipeline_class.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            **components,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_single_file(
    kind: Any, file: Path, tensors: dict[str, Tensor] | None = None, **options: Any
) -> Any:
    """`kind.from_single_file(file)` for a pipeline or a model class of diffusers, in float32.

    `tensors` take the place of the file's contents. Raises UserError as `load_model` does. A
    pipeline's file may contain more than the pipeline.
    """
    description = f"the {kind.__name__} in {file}"
    with (
        replaced_contents(tensors),
        recorded_missing_keys(description) as missing,
        recorded_warnings() as messages,
    ):
        loaded = kind.from_single_file(
            str(file), torch_dtype=torch.float32, local_files_only=True, **options
        )

    unexpected: list[str] = []
    for message in messages:
        if match := UNUSED.search(message):
            unexpected += match[1].split(", ")
    check_keys(description, missing=missing, unexpected=unexpected)

    # Without a pipeline's other parts, which are no modules
    for component in getattr(loaded, "components", {"": loaded}).values():
        if isinstance(component, torch.nn.Module):
            check_not_on_meta(description, component)
    return loaded


def load_lora(pipeline: Any, path: Path, source: Any, **options: Any) -> None:
    """`pipeline.load_lora_weights(source)`.

    `source` is the file `path`, or its tensors. Raises UserError if a weight of a layer is missing
    in it, or if it has one for a layer that the pipeline does not have. Errors of the loader are
    not translated.
    """
    with recorded_warnings() as messages, recorded_adapter_reports(pipeline) as reports:
        pipeline.load_lora_weights(source, **options)
    for report in reports:
        mismatched = [str(key) for key in report.mismatched_keys]
        check_keys(f"the LoRA {path}", report.missing_keys, report.unexpected_keys, mismatched)
    for message in messages:
        if message.startswith("Loading adapter weights"):
            problems = " ".join(message.split()).replace(" found in the model", "")
            raise UserError(
                f"the LoRA {path} does not fit this {type(pipeline).__name__}: "
                f"{problems[:MESSAGE_LENGTH]}. {REMEDY}"
            )


def check_keys(
    description: str,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[str] = (),
) -> None:
    """Raises UserError if a key is missing, not expected (but for HARMLESS) or mismatched."""
    surplus = [key for key in unexpected if not HARMLESS.search(key)]
    problems = []
    for keys, problem in (
        (sorted(missing), "missing"),
        (sorted(surplus), "not expected"),
        (sorted(mismatched), "of another shape"),
    ):
        if keys:
            problems.append(f"{_list_keys(keys)} {'is' if len(keys) == 1 else 'are'} {problem}")
    if problems:
        raise UserError(
            f"the weights of {description} do not fit its settings: {'; '.join(problems)}. {REMEDY}"
        )


def _list_keys(keys: list[str]) -> str:
    named = ", ".join(keys[:NUM_NAMED])
    if len(keys) <= NUM_NAMED:
        return named
    return f"{named} and {len(keys) - NUM_NAMED} more"


def check_not_on_meta(description: str, model: nn.Module) -> None:
    """Raises UserError if a parameter or buffer of `model` has no values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    check_keys(description, missing=[name for name, tensor in tensors if tensor.is_meta])


def read_shapes(file: Path) -> dict[str, list[int]]:
    """The names and shapes of the tensors in a .safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118


def check_file_in_own_format(
    kind: Any, file: Path, config: dict[str, Any], found: Mapping[str, list[int]]
) -> None:
    """Checks a single file of the model class `kind` that has diffusers' names for its weights.

    `found` are the names and shapes of its weights. diffusers takes such a file for one in another
    format if a single name differs, and fails in its conversion. Raises UserError as `load_model`
    does; other formats are not checked.
    """
    with torch.device("meta"):
        expected = kind.from_config(config).state_dict()
    if 2 * len(expected.keys() & found.keys()) < len(expected):
        return

    mismatched = []
    for key in sorted(expected.keys() & found.keys()):
        shape = list(expected[key].shape)
        if found[key] != shape:
            mismatched.append(f"{key} ({found[key]} instead of {shape})")
    check_keys(
        f"the {kind.__name__} in {file}",
        missing=expected.keys() - found.keys(),
        unexpected=found.keys() - expected.keys(),
        mismatched=mismatched,
    )


@contextmanager
def replaced_contents(tensors: dict[str, Tensor] | None) -> Iterator[None]:
    """Makes diffusers' loader of single files read `tensors` from any file, if they are given."""
    from diffusers.loaders import single_file, single_file_model

    if tensors is None:
        yield
        return
    modules: tuple[Any, ...] = (single_file, single_file_model)
    originals = [module.load_single_file_checkpoint for module in modules]
    for module in modules:
        module.load_single_file_checkpoint = lambda *_, **__: dict(tensors)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.load_single_file_checkpoint = original


@contextmanager
def recorded_missing_keys(description: str) -> Iterator[list[str]]:
    """Yields a list of the keys that were missing in any `load_state_dict` of the block.

    diffusers' loaders of single files call it with `strict=False` and ignore the missing keys. With
    accelerate they leave these weights on the device meta instead, and then convert the model with
    `to`: that raises UserError, naming them.
    """
    missing: list[str] = []
    original = nn.Module.load_state_dict
    original_to = nn.Module.to

    def checked_to(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        check_not_on_meta(description, module)
        return original_to(module, *arguments, **options)

    def recording(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(module, *arguments, **options)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = recording  # type: ignore[method-assign,assignment]
    nn.Module.to = checked_to  # type: ignore[method-assign,assignment]
    try:
        yield missing
    finally:
        nn.Module.to = original_to  # type: ignore[method-assign]
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


@contextmanager
def recorded_adapter_reports(pipeline: Any) -> Iterator[list[Any]]:
    """Yields a list of the reports of the adapters that the block loads into text encoders.

    transformers returns the report from `load_adapter`, and diffusers ignores it.
    """
    reports: list[Any] = []
    encoders = []
    for name, component in pipeline.components.items():
        if name.startswith("text_encoder") and hasattr(component, "load_adapter"):
            encoders.append(component)

    def record(load_adapter: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        report = load_adapter(*arguments, **options)
        reports.append(report)
        return report

    for encoder in encoders:
        encoder.load_adapter = partial(record, encoder.load_adapter)
    try:
        yield reports
    finally:
        for encoder in encoders:
            del encoder.load_adapter


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Yields a list of the warnings that diffusers logs in the block; they are not printed.

    Where its loaders have no report, as for single files and LoRAs, keys that are left over are
    found only there.
    """
    logger = logging.getLogger("diffusers")
    level = logger.level
    handlers = logger.handlers
    collector = _Collector()
    logger.handlers = [collector]
    logger.setLevel(logging.WARNING)
    try:
        yield collector.messages
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
