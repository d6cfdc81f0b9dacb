"""Texts that lowbit ships, in the public domain; README.md tells where they come from."""

from __future__ import annotations

from importlib.resources import files


def heldout_text() -> str:
    """Return the text for evaluation: chapters of a novel, 127 kB of ASCII."""
    return _read("heldout.txt")


def calibration_text() -> str:
    """Return the text for calibration: passages of other novels, ASCII."""
    return _read("calibration.txt")


def _read(name: str) -> str:
    return (files("lowbit.data") / name).read_text(encoding="ascii")
