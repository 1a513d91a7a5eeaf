"""What runs a step: the device, what is stated of it, and its random numbers."""

import logging
import os
import platform
from collections.abc import Generator
from contextlib import contextmanager

import torch

from fastflower import distributed
from fastflower.errors import ArgumentError, DeviceError
from fastflower.machine import version_of

_log = logging.getLogger("fastflower")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; None means CUDA where there is one, else the CPU, and says which in the log.

    Raises DeviceError for CUDA where there is none, ArgumentError for what is no device.
    """
    available = torch.cuda.is_available()
    if device is None:
        _log.info("device: %s (none was asked for)", "cuda" if available else "cpu")
    try:
        chosen = torch.device(device or ("cuda" if available else "cpu"))
    except RuntimeError:
        raise ArgumentError(
            f"device must be cpu, cuda or cuda:NUMBER, got {device!r}; leave it out for CUDA where there is one."
        ) from None
    if chosen.type == "cuda" and not available:
        raise DeviceError(
            f"device={str(device)!r}: this machine, or this build of torch ({torch.__version__}), has no CUDA; "
            f"leave device out to use the CPU, or install an NVIDIA driver and a CUDA build of torch."
        )
    if str(chosen) == "cuda":  # without a number
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def precision_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast on a device, in which a loader gives it images; precision  as a Recipe's."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Elsewhere it is emulated: a ResNet-50's step took 2 times as long with AVX-512, 18 times without (docs/log.md).
    fast = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16", "bf16")))  # ARM's is bf16
    return torch.bfloat16 if fast else torch.float32


def environment(device: torch.device, precision: torch.dtype | None = None) -> dict[str, str]:
    """Hardware, versions and, of training, its precision: for checkpoints and benchmark records."""
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
    """Where a step on the device takes its random numbers from. A graph reads its seed anew at each replay."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def fastest_convolutions(device: torch.device) -> Generator[None]:
    """Within, cuDNN times its algorithms at the first batch of each shape and keeps the fastest: shapes stay, so it pays.

    Not torch.backends.cudnn.flags, which sets all of cuDNN's flags, TF32 too, to values of its own.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
