"""Decoding on CUDA by replaying one captured step: the launches of hundreds of small kernels then cost the host nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.runtime.experts import PackedExperts

_EAGER_STEPS = 2  # before a capture everything must have run: kernels loaded, workspaces allocated, caches filled
READY_STEPS = _EAGER_STEPS + 1
"""Steps until decoding runs at its speed: the third is captured first."""


def can_graph(model: Any) -> bool:
    """Whether decode steps of ``model`` can be captured: on CUDA, without routing that the host decides."""
    return (
        model.device.type == "cuda"
        and bool(getattr(model, "_can_compile_fullgraph", False))
        and not any(isinstance(module, PackedExperts) for module in model.modules())
    )


class GraphedSteps:
    """Runs a model token by token over a static key-value cache; the third step is captured, and replayed from then on.

    Args:
        model: A transformers model on CUDA.
        length: Tokens that the cache holds, prompt included.
    """

    def __init__(self, model: Any, length: int) -> None:
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._steps = 0

    def prefill(self, ids: Tensor) -> Tensor:
        """Run the prompt (1, n) and return the logits (vocabulary,) after its last token."""
        with torch.inference_mode():
            logits: Tensor = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    def step(self, token: int) -> Tensor:
        """Run one token and return the logits (vocabulary,) after it; the next step overwrites them."""
        self.ids.fill_(token)
        self._steps += 1
        if self._steps <= _EAGER_STEPS:
            return self._eager()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        assert self._logits is not None
        self.graph.replay()  # capturing records without running, so this is also how the captured step itself runs
        return self._logits

    def _forward(self) -> Tensor:
        logits: Tensor = self.model(self.ids, past_key_values=self.cache, use_cache=True).logits
        return logits[0, -1]

    def _eager(self) -> Tensor:
        """Run on a stream of its own, as CUDA asks of steps that warm up for a capture."""
        side = torch.cuda.Stream(self.ids.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.ids.device))
        with torch.cuda.stream(side), torch.inference_mode():
            logits = self._forward()
        torch.cuda.current_stream(self.ids.device).wait_stream(side)
        return logits

    def _capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self._logits = self._forward()
