"""Copies between host and GPU that the host does not wait for.

A blocking copy waits until the GPU has done all that was queued before it, and the GPU then idles
while the host queues more. Copies from and to pinned memory only join the queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def pin(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor`, in pinned memory if `device` is a GPU: copies to it then need no wait."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor
    return tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor.to(device)`; the host does not wait for a copy from the CPU to a GPU."""
    return pin(tensor, device).to(device, non_blocking=torch.device(device).type == "cuda")


class HostCopy:
    """A copy of a tensor in host memory that may still be under way.

    Creating it does not wait; `read` waits until the numbers have arrived. On the CPU it is the
    tensor itself.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._copy = tensor.detach().cpu()
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class HostCopies:
    """Copies of many tensors into pinned buffers, which are kept for the next time.

    Allocating pinned memory takes longer than the copy. On the CPU each copy is a new tensor.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._event: torch.cuda.Event | None = None

    def start(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starts the copies, and returns them; they are complete after `wait`.

        Those of the call before are overwritten.
        """
        copies = {}
        self._event = None
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                copies[name] = tensor.detach().to("cpu", copy=True)
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._buffers[name] = buffer
            buffer.copy_(tensor.detach(), non_blocking=True)
            copies[name] = buffer
            self._event = self._event or torch.cuda.Event()

        # The copies are in the queue before what changes the tensors next
        if self._event is not None:
            self._event.record()
        return copies

    def wait(self) -> None:
        """Waits, in any thread, until the copies are complete."""
        if self._event is not None:
            self._event.synchronize()


class AsynchronousCopies(TorchFunctionMode):
    """Inside the block, `Tensor.to` from the CPU to a GPU goes through pinned memory.

    For the code of libraries that copies small tensors, such as token numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        is_copy = func is torch.Tensor.to and _target(args, kwargs) == "cuda"
        if is_copy and args[0].device.type == "cpu":
            args = (args[0].pin_memory(), *args[1:])
            kwargs["non_blocking"] = True
        return func(*args, **kwargs)


def _target(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The type of the device in the arguments of `Tensor.to`; None if there is none."""
    for argument in (*args[1:2], kwargs.get("device"), kwargs.get("other")):
        if isinstance(argument, Tensor):
            return argument.device.type
        if isinstance(argument, str | torch.device):
            return torch.device(argument).type
    return None
