"""What the contracts share: comparing values bit for bit, and saying which fixture is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from hypothesis import HealthCheck, Phase, settings
from torch import Tensor

from lowbit.interfaces import Entry, Value
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.tensors import PackedTensor, QuantizedTensor, bit_equal

STEADY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
"""Settings of the kit's hypothesis tests: the same examples in every run, whatever else keeps the machine busy."""


def override(contract: str, fixture: str, what: str) -> NoReturn:
    """Raise the error of a fixture that a test class must define."""
    raise NotImplementedError(f"override the fixture `{fixture}` of {contract}: return {what}")


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies to compare with later."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Assert that two mappings hold the same names with the same bits."""
    assert found.keys() == expected.keys(), f"{what}: names differ"
    for name, tensor in expected.items():
        assert bit_equal(found[name].cpu(), tensor.cpu()), f"{what}: {name} differs {_where(found[name], tensor)}"


def assert_same_quantized(found: QuantizedTensor, expected: QuantizedTensor, what: str) -> None:
    """Assert equality of scheme, shape and every bit of every part."""
    assert found.scheme == expected.scheme, f"{what}: the scheme changed"
    assert found.shape == expected.shape, f"{what}: the shape changed"
    assert_same_tensors(found.parts, expected.parts, what)


def assert_same_value(found: Value, expected: Value, what: str) -> None:
    """Assert equality of two tensors, or of two packed tensors and their specs."""
    assert type(found) is type(expected), f"{what}: {type(found).__name__}, not {type(expected).__name__}"
    if isinstance(found, PackedTensor):
        assert isinstance(expected, PackedTensor)
        assert found.spec == expected.spec, f"{what}: the spec changed"
        assert_same_tensors(found.buffers, expected.buffers, what)
    else:
        assert isinstance(expected, Tensor)
        assert_same_tensors({"it": found}, {"it": expected}, what)


def assert_sentence(reason: object) -> None:
    """Assert that a refusal is a sentence: a non-empty string on one line."""
    assert isinstance(reason, str), f"a refusal is a sentence, not {reason!r}"
    assert reason.strip(), "a refusal says why"
    assert "\n" not in reason, f"a refusal is one line: {reason!r}"


def assert_metadata(found: Metadata, expected: Metadata) -> None:
    """Assert that the config and every side file came back."""
    assert dict(found.config) == dict(expected.config)
    for file in expected.side_files:
        returned = found.side_file(file.name)
        assert returned is not None, f"the side file {file.name} is lost"
        assert returned.read() == file.read(), f"the side file {file.name} changed"


def entry_of(value: Value) -> Entry:
    """Return the entry that a value has in a checkpoint."""
    return value.spec if isinstance(value, PackedTensor) else TensorSpec.of(value)


def transposed(tensor: Tensor) -> Tensor:
    """Return the same values with other strides: stored column by column where there are two dimensions or more."""
    if tensor.dim() < 2:
        return torch.stack((tensor, tensor), dim=-1)[..., 0]
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _where(found: Tensor, expected: Tensor) -> str:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"({found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)})"
    differs = (found.cpu().double() != expected.cpu().double()).flatten().nonzero()
    return (
        f"(first at element {int(differs[0])} of {found.numel()})"
        if len(differs)
        else "(in the sign of a zero or a NaN)"
    )
