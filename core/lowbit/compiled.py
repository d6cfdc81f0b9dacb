"""Loops in C, compiled for this processor at first use: for what torch and numpy have no single operation for.

A ``CLoops`` is a C file beside the module that calls it. Whoever uses one has the same work in torch as well, to the same bits, and does
that where ``find`` returns None: without a compiler, or with LOWBIT_CC set to nothing. So a loop is never needed, only faster; contract
tests run both. Results lie in the cache folder (``cache_folder``) under a hash of everything that made them, and load in a millisecond;
compiling takes half a second, once.

A loop receives addresses (tensors, contiguous or with strides that it is told), int64 and double; it returns int64, and holds no lock of the
interpreter, so that ``lowbit.workers`` runs several at once::

    int64_t double_all(const float *from, float *to, int64_t count, double factor)

    loops = CLoops(Path(__file__).with_name("double.c"))
    if (double_all := loops.find("double_all")) is not None:
        double_all(weight, result, weight.numel(), 2.0)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

Loop: TypeAlias = Callable[..., int]
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""Nothing that changes a result: no contraction to fused products, no reordering of sums."""
NATIVE: Sequence[Sequence[str]] = (("-march=native",), ("-mcpu=native",), ())
"""Ways to ask for all instructions of this processor, the first that the compiler takes."""


class CLoops:
    """The loops of one C file, compiled when the first of them is asked for.

    Args:
        source: The file; files that it includes by name lie beside it.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._library: ctypes.CDLL | None = None
        self._tried = ""
        self._found: dict[str, Loop] = {}

    def find(self, name: str) -> Loop | None:
        """Return a loop, or None where nothing can compile it."""
        wanted = os.environ.get("LOWBIT_CC", "default")  # tests and users change it while the program runs
        if self._tried != wanted:
            with self._lock:
                if self._tried != wanted:
                    self._library, self._found = _load(self.source), {}
                    self._tried = wanted
        if self._library is None:
            return None
        if name not in self._found:
            self._found[name] = _callable(self._library, name)
        return self._found[name]


def why_not_compiled() -> str | None:
    """Return None when loops can be compiled here, else the reason in one sentence."""
    if _command() is not None:
        return None
    given = _given()
    if given is not None and not given.strip():
        return "LOWBIT_CC is empty"
    return f"no C compiler was found ({given or ', '.join(COMPILERS)}); install one, or name one in LOWBIT_CC"


def cache_folder() -> Path:
    """Return where compiled loops are kept: $LOWBIT_CACHE_DIR, else $XDG_CACHE_HOME/lowbit, else ~/.cache/lowbit; in ``loops``."""
    if given := os.environ.get("LOWBIT_CACHE_DIR"):
        return Path(given) / "loops"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "loops"


def compile_loops(source: Path, folder: Path) -> Path | None:
    """Return the library made of ``source``, compiled unless ``folder`` has it; None when there is no compiler that can."""
    if (command := _command()) is None:
        return None
    text = source.read_bytes() + b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.h")))
    made_by = "\0".join((*command, _version(tuple(command)), *FLAGS, _processor()))
    target = folder / f"{source.stem}-{hashlib.sha256(text + made_by.encode()).hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / target.name
        for native in NATIVE:
            done = subprocess.run(
                [*command, *FLAGS, *native, "-o", str(made), str(source), "-lm"], capture_output=True, check=False
            )
            if done.returncode == 0:
                made.replace(target)  # another process may have done the same meanwhile
                return target
    return None


def _load(source: Path) -> ctypes.CDLL | None:
    try:
        path = compile_loops(source, cache_folder())
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:  # a folder that cannot be written, a library that this system does not load: torch does the work
        return None


def _command() -> Sequence[str] | None:
    """Return the compiler with its first arguments; None when none is there, or none is wanted."""
    given = _given()
    for command in [[name] for name in COMPILERS] if given is None else [shlex.split(given)]:
        if command and shutil.which(command[0]):
            return command
    return None


def _given() -> str | None:
    """Return what LOWBIT_CC says, else CC unless it is empty."""
    return os.environ.get("LOWBIT_CC", os.environ.get("CC") or None)


@cache
def _version(command: Sequence[str]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


@cache
def _processor() -> str:
    """Return what tells processors of different instructions apart: folders of users are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    told = [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features", "CPU part")]
    return f"{platform.machine()} {sorted(set(told))}"


def _callable(library: ctypes.CDLL, name: str) -> Loop:
    function = getattr(library, name)
    function.restype = ctypes.c_int64

    def call(*arguments: Tensor | float | None) -> int:
        found: int = function(*map(_argument, arguments))
        return found

    return call


def _argument(value: Tensor | float | None) -> object:
    """Return what C takes: an address, an int64 or a double."""
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)
