"""Whether CUDA kernels can run here, and the one sentence that says why not.

``LOWBIT_CUDA=0`` switches every CUDA kernel off; whatever has a reference in plain torch then uses that.
"""

from __future__ import annotations

import os
from functools import cache

OLDEST = (7, 5)
"""Turing, the oldest compute capability that kernels are compiled for."""


def why_not_cuda(index: int = 0) -> str | None:
    """Return None when CUDA device ``index`` can compile and run kernels, else the reason, one sentence."""
    if os.environ.get("LOWBIT_CUDA") == "0":
        return "LOWBIT_CUDA=0 switches the CUDA kernels off; unset it to use them"
    return _why_not_packages() or _why_not_device(index)


def capability_reason(capability: tuple[int, int]) -> str | None:
    """Return None for a compute capability that kernels are compiled for, else the reason."""
    if capability < OLDEST:
        found, oldest = ".".join(map(str, capability)), ".".join(map(str, OLDEST))
        return f"the GPU has compute capability {found}, and the CUDA kernels need {oldest} (Turing) or newer"
    return None


def driver_reason(driver: int, compiler: tuple[int, int]) -> str | None:
    """Return None when a driver runs what NVRTC of version ``compiler`` makes, else the reason.

    ``driver`` is what cuDriverGetVersion says, such as 12040 for CUDA 12.4. A driver runs the code of every compiler of its own
    major version and of older ones (CUDA compatibility guide, minor version compatibility).
    """
    if driver // 1000 >= compiler[0]:
        return None
    return (
        f"the NVIDIA driver supports CUDA {driver // 1000}.{driver % 1000 // 10}, and the installed NVRTC is "
        f'{compiler[0]}.{compiler[1]}; update the driver, or pip install "nvidia-cuda-nvrtc<{driver // 1000 + 1}"'
    )


@cache
def _why_not_packages() -> str | None:
    try:
        import cuda.core  # noqa: F401  # whether it is there is the question
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # the last: cuda.pathfinder does not find the library
        return f'cuda-core or NVRTC is missing ({_one_line(error)}); pip install "lowbit[gpu]"'
    return None


@cache
def _why_not_device(index: int) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "no CUDA device is available to torch; the reference kernels run on the CPU"
    if index >= torch.cuda.device_count():
        return f"there is no CUDA device {index}; torch sees {torch.cuda.device_count()}"
    from cuda.bindings import driver, nvrtc

    _, version = driver.cuDriverGetVersion()
    _, major, minor = nvrtc.nvrtcVersion()
    return driver_reason(int(version), (major, minor)) or capability_reason(torch.cuda.get_device_capability(index))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
