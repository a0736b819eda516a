"""A simulated `cuda:0` for the CPU build of torch.

A tensor on it holds a CPU tensor with real numbers. As on a GPU, an operation on tensors of
different devices raises an error, and so does `numpy()`. What would make the host wait for a GPU (a
blocking copy, `item`, a mask as an index, an event) is counted, with the line of the project that
asked for it; so are operations on it. A copy does not wait if it is non-blocking and its end on the
host is pinned. Memory, streams, precision and speed are not simulated.

`guard.cpp` must be loaded before torch is imported, so a simulation takes a process of its own:
import this module first, with the library's path in SIMULATED_CUDA_LIBRARY, and call `install`.
"""

# ruff: noqa: E402 (torch is imported after the library is loaded)
from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(os.environ["SIMULATED_CUDA_LIBRARY"], mode=ctypes.RTLD_GLOBAL)

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
PACKAGE = f"{os.sep}diffusion2gan{os.sep}"

# Waits of the host, by (kind, line of the project); `Counter.total` of it is their number
waits: Counter[tuple[str, str]] = Counter()
# Operations on the device and waits so far, unlike `waits` not cleared; and of these the waits for
# all that was queued, which an event's is not
totals = {"operations": 0, "waits": 0, "full_waits": 0}
# The addresses of pinned memory. It is never freed, so that no address is used again.
pinned: dict[int, torch.Tensor] = {}

# Operations that take tensors of several devices
MIXED = {"copy_", "_to_copy", "to", "set_", "_copy_from", "_pin_memory", "is_same_size"} | {
    "lift_fresh"
}
# Operations with an index, which may be on the CPU
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"} | {
    "_unsafe_index",
    "_unsafe_index_put",
}
# Operations that refuse even a scalar on the CPU
STRICT = {"cat", "stack", "mm", "bmm", "addmm", "embedding", "convolution", "gather", "scatter"} | {
    "native_group_norm",
    "native_layer_norm",
    "grid_sampler_2d",
    "index_select",
    "nll_loss_forward",
}
# Operations whose result's size depends on the numbers
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
READS_A_VALUE = {"_local_scalar_dense", "is_nonzero", "equal"}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of different devices."""


class SimulatedTensor(torch.Tensor):
    """A tensor that says it is on cuda:0; `inner` is a CPU tensor with its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> SimulatedTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with torch.no_grad():
                copied = SimulatedTensor(self.inner.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad)
            else:
                memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]


class SimulatedMode(TorchDispatchMode):
    """Also sends operations without a simulated tensor here: those that create one."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Checks the devices of an operation, counts waits, and computes it on the CPU."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    simulated = [x for x in tensors if isinstance(x, SimulatedTensor)]
    on_cpu = [x for x in tensors if not isinstance(x, SimulatedTensor)]
    device = kwargs.get("device")

    # 1. The device of the result
    if name == "_fused_sdp_choice" and simulated:
        return 0  # attention by its formula
    if name in ("_to_copy", "to"):
        result_on_cuda = is_cuda(device) if device is not None else bool(simulated)
        if simulated and not result_on_cuda:
            count_wait("copy to the CPU")
        nothing_to_wait_for = args[0].numel() == 0 or (
            kwargs.get("non_blocking") and is_pinned(args[0])
        )
        if result_on_cuda and not simulated and not nothing_to_wait_for:
            count_wait("copy to the GPU")
    elif name == "copy_":
        result_on_cuda = isinstance(args[0], SimulatedTensor)
        if result_on_cuda != isinstance(args[1], SimulatedTensor):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            if not (non_blocking and is_pinned(args[1] if result_on_cuda else args[0])):
                count_wait("copy to the GPU" if result_on_cuda else "copy to the CPU")
    elif name in INDEXING:
        result_on_cuda = isinstance(args[0], SimulatedTensor)
        check_index(func, args, result_on_cuda)
    elif name in READS_A_VALUE and simulated:
        result_on_cuda = False
        count_wait("read of a value")
    elif not tensors:
        result_on_cuda = is_cuda(device)
    else:
        result_on_cuda = bool(simulated) if device is None else is_cuda(device)
        if name in DATA_DEPENDENT and simulated:
            count_wait("size that depends on values")

    # 2. Mixed devices: only scalars may be on the CPU
    if simulated and on_cpu and name not in MIXED | INDEXING:
        refused = [x for x in on_cpu if x.ndim > 0 or name in STRICT]
        if refused:
            shapes = [tuple(x.shape) for x in refused]
            raise MixedDevicesError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({func}; on the CPU: {shapes}, at {project_line()})"
            )

    # 3. Compute on the CPU
    cpu_args, cpu_kwargs = tree_map(to_cpu, args), tree_map(to_cpu, dict(kwargs))
    if cpu_kwargs.get("device") is not None:
        cpu_kwargs["device"] = CPU
    pin = cpu_kwargs.get("pin_memory")
    if pin:
        cpu_kwargs["pin_memory"] = False
    result = func(*cpu_args, **cpu_kwargs)
    if pin:
        pinned[address(result)] = result
    if result_on_cuda or simulated:
        totals["operations"] += 1
    if name in ("_to_copy", "to") and result is cpu_args[0]:
        result = result.clone()
    if not result_on_cuda:
        return result

    # 4. Wrap the result; in-place operations return their argument
    result = tree_map(lambda x: SimulatedTensor(x) if isinstance(x, torch.Tensor) else x, result)
    if simulated:
        return return_and_correct_aliasing(func, args, dict(kwargs), result)
    return result


def check_index(func: Any, args: Sequence[Any], on_cuda: bool) -> None:
    """Counts the waits of indexing; raises MixedDevicesError for an index on the wrong device."""
    for index in args[1]:
        if index is None:
            continue
        if isinstance(index, SimulatedTensor) and not on_cuda:
            raise MixedDevicesError(f"{func}: index on cuda:0 of a tensor on the CPU")
        if on_cuda and not isinstance(index, SimulatedTensor):
            count_wait("copy of an index to the GPU")
        if on_cuda and index.dtype in (torch.bool, torch.uint8):
            count_wait("mask as an index")

    if len(args) > 2 and isinstance(args[2], torch.Tensor):
        value_on_cuda = isinstance(args[2], SimulatedTensor)
        if value_on_cuda != on_cuda and (value_on_cuda or args[2].ndim > 0):
            raise MixedDevicesError(f"{func}: values on another device than the tensor")


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def to_cpu(x: Any) -> Any:
    if isinstance(x, SimulatedTensor):
        return x.inner
    if isinstance(x, torch.device) and x.type == "cuda":
        return CPU
    return x


def address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def is_pinned(x: torch.Tensor) -> bool:
    if isinstance(x, SimulatedTensor):
        return False
    return address(x) in pinned


def pin_memory(self: torch.Tensor) -> torch.Tensor:
    """`Tensor.pin_memory`, in any thread."""
    if is_pinned(self):
        return self
    copied = self.detach().clone(memory_format=torch.contiguous_format)
    pinned[address(copied)] = copied
    return copied


class SimulatedEvent:
    """`torch.cuda.Event`. Waiting for it counts, unless the host has waited since it was recorded.

    A wait for another event does not count as that.
    """

    def __init__(self) -> None:
        self.num_waits_before = totals["full_waits"]

    def record(self) -> None:
        self.num_waits_before = totals["full_waits"]

    def synchronize(self) -> None:
        if totals["full_waits"] == self.num_waits_before:
            count_wait("event")


def count_wait(kind: str) -> None:
    waits[(kind, project_line())] += 1
    totals["waits"] += 1
    if kind != "event":
        totals["full_waits"] += 1


def project_line() -> str:
    """The innermost line of the project that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name and "site-packages" not in name:
            return f"{Path(name).parent.name}/{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"


def move_module(
    self: torch.nn.Module, move: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """`nn.Module._apply`, which replaces parameters: their data cannot change device in place."""
    if recurse:
        for child in self.children():
            child._apply(move)
    for parameter in self._parameters.values():
        if parameter is None:
            continue
        with torch.no_grad():
            moved = move(parameter)
        if moved is parameter:
            continue
        new = torch.nn.Parameter(moved, parameter.requires_grad)
        if parameter.grad is not None:
            with torch.no_grad():
                new.grad = move(parameter.grad)
            parameter.grad = None
        torch.utils.swap_tensors(parameter, new)
    for key, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[key] = move(buffer)
    return self


def install() -> list[str]:
    """Starts the simulation in this process; returns a list to which calls are appended.

    These are "synchronize", and "set_device" with its device.
    """
    calls: list[str] = []
    torch.nn.Module._apply = move_module  # type: ignore[method-assign,assignment]
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.max_memory_allocated = lambda *args, **kwargs: 0
    torch.cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    torch.cuda.synchronize = lambda *args, **kwargs: calls.append("synchronize")
    torch.cuda.set_device = lambda device: calls.append(f"set_device {device}")
    properties = SimpleNamespace(name="simulated", total_memory=80 * 2**30)
    torch.cuda.get_device_properties = lambda device: properties
    torch.cuda.Event = SimulatedEvent  # type: ignore[misc,assignment]
    torch.Tensor.pin_memory = pin_memory  # type: ignore[method-assign,assignment]
    torch._C._set_only_lift_cpu_tensors(True)
    SimulatedMode().__enter__()
    return calls
