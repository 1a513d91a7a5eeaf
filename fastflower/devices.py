"""Device selection, precision, random generators, and a record of hardware and versions."""

import logging
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager

import torch

from fastflower import distributed
from fastflower.errors import ArgumentError, DeviceError, quoted
from fastflower.machine import version_of

_log = logging.getLogger("fastflower")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return `device` as a torch.device. If it is None, choose CUDA if available, else the CPU, and log the choice.

    Raises DeviceError if CUDA is requested but not available, or ArgumentError if `device` is not a valid device.
    """
    available = torch.cuda.is_available()
    if device is None:
        _log.info("device: %s (chosen by default)", "cuda" if available else "cpu")
        device = "cuda" if available else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ArgumentError(
            f"device must be cpu, cuda or cuda:NUMBER, got {quoted(device)}; omit it to use CUDA if available."
        )
    named = repr(
        str(device) if isinstance(device, torch.device) else device
    )  # an integer is that of a GPU, as in torch
    if chosen.type == "cuda" and not available:
        raise DeviceError(
            f"device={named}: this machine, or this build of torch ({torch.__version__}), has no CUDA; "
            f"omit device to use the CPU, or install an NVIDIA driver and a CUDA build of torch."
        )
    if str(chosen) == "cuda":  # without a number
        chosen = torch.device("cuda", torch.cuda.current_device())
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise DeviceError(f"device={named}: this machine has only {torch.cuda.device_count()} GPUs; omit device.")
    return chosen


def precision_of(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast and images on a device. `precision` is as in `Recipe`."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # CPUs without native bfloat16 emulate it: ResNet-50 took 2x as long with AVX-512 and 18x without (docs/log.md).
    fast = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16")))  # "bf16" is ARM's
    return torch.bfloat16 if fast else torch.float32


def environment(device: torch.device, precision: torch.dtype | None = None) -> dict[str, str]:
    """Return hardware, package versions and, if given, the precision, for checkpoints and benchmark records."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    names = ("fastflower", "torch", "torchvision", "numpy", "opencv-python-headless")
    return {
        "device": f"{device.type}: {chip}",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "ranks": str(distributed.world_size()),
        "python": platform.python_version(),
        **({"precision": str(precision).removeprefix("torch.")} if precision else {}),
        **{name: version_of(name) for name in names},
    }


def generator_of(device: torch.device) -> torch.Generator:
    """Return the random generator that training uses on a device. CUDA graphs reread its seed at each replay."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def fastest_convolutions(device: torch.device) -> Generator[None]:
    """Let cuDNN benchmark its algorithms for each new shape inside the block. Shapes rarely change, so it pays off.

    torch.backends.cudnn.flags would also reset cuDNN's other flags, such as TF32.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
