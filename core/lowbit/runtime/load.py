"""``lowbit.load``: any checkpoint that an importer opens, as a transformers model with packed linears."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.errors import CheckpointError, OptionError
from lowbit.interfaces import Checkpoint
from lowbit.metadata import Metadata
from lowbit.plugins import installed
from lowbit.registry import Registry
from lowbit.runtime.choice import choose, problem_for
from lowbit.runtime.embedding import QuantEmbedding
from lowbit.runtime.extras import need_transformers, quiet
from lowbit.runtime.lazy import LazyTensor, lazy_tensor
from lowbit.runtime.linear import QuantLinear
from lowbit.runtime.packed_module import PackedModule
from lowbit.runtime.slots import PackedSlot, Slots, make_slots, replace_module
from lowbit.tensors import PackedSpec, PackedTensor
from lowbit.workers import PIECE, map_ranges


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    keep_packed: bool = False,
    prepare: bool = False,
    cache_dequantized: bool = False,
    registry: Registry | None = None,
) -> Any:
    """Load a model from a checkpoint of any installed format and return it, in evaluation mode, on ``device``.

    Linears whose weights are packed become ``QuantLinear``, and embeddings ``QuantEmbedding`` where the layout lets single rows be
    read; a head that is tied to such an embedding shares its bits. Each is read into the memory that it will keep, so that the
    peak is the model and what a few weights need while they are arranged. Packed weights of other modules are dequantized to
    ``dtype``. Everything else is cast to ``dtype``: by default what the config says, but bfloat16 for packed weights where it says float32 or nothing, and on
    a CPU, where torch's packed products are fast in bfloat16 only.

    Args:
        path: A model folder or file.
        device: Where to put the model.
        dtype: Dtype of activations and of everything that is not packed.
        keep_packed: Keep the packed bits beside a kernel's own arrangement of them, so that the model can be saved, moved or
            cast. Without it such a layer keeps the arrangement only, once it has run.
        prepare: Let the kernels arrange all weights now, several at once. Otherwise, on a CPU, each layer does it when it first
            runs, and loading takes little more than reading. ``torch.compile(fullgraph=True)`` needs prepared layers.
        cache_dequantized: Keep a dense copy of each weight for products with more than one row.
        registry: Components to use; by default everything installed.

    Raises:
        CheckpointError: When the checkpoint cannot be read, or its tensors are not those of the model.
        NoRouteError: When no installed kernel runs a layout; it names the plugin.
        OptionError: When transformers is not installed, or the device is not there.
    """
    need_transformers("lowbit.load")
    registry, place = registry or installed(), compute_device(device)
    with _no_collection(), registry.open(Path(path)) as checkpoint:
        config = model_config(checkpoint.metadata, str(path))
        dtype = dtype or _dtype(config, checkpoint, place)
        packed = {name: entry for name, entry in checkpoint.entries.items() if isinstance(entry, PackedSpec)}
        _check_kernels(packed, dtype, place, registry)
        streaming = Streaming(checkpoint, registry, dtype, place)
        model = streaming.build(config)
        if place.type != "cpu":
            model.to(place)
        streaming.fill(model, keep_packed, cache_dequantized)
    if prepare or place.type != "cpu":
        prepare_layers(model)
    return model


@dataclass(slots=True)
class Streaming:
    """One load: what the quantizer in ``lowbit.runtime.hf`` is given, and fills in."""

    checkpoint: Checkpoint
    registry: Registry
    dtype: torch.dtype
    device: torch.device
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    slots: Slots | None = None

    def build(self, config: Any) -> Any:
        """Let transformers make the model and load what is not packed; raise CheckpointError unless the names agree."""
        from lowbit.runtime.hf import LowbitConfig, register

        register()
        model_class, quantization = find_model_class(config), LowbitConfig()
        quantization.streaming = self
        options = {"config": config, "state_dict": self.tensors, "dtype": self.dtype, "output_loading_info": True}
        with quiet(), _bare():
            try:
                model, report = model_class.from_pretrained(
                    None, quantization_config=quantization, **options, **_generation(self.checkpoint.metadata)
                )
            except RuntimeError as error:  # shapes that differ, which transformers reports in many lines
                raise CheckpointError(f"{self.checkpoint.path} does not fit its config: {_one_line(error)}") from error
        _check(report, self.checkpoint.path)
        self._check_shapes(model)
        return model

    def open_slots(self, model: Any) -> None:
        """Replace linears by slots, and say which tensors transformers shall load."""
        self.slots = make_slots(model, self.checkpoint.entries, PackedSlot, self.registry, self.device)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        packed = self.slots.packed
        for name in self.checkpoint.entries:
            if name not in packed:
                self.tensors[name] = lazy_tensor(self.checkpoint, name, self.registry, self.dtype)

    def fill(self, model: nn.Module, keep_packed: bool, cache_dequantized: bool) -> None:
        """Read the packed weights, as many at once as torch has threads, and put a layer with its weight into each place."""
        assert self.slots is not None
        names = [name for name in self.checkpoint.entries if name in self.slots.packed]
        pieces = map_ranges(
            lambda start, stop: [self._packed(name) for name in names[start:stop]], len(names), 1, piece=16
        )
        values = dict(zip(names, (value for piece in pieces for value in piece), strict=True))
        places = [(path, name, "") for name, path in self.slots.linears.items()]
        places += [(path, name, self.slots.embeddings[name]) for path, name in self.slots.tied.items()]
        options = {"dtype": self.dtype, "registry": self.registry}
        for path, name, tied in places:
            bias, more = _slot(model, path).bias, {"frugal": not keep_packed, "cache_dequantized": cache_dequantized}
            made = QuantLinear.holding(values[name], bias, **options, **more)
            made.tied = tied
            replace_module(model, path, made.eval())
        for name, path in self.slots.embeddings.items():
            embedding = model.get_submodule(path)
            assert isinstance(embedding, nn.Embedding)
            replace_module(model, path, QuantEmbedding.in_place_of(embedding, values[name], **options).eval())

    def _check_shapes(self, model: nn.Module) -> None:
        """Raise CheckpointError for a parameter that is not as the config has it: transformers 5.16 takes any shape."""
        for name, parameter in model.named_parameters():
            if parameter.shape != (wanted := self.shapes.get(name, parameter.shape)):
                sizes = ("x".join(map(str, shape)) for shape in (parameter.shape, wanted))
                raise CheckpointError(
                    "{} does not fit its config: {} is {}, and the model needs {}".format(
                        self.checkpoint.path, name, *sizes
                    )
                )

    def _packed(self, name: str) -> PackedTensor:
        value = self.checkpoint.map(name)
        assert isinstance(value, PackedTensor)
        if self.device.type == "cpu":
            return value
        return PackedTensor(value.spec, {name: buffer.to(self.device) for name, buffer in value.buffers.items()})


def prepare_layers(model: nn.Module) -> None:
    """Prepare every packed layer that is not: on a CPU as many at once as torch has threads, each by one.

    The tensors of a layer are too small to share out.
    """
    layers = [module for module in model.modules() if isinstance(module, PackedModule) and not module.is_prepared]
    if layers and all(layer.device.type == "cpu" for layer in layers):
        map_ranges(lambda at, _: layers[at].prepare(), len(layers), PIECE)
    for layer in layers:
        layer.prepared()


def _slot(model: nn.Module, path: str) -> PackedSlot:
    slot = model.get_submodule(path)
    assert isinstance(slot, PackedSlot)
    return slot


def compute_device(device: torch.device | str) -> torch.device:
    """Return the device of this name; raise OptionError when there is no such thing here."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"no device is named {device!r}; use cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"this machine, or this torch ({torch.__version__}), has no CUDA device; use device='cpu'")
    if place.type == "meta":
        raise OptionError("device 'meta' holds no weights to run; use cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # backends that this torch was built without
        raise OptionError(
            f"this machine, or this torch ({torch.__version__}), has no device {place}; use device='cpu'"
        ) from error
    return place


def _check_kernels(
    packed: Mapping[str, PackedSpec], dtype: torch.dtype, device: torch.device, registry: Registry
) -> None:
    """Raise NoRouteError, or CheckpointError, for weights that cannot be run; equal ones are asked for once."""
    for problem, name in {problem_for(spec, dtype, device): name for name, spec in packed.items()}.items():
        choose(problem, registry)
        if problem.layout not in registry.packers:
            raise CheckpointError(f"{name} has layout {problem.layout!r}, and no installed plugin unpacks it")


def model_config(metadata: Metadata, path: str) -> Any:
    """Build transformers' config object from the checkpoint's."""
    from transformers import AutoConfig, __version__

    said = {key: value for key, value in metadata.config.items() if key != "quantization_config"}
    if "model_type" not in said:
        raise CheckpointError(f"{path} has no config that names a model_type, so there is no model class to build")
    try:
        return AutoConfig.for_model(**said)
    except ValueError as error:
        raise CheckpointError(
            f"transformers {__version__} has no model of type {said['model_type']!r} ({path}); a newer one may"
        ) from error


def find_model_class(config: Any) -> Any:
    """Return the class that the config names, or transformers' language model of its type; raise CheckpointError for none."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    raise CheckpointError(f"transformers {transformers.__version__} has no language model for {config.model_type!r}")


def _dtype(config: Any, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype to run in; an importer says float32 of what has no dtype, such as a GGUF file, so it is no wish.

    On a CPU packed weights run in bfloat16 whatever the config says: float16 (GPTQ and AWQ folders say it) would be served by
    kernels that decode every weight at every product, four times as slow on SmolLM2 (measured 2026-11, AVX2).
    """
    said = getattr(config, "dtype", None)
    if not any(isinstance(entry, PackedSpec) for entry in checkpoint.entries.values()):
        return said if isinstance(said, torch.dtype) else torch.float32
    if isinstance(said, torch.dtype) and said != torch.float32 and device.type != "cpu":
        return said
    return torch.bfloat16


def _generation(metadata: Metadata) -> Mapping[str, Any]:
    """Return the generation config of the side files as an argument, if there is one."""
    from transformers import GenerationConfig

    file = metadata.side_file("generation_config.json")
    return {"generation_config": GenerationConfig.from_dict(json.loads(file.read()))} if file else {}


def _check(report: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, naming tensors, unless the checkpoint has exactly those of the model."""
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, and the model does not,")):
        if names := sorted(report[key]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{path} {what} {', '.join(names[:3])}{more}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def _bare() -> Iterator[None]:
    """Spare layers on meta their random numbers, which nobody will see: half the time that building a model takes."""
    kinds: tuple[Any, ...] = (nn.Linear, nn.Embedding)
    resets = [kind.reset_parameters for kind in kinds]

    def unless_meta(reset: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda module: None if module.weight.is_meta else reset(module)

    for kind, reset in zip(kinds, resets, strict=True):
        kind.reset_parameters = unless_meta(reset)
    try:
        yield
    finally:
        for kind, reset in zip(kinds, resets, strict=True):
            kind.reset_parameters = reset


@contextmanager
def _no_collection() -> Iterator[None]:
    """Put off the search for reference cycles: over the thousands of new objects of a model it takes a sixth of the time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
