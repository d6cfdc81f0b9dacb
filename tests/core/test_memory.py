"""Memory for large tensors, and the checksum of what is written."""

import gc

import pytest
import torch

from lowbit import memory
from lowbit.checksum import LANES, checksum


def test_large_tensors_start_at_a_huge_page_and_small_ones_are_torchs():
    large = memory.empty((3, memory.HUGE), torch.float16)
    assert large.shape == (3, memory.HUGE)
    assert large.dtype == torch.float16
    assert large.data_ptr() % memory.HUGE == 0
    assert large.fill_(2.0).sum(dtype=torch.float64) == 6 * memory.HUGE
    assert memory.empty((2, 3), torch.int32).shape == (2, 3)
    assert memory.empty((0, 3), torch.int32).numel() == 0


def test_memory_comes_back_only_when_no_view_is_left():
    with memory.reused():
        first = memory.empty((4 * memory.HUGE,), torch.uint8)
        place, view = first.data_ptr(), first[5:9]
        view.fill_(7)
        del first
        gc.collect()
        other = memory.empty((4 * memory.HUGE,), torch.uint8)
        assert other.data_ptr() != place
        other.fill_(1)
        assert view.tolist() == [7] * 4
        del view
        gc.collect()
        assert memory.empty((4 * memory.HUGE,), torch.uint8).data_ptr() == place


def test_nothing_is_kept_outside_and_not_more_than_said_inside():
    memory.empty((2 * memory.HUGE,), torch.uint8)
    assert memory._kept._blocks == []
    with memory.reused():
        tensors = [memory.empty((memory.KEPT // 2 - index * memory.HUGE,), torch.uint8) for index in range(4)]
        del tensors
        gc.collect()
        assert 0 < sum(map(len, memory._kept._blocks)) <= memory.KEPT
    assert memory._kept._blocks == []


@pytest.mark.parametrize("nbytes", [0, 1, 4 * LANES, 4 * LANES * 5 + 3])
def test_every_byte_counts(nbytes):
    raw = torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    told = checksum(raw)
    assert checksum(raw.clone()) == told
    for at in {0, 1, nbytes // 2, 4 * LANES, nbytes - 1} & set(range(nbytes)):
        damaged = raw.clone()
        damaged[at] ^= 0x80
        assert checksum(damaged) != told, at
    assert checksum(torch.cat((raw, torch.zeros(1, dtype=torch.uint8)))) != told


def test_words_and_pages_that_change_places_are_noticed():
    words = torch.randint(-(2**31), 2**31, (8 * LANES,), generator=torch.Generator().manual_seed(2)).int()
    told = checksum(words)
    for length in (1, 1024, LANES):
        for distance in (length, LANES, 4 * LANES):
            swapped = words.clone()
            swapped[:length], swapped[distance : distance + length] = (
                words[distance : distance + length],
                words[:length],
            )
            assert checksum(swapped) != told, (length, distance)


def test_a_checksum_reads_bytes_wherever_they_lie():
    odd = torch.arange(4 * LANES + 9, dtype=torch.int64).to(torch.uint8)
    assert checksum(odd[1:]) == checksum(odd[1:].clone())
    matrix = torch.arange(6, dtype=torch.int16).view(2, 3)
    assert checksum(matrix.T) == checksum(matrix.T.contiguous()) != checksum(matrix)
