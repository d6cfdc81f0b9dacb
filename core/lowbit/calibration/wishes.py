"""``Wishes``: what the user says of calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lowbit.calibration.dataset import DEFAULT, NSAMPLES, SEED, SEQLEN, Sampling
from lowbit.errors import OptionError
from lowbit.interfaces import Calibration
from lowbit.plan import COLLECTED, Step, measured


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked of calibration; None is what the quantizers' options imply, or the default.

    Attributes:
        dataset: Texts, as of ``Sampling``; given, it also weighs the columns for quantizers that need nothing.
        nsamples: How many samples.
        seqlen: Tokens of a sample.
        batch_size: Samples that run through a block at once.
        seed: For the choice of samples.
        device: Where blocks run.
        offload: Keep activations in files beside the destination instead of in memory.
        statistics: A file of statistics: used when it is there, else written.
        save_imatrix: Where to write the importance of all quantized weights.
        resume: Go on with a work directory that is there.
    """

    dataset: str | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int = 8
    seed: int = SEED
    device: str = "cpu"
    offload: bool = False
    statistics: Path | None = None
    save_imatrix: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise OptionError(f"--batch-size must be at least 1, got {self.batch_size}")
        self.sampling({}, None)

    @property
    def collects(self) -> frozenset[str]:
        """What calibration can give."""
        return COLLECTED

    def concerns(self, step: Step, known: Mapping[str, Calibration]) -> bool:
        """Whether calibration must run for this step."""
        return step.choice is not None and (self.weighs or bool(lacks(step, known)))

    @property
    def weighs(self) -> bool:
        """Whether importance is measured for quantizers that need nothing, too."""
        return self.dataset is not None or self.records

    @property
    def records(self) -> bool:
        """Whether statistics shall be kept."""
        return self.save_imatrix is not None or (self.statistics is not None and not self.statistics.exists())

    def sampling(self, implied: Mapping[str, int], longest: int | None) -> Sampling:
        """Return what to sample, for options that imply ``nsamples`` and ``seqlen`` and a model that takes ``longest`` tokens."""
        seqlen = self.seqlen
        if seqlen is None:
            seqlen = min(implied.get("seqlen", SEQLEN), longest or SEQLEN)
        nsamples = implied.get("nsamples", NSAMPLES) if self.nsamples is None else self.nsamples
        return Sampling(self.dataset or DEFAULT, nsamples, seqlen, self.seed)


def lacks(step: Step, known: Mapping[str, Calibration]) -> frozenset[str]:
    """Return what the quantizer of a step needs and no file says."""
    if step.choice is None:
        return frozenset()
    return step.choice.quantizer.needs_for(step.choice.options) - measured(known, step.name)
