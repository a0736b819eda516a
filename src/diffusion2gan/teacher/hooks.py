"""Reads intermediate outputs of a network through forward hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def capture_outputs(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Yields a dict that receives each module's first output within the context."""
    outputs: dict[nn.Module, Any] = {}

    def store(module: nn.Module, args: Any, output: Any) -> None:
        outputs.setdefault(module, output)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(store).remove)
        yield outputs
