"""lowbit: quantize language models, move low-bit weights between file formats exactly, and prove what was written.

Everything public is here. Names load on first use, so that ``lowbit --help`` never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.errors import LowbitError
    from lowbit.grids import dequantize
    from lowbit.hookspecs import hookimpl
    from lowbit.interfaces import Calibration, Checkpoint, Exporter, Importer, Kernel, MatmulProblem, Packer, Quantizer
    from lowbit.kernels import ReferenceKernel
    from lowbit.metadata import Metadata, SideFile
    from lowbit.parts import TensorSpec
    from lowbit.plugins import installed
    from lowbit.registry import Registry
    from lowbit.runtime.explain import explain
    from lowbit.runtime.linear import QuantLinear
    from lowbit.runtime.load import load
    from lowbit.runtime.parameter import PackedParameter
    from lowbit.runtime.quantize import quantize_model
    from lowbit.runtime.save import save
    from lowbit.runtime.tokenizer import load_tokenizer
    from lowbit.scheme import (
        Across,
        Binary,
        BinaryForm,
        Grid,
        Outliers,
        Rotation,
        ScaleCoding,
        ScaleFormat,
        Scheme,
        Trellis,
        Zero,
    )
    from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor

__version__ = "0.1.0"

_HOMES = {
    "LowbitError": "errors",
    "dequantize": "grids",
    "hookimpl": "hookspecs",
    "Calibration": "interfaces",
    "Checkpoint": "interfaces",
    "Exporter": "interfaces",
    "Importer": "interfaces",
    "Kernel": "interfaces",
    "MatmulProblem": "interfaces",
    "Packer": "interfaces",
    "Quantizer": "interfaces",
    "ReferenceKernel": "kernels",
    "Metadata": "metadata",
    "SideFile": "metadata",
    "TensorSpec": "parts",
    "installed": "plugins",
    "Registry": "registry",
    "explain": "runtime.explain",
    "QuantLinear": "runtime.linear",
    "load": "runtime.load",
    "PackedParameter": "runtime.parameter",
    "quantize_model": "runtime.quantize",
    "save": "runtime.save",
    "load_tokenizer": "runtime.tokenizer",
    "Across": "scheme",
    "Binary": "scheme",
    "BinaryForm": "scheme",
    "Grid": "scheme",
    "Outliers": "scheme",
    "Rotation": "scheme",
    "ScaleCoding": "scheme",
    "ScaleFormat": "scheme",
    "Scheme": "scheme",
    "Trellis": "scheme",
    "Zero": "scheme",
    "PackedSpec": "tensors",
    "PackedTensor": "tensors",
    "QuantizedTensor": "tensors",
}

__all__ = [
    "Across",
    "Binary",
    "BinaryForm",
    "Calibration",
    "Checkpoint",
    "Exporter",
    "Grid",
    "Importer",
    "Kernel",
    "LowbitError",
    "MatmulProblem",
    "Metadata",
    "Outliers",
    "PackedParameter",
    "PackedSpec",
    "PackedTensor",
    "Packer",
    "QuantLinear",
    "QuantizedTensor",
    "Quantizer",
    "ReferenceKernel",
    "Registry",
    "Rotation",
    "ScaleCoding",
    "ScaleFormat",
    "Scheme",
    "SideFile",
    "TensorSpec",
    "Trellis",
    "Zero",
    "__version__",
    "dequantize",
    "explain",
    "hookimpl",
    "installed",
    "load",
    "load_tokenizer",
    "quantize_model",
    "save",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"lowbit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
