"""The ``lowbit`` command. Each subcommand is a thin call into core; torch is imported inside them, so that help is instant."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from lowbit import __version__
from lowbit.cli.bench import bench_command
from lowbit.cli.convert import convert_command
from lowbit.cli.diff import diff_command
from lowbit.cli.doctor import doctor_command
from lowbit.cli.eval import eval_command
from lowbit.cli.generate import generate_command
from lowbit.cli.inspect import inspect_command
from lowbit.cli.kernels import kernels_command
from lowbit.cli.plugins import plugins_command
from lowbit.cli.sensitivity import sensitivity_command
from lowbit.errors import LowbitError, PausedError

EXIT_ERROR, EXIT_PAUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 75, 130, 143  # 75: BSD's EX_TEMPFAIL, try again
CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 110,
}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, package_name="lowbit", prog_name="lowbit")
def cli() -> None:
    """Quantize language models, convert low-bit weights between formats exactly, and prove what was written."""


for command in (
    convert_command,
    inspect_command,
    diff_command,
    plugins_command,
    doctor_command,
    generate_command,
    eval_command,
    bench_command,
    sensitivity_command,
    kernels_command,
):
    cli.add_command(command)


def main() -> NoReturn:
    """Run the command line: a user's mistake is one sentence on stderr and exit code 2, never a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Interrupted; the destination is as it was.", err=True)
        _leave(EXIT_INTERRUPTED)
    except TerminatedError:
        _leave(EXIT_TERMINATED)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except PausedError as error:
        click.echo(f"Paused: {error}.", err=True)
        code = EXIT_PAUSED
    except LowbitError as error:
        code = _fail(str(error), getattr(error, "reasons", {}))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str, reasons: Mapping[str, str]) -> int:
    """Print the sentence; a JSON document has every reason of a refusal, of which the sentence shows the first."""
    if "--json" in sys.argv:
        document = {"error": sentence, **({"reasons": dict(reasons)} if reasons else {})}
        click.echo(json.dumps(document, ensure_ascii=False))
    click.echo(f"Error: {sentence}", err=True)
    return EXIT_ERROR


class TerminatedError(BaseException):
    """Someone sent SIGTERM; an exception, so that temporary outputs are removed on the way out."""


def _terminate(*_: Any) -> NoReturn:
    raise TerminatedError


def _leave(code: int) -> NoReturn:
    """End at once: a signal may fall between a thread's start and the block that joins it, and Python's exit would abort under it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
