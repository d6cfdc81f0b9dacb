"""``lowbit kernels``: compile device kernels ahead of time, list them, remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import human_bytes, json_option, print_json, print_table
from lowbit.errors import LowbitError, OptionError

if TYPE_CHECKING:
    from lowbit.compilers import Built, Compiler


@click.group("kernels", short_help="Compile device kernels ahead of time, list or remove them.")
def kernels_command() -> None:
    """Compile device kernels ahead of time, list or remove them.

    A kernel is compiled when it is first needed and kept in LOWBIT_CACHE_DIR; a machine without a GPU can compile for any.
    LOWBIT_CUDA=0 runs everything without them.
    """


@kernels_command.command("build")
@click.option(
    "--arch", "archs", multiple=True, metavar="ARCH", help="Such as sm_90a; again for more. Default: GPUs here."
)
@click.option("--only", metavar="TEXT", help="Only kernels whose name contains TEXT.")
@json_option
def build_command(archs: Sequence[str], only: str | None, as_json: bool) -> None:
    """Compile every announced kernel, for the GPUs at hand or for --arch."""
    from lowbit.compilers import compiler, programs

    tool = compiler()
    chosen = archs or _sentences(tool.architectures)
    if not chosen:
        raise OptionError("no GPU is at hand to compile for; name an architecture, such as --arch sm_90a")
    for arch in chosen:
        _sentences(tool.check, arch)
    wanted = [(each, arch) for arch in chosen for each in programs(arch) if only is None or only in each.name]
    if not wanted:
        raise OptionError(f"no kernel's name contains {only!r}; lowbit kernels build without --only names them all")
    _show(tool, [_sentences(tool.build, program, arch) for program, arch in wanted], as_json)


@kernels_command.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List compiled kernels: architecture, size, compile time."""
    from lowbit.compilers import compiler

    tool = compiler()
    _show(tool, _sentences(tool.built), as_json)


@kernels_command.command("clear")
@json_option
def clear_command(as_json: bool) -> None:
    """Remove every compiled kernel; they are compiled again when needed."""
    from lowbit.compilers import compiler

    tool = compiler()
    count = _sentences(tool.clear)
    if as_json:
        print_json({"folder": str(tool.folder()), "removed": count})
    else:
        click.echo(f"removed {count} kernels from {tool.folder()}")


def _show(tool: Compiler, found: Sequence[Built], as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(tool.folder()), "kernels": [_document(each) for each in found]})
        return
    rows = [(each.kernel, each.arch, human_bytes(each.nbytes), _duration(each.seconds)) for each in found]
    total = sum(each.nbytes for each in found), sum(each.seconds for each in found)
    footer = (f"{len(found)} in {tool.folder()}", "", human_bytes(total[0]), _duration(total[1]) if found else "")
    print_table("", ("kernel", "arch", ">size", ">compile time"), rows, footer)


def _document(built: Built) -> dict[str, Any]:
    return {"kernel": built.kernel, "arch": built.arch, "bytes": built.nbytes, "seconds": round(built.seconds, 3)}


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds else "cached"


def _sentences(function: Any, *arguments: Any) -> Any:
    """Call a compiler's function; what it raises is a sentence for the user."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise LowbitError(str(error)) from error
