"""Errors a user may see: one sentence that names the thing, the value and the way out."""

from __future__ import annotations

from collections.abc import Mapping


class LowbitError(Exception):
    """Base of every error that is the user's to solve; the CLI prints its message and exits with code 2."""


class CheckpointError(LowbitError):
    """A checkpoint cannot be read: missing, truncated, inconsistent or unsafe."""


class OutputError(LowbitError):
    """The destination cannot be written: it exists, the disk is full, the path is wrong."""


class OptionError(LowbitError):
    """An option, rule or flag has no meaning here."""


class SchemeError(LowbitError):
    """A scheme contradicts itself or the parts of a tensor contradict the scheme."""


class WeightError(LowbitError):
    """A weight holds values that cannot be quantized, such as NaN or infinity."""


class PausedError(LowbitError):
    """The work stopped where it can be taken up again, as the user asked; the CLI exits with code 75."""


class VerificationError(LowbitError):
    """The reopened output differs from what was meant to be written."""


class UnknownComponentError(LowbitError):
    """No component of this name is installed."""


class PluginError(LowbitError):
    """A plugin failed to load or registered something that breaks the rules."""


class DuplicateComponentError(PluginError):
    """Two modules registered the same name; names are written into files, so neither wins."""


SHOWN_REASONS = 4
"""Refusals that a sentence shows; a format with sixteen layouts would fill the screen."""


class NoRouteError(LowbitError):
    """Nobody can do what was asked; ``reasons`` says why for everyone who was asked, the sentence the first few different ones."""

    def __init__(self, question: str, reasons: Mapping[str, str], hint: str = "") -> None:
        self.question = question
        self.reasons = dict(reasons)
        self.hint = hint
        groups: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            groups.setdefault(reason, []).append(name)
        shown = [f"{', '.join(names)}: {reason}" for reason, names in list(groups.items())[:SHOWN_REASONS]]
        if (more := sum(map(len, list(groups.values())[SHOWN_REASONS:]))) > 0:
            shown.append(f"and {more} more of the same kind")
        refusals = "; ".join(shown)
        super().__init__(question + (f" ({refusals})" if refusals else "") + (f"; {hint}" if hint else ""))
