"""What a checkpoint holds besides its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that belongs to a checkpoint but holds no weights: a tokenizer, a chat template, a model card."""

    name: str
    path: Path | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        """Return the bytes."""
        if self.content is not None:
            return self.content
        assert self.path is not None
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a checkpoint says besides its tensors.

    Attributes:
        config: The Hugging Face ``config.json``, without a quantization_config; {} when unknown.
        side_files: Everything else to carry along; names are plain file names or relative paths inside the checkpoint.
        provenance: What is known of where the weights come from, such as ``{"source": "...", "quantizer": "..."}``.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)

    def side_file(self, name: str) -> SideFile | None:
        """Return the side file of this name, if there is one."""
        return next((file for file in self.side_files if file.name == name), None)
