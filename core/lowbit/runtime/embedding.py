"""``QuantEmbedding``: an embedding that decodes the rows that are asked for, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.interfaces import MatmulProblem
from lowbit.registry import Registry
from lowbit.runtime.choice import Choice, choose_rows
from lowbit.runtime.packed_module import PackedModule
from lowbit.tensors import PackedSpec, PackedTensor


class QuantEmbedding(PackedModule, nn.Embedding):  # type: ignore[misc]  # its weight is a property
    """Returns rows of a packed weight (num_embeddings, embedding_dim), decoded in float32 and rounded once to ``dtype``.

    A subclass of ``nn.Embedding``, whose ``weight`` is a ``PackedParameter``. Buffers as those of ``QuantLinear``.

    Args:
        spec: Layout, scheme, shape and buffers.
        padding_idx: As of ``nn.Embedding``; it changes nothing here, because the weight gets no gradient.
        dtype: Dtype of the rows.
        device: Where the buffers are; with ``"meta"`` no memory is used.
        registry: Where the kernel comes from; by default everything installed.
        buffers: The buffers to hold; without them there are new ones, to be loaded into.

    Raises:
        NoRouteError: When no installed kernel reads single rows; raised as soon as the buffers hold data.
    """

    def __init__(
        self,
        spec: PackedSpec,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        registry: Registry | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not Embedding's: it would make a dense weight
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.hold(spec, dtype, device, registry, False, buffers)

    @classmethod
    def in_place_of(cls, module: nn.Embedding, packed: PackedTensor, **options: Any) -> QuantEmbedding:
        """Return a packed embedding with the class, where it has one of its own, and the other tensors of ``module``.

        Some models scale the rows in a subclass of ``nn.Embedding``, which calls its base class for them.
        """
        made = cls(packed.spec, module.padding_idx, buffers=packed.buffers, **options)
        if type(module) is not nn.Embedding:
            own = {name: value for name, value in vars(module).items() if name not in vars(made) or name == "training"}
            vars(made).update(own)
            for name, buffer in module._buffers.items():
                if name not in packed.spec.buffers:
                    made.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
            made.__class__ = _subclass(type(module))  # type: ignore[arg-type]  # mypy takes the hash of modules for that of their class
        return made

    def choose(self, problem: MatmulProblem, registry: Registry) -> Choice:
        """Return the kernel that reads rows."""
        return choose_rows(problem, registry)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of integers of any shape: (*input.shape, embedding_dim)."""
        if self._packed is None:
            self.prepare()
        assert self.choice is not None
        assert self._packed is not None
        numbers = input.reshape(-1)
        if torch.compiler.is_compiling():
            rows = torch.ops.lowbit.rows(numbers, self._operands(), self._binding, self.compute_dtype)
        else:
            rows = self.choice.kernel.rows(self._packed, numbers, self.compute_dtype)
        return rows.view(*input.shape, self.embedding_dim)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Show shape, scheme, layout and kernel."""
        kernel = self.choice.kernel.name if self.choice else "not prepared"
        shape = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{shape}, scheme={self.spec.scheme.summary()}, layout={self.spec.layout}, kernel={kernel}"


@cache
def _subclass(kind: type[nn.Embedding]) -> type[QuantEmbedding]:
    """Return ``kind`` with ``QuantEmbedding`` in the place of ``nn.Embedding``."""
    return type(f"Quant{kind.__name__}", (kind, QuantEmbedding), {})
