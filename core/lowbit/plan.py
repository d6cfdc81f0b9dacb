"""``Plan``: what happens to every tensor, decided from headers alone, before any work. A refusal costs milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from lowbit import lift
from lowbit.errors import NoRouteError, OptionError
from lowbit.exact import exact_scheme
from lowbit.interfaces import Calibration, Checkpoint, Entry, Exporter, MatmulProblem, Packer, Value
from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec, part_specs
from lowbit.recipe import Choice, Recipe, is_linear_name, is_matrix
from lowbit.registry import Registry
from lowbit.requantize import adapt, by_scheme, choice_for, nearest_choice, way_out, why_not_exactly, with_codebook
from lowbit.scheme import Grid, Scheme
from lowbit.tensors import PackedSpec

BASE_MEMORY = 450_000_000
"""Resident bytes of Python with torch loaded and worker threads started; measured 2026-11-21, CPU torch 2.13, Linux."""

OUTLIER_BYTES = 20
"""For each weight while outliers are placed: the weight, its error, gain and a sorted copy in float32, and a second dense part."""


class Action(str, Enum):
    """What a step does: nothing, choose codes, move codes to another layout, write floats, or change a float dtype."""

    COPY = "copy"
    QUANTIZE = "quantize"
    TRANSCODE = "transcode"
    DEQUANTIZE = "dequantize"
    CAST = "cast"


@dataclass(frozen=True, slots=True)
class Step:
    """One tensor: what it is, what it becomes, and who does it."""

    name: str
    action: Action
    source: Entry
    target: Entry
    choice: Choice | None = None
    packer: Packer | None = None

    @property
    def weights(self) -> int:
        """How many weights the tensor has."""
        return math.prod(self.source.shape)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive while the step runs: the source, the next source read ahead, parts, and the result."""
        alive = 2 * self.source.nbytes + self.target.nbytes
        if self.action in (Action.QUANTIZE, Action.TRANSCODE):
            scheme = self.choice.scheme if self.choice else _scheme(self.source)
            shape = (self.source.shape[0], self.source.shape[1])
            alive += sum(spec.nbytes for spec in part_specs(scheme, shape).values())
            if scheme.outliers and self.action is Action.QUANTIZE:
                alive += OUTLIER_BYTES * self.weights
        if isinstance(self.source, PackedSpec) and self.action in (Action.QUANTIZE, Action.DEQUANTIZE):
            alive += 4 * self.weights
        return alive


@dataclass(frozen=True, slots=True)
class Plan:
    """Every step in the order of the source file, and where it all goes."""

    steps: tuple[Step, ...]
    exporter: Exporter
    metadata: Metadata

    @property
    def entries(self) -> dict[str, Entry]:
        """What the destination will hold."""
        return {step.name: step.target for step in self.steps}

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that will be written."""
        return sum(step.target.nbytes for step in self.steps)

    @property
    def source_nbytes(self) -> int:
        """Bytes of tensors that will be read."""
        return sum(step.source.nbytes for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight over all tensors."""
        return 8 * self.nbytes / max(1, sum(step.weights for step in self.steps))

    @property
    def peak_memory(self) -> int:
        """Predicted peak resident bytes."""
        return BASE_MEMORY + max((step.peak_bytes for step in self.steps), default=0)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to: a format, perhaps one of its named variants (``gguf:q4_0``), and a dtype for what is not quantized."""

    format: str
    variant: str | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str, dtype: torch.dtype | None = None) -> Target:
        """Parse ``FORMAT[:VARIANT]``."""
        format, _, variant = text.partition(":")
        return cls(format, variant or None, dtype)

    def wanted(self, exporter: Exporter, checkpoint: Checkpoint, calibrated: bool = False) -> dict[str, Scheme]:
        """Return the scheme that the variant asks of each tensor; raise OptionError for an unknown variant."""
        if self.variant is None:
            return {}
        variants, entries = exporter.variants(), checkpoint.entries
        if self.variant in exporter.mixes():  # before a scheme of the same name: a mix says more of the same
            return dict(exporter.mix(self.variant, entries, checkpoint.metadata, calibrated))
        if self.variant in variants:
            names = (name for name, entry in entries.items() if is_matrix(entry) and is_linear_name(name))
            return dict.fromkeys(names, variants[self.variant])
        known = ", ".join(dict.fromkeys((*variants, *exporter.mixes())))
        reason = exporter.why_no_variant(self.variant)
        because = f": {reason}" if reason else ""
        way_out = f"it has {known}" if known else f"it has none, write --format {self.format}"
        raise OptionError(f"format {self.format!r} has no variant {self.variant!r}{because}; {way_out}")


COLLECTED = frozenset({"block_inputs", "importance", "hessian"})
"""What calibration can give to quantizers that need it."""


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    target: Target,
    registry: Registry,
    calibration: Mapping[str, Calibration] = MappingProxyType({}),
    collects: frozenset[str] = frozenset(),
    weighs: bool = False,
) -> Plan:
    """Decide every step.

    ``calibration`` is what was measured beforehand, by tensor; ``collects`` what will be for the quantizers that need it, and
    ``weighs`` whether importance will be for all others too.

    Raises NoRouteError when the format cannot hold a scheme, OptionError and UnknownComponentError for what was asked
    wrongly, and what the exporter's ``check`` raises for the checkpoint as a whole.
    """
    exporter = registry.exporters[target.format]
    wanted = target.wanted(exporter, checkpoint, bool(calibration) or weighs)
    choices = recipe.choose(
        checkpoint.entries, registry, wanted, _codebooks(checkpoint.entries, registry, target, wanted)
    )
    planner = _Planner(
        registry, target, wanted if not recipe.quantizes else {}, calibration, recipe.requantize, collects
    )
    steps = tuple(planner.step(name, entry, choices.get(name)) for name, entry in checkpoint.entries.items())
    plan = Plan(steps, exporter, checkpoint.metadata)
    if wanted and not any(step.action is not Action.COPY or isinstance(step.source, PackedSpec) for step in steps):
        raise OptionError(
            f"{target.format}:{target.variant} needs quantized weights and {checkpoint.path.name} has none; give --quantizer"
        )
    exporter.check(plan.entries, plan.metadata)
    return plan


@dataclass(frozen=True, slots=True)
class _Planner:
    registry: Registry
    target: Target
    wanted: Mapping[str, Scheme]
    calibration: Mapping[str, Calibration]
    requantize: bool = False
    collects: frozenset[str] = frozenset()
    lifted: dict[tuple[Scheme, tuple[int, int]], Scheme] = field(default_factory=dict)

    def step(self, name: str, entry: Entry, choice: Choice | None) -> Step:
        if choice is not None:
            return self._quantize(name, entry, choice)
        if isinstance(entry, PackedSpec):
            return self._move(name, entry)
        return self._keep(name, entry)

    def _quantize(self, name: str, entry: Entry, choice: Choice) -> Step:
        scheme, shape = choice.scheme, (entry.shape[0], entry.shape[1])
        exporter = self.registry.exporters[self.target.format]
        if isinstance(entry, PackedSpec) and not self.requantize:
            raise OptionError(
                f"{name} is {entry.scheme.summary()} already, and new codes would round it a second time; leave the quantizer "
                "out to move its codes exactly, keep it by a rule PATTERN=none, or give --allow-requantize"
            )
        if missing := choice.quantizer.needs_for(choice.options) - measured(self.calibration, name) - self.collects:
            raise lacking(choice, name, missing)
        if isinstance(entry, PackedSpec):
            self._require_readable(entry)
        scheme = self._storable(scheme, shape)
        try:
            packer = self._route(name, scheme, shape, choice.quantizer.codebook(choice.options))
        except NoRouteError:
            adapted = adapt(self.registry, choice, shape, exporter) if self.target.variant is None else None
            if adapted is None:
                raise
            return self._quantize(name, entry, adapted)
        if packer is None:
            dtype = self.target.dtype or (torch.float32 if isinstance(entry, PackedSpec) else entry.dtype)
            return Step(name, Action.QUANTIZE, entry, TensorSpec(dtype, shape), choice)
        return Step(name, Action.QUANTIZE, entry, packer.spec(scheme, shape), choice, packer)

    def _move(self, name: str, entry: PackedSpec) -> Step:
        """Copy, transcode or dequantize a packed weight: always exactly, unless requantizing is allowed."""
        exporter = self.registry.exporters[self.target.format]
        stored = exporter.layouts is None or entry.layout in exporter.layouts
        if stored and self._wants(name, entry) and exporter.why_not(entry.scheme, entry.shape) is None:
            return Step(name, Action.COPY, entry, entry)
        if not exporter.packs(name):
            return self._dequantize(name, entry)
        try:
            scheme = self._exact_scheme(name, entry)
            known = self.registry.packers[entry.layout].codebook if entry.layout in self.registry.packers else None
            packer = self._route(name, scheme, entry.shape, known, fixed=False)
        except NoRouteError as refusal:
            return self._requantize(name, entry, refusal)
        if packer is None:
            return self._dequantize(name, entry)
        self._require_readable(entry)
        return Step(name, Action.TRANSCODE, entry, packer.spec(scheme, entry.shape), packer=packer)

    def _wants(self, name: str, entry: PackedSpec) -> bool:
        """Whether the weight's own scheme and layout are what the variant asks for, where there is one."""
        if self.wanted.get(name, entry.scheme) != entry.scheme:
            return False
        preferred = self._preferred()
        others = (self.registry.packers[layout] for layout in preferred if entry.layout not in preferred)
        return all(packer.why_not(entry.scheme, entry.shape) for packer in others)

    def _preferred(self) -> Sequence[str]:
        return self.registry.exporters[self.target.format].preferred(self.target.variant) if self.target.variant else ()

    def _dequantize(self, name: str, entry: PackedSpec) -> Step:
        self._require_readable(entry)
        return Step(name, Action.DEQUANTIZE, entry, TensorSpec(self.target.dtype or torch.float32, entry.shape))

    def _requantize(self, name: str, entry: PackedSpec, refusal: NoRouteError) -> Step:
        """Choose new codes in the scheme that the variant asks for, or in the nearest; raise the refusal where that is not allowed."""
        scheme, shape, exporter = entry.scheme, entry.shape, self.registry.exporters[self.target.format]
        if not self.requantize:
            hint = way_out(self.registry, scheme, shape, self.target.format)
            reasons: Mapping[str, str] = refusal.reasons
            if name not in self.wanted:
                reasons = why_not_exactly(self.registry, scheme, shape, exporter, reasons)
            raise NoRouteError(refusal.question, reasons, hint) from None
        if wanted := self.wanted.get(name):
            choice = choice_for(self.registry, wanted, shape, exporter, self._preferred())
        else:
            choice = nearest_choice(self.registry, scheme, shape, exporter)
        if choice is None:
            hint = "no installed quantizer gives a scheme that it holds; name one with --quantizer"
            raise NoRouteError(refusal.question, refusal.reasons, hint) from None
        return self._quantize(name, entry, choice)

    def _exact_scheme(self, name: str, entry: PackedSpec) -> Scheme:
        """Return the scheme to store a packed weight in: its own, the variant's, or the smallest that means the same."""
        if wanted := self.wanted.get(name):
            if reason := lift.why_not(entry.scheme, wanted, entry.shape):
                variant = f"{self.target.format}:{self.target.variant}"
                question = (
                    f"{name} is {entry.scheme.summary()} and {variant} is {wanted.summary()}: no exact way leads there"
                )
                raise NoRouteError(question, {variant: reason})
            return wanted
        return self._storable(entry.scheme, entry.shape)

    def _storable(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """Return the scheme itself, or the one that the format stores and that holds exactly the same numbers."""
        key = (scheme, shape)
        if key not in self.lifted:
            self.lifted[key] = exact_scheme(self.registry, scheme, shape, self.target.format) or scheme
        return self.lifted[key]

    def _require_readable(self, entry: PackedSpec) -> None:
        """Refuse now, not in the middle of the work, when no plugin can unpack the layout."""
        self.registry.reference_kernel(MatmulProblem(entry.layout, entry.scheme, entry.shape))

    def _keep(self, name: str, entry: TensorSpec) -> Step:
        spec = entry
        if self.target.dtype and entry.dtype.is_floating_point and len(entry.shape) >= 2:
            spec = TensorSpec(self.target.dtype, entry.shape)
        spec = self.registry.exporters[self.target.format].plain(name, spec)
        return Step(name, Action.COPY if spec == entry else Action.CAST, entry, spec)

    def _route(
        self, name: str, scheme: Scheme, shape: tuple[int, int], codebook: Tensor | None, fixed: bool = True
    ) -> Packer | None:
        """Return the packer for codes that mean ``codebook``; None is one that only the data tells.

        A layout with a codebook of its own is refused then, unless the codes exist (not ``fixed``) and may turn out to fit.
        """
        preferred = (*self._preferred(), *with_codebook(self.registry, self.target.format, codebook))
        try:
            packer = self.registry.route(scheme, shape, self.target.format, preferred).packer
        except NoRouteError as error:
            reasons = by_scheme(self.registry, scheme, error.reasons)
            raise NoRouteError(f"{name}: {error.question}", reasons, error.hint) from None
        if packer is None or packer.codebook is None or (codebook is None and not fixed):
            return packer
        if codebook is None or not torch.equal(packer.codebook, codebook):
            question = (
                f"{name}: format {self.target.format!r} cannot hold a {scheme.summary()} weight with this codebook"
            )
            reasons = {packer.layout: "its codes mean fixed values, and those of the weight mean others"}
            raise NoRouteError(question, reasons, "the format 'native' stores any codebook")
        return packer


def _codebooks(
    entries: Mapping[str, Entry], registry: Registry, target: Target, wanted: Mapping[str, Scheme]
) -> dict[str, Tensor]:
    """Return the codebook that the variant means for each tensor, where its layout has one."""
    preferred = registry.exporters[target.format].preferred(target.variant) if target.variant else ()
    found = {
        name: registry.fixed_codebook(
            scheme, (entries[name].shape[0], entries[name].shape[1]), target.format, preferred
        )
        for name, scheme in wanted.items()
        if scheme.grid is Grid.CODEBOOK
    }
    return {name: codebook for name, codebook in found.items() if codebook is not None}


def measured(calibration: Mapping[str, Calibration], name: str) -> frozenset[str]:
    """Return what calibration holds for a tensor, in the words of ``Quantizer.needs``."""
    found = calibration.get(name, Calibration())
    return frozenset(what for what in ("importance", "hessian") if getattr(found, what) is not None)


def lacking(choice: Choice, name: str, missing: frozenset[str]) -> OptionError:
    """Return the refusal of a choice whose quantizer needs what nobody measures."""
    return OptionError(
        f"quantizer {choice.quantizer.name!r} needs calibration ({', '.join(sorted(missing))}) for {name}, and there "
        "is none; give --imatrix for importance, or choose options that need nothing"
    )


def _scheme(entry: Entry) -> Scheme:
    assert isinstance(entry, PackedSpec)
    return entry.scheme


class PlannedCheckpoint(Checkpoint):
    """What a plan will write, before it is written: names and schemes, no data; for planning what comes after it."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.entries, self.metadata = path, plan.entries, plan.metadata

    def read(self, name: str) -> Value:
        """Raise: there is no data yet."""
        raise NotImplementedError(f"{name} is not written yet")
