"""What can go wrong with CUDA, each as one sentence."""

from __future__ import annotations


class CudaError(RuntimeError):
    """Base: CUDA cannot do what was asked here."""


class CudaUnavailableError(CudaError):
    """No GPU, no driver, or a package of ``lowbit[gpu]`` is missing."""


class KernelBuildError(CudaError):
    """NVRTC refused a kernel; the message carries its log."""
