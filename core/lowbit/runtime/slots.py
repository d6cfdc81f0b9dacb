"""Where in a transformers model the weights of a checkpoint belong, and putting packed layers there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError, NoRouteError
from lowbit.interfaces import Entry
from lowbit.registry import Registry
from lowbit.runtime.choice import choose_rows, problem_for
from lowbit.runtime.experts import EXPERT, PackedExperts
from lowbit.tensors import PackedSpec


class PackedSlot(nn.Module):
    """Keeps the place of a packed linear, and its bias, while the other tensors of a model are loaded.

    Args:
        spec: What will come.
        bias: The bias of the linear that was here, if it had one.
        dtype: Dtype of the activations.
    """

    def __init__(self, spec: PackedSpec, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype, self._is_hf_initialized = spec, dtype, True
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Fail: nothing was loaded yet."""
        raise AssertionError("a packed layer was run before its weight was loaded")


@dataclass(frozen=True, slots=True)
class Slots:
    """Where packed entries of a checkpoint belong.

    Attributes:
        linears: The path of the linear of each name.
        embeddings: The path of the embedding of each name.
        tied: By the path of a linear that has the weight of such an embedding: the name of this weight.
        others: The names of all others.
    """

    linears: Mapping[str, str]
    embeddings: Mapping[str, str]
    tied: Mapping[str, str]
    others: tuple[str, ...]

    @property
    def packed(self) -> Mapping[str, str]:
        """The path of the module of each name that stays packed."""
        return {**self.linears, **self.embeddings}


def make_slots(
    model: Any,
    entries: Mapping[str, Entry],
    make: Callable[[PackedSpec, nn.Parameter | None, torch.dtype], nn.Module],
    registry: Registry,
    device: torch.device,
) -> Slots:
    """Replace every linear of ``model`` (on meta) whose weight is packed by what ``make`` returns; raise when shapes differ.

    Fused experts of transformers 5 become containers of linears for each expert where the checkpoint names experts one by
    one. Embeddings lose their weight where a kernel reads rows of the packed one, and linears that are tied to them become
    ``PackedSlot``s. Packed weights of all other modules stay as they are, to be dequantized.
    """
    packed = {name: entry for name, entry in entries.items() if isinstance(entry, PackedSpec)}
    rename = renamer(model)
    paths = {name: rename(name).removesuffix(".weight") for name in packed}
    dtype = _dtype(model)
    open_experts(model, paths.values())
    linears, embeddings = {}, {}
    for name, path in paths.items():
        module, spec = _module(model, path), packed[name]
        if isinstance(module, nn.Linear):
            _check_shape(name, spec, (module.out_features, module.in_features))
            replace_module(model, path, make(spec, module.bias, dtype))
            _untie(model, f"{path}.weight")
            linears[name] = path
        elif isinstance(module, nn.Embedding) and _reads_rows(module, spec, dtype, device, registry):
            _check_shape(name, spec, (module.num_embeddings, module.embedding_dim))
            _take_weight(module)
            embeddings[name] = path
    tied = _tied_slots(model, {path: name for name, path in embeddings.items()}, packed, entries)
    others = tuple(name for name in packed if name not in linears and name not in embeddings)
    return Slots(linears, embeddings, tied, others)


def _check_shape(name: str, spec: PackedSpec, wanted: tuple[int, int]) -> None:
    if wanted != spec.shape:
        sizes = f"is {spec.shape[0]}x{spec.shape[1]}, but the model of this config needs {wanted[0]}x{wanted[1]}"
        raise CheckpointError(f"{name} {sizes}")


def _reads_rows(
    module: nn.Embedding, spec: PackedSpec, dtype: torch.dtype, device: torch.device, registry: Registry
) -> bool:
    try:
        choose_rows(problem_for(spec, dtype, device), registry)
    except NoRouteError:
        return False
    return module.max_norm is None  # else looking a row up changes it


def _take_weight(module: nn.Embedding) -> None:
    """Leave an embedding without a parameter, and with a ``weight`` that transformers takes for one it has loaded."""
    del module._parameters["weight"]
    empty = torch.empty(0)
    empty._is_hf_initialized = True  # type: ignore[attr-defined]
    object.__setattr__(module, "weight", empty)


def _tied_slots(
    model: Any, embeddings: Mapping[str, str], packed: Mapping[str, PackedSpec], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """Replace the linears that are tied to ``embeddings`` (names by path), unless the checkpoint has weights for them."""
    ties, found = getattr(model, "all_tied_weights_keys", {}), {}
    for target, source in list(ties.items()):
        name = embeddings.get(source.removesuffix(".weight"))
        path = target.removesuffix(".weight")
        if name is None or not isinstance(module := _module(model, path), nn.Linear):
            continue
        if target in entries:
            _untie(model, target)
            continue
        ties.pop(target)
        replace_module(model, path, PackedSlot(packed[name], module.bias, _dtype(model)))
        found[path] = name
    return found


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule at ``path``."""
    parent, _, child = path.rpartition(".")
    owner = _module(model, parent)
    assert owner is not None
    assert child in owner._modules
    owner._modules[child] = module


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at ``path``, if there is one: ``get_submodule``, five times as fast."""
    found: nn.Module | None = model
    for part in path.split(".") if path else ():
        found = found._modules.get(part) if found is not None else None
    return found


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def renamer(model: Any) -> Callable[[str], str]:
    """Return the function from a checkpoint's name to the model's: transformers' own renamings, and its base prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> str:
        renamed = name
        for entry in renamings:
            renamed = entry.rename_source_key(renamed)[0]
        candidates = [name, renamed, prefix + renamed, renamed.removeprefix(prefix)]
        owners = (candidate.removesuffix(".weight") for candidate in candidates)
        return next((owner for owner in owners if _exists(model, owner)), name)

    return rename


def _exists(model: nn.Module, path: str) -> bool:
    """Whether the model has this module, or fused experts that stand for it."""
    experts = EXPERT.fullmatch(path)
    return _module(model, path) is not None or bool(experts and _module(model, experts["experts"]) is not None)


def open_experts(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace fused experts of ``model`` by containers of linears where ``paths`` name single experts."""
    matches = [match for path in paths if (match := EXPERT.fullmatch(path))]
    for owner in dict.fromkeys(match["experts"] for match in matches):
        fused = _module(model, owner)
        if fused is None or isinstance(fused, nn.ModuleList):
            continue
        names = {match["linear"] for match in matches if match["experts"] == owner}
        replace_module(model, owner, PackedExperts(fused, names, owner))


def _untie(model: Any, name: str) -> None:
    """Forget that ``name`` is another weight, such as the embedding: the checkpoint has one of its own."""
    tied = getattr(model, "all_tied_weights_keys", {})
    if name in tied:
        tied.pop(name)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
