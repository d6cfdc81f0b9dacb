"""One weight quantized by several devices, a share of its rows each, with the bits that one device gives."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor
from lowbit.errors import OptionError
from lowbit.importance import relative_importance
from lowbit_kbit.options import KbitOptions
from lowbit_kbit.quantizer import KbitQuantizer, choose_codebook, quantize_rows

_OF_ROWS = ("codes", "scales", "super_scales")


def quantize_over(
    weight: Tensor, options: KbitOptions, devices: Sequence[torch.device | str], calibration: Calibration | None = None
) -> QuantizedTensor:
    """Quantize ``weight`` (out, in) on ``devices`` at once; the result lies where the weight lies.

    A learned codebook is fitted to the whole weight first, and random numbers belong to elements, so the bits are those of
    ``KbitQuantizer.quantize``, whatever the devices. Raises OptionError without devices, and what ``quantize`` raises.
    """
    if not devices:
        raise OptionError("quantize_over needs at least one device, such as cuda:0")
    rows, columns = weight.shape
    size = min(options.group_size or columns, columns)
    if options.flat and columns % size:  # groups cross rows: there are no shares of rows
        return KbitQuantizer().quantize(weight, options, calibration)
    importance = relative_importance(calibration, weight)
    codebook = choose_codebook(weight, size, options, importance)
    bounds = [rows * index // len(devices) for index in range(len(devices) + 1)]

    def share(index: int) -> dict[str, Tensor]:
        start, stop = bounds[index], bounds[index + 1]
        there = torch.device(devices[index])
        moved = None if importance is None else importance.to(there)
        return quantize_rows(weight[start:stop].to(there), options, codebook, moved, start)

    with ThreadPoolExecutor(len(devices)) as pool:  # a launch waits for its checks: each device has a thread
        found = list(pool.map(share, [index for index in range(len(devices)) if bounds[index] < bounds[index + 1]]))
    parts = {
        name: torch.cat([each[name].to(weight.device) for each in found])
        if name in _OF_ROWS
        else part.to(weight.device)
        for name, part in found[0].items()
    }
    return KbitQuantizer().finish(parts, options, (rows, columns))
