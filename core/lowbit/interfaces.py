"""The five contracts. pluggy hooks find components; these abstract classes say what a component promises.

Components are stateless instances, registered once. ``why_not`` answers every question of the form "can you?": None is yes,
otherwise one sentence that names the thing, the value and the way out. It never raises and never looks at data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from lowbit.metadata import Metadata
from lowbit.parts import TensorSpec
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec, PackedTensor, QuantizedTensor, as_integers

if TYPE_CHECKING:
    from lowbit.calibration.block import Block
    from lowbit.loaders import LoaderRule

Entry: TypeAlias = "TensorSpec | PackedSpec"
Value: TypeAlias = "Tensor | PackedTensor"
OptionsT = TypeVar("OptionsT")
DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one file, as Hugging Face shards them."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration run measured about the inputs of one weight; absent measurements are None.

    Attributes:
        importance: Mean of x squared for each input column, float32 ``(in,)``.
        hessian: Mean of x xT over tokens, float32 ``(in, in)``.
    """

    importance: Tensor | None = None
    hessian: Tensor | None = None


class Quantizer(ABC, Generic[OptionsT]):
    """Chooses codes.

    Contract: ``quantize(w, o).scheme == scheme(o)``; the same input, options and seed give the same bits, on any number of
    threads; the input is not modified; every part is finite for finite weights.
    """

    name: ClassVar[str]
    Options: type[OptionsT]
    """A frozen dataclass; its fields become ``--set key=value``, and ``--bits``, ``--group-size``, ``--seed`` where present."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What convert must collect first: a subset of ``hessian``, ``importance``, ``block_inputs``."""

    def needs_for(self, options: OptionsT) -> frozenset[str]:
        """Return the part of ``needs`` that these options use; the default is all of it (0 tuning steps may need nothing)."""
        return self.needs

    def sampling(self, options: OptionsT) -> Mapping[str, int]:
        """Return what these options imply for calibration where the user says nothing: ``nsamples`` and ``seqlen``."""
        return {}

    @abstractmethod
    def scheme(self, options: OptionsT) -> Scheme:
        """Return the scheme of the results, before any data; raise OptionError for options that make no sense."""

    @abstractmethod
    def quantize(self, weight: Tensor, options: OptionsT, calibration: Calibration | None = None) -> QuantizedTensor:
        """Quantize ``weight`` (out, in), any float dtype, on its own device. Raises WeightError for NaN or infinity."""

    def fit(self, options: OptionsT, scheme: Scheme) -> OptionsT | None:
        """Return ``options`` changed so that they give ``scheme``, or None; a format's variant (``gguf:q4_0``) asks for it.

        The default sets the fields that are named as the scheme's: bits, group_size, symmetric, zero, scale_dtype.
        """
        says: dict[str, Any] = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
        says["scale_dtype"] = scheme.scales.dtype
        if not scheme.symmetric:
            says["zero"] = scheme.zero.value
        known = {field.name for field in fields(options)}  # type: ignore[arg-type]  # Options is a dataclass
        changed: OptionsT = replace(options, **{name: value for name, value in says.items() if name in known})  # type: ignore[type-var]
        return changed

    def codebook(self, options: OptionsT) -> Tensor | None:
        """Return the entries that these options fix before any data, float32 (2**bits, vector); None, the default, else.

        Some layouts have one codebook, which no scheme names; a quantizer that returns None cannot be stored in them.
        """
        return None

    def with_codebook(self, options: OptionsT, codebook: Tensor) -> OptionsT | None:
        """Return ``options`` changed so that codes mean the entries of ``codebook``, in its order, or None.

        The default changes nothing: it returns the options that do so anyway.
        """
        own = self.codebook(options)
        return options if own is not None and torch.equal(own, codebook) else None

    def quantize_block(
        self,
        weights: Mapping[str, Tensor],
        options: Mapping[str, OptionsT],
        calibration: Mapping[str, Calibration],
        block: Block | None = None,
    ) -> dict[str, QuantizedTensor]:
        """Quantize the weights of one decoder block together; the default quantizes each alone.

        ``block`` is there when ``needs`` holds ``block_inputs`` and calibration ran: the block in memory with its activations.
        """
        return {name: self.quantize(weight, options[name], calibration.get(name)) for name, weight in weights.items()}


class Packer(ABC):
    """Knows where the bits are, for one layout.

    Contract: when ``why_not`` is None, ``unpack(pack(q))`` equals ``q`` bit for bit, and ``pack(q)`` has the buffers that
    ``specs`` announced. Layout names are written into files: a name never changes its meaning.
    """

    layout: ClassVar[str]
    priority: ClassVar[int] = 0
    """Order among packers for formats that store any layout; higher first."""
    codebook: Tensor | None = None
    """The entries of the codes, float32 (2**bits, vector), where the layout fixes them: ``pack`` refuses others."""

    @abstractmethod
    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Return None when weights of this scheme and shape (out, in) can be packed, else the reason."""

    @abstractmethod
    def specs(self, scheme: Scheme, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Return the buffers that ``pack`` will make. Call only when ``why_not`` is None."""

    @abstractmethod
    def pack(self, quantized: QuantizedTensor) -> PackedTensor:
        """Arrange the parts into buffers."""

    @abstractmethod
    def unpack(self, packed: PackedTensor) -> QuantizedTensor:
        """Undo ``pack``."""

    def spec(self, scheme: Scheme, shape: tuple[int, int]) -> PackedSpec:
        """Return the spec of the packed tensor that ``pack`` will make."""
        return PackedSpec(self.layout, scheme, shape, self.specs(scheme, shape))

    def row_buffers(self, scheme: Scheme, shape: tuple[int, int]) -> frozenset[str]:
        """Return the buffers in which the rows of a weight lie one after the other, equally long; the rest serves all rows.

        Embeddings are read by it, a few rows at a time. Empty, the default, when no row can be read alone.
        """
        return frozenset()

    def rows(self, packed: PackedTensor, numbers: Tensor) -> PackedTensor:
        """Return the rows of these numbers, integers (n,), as a packed tensor (n, in); only where ``row_buffers`` names some."""
        apart = self.row_buffers(packed.scheme, packed.shape)
        spec = self.spec(packed.scheme, (len(numbers), packed.shape[1]))
        buffers = {name: buffer for name, buffer in packed.buffers.items() if name not in apart}
        for name in apart:
            buffer = packed.buffers[name]
            cut = as_integers(buffer).view(packed.shape[0], -1).index_select(0, numbers)
            buffers[name] = cut.view(buffer.dtype).view(spec.buffers[name].shape)
        return PackedTensor(spec, {name: buffers[name] for name in spec.buffers})


@dataclass(frozen=True, slots=True)
class MatmulProblem:
    """The question that a kernel answers: one packed weight on one device. The number of rows of x is not known."""

    layout: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    capability: tuple[int, int] | None = None


class Kernel(ABC):
    """Multiplies by a packed weight, or writes it out as floats, for one layout on one kind of device.

    Contract: ``matmul(x, prepare(p))`` agrees with ``x @ W.T`` in float64, W being the layout's plain-torch kernel's
    ``dequantize``, within the bound that ``lowbit.testing.budgets`` derives for the dtype; ``prepare`` is idempotent.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """0 is the plain-torch reference of a layout; faster kernels are higher."""

    @abstractmethod
    def why_not(self, problem: MatmulProblem) -> str | None:
        """Return None when this kernel serves the problem, else the reason."""

    def prepare(self, packed: PackedTensor) -> PackedTensor:
        """Rearrange once, at load; the default keeps the layout's buffers."""
        return packed

    @abstractmethod
    def dequantize(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in); computed in float32, then rounded once to ``dtype``."""

    def matmul(self, x: Tensor, packed: PackedTensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias`` for x (..., in), in x's dtype; the default multiplies by the dequantized weight."""
        return torch.nn.functional.linear(x, self.dequantize(packed, x.dtype), bias)

    def why_no_rows(self, problem: MatmulProblem) -> str | None:
        """Return None when ``rows`` reads single rows of such a weight, which it serves, else the reason (the default)."""
        return f"decodes whole weights, not the rows of an embedding ({self.name})"

    def rows(self, packed: PackedTensor, numbers: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows of these numbers, integers (n,), as ``dequantize`` gives them: (n, in).

        Call only when ``why_no_rows`` is None. It never waits for the device: CUDA graphs capture it.
        """
        raise NotImplementedError(f"kernel {self.name} refuses rows")


class Checkpoint(AbstractContextManager["Checkpoint"], ABC):
    """An opened path: names, shapes and dtypes from headers only; data one tensor at a time.

    Names are Hugging Face names (``model.layers.0.mlp.up_proj.weight``), whatever the file calls them.
    """

    path: Path
    entries: Mapping[str, Entry]
    """Every tensor by name, in the order of the file."""
    metadata: Metadata

    @abstractmethod
    def read(self, name: str) -> Value:
        """Read one tensor: a Tensor for a TensorSpec entry, a PackedTensor for a PackedSpec entry. Several threads may ask at once.

        Raises CheckpointError when the data does not fit the header.
        """

    def map(self, name: str) -> Value:
        """Return what ``read`` returns, to be kept: formats may leave the data where the file is mapped into memory.

        Writing to it changes no file. The file must not be shortened as long as the tensors live. The default reads.
        """
        return self.read(name)

    def stream(self) -> Iterator[tuple[str, Value]]:
        """Yield every tensor once, in file order."""
        for name in self.entries:
            yield name, self.read(name)

    def close(self) -> None:
        """Release files; the default has nothing to release."""

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Importer(ABC):
    """Reads one kind of checkpoint.

    Contract: never unpickles, never executes code from the checkpoint, never follows a path out of it; ``open`` reads
    headers only and raises CheckpointError, with a sentence, for anything malformed.
    """

    format: ClassVar[str]
    priority: ClassVar[int] = 0
    """Asked in this order, higher first: the most specific importer should recognise its files before a general one."""

    @abstractmethod
    def why_not(self, path: Path) -> str | None:
        """Return None when ``path`` (it exists) looks like this format, else the reason. Reads a few bytes at most."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Open ``path``; read headers, validate them, and return the checkpoint."""

    def calibration(self, path: Path, checkpoint: Checkpoint) -> Mapping[str, Calibration] | None:
        """Return what the file at ``path`` measured for the weights of ``checkpoint``, by name.

        None, the default, when the file is no calibration in this format (such as llama.cpp's importance matrix). Raises
        CheckpointError when it is one and does not fit the checkpoint.
        """
        return None


class Exporter(ABC):
    """Writes one file format.

    Contract: opening what was written gives the same names, schemes and bytes; the destination appears complete or not at
    all; unquantized tensors pass through, or are refused by ``why_not_entry`` before any work.
    """

    format: ClassVar[str]
    layouts: ClassVar[tuple[str, ...] | None]
    """The layouts it stores, best first; () stores no packed weight (they are dequantized); None stores any layout."""
    suffix: ClassVar[str] = ""
    """The destination's file suffix, such as ``.gguf``: one file, whatever its size. Empty when it is a folder."""
    calibration_suffix: ClassVar[str] = ""
    """The suffix of calibration files that ``write_calibration`` writes, such as ``.gguf``; empty when it writes none."""
    quantizers: ClassVar[tuple[str, ...]] = ()
    """Names of quantizers that ``--allow-requantize`` asks first where none is given; those that are not installed are skipped."""

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Return None when the format can hold the scheme, layouts aside, else the reason."""
        return None

    def packs(self, name: str) -> bool:
        """Return whether readers of the format look for a packed weight under this name; else it is dequantized, exactly.

        The default takes every name. Formats that pack linear layers only refuse embeddings.
        """
        return True

    def variants(self) -> Mapping[str, Scheme]:
        """Return named schemes for ``--format FORMAT:VARIANT``, such as ``q4_0``; the default has none."""
        return {}

    def mixes(self) -> Sequence[str]:
        """Return names of variants that give each tensor a scheme of its own, such as ``q4_k_m``; the default has none."""
        return ()

    def mix(
        self, name: str, entries: Mapping[str, Entry], metadata: Metadata, calibrated: bool = False
    ) -> Mapping[str, Scheme]:
        """Return the scheme of every tensor that the mix quantizes; tensors left out stay unquantized.

        ``calibrated`` says that the importance of columns was measured.
        """
        raise KeyError(name)

    def preferred(self, variant: str) -> Sequence[str]:
        """Return the layouts to try before the others when the variant or mix is asked for.

        Only where two layouts hold one scheme can the name say more than the scheme; the default has no preference.
        """
        return ()

    def why_no_variant(self, name: str) -> str | None:
        """Return why a variant of this name, which others may know, is none here; None when it is no known name."""
        return None

    def loaders(self) -> Sequence[LoaderRule]:
        """Return the rules of the programs that load this format, for ``--for LOADER``; the default knows none."""
        return ()

    def write_calibration(
        self, path: Path, measured: Mapping[str, Calibration], checkpoint: Checkpoint, tokens: int, source: str = ""
    ) -> None:
        """Write what was measured for the weights of ``checkpoint``, so that ``Importer.calibration`` reads it again.

        ``tokens`` is how many tokens were measured, ``source`` names their text. Raises CheckpointError, naming tensor and
        value, for what the file cannot hold, OutputError when it cannot be written.
        """
        raise NotImplementedError(f"format {self.format!r} has no calibration files")

    def check(self, entries: Mapping[str, Entry], metadata: Metadata) -> None:
        """Raise NoRouteError or CheckpointError, before any work, when the checkpoint as a whole cannot be written."""

    def left_out(self, destination: Path, metadata: Metadata) -> Sequence[str]:
        """Return the names of side files for which what is written to ``destination`` has no place; the default has for all."""
        return ()

    def model_config(self, entries: Mapping[str, Entry], metadata: Metadata) -> Mapping[str, Any]:
        """Return the config as it will be written, a quantization_config aside; the default changes nothing."""
        return metadata.config

    def plain(self, name: str, spec: TensorSpec) -> TensorSpec:
        """Return how an unquantized tensor will be stored; the default keeps it as it is."""
        return spec

    @abstractmethod
    def write(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        stream: Iterable[tuple[str, Value]],
        metadata: Metadata,
        shard_size: int = DEFAULT_SHARD_SIZE,
    ) -> None:
        """Write the header from ``entries``, then each value of ``stream`` as it comes (in the order of ``entries``).

        Every value fits its entry. Files are split so that none holds more than ``shard_size`` bytes of tensors, where the
        format can be split. Raises OutputError, and leaves nothing behind, when it cannot finish.
        """
