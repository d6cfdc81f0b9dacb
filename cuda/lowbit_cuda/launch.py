"""Compiled kernels on the current device, launched on torch's current stream."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from lowbit_cuda.arch import architecture
from lowbit_cuda.errors import CudaError
from lowbit_cuda.program import KernelProgram

_threads = threading.local()
SHARED_BYTES = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that a block may have, in KiB, by compute capability (CUDA programming guide, technical specifications)."""


def shared_bytes(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that a block may have; 0 for a device that is not known."""
    return SHARED_BYTES.get(capability, 0) * 1024


class Launcher:
    """One kernel of one program, loaded on the current device: what is made here may be launched inside a graph capture.

    Raises KernelBuildError or CudaUnavailableError when it does not compile, CudaError when the driver refuses it.
    """

    def __init__(self, program: KernelProgram, shared: int = 0) -> None:
        from cuda.bindings import driver
        from cuda.core import Device

        self._device = Device(torch.cuda.current_device())
        self._device.set_current()
        self.shared = shared
        self._streams: dict[int, Any] = {}
        self.kernel = program.compile(architecture(torch.cuda.get_device_capability())).get_kernel(program.entry)
        if shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (status,) = driver.cuKernelSetAttribute(attribute, shared, self.kernel.handle, self._device.device_id)
            if status != driver.CUresult.CUDA_SUCCESS:
                raise CudaError(f"the driver refused {shared} bytes of shared memory for {program.name}: {status.name}")

    def config(self, grid: int | tuple[int, ...], block: int, dependent: bool = False, cluster: int = 1) -> Any:
        """Return a launch configuration; ``grid`` counts blocks, ``cluster`` blocks launch together."""
        from cuda.core import LaunchConfig

        options: dict[str, Any] = {
            "block": block,
            "shmem_size": self.shared,
            "programmatic_stream_serialization": dependent,
        }
        if cluster > 1:
            assert isinstance(grid, int)
            return LaunchConfig(grid=grid // cluster, cluster=cluster, **options)  # which counts clusters
        return LaunchConfig(grid=grid, **options)

    def active_clusters(self, block: int, cluster: int) -> int:
        """Return how many clusters of ``cluster`` blocks run at once."""
        from cuda.bindings import driver

        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = cluster, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = block, 1, 1
        launch.sharedMemBytes = self.shared
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        launch.attrs, launch.numAttrs = [attribute], 1
        function = driver.CUfunction(int(self.kernel.handle))
        status, count = driver.cuOccupancyMaxActiveClusters(function, launch)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"the driver cannot say how many clusters of {cluster} run at once: {status.name}")
        return int(count)

    def launch(self, config: Any, arguments: Sequence[Any]) -> None:
        """Launch on torch's current stream; integers are addresses, numpy scalars go by value."""
        from cuda.core import launch

        if not getattr(_threads, str(self._device.device_id), False):
            self._device.set_current()  # torch's backward threads come without a context
            setattr(_threads, str(self._device.device_id), True)
        # the raw handle and one object for each: asking torch for its stream took a fifth of a call (H200, 2026-11-21)
        handle = torch._C._cuda_getCurrentRawStream(self._device.device_id)
        if (stream := self._streams.get(handle)) is None:
            stream = self._streams[handle] = self._device.create_stream(_RawStream(handle))
        launch(stream, config, self.kernel, *arguments)


class _RawStream:
    """A stream of torch as cuda.core takes it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
