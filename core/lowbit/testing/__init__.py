"""The conformance kit: what every component promises, as test classes to subclass.

    from lowbit.testing import QuantizerContract

    class TestMyQuantizer(QuantizerContract):
        @pytest.fixture
        def quantizer(self):
            return MyQuantizer()

        @pytest.fixture(params=[2, 3, 4], ids="{}bit".format)
        def options(self, request):
            return MyOptions(bits=request.param)

``weights`` has seeded weights, ``samples`` and ``strategies`` make quantized tensors of any scheme, and ``budgets`` says how
large an error may be and why. Needs pytest and hypothesis: ``pip install "lowbit[test]"``.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401  # only to say at once, and clearly, that it is missing
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lowbit.testing needs pytest and hypothesis, and {error.name} is missing: pip install 'lowbit[test]'",
        name=error.name,
    ) from error

# Before the first import of the contracts: otherwise their asserts fail without showing the values.
pytest.register_assert_rewrite("lowbit.testing.contracts")

from lowbit.testing import budgets, samples, strategies, weights
from lowbit.testing.contracts.exporter import ExporterContract
from lowbit.testing.contracts.importer import ImporterContract, Written
from lowbit.testing.contracts.kernel import KernelContract
from lowbit.testing.contracts.packer import PackerContract
from lowbit.testing.contracts.quantizer import QuantizerContract

__all__ = [
    "ExporterContract",
    "ImporterContract",
    "KernelContract",
    "PackerContract",
    "QuantizerContract",
    "Written",
    "budgets",
    "samples",
    "strategies",
    "weights",
]
