"""Finding plugins: the only module that touches pluggy's manager. Hooks run once, at start, never per tensor."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from lowbit import hookspecs
from lowbit.errors import PluginError
from lowbit.registry import Registry
from lowbit.runtime.cpu import register_cpu_kernels

GROUP = "lowbit"
KINDS = ("quantizers", "packers", "kernels", "importers", "exporters")


@cache
def installed() -> Registry:
    """Return the registry of everything installed, found once through the entry-point group ``lowbit``, and core's CPU kernels.

    ``LOWBIT_DISABLE_PLUGINS=a,b`` skips entry points by name; ``LOWBIT_TRACE_PLUGINS=1`` prints every hook call to stderr.
    """
    manager = new_manager()
    for name in filter(None, (part.strip() for part in os.environ.get("LOWBIT_DISABLE_PLUGINS", "").split(","))):
        manager.set_blocked(name)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        load(manager, entry)
    found = collect(manager)
    register_cpu_kernels(found)
    return found


def registry(*plugins: ModuleType | object) -> Registry:
    """Return a registry of just these plugin modules (or objects with hook methods): for tests and embedding."""
    manager = new_manager()
    try:
        for plugin in plugins:
            manager.register(plugin)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook has arguments that lowbit does not give: {_one_line(error)}") from error
    return collect(manager)


def new_manager() -> pluggy.PluginManager:
    """Return an empty manager that knows lowbit's hooks."""
    manager = pluggy.PluginManager("lowbit")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("LOWBIT_TRACE_PLUGINS"):
        manager.add_hookcall_monitoring(_before, _after)
    return manager


def load(manager: pluggy.PluginManager, entry: EntryPoint) -> None:
    """Load one entry point; a failure names the plugin and the way to go on without it."""
    try:
        manager.load_setuptools_entrypoints(GROUP, name=entry.name)
    except Exception as error:  # whatever a third party's import raises must be told with the plugin's name
        raise PluginError(
            f"plugin {entry.name!r} ({entry.value}) failed to load: {_one_line(error)}; "
            f"reinstall it, or set LOWBIT_DISABLE_PLUGINS={entry.name} to go on without it"
        ) from error


def collect(manager: pluggy.PluginManager) -> Registry:
    """Run every registration hook and return the filled registry."""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a plugin implements a hook that lowbit does not have: {_one_line(error)}") from error
    found = Registry()
    for kind in KINDS:
        hook = getattr(manager.hook, f"lowbit_register_{kind}")
        returned = hook(register=getattr(found, kind).register)
        if returned:
            raise PluginError(
                f"an implementation of {hook.name} returned {returned[0]!r}; call register(component) and return nothing"
            )
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _before(name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
    plugins = ", ".join(implementation.plugin_name for implementation in implementations)
    print(f"lowbit: {name} -> {plugins or 'nobody'}", file=sys.stderr)  # noqa: T201


def _after(
    outcome: pluggy.Result[Any], name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
) -> None:
    failed = outcome.exception
    print(f"lowbit: {name} {'failed: ' + str(failed) if failed else 'done'}", file=sys.stderr)  # noqa: T201
