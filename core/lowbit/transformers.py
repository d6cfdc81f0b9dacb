"""``import lowbit.transformers``: from then on, ``AutoModelForCausalLM.from_pretrained`` loads native folders.

``import lowbit`` alone does not do it, because it would have to import torch and transformers. Without this import transformers
stops at a native folder: it finds no ``model.safetensors`` there.
"""

from __future__ import annotations

from lowbit.runtime.extras import need_transformers

need_transformers("lowbit.transformers")

from lowbit.runtime.hf import LowbitConfig, LowbitQuantizer, register

__all__ = ["LowbitConfig", "LowbitQuantizer", "register"]

register()
