"""The quantizer ``ggml`` against the conformance kit, for every type."""

import pytest

from lowbit.testing import QuantizerContract
from lowbit_formats.ggml import GgmlQuantizer
from lowbit_formats.ggml.options import TYPES, GgmlOptions

# Made for weights that have so few values already; on Gaussian ones their absmax scale rounds almost all to zero.
TERNARY = ("tq1_0", "tq2_0")


class TestGgmlQuantizer(QuantizerContract):
    @pytest.fixture
    def quantizer(self):
        return GgmlQuantizer()

    @pytest.fixture(params=TYPES)
    def options(self, request):
        return GgmlOptions(request.param)

    @pytest.fixture
    def shape(self):
        return 64, 1024

    @pytest.fixture
    def max_nmse(self, quantizer, options, shape):
        if options.type in TERNARY:
            return 1.0
        from lowbit.testing import budgets

        return budgets.nmse_budget(quantizer.scheme(options), shape[1])
