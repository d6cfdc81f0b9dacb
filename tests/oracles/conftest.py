"""Real input for the oracles: SmolLM2-135M-Instruct, fetched once by ``bench/models.py`` and cached outside the repository."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of the Q4_1 GGUF."""
    return load(Path(__file__).parents[2] / "bench" / "models.py").smollm2()


@pytest.fixture(scope="session")
def ggml():
    """ggml's C functions, on numpy arrays."""
    if importlib.util.find_spec("llama_cpp") is None:  # only its libraries are needed, so it is not imported
        pytest.skip("ggml's own C code comes with llama-cpp-python, which is not installed")
    return load(Path(__file__).with_name("ggml_library.py")).Ggml()


@pytest.fixture(scope="session")
def llama():
    """llama.cpp itself: quantizing files, and computing with models."""
    pytest.importorskip("llama_cpp", reason="llama.cpp comes with llama-cpp-python, which is not installed")
    return load(Path(__file__).with_name("llama_library.py")).Llama()


def load(path):
    """Import a Python file that is no part of a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
