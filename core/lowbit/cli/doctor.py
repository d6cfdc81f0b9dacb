"""``lowbit doctor``."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import click

from lowbit.cli.console import json_option, print_json, print_table
from lowbit.errors import LowbitError

PACKAGES = {
    "torch": "",
    "safetensors": "",
    "gguf": "",
    "pluggy": "",
    "transformers": 'pip install "lowbit[hf]"',
    "tokenizers": 'pip install "lowbit[hf]"',
    "cuda-core": 'pip install "lowbit[gpu]"',
    "nvidia-cuda-nvrtc": 'pip install "lowbit[gpu]"',
}
"""Packages to report and, for optional ones, how to get them."""


@click.command("doctor", short_help="Report versions, devices and what is missing.")
@json_option
def doctor_command(as_json: bool) -> None:
    """Report versions, devices and plugins, what is missing, and how to get it."""
    report = _report()
    if as_json:
        print_json(report)
        return
    rows = [
        (name, version or "missing", "" if version else PACKAGES[name]) for name, version in report["packages"].items()
    ]
    print_table("", ("package", "version", "get it with"), [("python", report["python"], ""), *rows])
    devices = ", ".join(report["devices"])
    click.echo(f"devices: {devices}; {report['threads']} threads")
    click.echo(f"loops in C: {report['loops']}")
    click.echo(f"plugins: {report['plugins'] if isinstance(report['plugins'], str) else ', '.join(report['plugins'])}")


def _report() -> dict[str, Any]:
    import torch

    from lowbit.compiled import why_not_compiled

    reason = why_not_compiled()
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": ["cpu", *(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))],
        "threads": torch.get_num_threads(),
        "loops": f"not compiled, torch does their work slower: {reason}" if reason else "compiled at first use",
        "plugins": _plugins(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugins() -> list[str] | str:
    """Name the installed entry points, or give the sentence of what is wrong with one."""
    from lowbit.plugins import GROUP, installed

    try:
        installed()
    except LowbitError as error:
        return str(error)
    return sorted(entry.name for entry in importlib.metadata.entry_points(group=GROUP))
