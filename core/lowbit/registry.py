"""``Registry``: every installed component by name, and the two decisions made from it: a route and a kernel."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from lowbit.errors import (
    CheckpointError,
    DuplicateComponentError,
    NoRouteError,
    OptionError,
    PluginError,
    UnknownComponentError,
)
from lowbit.interfaces import Calibration, Checkpoint, Exporter, Importer, Kernel, MatmulProblem, Packer, Quantizer
from lowbit.parts import TensorSpec
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec

T = TypeVar("T")

INSTALL_HINTS = {name: f"lowbit-{name}" for name in ("kbit", "spqr", "autoround", "qtip", "binary")}
"""First-party plugins that may simply not be installed; the one place where core knows their names."""


class Table(Mapping[str, T], Generic[T]):
    """Components of one kind by name; duplicates raise, unknown names list the known ones."""

    def __init__(self, what: str, kind: type, key: str) -> None:
        self.what, self._kind, self._key = what, kind, key
        self._items: dict[str, T] = {}

    def register(self, component: T) -> None:
        """Add a component; raise PluginError for anything but an instance, DuplicateComponentError for a taken name."""
        module = type(component).__module__
        if isinstance(component, type) or not isinstance(component, self._kind):
            shown = component.__name__ if isinstance(component, type) else repr(component)
            raise PluginError(
                f"{shown} is no {self._kind.__name__} instance; register an instance, not a class ({self.what})"
            )
        name = getattr(component, self._key)
        if name in self._items:
            other = type(self._items[name]).__module__
            raise DuplicateComponentError(
                f"two {self.what}s are named {name!r}: one in {other}, one in {module}; rename one"
            )
        self._items[name] = component

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise UnknownComponentError(self._unknown(name)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def by_priority(self) -> list[T]:
        """Return the components by (-priority, name): the same order however they were installed."""
        return [self._items[name] for name in sorted(self._items, key=lambda name: (-self._priority(name), name))]

    def _priority(self, name: str) -> int:
        return int(getattr(self._items[name], "priority", 0))

    def _unknown(self, name: str) -> str:
        sentence = f"no {self.what} named {name!r}; installed: {', '.join(self) or 'none'}"
        if close := difflib.get_close_matches(name, list(self), n=1):
            return f"{sentence}; did you mean {close[0]!r}?"
        hint = INSTALL_HINTS.get(name.partition("-")[0])
        return f"{sentence} (pip install {hint})" if hint else sentence


@dataclass(frozen=True, slots=True)
class Route:
    """How a weight of some scheme reaches a file: an exporter, and the packer of the layout (None: dequantized)."""

    exporter: Exporter
    packer: Packer | None


def with_article(scheme: Scheme) -> str:
    """Return a scheme's summary after ``a`` or ``an``."""
    return f"{'an' if scheme.summary()[0] in 'aeiou' else 'a'} {scheme.summary()}"


def _difference(buffers: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> str:
    """Say which buffer is missing, surplus, or of another dtype or shape."""
    for name in sorted(wanted.keys() | buffers.keys()):
        if name not in buffers:
            return f"it has no {name}"
        if name not in wanted:
            return f"such a weight has no {name}"
        has, needs = buffers[name], wanted[name]
        if has != needs:
            return f"{name} is {_text(has)}, and such a weight needs {_text(needs)}"
    raise AssertionError("equal buffers have no difference")


def _text(spec: TensorSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"


class Registry:
    """All components; build one with ``lowbit.plugins.installed()`` or, in tests, register by hand."""

    def __init__(self) -> None:
        self.quantizers: Table[Quantizer[Any]] = Table("quantizer", Quantizer, "name")
        self.packers: Table[Packer] = Table("layout", Packer, "layout")
        self.kernels: Table[Kernel] = Table("kernel", Kernel, "name")
        self.importers: Table[Importer] = Table("import format", Importer, "format")
        self.exporters: Table[Exporter] = Table("export format", Exporter, "format")

    def open(self, path: Path) -> Checkpoint:
        """Open a checkpoint with the first importer that recognises it.

        Raises CheckpointError, with every reason, when none does, and when buffers do not fit the scheme that is declared for them.
        """
        if not path.exists():
            raise CheckpointError(f"{path} does not exist; give a model folder or a .gguf or .safetensors file")
        reasons = {}
        for importer in self.importers.by_priority():
            reason = importer.why_not(path)
            if reason is None:
                checkpoint = importer.open(path)
                try:
                    self._check_buffers(checkpoint)
                except BaseException:
                    checkpoint.close()
                    raise
                return checkpoint
            reasons[importer.format] = reason
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise CheckpointError(
            f"{path} holds no checkpoint that an installed format can read ({listed or 'none installed'})"
        )

    def _check_buffers(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError for a packed weight whose buffers are not those that its layout has for its scheme and shape."""
        known: dict[tuple[str, int, tuple[int, int]], Mapping[str, TensorSpec] | str] = {}
        for name, entry in checkpoint.entries.items():
            if not isinstance(entry, PackedSpec) or entry.layout not in self.packers:
                continue
            key = (entry.layout, id(entry.scheme), entry.shape)  # hashing a scheme takes longer than asking
            if key not in known:
                packer = self.packers[entry.layout]
                known[key] = packer.why_not(entry.scheme, entry.shape) or packer.specs(entry.scheme, entry.shape)
            wanted = known[key]
            if wanted != entry.buffers:
                declared = f"{checkpoint.path}: {name} is declared as {with_article(entry.scheme)} weight"
                reason = wanted if isinstance(wanted, str) else _difference(entry.buffers, wanted)
                raise CheckpointError(f"{declared} in layout {entry.layout!r}, but {reason}")

    def calibration(self, path: Path, checkpoint: Checkpoint) -> Mapping[str, Calibration]:
        """Read a calibration file, such as an importance matrix, for the weights of ``checkpoint``.

        Raises CheckpointError when the path does not exist or no installed format reads calibration from it.
        """
        if not path.is_file():
            raise CheckpointError(f"{path} is no file; --imatrix takes an importance matrix")
        for importer in self.importers.by_priority():
            found = importer.calibration(path, checkpoint)
            if found is not None:
                return found
        raise CheckpointError(f"{path} holds no importance matrix that an installed format can read")

    def write_calibration(
        self, path: Path, measured: Mapping[str, Calibration], checkpoint: Checkpoint, tokens: int, source: str = ""
    ) -> None:
        """Write a calibration file with the installed format whose suffix ``path`` has; see ``Exporter.write_calibration``.

        Raises OptionError when no installed format writes calibration files of this suffix.
        """
        writers = {exporter.calibration_suffix: exporter for exporter in self.exporters.values()}
        suffixes = ", ".join(sorted(suffix for suffix in writers if suffix)) or "none"
        if not path.suffix or path.suffix not in writers:
            raise OptionError(f"{path} names no kind of calibration file; installed formats write {suffixes}")
        writers[path.suffix].write_calibration(path, measured, checkpoint, tokens, source)

    def route(self, scheme: Scheme, shape: tuple[int, int], format: str, preferred: Sequence[str] = ()) -> Route:
        """Return how ``format`` stores weights of this scheme and shape; raise NoRouteError with every refusal.

        ``preferred`` layouts are tried first; the order of the others is the format's.
        """
        exporter = self.exporters[format]
        reasons = self._refusals(exporter, scheme, shape, preferred)
        if isinstance(reasons, Route):
            return reasons
        able = self.formats_for(scheme, shape)
        question = f"format {format!r} cannot hold {with_article(scheme)} weight of {shape[0]}x{shape[1]}"
        raise NoRouteError(
            question, reasons, f"these formats can: {', '.join(able)}" if able else "no installed format can"
        )

    def formats_for(self, scheme: Scheme, shape: tuple[int, int]) -> list[str]:
        """Return the formats that store weights of this scheme and shape packed, by name."""
        routes = {name: self._refusals(exporter, scheme, shape) for name, exporter in self.exporters.items()}
        return [name for name, route in routes.items() if isinstance(route, Route) and route.packer is not None]

    def ask(
        self, scheme: Scheme, shape: tuple[int, int], format: str, preferred: Sequence[str] = ()
    ) -> Route | Mapping[str, str]:
        """Return the route by which ``format`` stores such a weight, or the refusals by who refused."""
        return self._refusals(self.exporters[format], scheme, shape, preferred)

    def fixed_codebook(
        self, scheme: Scheme, shape: tuple[int, int], format: str, preferred: Sequence[str] = ()
    ) -> Tensor | None:
        """Return the codebook of the layout by which ``format`` stores such a weight; None where codebooks are free."""
        route = self.ask(scheme, shape, format, preferred)
        return route.packer.codebook if isinstance(route, Route) and route.packer else None

    def _refusals(
        self, exporter: Exporter, scheme: Scheme, shape: tuple[int, int], preferred: Sequence[str] = ()
    ) -> Route | dict[str, str]:
        if reason := exporter.why_not(scheme, shape):
            return {exporter.format: reason}
        if exporter.layouts == ():
            return Route(exporter, None)
        reasons: dict[str, str] = {}
        packers = (
            self.packers.by_priority() if exporter.layouts is None else [self.packers[x] for x in exporter.layouts]
        )
        packers.sort(key=lambda packer: packer.layout not in preferred)
        for packer in packers:
            reason = packer.why_not(scheme, shape)
            if reason is None:
                return Route(exporter, packer)
            reasons[packer.layout] = reason
        return reasons

    def kernel_for(self, problem: MatmulProblem) -> Kernel:
        """Return the fastest kernel that serves ``problem``; raise NoRouteError with every refusal."""
        reasons = {}
        for kernel in self.kernels.by_priority():
            reason = kernel.why_not(problem)
            if reason is None:
                return kernel
            reasons[kernel.name] = reason
        relevant = {
            name: reason for name, reason in reasons.items() if problem.layout in reason or problem.layout in name
        }
        question = f"no kernel runs layout {problem.layout!r} ({problem.scheme.summary()}) on {problem.device}"
        raise NoRouteError(question, relevant or reasons, self._hint(problem.layout))

    def _hint(self, layout: str) -> str:
        package = INSTALL_HINTS.get(layout.partition("-")[0])
        return f"pip install {package}" if package else "install the plugin that registers this layout"

    def reference_kernel(self, problem: MatmulProblem) -> Kernel:
        """Return the plain-torch kernel of the layout (priority 0), which defines what its bits mean."""
        for kernel in self.kernels.by_priority():
            if kernel.priority == 0 and kernel.why_not(problem) is None:
                return kernel
        raise NoRouteError(f"layout {problem.layout!r} has no plain-torch kernel", {}, self._hint(problem.layout))
