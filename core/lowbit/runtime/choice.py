"""Which kernel serves a packed weight on a device, and why the faster ones do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit.errors import NoRouteError
from lowbit.interfaces import Kernel, MatmulProblem
from lowbit.registry import Registry
from lowbit.tensors import PackedSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that serves, and the reason of each faster kernel that refused, fastest first."""

    kernel: Kernel
    refusals: Mapping[str, str]


def problem_for(spec: PackedSpec, dtype: torch.dtype, device: torch.device) -> MatmulProblem:
    """Return the question to ask kernels about a packed weight, activations of ``dtype``, on ``device``."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return MatmulProblem(spec.layout, spec.scheme, spec.shape, dtype, device.type, capability)


def choose(problem: MatmulProblem, registry: Registry) -> Choice:
    """Return the fastest kernel that serves; raise NoRouteError, as ``Registry.kernel_for`` does, when none does."""
    kernel = registry.kernel_for(problem)
    refusals = {}
    for other in registry.kernels.by_priority():
        if other.priority <= kernel.priority:
            break
        refusals[other.name] = other.why_not(problem) or ""
    return Choice(kernel, refusals)


def choose_rows(problem: MatmulProblem, registry: Registry) -> Choice:
    """Return the kernel that reads single rows, for an embedding; the one that keeps the bits as they are comes first.

    Raises NoRouteError, with every reason, when none does.
    """
    reasons = {}
    for kernel in reversed(registry.kernels.by_priority()):
        reason = kernel.why_not(problem) or kernel.why_no_rows(problem)
        if reason is None:
            return Choice(kernel, {})
        reasons[kernel.name] = reason
    raise NoRouteError(f"no kernel reads rows of layout {problem.layout!r} on {problem.device}", reasons)
