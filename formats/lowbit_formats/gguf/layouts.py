"""Every layout of this package: one packer for each ggml type that has a scheme."""

from __future__ import annotations

from lowbit_formats.gguf import simple_blocks, super_blocks

PACKERS = (*simple_blocks.PACKERS, *super_blocks.PACKERS)
BY_TYPE = {packer.type.name: packer for packer in PACKERS}
BY_LAYOUT = {packer.layout: packer for packer in PACKERS}
