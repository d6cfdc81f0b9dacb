"""A correct small packer, and some that each lose something; ``must_fail`` names the tests that have to notice."""

import pytest
import torch

from lowbit import Grid, PackedTensor, Packer, QuantizedTensor, Scheme, TensorSpec, Zero
from lowbit.errors import SchemeError
from lowbit.streams import StreamPacker
from lowbit.testing import PackerContract

ROUND_TRIP = frozenset({"test_round_trip_is_exact"})


class NibblePacker(Packer):
    """Two 4-bit codes in a byte, low nibble first; symmetric affine codes with one float16 scale a group."""

    layout = "toy-nibbles"

    def why_not(self, scheme, shape):
        if shape[1] % 2:
            return f"in_features must be even, got {shape[1]}"
        if scheme.group_size is None or scheme != Scheme(Grid.AFFINE, 4, scheme.group_size):
            return f"stores affine 4-bit symmetric codes in groups, not {scheme.summary()}"
        return None

    def specs(self, scheme, shape):
        groups = scheme.groups(shape)
        return {
            "nibbles": TensorSpec(torch.uint8, (shape[0], shape[1] // 2)),
            "scales": TensorSpec(torch.float16, (shape[0], groups)),
        }

    def pack(self, quantized):
        codes = self.codes(quantized.parts["codes"])
        buffers = {"nibbles": codes[:, 0::2] | codes[:, 1::2] << 4, "scales": quantized.parts["scales"].contiguous()}
        return PackedTensor(self.spec(quantized.scheme, quantized.shape), self.buffers(buffers))

    def unpack(self, packed):
        nibbles = packed.buffers["nibbles"]
        codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)
        return QuantizedTensor(packed.scheme, packed.shape, {"codes": codes, "scales": packed.buffers["scales"]})

    def codes(self, codes):
        return codes

    def buffers(self, buffers):
        return buffers


class _Contract(PackerContract):
    kind = NibblePacker
    must_fail: frozenset[str] = frozenset()

    @pytest.fixture
    def packer(self):
        return self.kind()


class CorrectNibbles(_Contract):
    pass


class DropsTheTopBit(NibblePacker):
    def codes(self, codes):
        return codes & 7


class BrokenDropsTheTopBit(_Contract):
    kind = DropsTheTopBit
    must_fail = ROUND_TRIP


class LosesTheSign(NibblePacker):
    def buffers(self, buffers):
        return {**buffers, "scales": buffers["scales"].abs()}


class BrokenLosesTheSign(_Contract):
    kind = LosesTheSign
    must_fail = ROUND_TRIP


class FlushesSubnormals(NibblePacker):
    def buffers(self, buffers):
        scales = buffers["scales"]
        return {**buffers, "scales": torch.where(scales.abs() < 2.0**-14, 0 * scales, scales)}


class BrokenFlushesSubnormals(_Contract):
    kind = FlushesSubnormals
    must_fail = ROUND_TRIP


class StoresInBfloat16(NibblePacker):
    def buffers(self, buffers):
        return {**buffers, "scales": buffers["scales"].bfloat16().half()}


class BrokenStoresInBfloat16(_Contract):
    kind = StoresInBfloat16
    must_fail = ROUND_TRIP


class MisannouncesSpecs(NibblePacker):
    def spec(self, scheme, shape):
        return super().spec(scheme, shape) if self.packing else super().spec(scheme, (shape[0], shape[1] * 2))

    packing = False

    def pack(self, quantized):
        self.packing = True
        packed = super().pack(quantized)
        self.packing = False
        return packed


class BrokenMisannouncesSpecs(_Contract):
    kind = MisannouncesSpecs
    must_fail = frozenset({"test_specs_announce_what_pack_returns"})


class ReordersBuffers(NibblePacker):
    def buffers(self, buffers):
        return dict(reversed(buffers.items()))


class BrokenReordersBuffers(_Contract):
    kind = ReordersBuffers
    must_fail = frozenset({"test_specs_announce_what_pack_returns"})


class ScribblesOnCodes(NibblePacker):
    def codes(self, codes):
        return codes.bitwise_xor_(8)

    def unpack(self, packed):
        nibbles = packed.buffers["nibbles"]
        codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2) ^ 8
        return QuantizedTensor(packed.scheme, packed.shape, {"codes": codes, "scales": packed.buffers["scales"]})


class BrokenScribblesOnCodes(_Contract):
    kind = ScribblesOnCodes
    must_fail = frozenset({"test_inputs_are_left_alone"})


class LeavesGarbage(NibblePacker):
    """A byte of padding a row that nobody writes."""

    def specs(self, scheme, shape):
        specs = super().specs(scheme, shape)
        return {**specs, "nibbles": TensorSpec(torch.uint8, (shape[0], shape[1] // 2 + 1))}

    def buffers(self, buffers):
        rows, columns = buffers["nibbles"].shape
        padded = torch.empty(rows, columns + 1, dtype=torch.uint8)
        padded[:, :columns] = buffers["nibbles"]
        return {**buffers, "nibbles": padded}

    def unpack(self, packed):
        nibbles = packed.buffers["nibbles"][:, :-1]
        codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(-2)
        return QuantizedTensor(packed.scheme, packed.shape, {"codes": codes, "scales": packed.buffers["scales"]})


class BrokenLeavesGarbage(_Contract):
    kind = LeavesGarbage
    must_fail = frozenset({"test_same_parts_same_bytes"})


class AcceptsZeros(NibblePacker):
    """Says yes to integer zeros and to permutations, and then drops them: fails in ``unpack``."""

    def why_not(self, scheme, shape):
        return None if scheme.grid is Grid.AFFINE and scheme.bits == 4 and shape[1] % 2 == 0 else "not 4-bit affine"


class BrokenAcceptsZeros(_Contract):
    kind = AcceptsZeros
    must_fail = frozenset({"test_other_schemes_round_trip_or_are_refused"})

    @pytest.fixture
    def examples(self):
        return [(Scheme(Grid.AFFINE, 4, 32, Zero.INTEGER), (16, 256))]


class RefusesWithoutReason(NibblePacker):
    def why_not(self, scheme, shape):
        return "" if super().why_not(scheme, shape) else None


class BrokenRefusesWithoutReason(_Contract):
    kind = RefusesWithoutReason
    must_fail = frozenset({"test_other_schemes_round_trip_or_are_refused"})


class RaisesInsteadOfRefusing(NibblePacker):
    def why_not(self, scheme, shape):
        if (reason := super().why_not(scheme, shape)) is not None:
            raise SchemeError(reason)


class BrokenRaisesInsteadOfRefusing(_Contract):
    kind = RaisesInsteadOfRefusing
    must_fail = frozenset({"test_other_schemes_round_trip_or_are_refused"})

    @pytest.fixture
    def examples(self):
        return [(Scheme(Grid.AFFINE, 4, 32), (16, 256))]


class Misnamed(NibblePacker):
    layout = "Toy Nibbles"


class BrokenMisnamed(_Contract):
    kind = Misnamed
    must_fail = frozenset({"test_layout_has_a_name_for_files"})


class NamesSharedBuffers(NibblePacker):
    """Says that rows can be read alone, but forgets their scales: the first rows' are taken for all."""

    def row_buffers(self, scheme, shape):
        return frozenset({"nibbles"})

    def rows(self, packed, numbers):
        spec = self.spec(packed.scheme, (len(numbers), packed.shape[1]))
        buffers = {"nibbles": packed.buffers["nibbles"][numbers], "scales": packed.buffers["scales"][: len(numbers)]}
        return PackedTensor(spec, buffers)


class BrokenNamesSharedBuffers(_Contract):
    kind = NamesSharedBuffers
    must_fail = frozenset({"test_rows_are_those_of_the_weight"})


class NibbleStreams(NibblePacker, StreamPacker):
    def read_parts(self, packed, start, stop):
        return {"scales": packed.buffers["scales"][start:stop]}

    def write_parts(self, packed, start, stop, parts):
        packed.buffers["scales"][start:stop] = parts["scales"]

    def streams(self, packed, start, stop):
        return packed.buffers["nibbles"].view(torch.int32)[start:stop]

    def put_streams(self, packed, start, stop, streams):
        packed.buffers["nibbles"].view(torch.int32)[start:stop] = streams


class CorrectNibbleStreams(_Contract):
    kind = NibbleStreams


class StreamsAreBigEndian(NibbleStreams):
    def streams(self, packed, start, stop):
        nibbles = packed.buffers["nibbles"][start:stop]
        return (nibbles << 4 | nibbles >> 4).view(torch.int32)

    def put_streams(self, packed, start, stop, streams):
        nibbles = streams.view(torch.uint8)
        packed.buffers["nibbles"][start:stop] = nibbles << 4 | nibbles >> 4


class BrokenStreamsAreBigEndian(_Contract):
    kind = StreamsAreBigEndian
    must_fail = frozenset({"test_streams_are_the_codes"})


class WritesScalesOfTheFirstRows(NibbleStreams):
    def write_parts(self, packed, start, stop, parts):
        packed.buffers["scales"][: stop - start] = parts["scales"]


class BrokenWritesScalesOfTheFirstRows(_Contract):
    kind = WritesScalesOfTheFirstRows
    must_fail = frozenset({"test_streams_are_the_codes"})
