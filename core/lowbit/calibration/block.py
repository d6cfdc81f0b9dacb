"""One decoder block in memory, with the activations that calibration kept for it: what a quantizer sees that tunes a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn


class Block(ABC):
    """A decoder block of a model, its inputs in the quantized model and its outputs in the unquantized one.

    Attributes:
        name: Path of the block in the model, ``model.layers.3``.
        module: The block with the checkpoint's float weights, in eval mode, on its device. A quantizer may wrap or replace its
            linears while it works and must leave the module as it found it.
        linears: The weights to be quantized: name of the tensor in the checkpoint -> path of its linear layer in ``module``.
        samples: Number of calibration sequences, all of one length.
        resident: Whether all activations are on the module's device: to read them costs next to nothing.
    """

    name: str
    module: nn.Module
    linears: Mapping[str, str]
    samples: int
    resident: bool = False

    @abstractmethod
    def inputs(self, index: Sequence[int]) -> Tensor:
        """Return what the block receives in the quantized model for these samples, ``(len(index), seqlen, hidden)``."""

    @abstractmethod
    def targets(self, index: Sequence[int]) -> Tensor:
        """Return what the float block gives for its inputs in the float model, ``(len(index), seqlen, hidden)``."""

    @abstractmethod
    def mask(self, index: Sequence[int]) -> Tensor:
        """Return which tokens count, bool ``(len(index), seqlen)`` on the CPU; padding does not."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Run ``module`` on hidden states ``(n, seqlen, hidden)``, with the model's own mask and position embeddings.

        Gradients flow when they are enabled; the result has the shape of ``hidden``.
        """

    def log(self, text: str) -> None:
        """Tell the user one line about this block: the loss before and after."""
