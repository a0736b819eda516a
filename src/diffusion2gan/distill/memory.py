"""The memory of a run: counted before it starts, and what needs less if the GPU has too little."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diffusion2gan.adversarial.losses import exact_derivatives, finite_difference_r1, r1_penalty
from diffusion2gan.distill.run import Run
from diffusion2gan.errors import Failure, UserError
from diffusion2gan.recipe import Recipe
from diffusion2gan.runtime.precision import full_float32
from diffusion2gan.teacher.conditioning import Conditioning

GIB = 2**30


def memory_bytes(run: Run, is_cpu: bool | None = None) -> dict[str, int]:
    """Bytes on the device during training, by component, without activations.

    `is_cpu`: whether the device is the CPU, where models that are offloaded from a GPU stay; by
    default the teacher's is meant. Activations come on top; they are measured (`peak_memory_mib`),
    not counted.
    """
    recipe = run.recipe
    teacher = run.teacher
    trained = run.student.trained
    student = num_bytes(trained)
    discriminator = num_bytes(run.discriminator)

    # Models that are offloaded from a GPU stay in memory if the device is the CPU
    if is_cpu is None:
        is_cpu = teacher.device.type == "cpu"
    teacher_weights = 0
    if recipe.needs_teacher or is_cpu:
        teacher_weights = num_bytes(teacher.network)
    vae = 0
    if recipe.needs_vae or is_cpu:
        vae = num_bytes(teacher.vae)

    text_encoders = 0
    if recipe.prompt_embeds == "encoded":
        components = teacher.pipeline.components.items()
        encoders = [module for name, module in components if name.startswith("text_encoder")]
        text_encoders = num_bytes(*encoders)

    return {
        "student_weights": student,
        "student_gradients_adam_average": 2 * student + adam_bytes(recipe, trained),
        "teacher_weights": teacher_weights,
        "discriminator_weights_gradients_adam": (
            2 * discriminator + adam_bytes(recipe, run.discriminator)
        ),
        "text_encoders": text_encoders,
        "vae": vae,
    }


def num_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all parameters and buffers; shared tensors count once."""
    sizes: dict[int, int] = {}
    for module in modules:
        if module is None:
            continue
        for tensor in (*module.parameters(), *module.buffers()):
            address = id(tensor) if tensor.is_meta else tensor.data_ptr()
            sizes[address] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def num_trainable(module: nn.Module | None) -> int:
    """The number of trainable parameters."""
    if module is None:
        return 0
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def adam_bytes(recipe: Recipe, module: nn.Module | None) -> int:
    """Bytes of Adam's two averages.

    With 8 bits, tensors of 4 096 elements or more have a byte per element and a float32 scale per
    256 elements; smaller ones stay in float32.
    """
    if module is None or recipe.optimizer == "adamw":
        return 2 * num_bytes(module)

    total = 0
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        numel = parameter.numel()
        if numel >= 4096:
            num_blocks = -(-numel // 256)
            total += 2 * (numel + 4 * num_blocks)
        else:
            total += 2 * 4 * numel
    return total


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside the block create: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._current = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._current += storage.nbytes()
        self.peak = max(self.peak, self._current)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._current -= self._alive.pop(key, 0)


def count_r1_bytes(run: Run, method: str) -> int:
    """`count_penalty_bytes` of the run's discriminator and teacher. It needs the text encoders."""
    assert run.discriminator is not None
    row = run.teacher.unconditional()
    return count_penalty_bytes(run.discriminator, row, run.teacher.latent_shape, method)


def count_penalty_bytes(
    discriminator: nn.Module, row: Conditioning, latent_shape: tuple[int, int, int], method: str
) -> int:
    """The most memory that the R1 penalty and its backward pass take at once, on one sample.

    Beside the weights and their gradients, in bytes; `row` is the conditioning of one prompt.
    Nothing is computed: torch's fake tensors have shapes and no numbers. Kernels' scratch memory
    is not counted.
    """
    shape = (1, *latent_shape)
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Inputs, and the discriminator with gradients
        discriminator = copy_without_numbers(discriminator)
        cond = row.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        noise = torch.empty(shape)
        latents = torch.empty(shape)
        for parameter in discriminator.parameters():
            parameter.grad = torch.empty(parameter.shape)

        with AllocationCounter() as counter:
            if method == "exact":
                with exact_derivatives("cpu"):
                    r1_penalty(discriminator, noise, cond, latents).backward()
            else:
                direction = torch.empty(shape)
                with full_float32("cpu"):
                    finite_difference_r1(discriminator, noise, cond, latents, direction).backward()
    return counter.peak


def copy_without_numbers(module: nn.Module) -> Any:
    """A copy with new tensors on the CPU, which inside a FakeTensorMode have no numbers."""
    empty: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, empty)


def check_r1_memory(run: Run) -> None:
    """Raises UserError if the GPU is too small for the R1 penalty on one sample."""
    recipe = run.recipe
    device = run.teacher.device
    if run.discriminator is None or recipe.r1_weight == 0 or device.type != "cuda":
        return
    if run.is_sharded:
        return

    available = torch.cuda.get_device_properties(device).total_memory
    state = sum(memory_bytes(run).values())
    needed = count_r1_bytes(run, recipe.r1_method)
    if state + needed <= available:
        return
    remedy = "set r1_weight=0, or a smaller resolution"
    if recipe.r1_method == "exact":
        fewer = count_r1_bytes(run, "finite_differences")
        remedy = (
            f"set r1_method=finite_differences, which needs {fewer / GIB:.2f} GiB there, "
            f"{remedy.removeprefix('set ')} (gradient_checkpointing does not help)"
        )
    raise UserError(
        f"the R1 penalty (r1_weight = {recipe.r1_weight}, r1_method = {recipe.r1_method}) needs "
        f"{needed / GIB:.2f} GiB on one sample, beside {state / GIB:.2f} GiB of weights, gradients "
        f"and averages, and {device} has {available / GIB:.2f} GiB. To train here, {remedy}."
    )


def out_of_memory_failure(run: Run, error: torch.OutOfMemoryError) -> Failure:
    """The error for a step that the GPU has too little memory for: what is needed, what helps."""
    recipe = run.recipe
    state = sum(memory_bytes(run).values())
    needs = f"{state / GIB:.2f} GiB of weights, gradients and averages (counted)"
    if run.discriminator is not None and recipe.r1_weight > 0 and run.teacher.prompts is None:
        r1 = count_r1_bytes(run, recipe.r1_method)
        needs += f", {r1 / GIB:.2f} GiB for the R1 penalty on one sample (counted)"
    remedies = ", ".join(smaller_settings(recipe))
    return Failure(
        f"out of memory after {run.pairs_seen} pairs, on {run.teacher.device} "
        f"({str(error).splitlines()[0]}). The run needs {needs}, and the activations of a "
        f"micro-batch. What needs less: {remedies}. The last checkpoint, if there is one, is "
        "intact; gradient_accumulation_steps, gradient_checkpointing and precision may change in a "
        "run, with --allow-change."
    )


def smaller_settings(recipe: Recipe) -> list[str]:
    """The settings that need less memory than the recipe's."""
    settings = []
    micro_batch_size = recipe.batch_size // recipe.gradient_accumulation_steps
    if micro_batch_size > 1:
        settings.append(
            f"gradient_accumulation_steps={recipe.batch_size} or less (it is "
            f"{recipe.gradient_accumulation_steps}, with micro-batches of {micro_batch_size})"
        )
    if not recipe.gradient_checkpointing:
        settings.append("gradient_checkpointing=true")
    if recipe.precision == "float32":
        settings.append("precision=bfloat16")
    if recipe.adversarial_weight > 0 and recipe.r1_weight > 0 and recipe.r1_method == "exact":
        settings.append("r1_method=finite_differences (in a new run)")
    if recipe.prompt_embeds == "encoded":
        settings.append("prompt_embeds=kept (in a new run)")
    if recipe.optimizer == "adamw" and recipe.strategy == "ddp":
        settings.append("optimizer=adamw8bit (in a new run)")
    if recipe.lora_rank == 0:
        settings.append("lora_rank=64 (in a new run)")
    settings.append("a smaller resolution (with other pairs)")
    return settings
