"""Compiles kernel.c into the package with a compiler from PyPI, so that users need no C compiler."""

import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FLAGS = ["-O3", "-shared", "-s", "-mavx2", "-mfma", "-mf16c", "-Wall", "-Wextra", "-Werror"]


class CustomBuildHook(BuildHookInterface[Any]):
    """Adds kernel.so to wheels for Linux on x86-64. Other wheels have none, and fastflower uses OpenCV instead."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  (hatchling's signature)
        """Compile the kernel, and tag the wheel for Linux on x86-64 with glibc 2.17 or newer."""
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            return
        if find_spec("ziglang") is None:
            self.app.display_warning("ziglang is not installed: the package is built without its native kernel")
            return
        folder = Path(self.root, "fastflower", "loading", "backends")
        target = ["-target", "x86_64-linux-gnu.2.17", "-o", folder / "kernel.so", folder / "kernel.c"]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *_FLAGS, *target], check=True)
        build_data["artifacts"].append("fastflower/loading/backends/kernel.so")
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-manylinux_2_17_x86_64"
