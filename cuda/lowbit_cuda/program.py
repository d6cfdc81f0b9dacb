"""``KernelProgram``: a CUDA source with its compile-time settings, compiled by NVRTC on first use and cached on disk.

No nvcc, no host compiler, no torch headers: a machine without a GPU can compile every kernel for every architecture. The cache is
cuda.core's, keyed by source, options, NVRTC version and a digest of every header that may be included; it is safe with many
processes. It lies outside the package: $LOWBIT_CACHE_DIR, else $XDG_CACHE_HOME/lowbit, else ~/.cache/lowbit.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_cuda.errors import CudaUnavailableError, KernelBuildError
from lowbit_cuda.records import BuiltKernel, write_record

if TYPE_CHECKING:
    from cuda.core import ObjectCode

INCLUDE = Path(__file__).parent / "include"
"""The shared headers: ``#include <lowbit/...>``."""


@dataclass(frozen=True, slots=True)
class KernelProgram:
    """One translation unit with one ``extern "C"`` entry; each set of macro definitions is a kernel of its own.

    Attributes:
        source: The ``.cu`` file.
        entry: Name of the ``extern "C" __global__`` function.
        defines: Macros by name, the compile-time parameters of the templates.
        include: Further header folders, such as a plugin's own.
    """

    source: Path
    entry: str
    defines: Mapping[str, str | int] = field(default_factory=dict)
    include: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """A readable name, such as ``gemv.cu:lowbit_gemv BITS=4 GROUP=128``."""
        return " ".join(
            [f"{self.source.name}:{self.entry}", *(f"{key}={value}" for key, value in self.defines.items())]
        )

    def compile(self, arch: str) -> ObjectCode:
        """Return the cubin for ``arch`` (``sm_90a``), from the cache when it is there.

        Raises KernelBuildError with NVRTC's log, CudaUnavailableError when cuda-core or NVRTC is not installed.
        """
        return compile_text(self.source.read_text(), self, arch)


def compile_text(text: str, program: KernelProgram, arch: str) -> ObjectCode:
    """Compile source text with a program's settings: what ``KernelProgram.compile`` does with its file."""
    core = _cuda_core()
    options = core.ProgramOptions(
        name=program.source.stem,
        arch=arch,
        std="c++17",
        define_macro=[(key, str(value)) for key, value in sorted(program.defines.items())] or None,
        include_path=[str(path) for path in (INCLUDE, *program.include, *_toolkit_headers())],
    )
    store = _store()
    key = core.utils.make_program_cache_key(
        code=text, code_type="c++", options=options, target_type="cubin", extra_digest=_headers_digest(program.include)
    )
    found = store.get(key)
    if found is not None:
        return core.ObjectCode.from_cubin(found, name=program.name)
    started = time.perf_counter()
    try:
        built = core.Program(text, "c++", options=options).compile("cubin")
    except Exception as error:  # cuda.core raises its own and NVRTC's types, with the log in the text
        raise KernelBuildError(f"{program.name} does not compile for {arch}: {error}") from error
    store[key] = built
    write_record(cache_folder(), BuiltKernel(program.name, arch, len(built.code), time.perf_counter() - started), key)
    return built


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    if given := os.environ.get("LOWBIT_CACHE_DIR"):
        return Path(given) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "kernels"


def _store() -> Any:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CudaUnavailableError(
            f"{folder} cannot be made to keep compiled kernels ({error.strerror}); set LOWBIT_CACHE_DIR to a folder that can"
        ) from error
    return _cuda_core().utils.FileStreamProgramCache(folder)


@cache
def _headers_digest(folders: tuple[Path, ...]) -> bytes:
    """Digest every header that a program could include, so that an edited header is never served from the cache."""
    total = hashlib.sha256()
    for folder in (INCLUDE, *folders):
        for path in sorted(folder.rglob("*.cuh")):
            total.update(path.relative_to(folder).as_posix().encode())
            total.update(path.read_bytes())
    total.update("".join(map(str, _toolkit_headers())).encode())
    return total.digest()


@cache
def _toolkit_headers() -> tuple[Path, ...]:
    """Return the folders of cuda_fp16.h and the standard headers, from the nvidia wheels or a toolkit."""
    import cuda.pathfinder

    found = [cuda.pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
    if found[0] is None:
        raise CudaUnavailableError('the CUDA runtime headers are missing; pip install "lowbit[gpu]"')
    return tuple(Path(folder) for folder in found if folder)


@cache
def _cuda_core() -> Any:
    try:
        import cuda.core
        import cuda.core.utils
    except ImportError as error:
        raise CudaUnavailableError(f'cuda-core is not installed ({error}); pip install "lowbit[gpu]"') from error
    return cuda.core
