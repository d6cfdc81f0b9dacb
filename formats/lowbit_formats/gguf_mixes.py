"""File types: which ggml type llama.cpp's ``llama-quantize`` gives each tensor, for ``gguf:q4_k_m`` and the others.

The rules are those of ``src/llama-quant.cpp`` (llama.cpp of September 2026) for dense models: most tensors get the mix's base
type; the output matrix (the embedding, when it is tied) gets Q6_K or Q8_0; attention values and the last matrix of the feed
forward network, which lose most, get better types in some or all layers; and a row that no block of a type fits falls back
to a type with smaller blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lowbit.errors import CheckpointError
from lowbit.interfaces import Entry
from lowbit.metadata import Metadata
from lowbit.recipe import is_matrix
from lowbit.scheme import Scheme
from lowbit.tensors import PackedSpec
from lowbit_formats.gguf import config
from lowbit_formats.gguf.architectures import BY_MODEL_TYPE
from lowbit_formats.gguf.block_types import TYPES
from lowbit_formats.gguf.layouts import BY_LAYOUT, BY_TYPE

OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"
FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "Q2_0": "Q4_0",
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "TQ1_0": "Q4_0",
        "TQ2_0": "Q4_0",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
    }
)
"""The type in place of one whose blocks do not divide a row (``tensor_type_fallback``)."""
_LAYERED = re.compile(r"blk\.(\d+)\.(.+)\.weight")
_VALUES = ("attn_v", "attn_qkv")  # llama.cpp treats a fused q, k and v as it does v
_LARGE_LAYERS = 80
_KEEPS_VALUES_ABOVE = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: its index among ``count`` of its kind, query heads for each key head, whether there is an imatrix."""

    index: int
    count: int
    gqa: int
    calibrated: bool


Rule = Callable[[Place], str | None]
"""A better type for some places, None for the base type."""


def _always(type: str) -> Rule:
    return lambda place: type


def _first(type: str, count: int, otherwise: str | None = None) -> Rule:
    """The first ``count`` layers."""
    return lambda place: type if place.index < count else otherwise


def _first_part(type: str, part: int, otherwise: str | None = None, calibrated: bool | None = None) -> Rule:
    """The first 1/part of the layers; with ``calibrated`` only with, or only without, an importance matrix."""

    def choose(place: Place) -> str | None:
        applies = calibrated is None or place.calibrated == calibrated
        return type if applies and place.index < place.count // part else otherwise

    return choose


def _more_bits(type: str) -> Rule:
    """The first and the last eighth, and every third layer between (``use_more_bits``)."""

    def choose(place: Place) -> str | None:
        index, count = place.index, place.count
        chosen = index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
        return type if chosen else None

    return choose


def _shared_heads(type: str, otherwise: str | None = None) -> Rule:
    """Models in which four or more query heads share a key head: v is small there."""
    return lambda place: type if place.gqa >= 4 else otherwise


@dataclass(frozen=True, slots=True)
class Mix:
    """One file type: its id (enum llama_ftype), the base type, and what gets another."""

    file_type: int
    base: str
    values: Rule | None = None
    down: Rule | None = None
    output: Rule | None = None
    embedding: str | None = None


_MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        "q4_0": Mix(2, "Q4_0", down=_first_part("Q4_1", 8, calibrated=True)),
        "q4_1": Mix(3, "Q4_1"),
        "q8_0": Mix(7, "Q8_0"),
        "q5_0": Mix(8, "Q5_0", down=_first_part("Q5_1", 8, calibrated=True)),
        "q5_1": Mix(9, "Q5_1"),
        "q2_k": Mix(10, "Q2_K", _shared_heads("Q4_K", "Q3_K"), _always("Q3_K"), _always("Q3_K")),
        "q3_k_s": Mix(11, "Q3_K"),
        "q3_k_m": Mix(12, "Q3_K", _first("Q5_K", 2, "Q4_K"), _first_part("Q5_K", 16, "Q4_K"), _always("Q4_K")),
        "q3_k_l": Mix(13, "Q3_K", _always("Q5_K"), _always("Q5_K"), _always("Q5_K")),
        "q4_k_s": Mix(14, "Q4_K", _first("Q5_K", 4), _first_part("Q5_K", 8)),
        "q4_k_m": Mix(15, "Q4_K", _more_bits("Q6_K"), _more_bits("Q6_K")),
        "q5_k_s": Mix(16, "Q5_K"),
        "q5_k_m": Mix(17, "Q5_K", _more_bits("Q6_K"), _more_bits("Q6_K")),
        "q6_k": Mix(18, "Q6_K"),
        "q2_k_s": Mix(21, "Q2_K", _shared_heads("Q4_K"), _first_part("Q4_K", 8)),
        "iq4_nl": Mix(25, "IQ4_NL", _shared_heads("Q5_K"), _first_part("Q5_K", 8, calibrated=False)),
        "tq1_0": Mix(36, "TQ1_0", embedding="Q4_K"),
        "tq2_0": Mix(37, "TQ2_0", embedding="Q4_K"),
        "q1_0": Mix(40, "Q1_0"),
        "q2_0": Mix(41, "Q2_0", embedding="Q4_K"),
    }
)
_ALIASES: Mapping[str, str] = MappingProxyType({"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"})

NAMES: tuple[str, ...] = (*_MIXES, *_ALIASES)
"""Every file type by its llama.cpp name in lower case; q3_k, q4_k and q5_k are llama.cpp's short names for the M mixes."""


_NO_SEARCH = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_xs")
_FLOATS = ("f16", "f32", "bf16")


def why_not(name: str) -> str | None:
    """Return why a file type or type of llama.cpp is not written here; None for a name that llama.cpp does not have either."""
    if name in _FLOATS:
        return "floats are no variant; leave it out and give --dtype float16, float32 or bfloat16"
    if name in _NO_SEARCH:
        return f"{name.upper()} is read here, and no quantizer here makes it; IQ4_NL and the K types are the nearest"
    if name == "nvfp4":
        return "NVFP4 keeps a scale for the whole tensor beside it, which is neither read nor written here; MXFP4 is the nearest"
    if name in ("mxfp4_moe", "q8_1", "q8_k"):
        return "this lowbit writes dense models, so mxfp4" if name == "mxfp4_moe" else "it is a type of activations"
    return None


def id_of(name: str) -> int:
    """Return the ``general.file_type`` of a file type; KeyError for a name that is none of ``NAMES``."""
    return _MIXES[_ALIASES.get(name, name)].file_type


def mix(name: str, entries: Mapping[str, Entry], metadata: Metadata, calibrated: bool = False) -> dict[str, Scheme]:
    """Return the scheme of every tensor that the file type quantizes, by Hugging Face name.

    What is left out stays as it is: vectors, norms, and rows that no block fits. ``calibrated`` says that there is an
    importance matrix, which changes three of the mixes. Raises CheckpointError for a model that GGUF cannot hold, KeyError for
    a name that is none of ``NAMES``.
    """
    model = _Model.of(entries, metadata)
    chosen = types(name, model.columns, model.blocks, model.gqa, model.large, calibrated)
    return {model.names[ggml_name]: BY_TYPE[type].scheme for ggml_name, type in chosen.items()}


def file_type(entries: Mapping[str, Entry], metadata: Metadata) -> int | None:
    """Return the ``general.file_type`` of a file of these entries; None when it is no mix of llama.cpp.

    Raises CheckpointError for a model that GGUF cannot hold.
    """
    model = _Model.of(entries, metadata)
    packed = {name: entries[hf_name] for name, hf_name in model.names.items()}
    found = {name: BY_LAYOUT[entry.layout].type.name for name, entry in packed.items() if isinstance(entry, PackedSpec)}
    for name, made in _MIXES.items():
        for calibrated in (False, True):
            if types(name, model.columns, model.blocks, model.gqa, model.large, calibrated) == found:
                return made.file_type
    return None


@dataclass(frozen=True, slots=True)
class _Model:
    """What the rules ask of a model; ``names`` leads from ggml's names of its matrices to Hugging Face's."""

    names: Mapping[str, str]
    columns: Mapping[str, int]
    blocks: int
    gqa: int
    large: bool

    @classmethod
    def of(cls, entries: Mapping[str, Entry], metadata: Metadata) -> _Model:
        if reason := config.why_not(metadata.config):
            raise CheckpointError(f"GGUF cannot hold this model: it is {reason}")
        model = metadata.config
        architecture, blocks = BY_MODEL_TYPE[model["model_type"]], model["num_hidden_layers"]
        heads = model["num_attention_heads"]
        gqa = heads // (model.get("num_key_value_heads") or heads)
        large = blocks == _LARGE_LAYERS and (architecture.name == "qwen2" or (architecture.name == "llama" and gqa > 1))
        names = {}
        for name, entry in entries.items():
            ggml_name = architecture.ggml_name(name, blocks)
            if ggml_name is not None and is_matrix(entry):
                names[ggml_name] = name
        columns = {ggml_name: entries[name].shape[1] for ggml_name, name in names.items()}
        return cls(names, columns, blocks, gqa, large)


def types(
    name: str, columns: Mapping[str, int], blocks: int, gqa: int = 1, large: bool = False, calibrated: bool = False
) -> dict[str, str]:
    """Return ggml's type names of the matrices that a file type quantizes, by ggml's tensor names.

    Args:
        name: One of ``NAMES``; KeyError for another.
        columns: The row length of every matrix of the model, by ggml's name.
        blocks: Decoder blocks.
        gqa: Query heads for each key head.
        large: Whether llama.cpp calls it a 70B model: 80 layers, and grouped queries in the architecture llama.
        calibrated: Whether there is an importance matrix.
    """
    made = _MIXES[_ALIASES.get(name, name)]
    chosen = {}
    for tensor, type in _wanted(made, columns, blocks, gqa, large, calibrated):
        if fitting := _fitting(type, columns[tensor]):
            chosen[tensor] = fitting
    return chosen


def _wanted(
    made: Mix, columns: Mapping[str, int], blocks: int, gqa: int, large: bool, calibrated: bool
) -> Iterator[tuple[str, str]]:
    """Yield every matrix that is quantized, and its type before fallbacks."""
    layered = [(int(found[1]), found[2], name) for name in columns if (found := _LAYERED.fullmatch(name))]
    values = [name for _, stem, name in sorted(layered) if stem in _VALUES]
    rules = {**dict.fromkeys(_VALUES, made.values), "ffn_down": made.down, "attn_output": made.output}
    for layer, stem, name in layered:
        if stem.endswith("_norm"):
            continue
        index, count = (values.index(name), len(values)) if stem in _VALUES else (layer, blocks)
        rule = rules.get(stem)
        type = (rule(Place(index, count, gqa, calibrated)) if rule else None) or made.base
        yield name, _KEEPS_VALUES_ABOVE.get(type, type) if large and stem in _VALUES else type
    if OUTPUT in columns:
        yield OUTPUT, _output_type(made.base, columns[OUTPUT])
        yield EMBEDDING, made.embedding or made.base
    else:
        yield EMBEDDING, _output_type(made.base, columns[EMBEDDING])


def _output_type(base: str, columns: int) -> str:
    return "Q8_0" if base == "Q8_0" or columns % TYPES[base].weights else "Q6_K"


def _fitting(type: str, columns: int) -> str | None:
    """Return the type whose blocks divide the row: this one, its fallback, or None.

    Where there is none, llama.cpp writes float16, and refuses Q1_0.
    """
    if columns % TYPES[type].weights == 0:
        return type
    type = FALLBACKS.get(type, type)
    return None if columns % TYPES[type].weights else type
