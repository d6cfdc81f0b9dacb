"""Codes that move as bit streams arrive as they do by way of single codes, and what is not the same is noticed."""

from dataclasses import replace

import pytest

from lowbit import Grid, PackedTensor, ScaleFormat, Scheme, Zero, installed
from lowbit.lift import lift, why_not
from lowbit.streams import StreamPacker, streamed
from lowbit.testing import samples
from lowbit.testing.contracts.checks import assert_same_tensors
from lowbit_formats.ct_layout import CtPacker

SHAPE = (3 * 128, 1024)
SCHEMES = {
    "symmetric": Scheme(Grid.AFFINE, 4, 128),
    "bfloat16": Scheme(Grid.AFFINE, 4, 128, scales=ScaleFormat("bfloat16")),
    "asymmetric": Scheme(Grid.AFFINE, 4, 128, Zero.INTEGER),
    "minimums": Scheme(Grid.AFFINE, 4, 32, Zero.MINIMUM),
    "per channel": Scheme(Grid.AFFINE, 4, None),
    "3 bits": Scheme(Grid.AFFINE, 3, 64),
    "8 bits": Scheme(Grid.AFFINE, 8, 64),
    "act-order": Scheme(Grid.AFFINE, 4, 128, permutation=True),
}


def pairs():
    """Yield every scheme with every two stream layouts of which the second holds it, or a scheme that it lifts to."""
    packers = [packer for packer in installed().packers.values() if isinstance(packer, StreamPacker)]
    for name, scheme in SCHEMES.items():
        zeros = (
            [scheme.zero] if scheme.permutation else list(Zero)
        )  # with one, only the same parts are proved without floats
        targets = [replace(scheme, group_size=size, zero=zero) for size in (scheme.group_size, 32) for zero in zeros]
        for source in packers:
            if source.why_not(scheme, SHAPE) is None:
                for packer in packers:
                    fits = (it for it in targets if not packer.why_not(it, SHAPE) and not why_not(scheme, it, SHAPE))
                    if target := next(fits, None):
                        yield pytest.param(source, packer, scheme, target, id=f"{name}-{source.layout}-{packer.layout}")


@pytest.mark.parametrize(("source", "packer", "scheme", "target"), list(pairs()))
def test_streams_end_where_codes_do(source, packer, scheme, target):
    quantized = samples.quantized(scheme, SHAPE)
    found = streamed(source.pack(quantized), source, packer, packer.spec(target, SHAPE))
    assert found is not None
    assert_same_tensors(found.buffers, packer.pack(lift(quantized, target)).buffers, "the buffers")


def test_there_are_pairs():
    assert len(list(pairs())) > 30


@pytest.mark.parametrize("bits", [4, 5])
def test_other_codes_take_the_other_way(bits):
    packers, scheme = installed().packers, SCHEMES["asymmetric"]
    target = Scheme(Grid.AFFINE, bits, 128, Zero.SYMMETRIC if bits == 5 else Zero.INTEGER)
    packed = packers["awq-gemm"].pack(samples.quantized(scheme, SHAPE))
    found = streamed(packed, packers["awq-gemm"], packers["ct-pack"], packers["ct-pack"].spec(target, SHAPE))
    assert (found is None) == (bits == 5)


class FlipsABit(CtPacker):
    def put_streams(self, packed, start, stop, streams):
        super().put_streams(packed, start, stop, streams)
        if start <= 200 < stop:
            packed.buffers["weight_packed"][200, 3] ^= 1 << 17


class DoublesAScale(CtPacker):
    def write_parts(self, packed, start, stop, parts):
        super().write_parts(packed, start, stop, parts)
        packed.buffers["weight_scale"][stop - 1, 0] *= 2


@pytest.mark.parametrize("packer", [FlipsABit(), DoublesAScale()])
@pytest.mark.parametrize("zero", [Zero.SYMMETRIC, Zero.INTEGER])
def test_what_is_written_wrongly_is_not_proved(packer, zero):
    scheme = SCHEMES["symmetric"]
    source = installed().packers["gptq"]
    packed = source.pack(samples.quantized(scheme, SHAPE))
    spec = packer.spec(replace(scheme, zero=zero), SHAPE)
    assert isinstance(streamed(packed, source, CtPacker(), spec), PackedTensor)
    assert streamed(packed, source, packer, spec) is None
