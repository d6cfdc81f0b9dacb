"""transformers' side: a quantization config and a quantizer named ``lowbit``. Imports transformers; import it when needed.

Two ways lead here. ``lowbit.load`` hands over an open checkpoint of any format: linears become slots, transformers loads the
rest from lazy tensors, and the slots are filled afterwards. ``AutoModelForCausalLM.from_pretrained(native folder)`` knows only
the folder: linears become layers on meta whose buffers have the names of the stored tensors, and transformers loads them all.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.errors import CheckpointError
from lowbit.plugins import installed
from lowbit.runtime.embedding import QuantEmbedding
from lowbit.runtime.linear import QuantLinear
from lowbit.runtime.packed_module import PackedModule
from lowbit.runtime.save import native_save
from lowbit.runtime.slots import Slots, make_slots, replace_module
from lowbit.tensors import PackedSpec, PackedTensor

if TYPE_CHECKING:
    from lowbit.runtime.load import Streaming

METHOD = "lowbit"


class LowbitConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a native folder; ``streaming`` is set, for one load, by ``lowbit.load``."""

    def __init__(self, **said: Any) -> None:
        self.quant_method: Any = METHOD
        self.streaming: Streaming | None = None
        self.said = {key: value for key, value in said.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        """Return what the file said."""
        return {"quant_method": METHOD, **self.said}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: Any) -> LowbitConfig:
        """Copy what the file said: transformers copies configs, and an open checkpoint must not be."""
        return LowbitConfig(**self.said)


class LowbitQuantizer(HfQuantizer):
    """Replaces linears before the weights are loaded, and prepares them afterwards."""

    requires_calibration = False

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        installed()  # plugins make tensors when they are imported, and from here on new tensors are on meta
        self.streaming = quantization_config.streaming
        self.slots: Slots | None = None

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Yes: ``save_pretrained`` writes a native folder."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes: adapters on top of packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes: every product is one operator."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the files of a native folder, for transformers 5.20 and newer: the first hook there that sees the config."""
        return self._name_weights(config)

    def update_tp_plan(self, config: Any) -> Any:
        """Name the files of a native folder, for transformers before 5.20."""
        return self._name_weights(config)

    def _name_weights(self, config: Any) -> Any:
        """Set ``transformers_weights``: a native folder has no ``model.safetensors``, on purpose (see the format)."""
        if self.streaming is None and self.pre_quantized:
            config.transformers_weights = weights_file(Path(getattr(config, "_name_or_path", "")))
        return config

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        with torch.device("cpu"):  # not on meta, as transformers has it here: packers and kernels may compute to answer
            if self.streaming is not None:
                self.streaming.open_slots(model)
            elif self.pre_quantized:
                self.slots = _make_layers(model, Path(checkpoint_files[0]).parent)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.slots is not None:
            _finish(model, self.slots)
        native_save(model)
        return model


def weights_file(folder: Path) -> str:
    """Return the name of the safetensors file, or of the index of several, in a native folder."""
    if not folder.is_dir():
        raise CheckpointError(f"lowbit models load from a folder, and {folder} is none; download the repository first")
    names = [path.name for pattern in ("*.safetensors.index.json", "*.safetensors") for path in folder.glob(pattern)]
    if not names:
        raise CheckpointError(f"{folder} holds no safetensors files; copy the whole folder again")
    return names[0]


@cache
def register() -> None:
    """Make transformers know ``quant_method: lowbit``, once a process."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LowbitConfig)
        register_quantizer(METHOD)(LowbitQuantizer)


def _make_layers(model: Any, folder: Path) -> Slots:
    """Replace linears on meta by layers with the layouts of a native folder, and give embeddings their buffers."""

    def make(spec: PackedSpec, bias: nn.Parameter | None, dtype: torch.dtype) -> QuantLinear:
        layer = QuantLinear(spec, dtype=dtype, device="meta")
        layer.bias = bias  # type: ignore[assignment]
        return layer

    with installed().open(folder) as checkpoint:
        slots = make_slots(model, checkpoint.entries, make, installed(), torch.device("cpu"))
    if slots.others:
        raise CheckpointError(
            f"{slots.others[0]} is packed and no linear of this model; load the folder with lowbit.load(), "
            "which dequantizes such weights"
        )
    for name, path in slots.embeddings.items():
        module, spec = model.get_submodule(path), checkpoint.entries[name]
        assert isinstance(spec, PackedSpec)
        for buffer, of in spec.buffers.items():
            module._buffers[buffer] = torch.empty(of.shape, dtype=of.dtype, device="meta")
        vars(module)["packed_spec"] = spec
    return slots


def _finish(model: Any, slots: Slots) -> None:
    """Make the packed embeddings and the linears that are tied to them, now that their buffers are loaded; prepare all layers."""
    dtype = model.dtype
    for name, path in slots.embeddings.items():
        module = model.get_submodule(path)
        spec = vars(module).pop("packed_spec")
        packed = PackedTensor(spec, {buffer: module._buffers[buffer] for buffer in spec.buffers})
        replace_module(model, path, QuantEmbedding.in_place_of(module, packed, dtype=dtype))
        for place in (place for place, source in slots.tied.items() if source == name):
            layer = QuantLinear.holding(packed, model.get_submodule(place).bias, dtype=dtype)
            layer.tied = path
            replace_module(model, place, layer)
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.prepare()
