"""GPU architectures: which ones kernels are compiled for, and what a device is."""

from __future__ import annotations

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
"""Every kernel is compiled for these in CI, on a machine without a GPU."""

_FEATURE_SETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}
"""Devices whose architecture-specific instructions we may use; others compile for their plain name."""


def architecture(capability: tuple[int, int]) -> str:
    """Return the name to compile for on a device of this compute capability, such as ``sm_90a``."""
    return _FEATURE_SETS.get(capability, f"sm_{capability[0]}{capability[1]}")


def capability_of(arch: str) -> tuple[int, int]:
    """Return the compute capability of an architecture name."""
    digits = arch.removeprefix("sm_").rstrip("af")
    return int(digits[:-1]), int(digits[-1])
