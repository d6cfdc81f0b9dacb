"""Small GGUF models of random weights, written with the gguf package: an implementation that is not under test."""

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, FFN, BLOCKS, CONTEXT = 256, 4, 2, 512, 1, 128
QUANT = gguf.GGMLQuantizationType
SPECIAL = ("<|begin|>", "<|end|>", "<tool>")


def byte_alphabet() -> list[str]:
    """GPT-2's spelling of the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


MERGES = ("Ġ t", "h e", "Ġt he", "1 2")
BYTE_TOKENS = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
BYTE_TYPES = [3, 3, 4, *[1] * (len(BYTE_TOKENS) - 3)]
_PIECES = ["▁t", "he", "▁the", "▁", "t", "h", "e", "▁a", "a", "1", "2", "!"]
PIECE_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
PIECE_TYPES = [2, 3, 3, *[6] * 256, *[1] * len(_PIECES)]
PIECE_SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(_PIECES))]


@dataclass
class Recipe:
    """What to write; every field is a variation that some test needs."""

    architecture: str = "llama"
    vocabulary: str = "gpt2"
    pre: str | None = "smollm"
    tied: bool = True
    types: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)
    without: tuple = ()
    extra: dict = field(default_factory=dict)
    heads: int = HEADS

    @property
    def tokens(self):
        """The tokens of the vocabulary."""
        return PIECE_TOKENS if self.vocabulary == "llama" else BYTE_TOKENS

    def shapes(self):
        """Shapes by ggml name, outermost first."""
        size, kv, block = HIDDEN, HIDDEN * KV_HEADS // self.heads, "blk.0."
        shapes = {"token_embd.weight": (len(self.tokens), size), "output_norm.weight": (size,)}
        if not self.tied:
            shapes["output.weight"] = (len(self.tokens), size)
        shapes |= {block + "attn_norm.weight": (size,), block + "ffn_norm.weight": (size,)}
        shapes |= {block + "attn_output.weight": (size, size), block + "ffn_down.weight": (size, FFN)}
        if self.architecture == "phi3":
            qkv, up = block + "attn_qkv.weight", block + "ffn_up.weight"
            return {**shapes, qkv: (size + 2 * kv, size), up: (2 * FFN, size)}
        shapes |= {block + "ffn_gate.weight": (FFN, size), block + "ffn_up.weight": (FFN, size)}
        for letter, rows in (("q", size), ("k", kv), ("v", kv)):
            shapes[f"{block}attn_{letter}.weight"] = (rows, size)
            if self.architecture == "qwen2":
                shapes[f"{block}attn_{letter}.bias"] = (rows,)
            if self.architecture in ("qwen3", "gemma3") and letter != "v":
                shapes[f"{block}attn_{letter}_norm.weight"] = (size // self.heads,)
        if self.architecture == "gemma3":
            shapes |= {f"{block}{name}.weight": (size,) for name in ("post_attention_norm", "post_ffw_norm")}
        return shapes


def array_of(shape, type: str, seed: int) -> np.ndarray:
    """Random data of a ggml type: floats, or blocks of random bytes whose scales are finite and small."""
    source = np.random.default_rng(seed)
    if type in ("F32", "F16"):
        return (source.standard_normal(shape) * 0.05).astype(np.float32 if type == "F32" else np.float16)
    if type == "BF16":
        return (source.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weights, nbytes = gguf.GGML_QUANT_SIZES[QUANT[type]]
    rows = source.integers(0, 256, (*shape[:-1], shape[-1] // weights, nbytes), dtype=np.uint8)
    rows[..., 1::2] &= 0x2F  # the exponent of every fp16 in every type lies in an odd byte
    if type == "MXFP4":
        rows[..., 0] &= 0x7F  # its scale is a byte, whose 255 is NaN
    return rows.reshape(*shape[:-1], -1)


def write_model(path: Path, recipe: Recipe) -> dict[str, np.ndarray]:
    """Write a model and return its arrays by ggml name, as they lie in the file."""
    writer = gguf.GGUFWriter(path, recipe.architecture)
    name = recipe.architecture
    numbers = {
        f"{name}.context_length": CONTEXT,
        f"{name}.embedding_length": HIDDEN,
        f"{name}.block_count": BLOCKS,
        f"{name}.feed_forward_length": FFN,
        f"{name}.attention.head_count": recipe.heads,
        f"{name}.attention.head_count_kv": KV_HEADS,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.freq_base": 5e5,
    }
    _write_vocabulary(numbers, recipe)
    for key, value in {**numbers, **recipe.keys}.items():
        if key not in recipe.without and value is not None:
            _write_key(writer, key, value)
    arrays = {}
    shapes = {key: shape for key, shape in recipe.shapes().items() if key not in recipe.without}
    for seed, (key, shape) in enumerate(shapes.items()):
        type = recipe.types.get(key, "F32" if len(shape) == 1 else "Q8_0")
        arrays[key] = array_of(shape, type, seed)
        raw = None if type in ("F32", "F16") else QUANT[type]
        data = arrays[key].view(np.uint8) if type == "BF16" else arrays[key]
        writer.add_tensor(key, data, raw_dtype=raw)
    for key, values in recipe.extra.items():
        arrays[key] = values
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def _write_vocabulary(numbers: dict, recipe: Recipe) -> None:
    prefix = "tokenizer.ggml."
    if recipe.vocabulary == "llama":
        numbers |= {prefix + "model": "llama", prefix + "tokens": PIECE_TOKENS, prefix + "token_type": PIECE_TYPES}
        numbers |= {prefix + "scores": PIECE_SCORES, prefix + "bos_token_id": 1, prefix + "eos_token_id": 2}
        numbers |= {prefix + "unknown_token_id": 0}
    elif recipe.vocabulary == "gpt2":
        numbers |= {prefix + "model": "gpt2", prefix + "pre": recipe.pre, prefix + "tokens": BYTE_TOKENS}
        numbers |= {prefix + "token_type": BYTE_TYPES, prefix + "merges": list(MERGES)}
        numbers |= {prefix + "bos_token_id": 0, prefix + "eos_token_id": 1}


def _write_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


class GgufModels:
    """What the fixture hands out: the recipe, the writer, and the figures of the models."""

    Recipe = Recipe
    hidden, heads, kv_heads, ffn = HIDDEN, HEADS, KV_HEADS, FFN
    byte_tokens, byte_types, merges = BYTE_TOKENS, BYTE_TYPES, MERGES
    piece_tokens, piece_types, piece_scores = PIECE_TOKENS, PIECE_TYPES, PIECE_SCORES
    write = staticmethod(write_model)


@pytest.fixture(scope="session")
def gguf_models() -> type[GgufModels]:
    """Writer of small GGUF models."""
    return GgufModels
