"""From a decoder block and options to tuned codes: what the quantizer's ``quantize_block`` does when ``iters`` is above 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit import Calibration, QuantizedTensor, Scheme, dequantize
from lowbit.calibration.block import Block
from lowbit.errors import OptionError, WeightError
from lowbit.importance import relative_importance
from lowbit_autoround.activations import Runner, borrowed_weights, measure_importance
from lowbit_autoround.options import AutoRoundOptions
from lowbit_autoround.starts import tuned_weight
from lowbit_autoround.tuned_weight import TunedWeight
from lowbit_autoround.tuner import NotFiniteError, Schedule, Tuner, checked_samples


def tune_block(
    block: Block,
    weights: Mapping[str, Tensor],
    options: Mapping[str, AutoRoundOptions],
    schemes: Mapping[str, Scheme],
    calibration: Mapping[str, Calibration],
    rounded: Mapping[str, QuantizedTensor],
) -> dict[str, QuantizedTensor] | None:
    """Tune ``weights`` of ``block`` together and return their codes; None when the loss is not finite and may not be.

    Args:
        block: The module is left as it was.
        weights: By name, float (out, in), all of them linears of the block.
        options: By name; what concerns the block as a whole must be the same for all of ``weights``.
        schemes: By name.
        calibration: By name; importance for searched scales, measured on the block where it is missing.
        rounded: Weights of the block that are not tuned; it runs with what they decode to.

    Raises OptionError and WeightError.
    """
    schedule = _schedule(block, {name: options[name] for name in weights})
    shapes = {name: weight.shape for name, weight in weights.items()}
    shapes |= {name: torch.Size(quantized.shape) for name, quantized in rounded.items() if name in block.linears}
    first = options[next(iter(weights))]
    with torch.inference_mode(False), torch.no_grad():
        runner = Runner(block, schedule.batch_size)
        started = _starts(runner, weights, options, schemes, calibration, schedule)
        with borrowed_weights(block, shapes) as parameters:
            for name in shapes.keys() - weights.keys():
                parameters[name].data.copy_(dequantize(rounded[name]))
                parameters[name].requires_grad_(False)
            try:
                outcome = Tuner(runner, started, parameters, schedule).run(
                    {name: options[name].tune_scales for name in weights}
                )
            except NotFiniteError as error:
                if first.fallback == "rtn":
                    block.log(f"loss {error.loss} at step {error.step}: rounded to nearest instead")
                    return None
                raise WeightError(_explain(block, error)) from None
    block.log(f"loss {outcome.before:.3e} -> {outcome.after:.3e} at step {outcome.step} of {schedule.iters}")
    return {name: started[name].quantized(outcome.parts[name]) for name in weights}


def _schedule(block: Block, options: Mapping[str, AutoRoundOptions]) -> Schedule:
    """Return the settings that all options agree on."""
    first_name, first = next(iter(options.items()))
    for name, other in options.items():
        for key in ("iters", "batch_size"):
            _require_same(block, key, (first_name, getattr(first.tuning, key)), (name, getattr(other.tuning, key)))
        for key in ("accumulate", "tokens", "trim", "fallback", "seed"):
            _require_same(block, key, (first_name, getattr(first, key)), (name, getattr(other, key)))
    tuning = first.tuning
    step = min(block.samples, tuning.batch_size * first.accumulate) * block.mask([0]).shape[1]
    share = first.counted_share(step)
    return Schedule(tuning.iters, tuning.batch_size, first.accumulate, share, first.trim, first.seed)


def _require_same(block: Block, key: str, first: tuple[str, object], other: tuple[str, object]) -> None:
    if first[1] != other[1]:
        raise OptionError(
            f"{block.name} is tuned as a whole, and {key} is {first[1]} for {first[0]} but {other[1]} for {other[0]}; "
            "give both the same, or iters=0 to one"
        )


def _starts(
    runner: Runner,
    weights: Mapping[str, Tensor],
    options: Mapping[str, AutoRoundOptions],
    schemes: Mapping[str, Scheme],
    calibration: Mapping[str, Calibration],
    schedule: Schedule,
) -> dict[str, TunedWeight]:
    known = dict(calibration)
    searched = [name for name in weights if options[name].tuning.search or options[name].two_level]
    if missing := [name for name in searched if known.get(name, Calibration()).importance is None]:
        index = checked_samples(runner.block.samples, schedule.batch_size)
        measured = measure_importance(runner, index, missing)
        known |= {name: Calibration(importance=importance) for name, importance in measured.items()}
    return {
        name: tuned_weight(
            weight,
            schemes[name],
            relative_importance(known.get(name), weight) if name in searched else None,
            options[name].tuning.search,
            options[name].tuning.step_size(schemes[name].bits),
        )
        for name, weight in weights.items()
    }


def _explain(block: Block, error: NotFiniteError) -> str:
    """Say where NaN or infinity came from, and what helps; the block's name is the caller's to add, as with all weights."""
    help_ = "or set fallback=rtn to round such blocks to nearest"
    for what, read in (("inputs", block.inputs), ("float outputs", block.targets)):
        for sample in range(block.samples):
            if not bool(torch.isfinite(read([sample])).all()):
                return (
                    f"the {what} of calibration sequence {sample} hold NaN or infinity, which float16 gives "
                    f"beyond 65504; calibrate in bfloat16 or float32, {help_}"
                )
    return f"the loss is {error.loss} at tuning step {error.step}; try a smaller lr, {help_}"
