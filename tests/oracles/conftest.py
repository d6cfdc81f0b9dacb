"""Real input for the oracles: SmolLM2-135M-Instruct, fetched once by ``bench/models.py`` and cached outside the repository."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Path of the Q4_1 GGUF."""
    location = Path(__file__).parents[2] / "bench" / "models.py"
    spec = importlib.util.spec_from_file_location("bench_models", location)
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models.smollm2()
