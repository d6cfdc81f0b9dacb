"""Quantizers that need calibration: one searches with the block in hand, one wants a Hessian, one takes importance."""

from dataclasses import dataclass

import torch

from lowbit import Grid, QuantizedTensor, Quantizer, ScaleFormat, Scheme
from lowbit.grids import dequantize


@dataclass(frozen=True)
class ShrinkOptions:
    bits: int = 3
    group_size: int | None = 16


class RoundQuantizer(Quantizer[ShrinkOptions]):
    """Rounds to nearest with scales that are shrunk by a factor; takes importance and needs nothing."""

    name = "rounds"
    Options = ShrinkOptions

    def scheme(self, options):
        return Scheme(Grid.AFFINE, options.bits, options.group_size, scales=ScaleFormat("float32"))

    def quantize(self, weight, options, calibration=None, factor=1.0):
        scheme = self.scheme(options)
        groups = weight.float().reshape(weight.shape[0], -1, options.group_size)
        if calibration is not None and calibration.importance is not None:  # some use of it that changes the codes
            gains = calibration.importance.to(weight.device).reshape(-1, options.group_size)
            factor = factor * (0.8 + 0.2 * gains.mean() / (gains.mean() + gains.std()))
        scales = factor * groups.abs().amax(-1) / (scheme.midpoint - 1)
        codes = (groups / scales[..., None].clamp(min=1e-9)).round() + scheme.midpoint
        codes = codes.clamp(0, 2**scheme.bits - 1).reshape(weight.shape).to(torch.uint8)
        return QuantizedTensor(scheme, tuple(weight.shape), {"codes": codes, "scales": scales})


class BlockQuantizer(RoundQuantizer):
    """Takes the factor of three with which the block's outputs come closest to the targets."""

    name = "needs-block"
    needs = frozenset({"block_inputs"})

    def quantize_block(self, weights, options, calibration, block=None):
        assert block is not None
        every, losses = range(block.samples), {}
        floats = {path: block.module.get_submodule(path).weight for path in block.linears.values()}
        hidden, targets = block.inputs(every), block.targets(every)
        assert bool(block.mask(every).all())
        for factor in (0.7, 0.85, 1.0):
            for name, path in block.linears.items():
                rounded = dequantize(self.quantize(weights[name], options[name], factor=factor))
                rounded = rounded.to(floats[path].dtype)
                block.module.get_submodule(path).weight = torch.nn.Parameter(rounded, requires_grad=False)
            with torch.no_grad():
                losses[factor] = float((block.forward(hidden) - targets).square().mean())
        for path, weight in floats.items():
            block.module.get_submodule(path).weight = weight
        best = min(losses, key=losses.__getitem__)
        block.log(f"loss {losses[1.0]:.4e} -> {losses[best]:.4e}")
        return {name: self.quantize(weight, options[name], factor=best) for name, weight in weights.items()}


class HessianQuantizer(RoundQuantizer):
    """Refuses to work without a Hessian that is one."""

    name = "needs-hessian"
    needs = frozenset({"hessian"})

    def quantize(self, weight, options, calibration=None, factor=1.0):
        hessian = calibration.hessian
        assert torch.equal(hessian, hessian.T)
        assert hessian.shape == (weight.shape[1], weight.shape[1])
        return super().quantize(weight, options, None, 1.0 if float(hessian.trace()) > 0 else 0.5)
