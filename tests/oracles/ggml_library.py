"""ggml's own C code, out of the shared libraries in the package llama-cpp-python: quantizers, dequantizers, validation.

Loaded by the fixture ``ggml`` in conftest.py; the same build runs models, so what it says here is what llama.cpp computes.
"""

import ctypes
import importlib.util
import sys
import threading
from pathlib import Path

import numpy as np

LIBRARY = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")


class TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class Ggml:
    """The functions that tests need, on numpy arrays; types are ggml's ids."""

    def __init__(self):
        package = importlib.util.find_spec("llama_cpp").submodule_search_locations[0]
        self._library = library = ctypes.CDLL(str(Path(package) / "lib" / LIBRARY))
        library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
        library.ggml_row_size.restype = library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
        numbers = (ctypes.c_int64,) * 3
        library.ggml_quantize_chunk.argtypes = (
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *numbers, ctypes.c_void_p
        )  # fmt: skip
        library.ggml_validate_row_data.restype = ctypes.c_bool
        library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)

    def traits(self, type):
        """Return what ggml says of a type."""
        return self._library.ggml_get_type_traits(type).contents

    def quantize(self, type, weights, importance=None, threads=1):
        """Quantize float32 (rows, columns) to uint8 blocks (rows, bytes), as llama-quantize does."""
        weights = np.ascontiguousarray(weights, dtype=np.float32)
        rows, columns = weights.shape
        blocks = np.empty((rows, self._library.ggml_row_size(type, columns)), np.uint8)
        factors = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)

        def work(start, stop):  # ctypes releases the interpreter's lock
            self._library.ggml_quantize_chunk(
                type, weights[start:].ctypes.data, blocks[start:].ctypes.data, 0, stop - start, columns,
                None if factors is None else factors.ctypes.data,
            )  # fmt: skip

        if threads == 1:
            work(0, rows)
            return blocks
        bounds = [rows * index // threads for index in range(threads + 1)]
        workers = [threading.Thread(target=work, args=bounds[i : i + 2]) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return blocks

    def dequantize(self, type, blocks, columns):
        """Return float32 (rows, columns) of uint8 blocks (rows, bytes)."""
        blocks = np.ascontiguousarray(blocks)
        weights = np.empty((len(blocks), columns), np.float32)
        self.traits(type).to_float(blocks.ctypes.data, weights.ctypes.data, weights.size)
        return weights

    def valid(self, type, blocks):
        """Whether llama.cpp accepts the rows: no scale is NaN or infinite."""
        blocks = np.ascontiguousarray(blocks)
        return self._library.ggml_validate_row_data(type, blocks.ctypes.data, blocks.nbytes)
