"""``Scheme``: what codes mean. Frozen data with a closed vocabulary; it names no algorithm, no file format, no kernel.

A weight ``W`` has shape ``(out_features, in_features)``; groups of ``group_size`` weights run along in_features and share
a scale ``s``. With a code ``q`` for each weight (for each ``vector`` weights), the grids mean::

    AFFINE     w = s * (q - z)         z fixed (SYMMETRIC), an integer (INTEGER) or a float (FLOAT) per group
               w = s * q + m           m a float per group (MINIMUM: GGUF Q4_1, K-quants, MLX)
    CODEBOOK   w = s * codebook[q]
    TRELLIS    w = s * decode(window of a bit stream)
    BINARY     w = sum_p s_p * (+-1)   or diag(a) B1 diag(m) B2 diag(b)

and three add-ons compose with any grid, applied in this order: the permutation chooses each column's group, the rotation
multiplies by signed Hadamard matrices on either side, the outliers are added last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lowbit.errors import SchemeError
from lowbit.records import from_document, to_document

SCHEME_VERSION = 1
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e8m0fnu")


class Grid(str, Enum):
    """The family of values that codes can stand for."""

    AFFINE = "affine"
    CODEBOOK = "codebook"
    TRELLIS = "trellis"
    BINARY = "binary"


class Zero(str, Enum):
    """Where an affine grid has its zero: the midpoint code, an integer or float per group, or a float minimum."""

    SYMMETRIC = "symmetric"
    INTEGER = "integer"
    FLOAT = "float"
    MINIMUM = "minimum"


class ScaleCoding(str, Enum):
    """How a second level turns a sub-scale code ``u`` into a scale: ``d*u``, ``d*(u - z)`` or ``d*codebook[u] + offset``."""

    LINEAR = "linear"
    AFFINE = "affine"
    CODEBOOK = "codebook"


class Across(str, Enum):
    """Which neighbours share a second-level scale: groups along a row (K-quants) or rows of one group column (SpQR)."""

    GROUPS = "groups"
    ROWS = "rows"


class BinaryForm(str, Enum):
    """Binary planes are added, or multiplied with a vector of scales between them (double binary factorization)."""

    SUM = "sum"
    PRODUCT = "product"


@dataclass(frozen=True, slots=True)
class ScaleFormat:
    """How scales (and float zeros or minimums) are stored: one float each, or two levels when ``bits`` is given.

    Two levels: an integer of ``bits`` bits per group, and one float of ``dtype`` for every ``super_group`` of them
    (None: the whole row, or all rows).
    """

    dtype: str = "float16"
    bits: int | None = None
    super_group: int | None = None
    across: Across = Across.GROUPS
    coding: ScaleCoding = ScaleCoding.LINEAR
    signed: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise SchemeError(f"scale dtype must be one of {', '.join(FLOAT_DTYPES)}, got {self.dtype!r}")
        if self.bits is None:
            if (self.super_group, self.across, self.coding, self.signed) != (
                None,
                Across.GROUPS,
                ScaleCoding.LINEAR,
                False,
            ):
                raise SchemeError(
                    "super_group, across, coding and signed describe a second level: give bits, or leave them out"
                )
        elif not 1 <= self.bits <= 8:
            raise SchemeError(f"sub-scale bits must be 1 to 8, got {self.bits}")
        if self.coding is ScaleCoding.CODEBOOK and self.signed:
            raise SchemeError("sub-scales that index a codebook have no sign: leave signed out")
        if self.super_group is not None and self.super_group < 1:
            raise SchemeError(f"super_group must be positive, got {self.super_group}")

    @property
    def two_level(self) -> bool:
        """Whether scales are integers that a second level of floats scales again."""
        return self.bits is not None


@dataclass(frozen=True, slots=True)
class Trellis:
    """A bitshift trellis over ``tile`` (out, in): step t decodes the ``state_bits`` bits that end at the step's last bit.

    ``step_bits`` repeats over the steps of a tile, so (2, 3) is 2.5 bits; each step yields ``step_weights`` weights. The
    stream of a tile is circular (tail-biting). ``code`` names the function from state to value (arXiv 2406.11235 and exllamav3), and
    ``order`` the walk over the tile: row by row, or as a warp holds it (``mma_b``, drawn in lowbit.trellis).
    """

    code: str
    step_bits: tuple[int, ...]
    state_bits: int = 16
    step_weights: int = 1
    table_bits: int = 0
    tile: tuple[int, int] = (16, 16)
    order: str = "rows"

    CODES = ("1mad", "2mad", "3inst", "mcg", "mul1", "lut", "hyb")
    ORDERS = ("rows", "mma_b")

    def __post_init__(self) -> None:
        if self.code not in self.CODES:
            raise SchemeError(f"trellis code must be one of {', '.join(self.CODES)}, got {self.code!r}")
        if not 1 <= self.state_bits <= 24:  # a state times a 32-bit multiplier fits the int64 of lowbit.trellis
            raise SchemeError(f"trellis state_bits must be 1 to 24, got {self.state_bits}")
        if not self.step_bits or not all(1 <= bits <= self.state_bits for bits in self.step_bits):
            raise SchemeError(f"trellis step_bits must be 1 to state_bits ({self.state_bits}), got {self.step_bits}")
        if (self.code in ("lut", "hyb")) != (self.table_bits > 0):
            raise SchemeError(
                f"trellis table_bits goes with the codes lut and hyb only, got {self.table_bits} for {self.code}"
            )
        if min(self.tile) < 1 or self.step_weights < 1 or self.tile[0] * self.tile[1] % self.step_weights:
            raise SchemeError(f"trellis step_weights must divide the tile {self.tile}, got {self.step_weights}")
        if self.code == "hyb" and not (self.state_bits == 16 and self.step_weights == 2 and self.table_bits <= 15):
            raise SchemeError("the trellis code hyb has 16-bit states, 2 weights a step and at most 15 table bits")
        if self.code == "lut" and self.table_bits != self.state_bits:
            raise SchemeError(f"the trellis code lut needs a table entry for each of the 2**{self.state_bits} states")
        if self.code not in ("lut", "hyb") and self.step_weights != 1:
            raise SchemeError(f"the trellis code {self.code} computes one weight a step, got {self.step_weights}")
        if self.order not in self.ORDERS:
            raise SchemeError(f"trellis order must be one of {', '.join(self.ORDERS)}, got {self.order!r}")
        if self.order != "rows" and self.tile != (16, 16):
            raise SchemeError(f"the trellis order {self.order} walks tiles of 16x16, got {self.tile}")

    @property
    def steps(self) -> int:
        """Steps in one tile."""
        return self.tile[0] * self.tile[1] // self.step_weights

    @property
    def tile_bits(self) -> int:
        """Bits that one tile stores."""
        period = len(self.step_bits)
        return sum(self.step_bits[step % period] for step in range(self.steps))


@dataclass(frozen=True, slots=True)
class Binary:
    """Sign planes: ``planes`` of them added (each with its own scales), or a product of two with a dimension between them.

    The inner dimension of a product is ``rank``, or follows from ``rate``, the bits of both sign matrices for each weight of a
    shape: one scheme then serves weights of every shape.
    """

    planes: int = 1
    form: BinaryForm = BinaryForm.SUM
    rank: int | None = None
    column_scales: bool = False
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.planes < 1:
            raise SchemeError(f"binary planes must be positive, got {self.planes}")
        if (self.form is BinaryForm.PRODUCT) != (self.rank is not None or self.rate is not None):
            raise SchemeError(
                f"binary rank or rate goes with the product form only, got {self.rank} and {self.rate} for {self.form.value}"
            )
        if self.rank is not None and self.rate is not None:
            raise SchemeError(f"a binary product has a rank or a rate, got both: {self.rank} and {self.rate}")
        if self.rank is not None and self.rank < 1:
            raise SchemeError(f"binary rank must be positive, got {self.rank}")
        if self.rate is not None and not 0 < self.rate <= 16:
            raise SchemeError(f"binary rate must be above 0 and at most 16, got {self.rate}")

    def inner(self, shape: tuple[int, int]) -> int:
        """Return the inner dimension of a product of ``shape`` (out, in): rank, or rate * out * in / (out + in), rounded."""
        if self.rate is None:
            assert self.rank is not None
            return self.rank
        return max(1, round(self.rate * shape[0] * shape[1] / (shape[0] + shape[1])))


@dataclass(frozen=True, slots=True)
class Outliers:
    """A sparse matrix (CSR) added to the dense grid; exactly ``round(density * out * in)`` entries, so sizes are known."""

    density: float
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise SchemeError(f"outlier density must lie between 0 and 1, got {self.density}")
        if self.dtype not in FLOAT_DTYPES[:3]:
            raise SchemeError(f"outlier dtype must be float16, bfloat16 or float32, got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class Rotation:
    """Random Hadamard rotation: W = diag(u) H_out Wq H_in diag(v), H orthonormal in blocks; block 0 leaves a side alone.

    ``dtype`` int8 stores plain signs; a float dtype stores signs times scales (EXL3's suh and svh).
    """

    in_block: int = 128
    out_block: int = 0
    dtype: str = "int8"

    def __post_init__(self) -> None:
        for side, block in (("in_block", self.in_block), ("out_block", self.out_block)):
            if block and block & (block - 1):
                raise SchemeError(f"rotation {side} must be a power of two or 0, got {block}")
        if not (self.in_block or self.out_block):
            raise SchemeError("a rotation needs in_block or out_block")
        if self.dtype not in ("int8", *FLOAT_DTYPES[:3]):
            raise SchemeError(f"rotation dtype must be int8 or a float dtype, got {self.dtype!r}")


@dataclass(frozen=True, slots=True)
class Scheme:
    """What the codes of one weight mean. Compare with ``==``; store with ``to_json``.

    Attributes:
        grid: The family of values.
        bits: Bits of one code: 1-8 for AFFINE, 1-16 for CODEBOOK; for BINARY the number of planes, for TRELLIS unused (0).
        group_size: Weights that share a scale; None is the whole row (per channel) or, with ``flat``, the whole tensor.
        zero: Where an affine grid has its zero.
        scales: How scales are stored.
        levels: Codes in use when fewer than ``2**bits`` (ternary: bits=2, levels=3); the symmetric zero is ``levels // 2``.
        flat: Groups run over the row-major flattened weight and may cross rows (bitsandbytes).
        vector: Weights that one code stands for (vector codebooks), along in_features.
    """

    grid: Grid
    bits: int
    group_size: int | None = None
    zero: Zero = Zero.SYMMETRIC
    scales: ScaleFormat = ScaleFormat()
    levels: int | None = None
    flat: bool = False
    vector: int = 1
    trellis: Trellis | None = None
    binary: Binary | None = None
    outliers: Outliers | None = None
    rotation: Rotation | None = None
    permutation: bool = False

    def __post_init__(self) -> None:
        _check_grid(self)
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size must be positive, or None for the whole row, got {self.group_size}")
        if self.vector < 1 or (self.group_size or self.vector) % self.vector:
            raise SchemeError(f"vector must divide group_size, got {self.vector} and {self.group_size}")
        if self.permutation and (self.flat or self.vector > 1):
            raise SchemeError("a permutation chooses the group of whole columns: flat groups and vectors have none")

    @property
    def symmetric(self) -> bool:
        """Whether an affine grid has its zero at the midpoint code."""
        return self.zero is Zero.SYMMETRIC

    @property
    def code_count(self) -> int:
        """How many different codes are in use."""
        return self.levels or 2**self.bits

    @property
    def midpoint(self) -> int:
        """The code that means zero on a symmetric affine grid."""
        return self.code_count // 2

    @property
    def rate(self) -> float:
        """Bits of codes for each weight, scales and add-ons not counted."""
        if self.trellis:
            return self.trellis.tile_bits / math.prod(self.trellis.tile)
        if self.binary and self.binary.rate:
            return self.binary.rate
        return self.bits / self.vector

    def groups(self, shape: tuple[int, int]) -> int:
        """Groups in a row of a weight of ``shape`` (with ``flat``: in the whole weight); the last may be short."""
        length = shape[0] * shape[1] if self.flat else shape[1]
        return math.ceil(length / (self.group_size or length))

    def summary(self) -> str:
        """A short name for tables, such as ``affine 4-bit g128 asym`` or ``codebook 3-bit g64 +outliers``."""
        parts = [self.grid.value, f"{self.rate:g}-bit", f"g{self.group_size}" if self.group_size else "per-channel"]
        if self.grid is Grid.AFFINE and not self.symmetric:
            parts.append({Zero.INTEGER: "asym", Zero.FLOAT: "float-zero", Zero.MINIMUM: "min"}[self.zero])
        if self.scales.two_level:
            parts.append(f"{self.scales.bits}-bit-scales")
        elif self.scales.dtype != "float16":
            parts.append(self.scales.dtype)
        addons = {"outliers": self.outliers, "rotation": self.rotation, "permutation": self.permutation or None}
        return " ".join(parts + [f"+{name}" for name, value in addons.items() if value])

    def to_json(self) -> dict[str, Any]:
        """Return a JSON document; fields at their default are left out, so that files stay readable."""
        return {"version": SCHEME_VERSION, **to_document(self)}

    @classmethod
    def from_json(cls, document: Any) -> Scheme:
        """Read what ``to_json`` wrote; an unknown version, an unknown key or a value of a wrong type raises SchemeError."""
        if not isinstance(document, dict):
            raise SchemeError(f"a Scheme must be a JSON object, got {document!r}")
        values = dict(document)
        if (version := values.pop("version", None)) != SCHEME_VERSION:
            raise SchemeError(
                f"this lowbit reads scheme version {SCHEME_VERSION}, got {version!r}; install a newer lowbit"
            )
        return from_document(cls, values)


def _check_grid(scheme: Scheme) -> None:
    limits = {Grid.AFFINE: (1, 8), Grid.CODEBOOK: (1, 16), Grid.TRELLIS: (0, 0), Grid.BINARY: (1, 8)}
    low, high = limits[scheme.grid]
    if not isinstance(scheme.bits, int) or not low <= scheme.bits <= high:
        raise SchemeError(f"bits must be {low} to {high} for a {scheme.grid.value} grid, got {scheme.bits}")
    if (scheme.grid is Grid.TRELLIS) != (scheme.trellis is not None):
        raise SchemeError(f"the trellis field goes with the trellis grid, got a {scheme.grid.value} grid")
    if (scheme.grid is Grid.BINARY) != (scheme.binary is not None):
        raise SchemeError(f"the binary field goes with the binary grid, got a {scheme.grid.value} grid")
    if scheme.binary and scheme.binary.planes != scheme.bits:
        raise SchemeError(
            f"bits of a binary grid is its number of planes, got {scheme.bits} and {scheme.binary.planes}"
        )
    if scheme.binary and (scheme.flat or scheme.scales.two_level):
        raise SchemeError("binary planes have one float scale a group: flat groups and two-level scales do not apply")
    if scheme.binary and scheme.binary.form is BinaryForm.PRODUCT and (scheme.group_size or scheme.permutation):
        raise SchemeError("a binary product has scales for rows, rank and columns: it has no groups to size or permute")
    if scheme.grid is not Grid.AFFINE and not scheme.symmetric:
        raise SchemeError(f"only an affine grid has a zero of its own, got {scheme.zero.value} on {scheme.grid.value}")
    if scheme.levels is not None and scheme.grid not in (Grid.AFFINE, Grid.CODEBOOK):
        raise SchemeError(f"levels count codes, and a {scheme.grid.value} grid has none, got {scheme.levels}")
    if scheme.levels is not None and not 2 <= scheme.levels < 2**scheme.bits:
        raise SchemeError(f"levels must be 2 to {2**scheme.bits - 1} (leave it out for all codes), got {scheme.levels}")
    if scheme.vector > 1 and scheme.grid is not Grid.CODEBOOK:
        raise SchemeError(f"only a codebook has vectors, got {scheme.vector} on a {scheme.grid.value} grid")
