"""``PackerContract``: packing has no tolerance. Every bit that goes in comes out, and the buffers are those announced."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbit.bits import pack_bits
from lowbit.grids import dequantize
from lowbit.interfaces import Packer
from lowbit.parts import TensorSpec
from lowbit.scheme import Grid, Scheme
from lowbit.streams import StreamPacker
from lowbit.tensors import PackedTensor, QuantizedTensor, bit_equal
from lowbit.testing import samples, strategies
from lowbit.testing.contracts.checks import (
    STEADY,
    assert_same_quantized,
    assert_same_tensors,
    assert_sentence,
    copies,
    override,
    transposed,
)

Example = tuple[Scheme, tuple[int, int]]
QuantizedStrategy = Callable[[Scheme, tuple[int, int]], "st.SearchStrategy[QuantizedTensor]"]


class PackerContract:
    """Subclass it, and override ``packer``; ``examples`` by default are those of ``samples.REPRESENTATIVES`` that it accepts.

    A packer promises: ``unpack(pack(q))`` is q, bit for bit, for every scheme and shape that ``why_not`` accepts; ``specs``
    announces the names, dtypes, shapes and order of the buffers before there is data; the same parts give the same bytes,
    padding included; parts and buffers are not written to. Buffers *may* share memory with the parts (and parts with
    buffers): values of both kinds are never modified after they are made, and copying each would double the memory.
    """

    @pytest.fixture
    def packer(self) -> Packer:
        """Override: an instance of the packer."""
        override("PackerContract", "packer", "an instance of your Packer")

    @pytest.fixture
    def examples(self, packer: Packer) -> Sequence[Example]:
        """Schemes and shapes (out, in) that the packer must accept: what it was made for."""
        accepted = [
            (scheme, shape) for scheme, shape in samples.REPRESENTATIVES if packer.why_not(scheme, shape) is None
        ]
        return accepted or override("PackerContract", "examples", "a list of (scheme, shape) that your packer accepts")

    @pytest.fixture
    def strategy(self) -> QuantizedStrategy:
        """A hypothesis strategy of tensors for a scheme and a shape; override it when parts have further constraints."""
        return strategies.quantized

    def test_layout_has_a_name_for_files(self, packer: Packer) -> None:
        """Lower case letters, digits, ``-``, ``_`` and ``.``: the name is written into files."""
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", packer.layout)

    def test_examples_are_accepted(self, packer: Packer, examples: Sequence[Example]) -> None:
        """``why_not`` says None."""
        assert examples
        for scheme, shape in examples:
            assert packer.why_not(scheme, shape) is None

    def test_specs_announce_what_pack_returns(self, packer: Packer, examples: Sequence[Example]) -> None:
        """Names, order, dtypes and shapes; buffers are contiguous, so that their bytes are the file's bytes."""
        for scheme, shape in examples:
            spec = packer.spec(scheme, shape)
            packed = packer.pack(samples.quantized(scheme, shape))
            assert packed.spec == spec
            assert list(packed.buffers) == list(spec.buffers)
            assert {name: TensorSpec.of(buffer) for name, buffer in packed.buffers.items()} == dict(spec.buffers)
            assert all(buffer.is_contiguous() for buffer in packed.buffers.values())
            assert packed.layout == packer.layout

    def test_round_trip_is_exact(
        self, packer: Packer, examples: Sequence[Example], strategy: QuantizedStrategy
    ) -> None:
        """For every example: random codes, the lowest and the highest, and every kind of finite float."""
        for scheme, shape in examples:

            @given(strategy(scheme, shape))
            @STEADY
            def check(quantized: QuantizedTensor) -> None:
                assert_same_quantized(packer.unpack(packer.pack(quantized)), quantized, "the round trip")

            check()

    def test_other_schemes_round_trip_or_are_refused(self, packer: Packer, strategy: QuantizedStrategy) -> None:
        """Any scheme of the vocabulary is packed exactly, or refused with a sentence: there is no third way."""

        @given(st.data())
        @STEADY
        def check(data: st.DataObject) -> None:
            scheme = data.draw(strategies.schemes())
            shape = data.draw(strategies.shapes(scheme))
            reason = packer.why_not(scheme, shape)
            if reason is not None:
                assert_sentence(reason)
                return
            quantized = data.draw(strategy(scheme, shape))
            assert_same_quantized(packer.unpack(packer.pack(quantized)), quantized, scheme.summary())

        check()
        for scheme, shape in samples.REPRESENTATIVES:
            if (reason := packer.why_not(scheme, shape)) is not None:
                assert_sentence(reason)
            elif scheme.grid is Grid.AFFINE:  # a codebook may be the layout's own, which ``strategy`` knows
                quantized = samples.quantized(scheme, shape)
                assert_same_quantized(packer.unpack(packer.pack(quantized)), quantized, scheme.summary())

    def test_rows_are_those_of_the_weight(self, packer: Packer, examples: Sequence[Example]) -> None:
        """Where ``row_buffers`` names some: any rows, in any order, one of them twice, as ``unpack`` of all would give them."""
        for scheme, shape in examples:
            if packer.row_buffers(scheme, shape):
                packed = packer.pack(samples.quantized(scheme, shape))
                numbers = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
                weight, found = dequantize(packer.unpack(packed)), packer.rows(packed, numbers)
                assert found.spec == packer.spec(scheme, (len(numbers), shape[1]))
                assert bit_equal(dequantize(packer.unpack(found)), weight[numbers]), "rows differ from the weight's"

    @pytest.mark.parametrize("compiled", [True, False])
    def test_streams_are_the_codes(
        self, packer: Packer, examples: Sequence[Example], compiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a ``StreamPacker``: what it reads of some rows is theirs, and rows written range by range are what ``pack`` makes.

        All of it with loops in C, where they can be compiled, and without.
        """
        if not compiled:
            monkeypatch.setenv("LOWBIT_CC", "")
        for scheme, (_, columns) in examples if isinstance(packer, StreamPacker) else ():
            assert isinstance(packer, StreamPacker)
            step, shape = packer.stream_rows, (3 * packer.stream_rows, columns)
            if columns * scheme.bits % 32 or packer.why_not(scheme, shape):
                continue
            quantized = samples.quantized(scheme, shape)
            packed = packer.pack(quantized)
            again = PackedTensor(packed.spec, {name: torch.zeros_like(it) for name, it in packed.buffers.items()})
            for start, stop in ((step, 3 * step), (0, step)):
                rows, streams = quantized.rows(start, stop), packer.streams(packed, start, stop)
                expected = pack_bits(rows.parts["codes"], scheme.bits).view(torch.int32)
                assert bit_equal(streams, expected), f"streams of rows {start} to {stop} are not their codes"
                found = {**packer.read_parts(packed, start, stop), "codes": rows.parts["codes"]}
                assert_same_tensors(found, rows.parts, f"the parts of rows {start} to {stop}")
                packer.write_parts(again, start, stop, rows.parts)
                packer.put_streams(again, start, stop, streams)
                assert packer.holds_streams(again, start, stop, expected), f"rows {start} to {stop} read as other codes"
                for at in (0, expected.numel() // 3, expected.numel() - 1):
                    damaged = expected.clone()
                    damaged.view(-1)[at] ^= 1 << at % 31
                    assert not packer.holds_streams(again, start, stop, damaged), (
                        f"a wrong code in word {at} goes unseen"
                    )
            assert_same_tensors(again.buffers, packed.buffers, "buffers written range by range")

    def test_inputs_are_left_alone(self, packer: Packer, examples: Sequence[Example]) -> None:
        """Neither ``pack`` writes to parts nor ``unpack`` to buffers."""
        for scheme, shape in examples:
            quantized = samples.quantized(scheme, shape)
            parts = copies(quantized.parts)
            packed = packer.pack(quantized)
            assert_same_tensors(quantized.parts, parts, "parts after pack")
            buffers = copies(packed.buffers)
            packer.unpack(packed)
            assert_same_tensors(packed.buffers, buffers, "buffers after unpack")

    def test_same_parts_same_bytes(self, packer: Packer, examples: Sequence[Example]) -> None:
        """Other strides and other garbage in fresh memory change no byte: padding is written, not left over."""
        for scheme, shape in examples:
            quantized = samples.quantized(scheme, shape)
            expected = _packed(packer, quantized, garbage=0)
            strided = {name: transposed(part) for name, part in quantized.parts.items()}
            found = _packed(packer, QuantizedTensor(scheme, shape, strided), garbage=0x5A)
            assert_same_tensors(found.buffers, expected.buffers, "the second packing")


def _packed(packer: Packer, quantized: QuantizedTensor, garbage: int) -> PackedTensor:
    """Pack while torch's fresh memory holds ``garbage``, as it may after an hour of other work."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            fresh = make(*arguments, **options)
            fresh.fill_(garbage)
            return fresh

        return empty

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filled(Tensor.new_empty)),
    ):
        return packer.pack(quantized)
