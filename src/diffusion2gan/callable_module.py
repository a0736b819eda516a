"""Modules that are called: `diffusion2gan.distill` is a subpackage and a function of the API."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call is the function of `diffusion2gan.api` of the same name.

    Python binds a subpackage to its name in the package when it is imported, so a function of that
    name would be there or not depending on what was imported before. As one object it is both.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function of `diffusion2gan.api` of the same name."""
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        return getattr(import_module("diffusion2gan.api"), self.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Makes the module `name` callable."""
    sys.modules[name].__class__ = CallableModule
