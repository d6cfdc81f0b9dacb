"""Fused experts of transformers 5, opened: one linear for each expert and projection, so that each can be packed."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import CheckpointError

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<linear>\w+)")
"""The path of one linear of one expert, as checkpoints name it."""
PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down: most models, and Mixtral."""


class PackedExperts(nn.Module):
    """Computes what the fused module computes: for each token the weighted sum of its experts' gated products.

    Args:
        fused: The module of transformers, with ``gate_up_proj`` (experts, 2 * intermediate, hidden) and ``down_proj``.
        names: What the checkpoint calls the linears of an expert.
        path: Where the module is, for errors.

    Raises:
        CheckpointError: When the fused module computes anything else (biases, transposed weights, no gate).
    """

    def __init__(self, fused: nn.Module, names: set[str], path: str) -> None:
        super().__init__()
        known = next((triple for triple in PROJECTIONS if names <= set(triple)), None)
        if known is None or (reason := _why_not(fused)):
            raise CheckpointError(
                f"{path}: lowbit cannot open these experts, {reason if known else f'with linears {sorted(names)}'}; "
                "convert the checkpoint to format 'hf' and load that"
            )
        gate_up: Any = fused.gate_up_proj
        self.names, self.apply_gate = known, _gate(fused)
        experts, double, hidden = gate_up.shape
        self.num_experts = experts
        options = {"bias": False, "device": "meta", "dtype": gate_up.dtype}
        for number in range(experts):
            shapes = ((hidden, double // 2), (hidden, double // 2), (double // 2, hidden))
            linears = {name: nn.Linear(*shape, **options) for name, shape in zip(known, shapes, strict=True)}
            self.add_module(str(number), nn.ModuleDict(linears))

    def copy_weights(self, fused: nn.Module) -> None:
        """Take the weights of the fused module, as views."""
        gate_up, down = (getattr(fused, name).detach() for name in ("gate_up_proj", "down_proj"))
        half = gate_up.shape[1] // 2
        for number in range(self.num_experts):
            weights = (gate_up[number, :half], gate_up[number, half:], down[number])
            expert: Any = getattr(self, str(number))
            for name, weight in zip(self.names, weights, strict=True):
                expert[name].weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (tokens, hidden) for tokens (tokens, hidden), chosen experts and their weights (tokens, k)."""
        result = torch.zeros_like(hidden_states)
        for number in sorted(set(top_k_index.flatten().tolist())):
            if number >= self.num_experts:  # transformers' mark of a token that is routed nowhere
                continue
            token, choice = torch.where(top_k_index == number)
            expert: Any = getattr(self, str(number))
            gate, up, down = (expert[name] for name in self.names)
            tokens = hidden_states[token]
            product = down(self.apply_gate(gate(tokens), up(tokens))) * top_k_weights[token, choice, None]
            result.index_add_(0, token, product.to(result.dtype))
        return result


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts in 3-D parameters."""
    weight = getattr(module, "gate_up_proj", None)
    return isinstance(weight, Tensor) and weight.dim() == 3


def _why_not(fused: nn.Module) -> str | None:
    """Return why the module is no plain gated one; attributes as ``use_experts_implementation`` sets them."""
    shape = getattr(getattr(fused, "gate_up_proj", None), "shape", ())
    if len(shape) != 3 or not hasattr(fused, "down_proj"):
        return f"because {type(fused).__name__} has no 3-D gate_up_proj and down_proj"
    odd = {"biases": "has_bias", "transposed weights": "is_transposed", "a norm of its own": "has_post_expert_norm"}
    found = [what for what, attribute in odd.items() if getattr(fused, attribute, False)]
    if not getattr(fused, "is_concatenated", True):
        found.append("interleaved gates")
    return f"because {type(fused).__name__} has {' and '.join(found)}" if found else None


def _gate(fused: Any) -> Any:
    """Return the function of gate and up: the class's own where it has one, else ``act_fn(gate) * up``."""
    own = getattr(fused, "_apply_gate", None)
    if own is not None and "_default" not in getattr(own, "__name__", ""):
        owner = type(fused)
        kept = _Kept(fused)
        return lambda gate, up: owner._apply_gate(kept, torch.cat((gate, up), dim=-1))
    act = fused.act_fn
    return lambda gate, up: act(gate) * up


class _Kept:
    """The plain attributes of a fused module (limits, activation), without its weights."""

    def __init__(self, fused: Any) -> None:
        self.__dict__.update({name: value for name, value in vars(fused).items() if not name.startswith("_")})
        self.__dict__.update(fused._modules)
