"""``Skeleton``: a transformers model without weights, whose modules are filled from a checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError, OptionError
from lowbit.interfaces import Checkpoint, MatmulProblem
from lowbit.recipe import is_matrix
from lowbit.registry import Registry
from lowbit.runtime.extras import need_transformers
from lowbit.runtime.load import find_model_class, model_config
from lowbit.runtime.slots import open_experts, renamer
from lowbit.tensors import PackedTensor


@dataclass(frozen=True, slots=True)
class Filling:
    """What fills a module: its tensors by their names in it, where it computes, and the matrices as the checkpoint has them."""

    tensors: Mapping[str, Tensor]
    matrices: Mapping[str, Tensor]


class Skeleton:
    """A model on meta, its decoder blocks, and which tensor of the checkpoint each parameter is.

    Nothing of the checkpoint is executed: the class is transformers' own, by the config's ``model_type``.

    Args:
        checkpoint: An open checkpoint; it must stay open.
        registry: For dequantizing packed weights.
        device: Where modules go when they are filled.
        dtype: Of the filled parameters.

    Attributes:
        decoder: The part of the model that embeds tokens and runs the blocks.
        blocks: The decoder blocks by path (``model.layers.0``), in order.
        config: The text config of the model.

    Raises:
        CheckpointError: When there is no model class for the config, or tensors of the model are missing.
        OptionError: When transformers is not installed, or no decoder blocks are found.
    """

    def __init__(self, checkpoint: Checkpoint, registry: Registry, device: torch.device, dtype: torch.dtype) -> None:
        need_transformers("calibration")
        self.checkpoint, self.registry, self.device, self.dtype = checkpoint, registry, device, dtype
        self._copying: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        config = model_config(checkpoint.metadata, str(checkpoint.path))
        with _parameters_on_meta():
            self.model: Any = find_model_class(config)(config)
        self.model.eval().requires_grad_(False)
        self._kept: Mapping[str, Tensor] = {}
        self.config = config.get_text_config()
        self._sources = self._name_sources()
        self.decoder: Any = self.model.get_decoder()
        self._layers, self.blocks = self._find_blocks()

    def linears(self, block: str) -> dict[str, str]:
        """Return the weights of linear layers in a block: tensor name in the checkpoint -> path of the layer in the block."""
        found = {}
        for path, module in self.blocks[block].named_modules():
            source = self._sources.get(f"{block}.{path}.weight")
            if isinstance(module, nn.Linear) and source is not None:
                found[source] = path
        return found

    @contextmanager
    def filled(
        self, path: str, but: str | None = None, filling: Callable[[], Filling] | None = None
    ) -> Iterator[nn.Module]:
        """Fill the module at ``path`` from the checkpoint, all but the submodule at ``but``; empty it again at the end.

        ``filling`` returns what ``read`` has read before. The weights that were read for a block are at hand until the end,
        for ``source_weight``.
        """
        module = self._module(path)
        empty = self._empty(path, but)
        _move_buffers(module, self.device)
        try:
            found = filling() if filling else self.read(path, but)
            self._kept = found.matrices
            _used_here(found.tensors.values())
            self._assign(module, found.tensors)
            del found  # who puts other weights into the module lets these go
            yield module
        finally:
            self._kept = {}
            self._assign(module, empty)

    def read(self, path: str, but: str | None = None) -> Filling:
        """Read what ``filled`` puts into an empty module, which may happen in another thread, beside the work on another one.

        Weights are copied to a GPU on a stream of their own: on the one that blocks run on, each would wait for all work that is
        queued there. They have arrived when this returns.
        """
        prefix, keep = (f"{path}." if path else ""), path in self.blocks
        parameters = {name for name, _ in self._module(path).named_parameters()}
        tensors, matrices = {}, {}
        for name, empty in self._empty(path, but).items():
            source, value = self._read(prefix + name, empty)
            if keep and value.dim() == 2:
                matrices[source] = value
            computes = name in parameters and empty.is_floating_point()
            with torch.cuda.stream(self._copying) if self._copying else nullcontext():
                tensors[name] = value.to(self.device, self.dtype if computes else empty.dtype)
        if self._copying:
            self._copying.synchronize()
        return Filling(tensors, matrices)

    def source_weight(self, name: str) -> Tensor:
        """Return a weight of the checkpoint as floats: as stored, or float32 when it is packed."""
        if name in self._kept:
            return self._kept[name]
        value = self.checkpoint.read(name)
        if not isinstance(value, PackedTensor):
            return value
        problem = MatmulProblem(value.layout, value.scheme, value.shape)
        return self.registry.reference_kernel(problem).dequantize(value)

    @contextmanager
    def replaced_blocks(self, modules: Mapping[str, nn.Module]) -> Iterator[Any]:
        """Yield the decoder with other modules in the place of its blocks."""
        layers: Any = self.model.get_submodule(self._layers)
        try:
            for number, path in enumerate(self.blocks):
                layers[number] = modules[path]
            yield self.decoder
        finally:
            for number, path in enumerate(self.blocks):
                layers[number] = self.blocks[path]

    @property
    def decoder_path(self) -> str:
        """Path of the decoder in the model."""
        path: str = next(path for path, module in self.model.named_modules() if module is self.decoder)
        return path

    @property
    def layers_path(self) -> str:
        """Path of the list of blocks in the model."""
        return self._layers

    def _name_sources(self) -> dict[str, str]:
        """Return the checkpoint's name of every parameter and buffer that it has; experts are opened on the way."""
        rename, entries = renamer(self.model), self.checkpoint.entries
        matrices = [name for name, entry in entries.items() if is_matrix(entry) and name.endswith(".weight")]
        open_experts(self.model, [rename(name).removesuffix(".weight") for name in matrices])
        self.model.requires_grad_(False)
        sources = {}
        for name in entries:
            owner, _, leaf = name.rpartition(".")
            path = rename(f"{owner}.weight").removesuffix(".weight")
            sources[f"{path}.{leaf}"] = name
        return sources

    def _find_blocks(self) -> tuple[str, dict[str, nn.Module]]:
        count = getattr(self.config, "num_hidden_layers", None)
        prefix = self.decoder_path
        for path, module in self.decoder.named_modules(prefix=prefix):
            if isinstance(module, nn.ModuleList) and len(module) == count and not isinstance(module[0], nn.Linear):
                return path, {f"{path}.{number}": block for number, block in enumerate(module)}
        raise OptionError(
            f"{type(self.model).__name__} has no list of {count} decoder blocks that lowbit can find, so it cannot be calibrated; "
            "use a quantizer that needs no calibration, or give --imatrix"
        )

    def _module(self, path: str) -> nn.Module:
        module = self.model.get_submodule(path) if path else self.model
        assert isinstance(module, nn.Module)
        return module

    def _empty(self, path: str, but: str | None) -> dict[str, Tensor]:
        """Return what an empty module holds, by names in it, but for the submodule at ``but``."""
        prefix, skipped = (f"{path}." if path else ""), f"{but}." if but else None
        state = self._module(path).state_dict()
        return {name: empty for name, empty in state.items() if not (skipped and (prefix + name).startswith(skipped))}

    def _read(self, path: str, empty: Tensor) -> tuple[str, Tensor]:
        """Return the name in the checkpoint of what belongs at ``path``, and its value there."""
        name = self._sources.get(path)
        if name is None:
            raise CheckpointError(f"{self.checkpoint.path} lacks {path}, which its config asks for")
        value = self.source_weight(name)
        if value.shape != empty.shape:
            raise CheckpointError(
                f"{name} is {_shape(value)}, but the model of this config needs {_shape(empty)}; the config is another model's"
            )
        return name, value

    @staticmethod
    def _assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        module.load_state_dict(tensors, strict=False, assign=True)
        module.requires_grad_(False)


def _used_here(tensors: Iterable[Tensor]) -> None:
    """Tell torch that tensors are used on this thread's stream, so that their memory is not given to another before that is done."""
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move what is computed rather than stored (rotary frequencies) to the device; it is small and stays there."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules be made with parameters on meta and real buffers: rotary frequencies are computed, never stored.

    ``torch.device("meta")`` would put both there. The parameters are allocated first, one at a time, and never touched.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
