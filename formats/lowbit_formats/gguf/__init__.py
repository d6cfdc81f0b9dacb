"""GGUF: the files of llama.cpp. Layouts of every block type, importer and exporter; the bytes are drawn in SPEC.md."""

from __future__ import annotations

from collections.abc import Callable

from lowbit.hookspecs import hookimpl
from lowbit.interfaces import Exporter, Importer, Kernel, Packer
from lowbit.kernels import ReferenceKernel
from lowbit_formats.gguf.exporter import GgufExporter
from lowbit_formats.gguf.importer import GgufImporter
from lowbit_formats.gguf.layouts import PACKERS

__all__ = ["PACKERS", "GgufExporter", "GgufImporter"]


@hookimpl
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register one layout for each block type."""
    for packer in PACKERS:
        register(packer)


@hookimpl
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register the plain-torch kernel of each layout."""
    for packer in PACKERS:
        register(ReferenceKernel(packer))


@hookimpl
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register the importer."""
    register(GgufImporter())


@hookimpl
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register the exporter."""
    register(GgufExporter())
