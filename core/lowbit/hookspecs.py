"""The plugin API: one hook for each kind of component. A plugin implements those it needs and registers instances.

    from lowbit import hookimpl

    @hookimpl
    def lowbit_register_quantizers(register):
        register(MyQuantizer())

and says in its pyproject.toml where to find them: ``[project.entry-points.lowbit]`` ``my-plugin = "my_module"``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from lowbit.interfaces import Exporter, Importer, Kernel, Packer, Quantizer

hookspec = pluggy.HookspecMarker("lowbit")
hookimpl = pluggy.HookimplMarker("lowbit")


@hookspec
def lowbit_register_quantizers(register: Callable[[Quantizer[Any]], None]) -> None:
    """Register algorithms that choose codes."""


@hookspec
def lowbit_register_packers(register: Callable[[Packer], None]) -> None:
    """Register layouts: where the bits of a quantized weight are."""


@hookspec
def lowbit_register_kernels(register: Callable[[Kernel], None]) -> None:
    """Register kernels that multiply by packed weights, at least a plain-torch one for every layout."""


@hookspec
def lowbit_register_importers(register: Callable[[Importer], None]) -> None:
    """Register readers of checkpoint formats."""


@hookspec
def lowbit_register_exporters(register: Callable[[Exporter], None]) -> None:
    """Register writers of checkpoint formats."""
