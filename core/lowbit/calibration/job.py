"""The calibrated part of a conversion: decoder blocks are quantized and committed one by one before anything is written."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.calibration.dataset import Sampling, sample
from lowbit.calibration.identity import identity
from lowbit.calibration.measured import write_statistics
from lowbit.calibration.runner import BlockRunner, Finished, compute_dtype
from lowbit.calibration.skeleton import Skeleton
from lowbit.calibration.wishes import Wishes, lacks
from lowbit.calibration.workdir import Result, Results, WorkDirectory, work_path
from lowbit.errors import OptionError, OutputError, PausedError, SchemeError, WeightError
from lowbit.interfaces import Calibration, Checkpoint
from lowbit.metrics import ErrorSum
from lowbit.plan import Plan, Step, lacking
from lowbit.registry import Registry
from lowbit.runtime.load import compute_device
from lowbit.runtime.tokenizer import load_tokenizer
from lowbit.staging import check_destination
from lowbit.tensors import QuantizedTensor
from lowbit.work import finish

COMMIT_SHARE = 0.05
"""Activations of large models take seconds to write: they are, as soon as that is at most this share of the time since last."""
DISK_RATE = 1e9
"""Bytes a second: what writing activations is taken to cost before it was measured."""
Note = Callable[[str], None]
Done = Callable[[str, Step], None]


class Job:
    """One calibration: quantizes all decoder blocks of a plan.

    Args:
        plan: The whole conversion; its quantized weights outside of blocks are left to it.
        checkpoint: The source, open.
        destination: The work directory is beside it, until ``running`` ends well.
        registry: Components.
        known: Measurements from files.
        wishes: What is asked.
        note: Is told a line about each block.
        done: Is told ``"calibrate"`` and the step of each finished weight.

    Raises:
        OutputError: When there is a work directory and no ``resume``, or one of another job, or no space for it.
        OptionError: When the model or the texts cannot be calibrated with.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        destination: Path,
        registry: Registry,
        known: Mapping[str, Calibration],
        wishes: Wishes,
        note: Note,
        done: Done,
    ) -> None:
        self.checkpoint, self.registry, self.wishes, self.note, self.done = checkpoint, registry, wishes, note, done
        self.steps = {step.name: step for step in plan.steps if step.choice is not None}
        self._check_outputs()
        device = compute_device(wishes.device)
        self.skeleton = Skeleton(checkpoint, registry, device, compute_dtype(device))
        inside = {name for block in self.skeleton.blocks for name in self.skeleton.linears(block)}
        self._check_outside(inside, known)
        choices = {name: step.choice for name, step in self.steps.items() if step.choice and name in inside}
        self.sampling, self.tokens = self._sample(inside)
        self.runner = BlockRunner(
            self.skeleton, choices, self.tokens, wishes.batch_size, wishes.weighs, wishes.records, known, note=note
        )
        self._check_space(destination)
        given = [wishes.weighs, wishes.records]
        said = identity(plan, checkpoint, self.tokens, wishes.batch_size, device, known, given)
        self.work = WorkDirectory(work_path(destination), said, wishes.resume)
        if wishes.offload:
            self.runner.folder = self.work.path

    @contextmanager
    def running(self) -> Iterator[Results]:
        """Run what is not finished yet, yield everything, and at a good end keep the statistics and remove the directory.

        Raises PausedError after the block that was running when the user pressed Ctrl-C; pressed twice, KeyboardInterrupt.
        """
        try:
            self._run()
            results = self.work.results(self.steps)
            yield results
        except BaseException:
            if not self.work.done:
                self.work.discard()
            raise
        self._keep(results)
        self.work.discard()

    def _run(self) -> None:
        work, blocks = self.work, list(self.skeleton.blocks)
        for name in (name for block in blocks[: work.done] for name in self.skeleton.linears(block)):
            if name in self.runner.choices:
                self.done("calibrate", self.steps[name])
        if work.done:
            self.note(f"{work.done} of {len(blocks)} blocks are finished already")
        if work.done == len(blocks):
            return
        chains = work.chains(self.skeleton.device, self.wishes.offload) if work.done else self.runner.start()
        began, cost = time.monotonic(), chains.nbytes / DISK_RATE
        with stoppable(self.note) as stopping, self._packing() as pack:
            for number, block in enumerate(self.runner.run(chains, work.done), work.done + 1):
                packed = pack(block)
                now = time.monotonic()
                if stopping() or number == len(blocks) or cost <= COMMIT_SHARE * (now - began):
                    packed.result()
                    now = time.monotonic()
                    work.commit(chains if number < len(blocks) else None)
                    began = time.monotonic()
                    cost = began - now
                if stopping() and work.done == number:
                    raise PausedError(
                        f"stopped behind {block.name}, {work.done} of {len(blocks)} blocks are finished; the same command with "
                        "--resume goes on"
                    )

    @contextmanager
    def _packing(self) -> Iterator[Callable[[Finished], Future[None]]]:
        """Yield what packs and keeps a block: beside the work on the next one where that is on a GPU, one block at a time."""
        beside = self.skeleton.device.type != "cpu" and not self.wishes.offload
        last: Future[None] = Future()
        last.set_result(None)
        with ThreadPoolExecutor(1, "lowbit-pack") as packer:

            def pack(block: Finished) -> Future[None]:
                nonlocal last
                last.result()
                if beside:
                    last = packer.submit(self._pack, block)
                else:
                    self._pack(block)
                return last

            yield pack
            last.result()

    def _pack(self, block: Finished) -> None:
        finished = {
            name: _finish(self.steps[name], block.weights[name], quantized, block.errors.get(name))
            for name, quantized in block.quantized.items()
        }
        self.work.add(finished, block.calibration if self.wishes.records else {})
        self._tell(block, finished)

    def _tell(self, block: Finished, finished: Mapping[str, Result]) -> None:
        if finished:
            error = sum((error for _, error in finished.values()), ErrorSum())
            behind = "" if block.error is None else f", outputs {block.error:.4f} from the float model's"
            self.note(f"{block.name}: {len(finished)} weights, error {error.text()}{behind}")
        for name in finished:
            self.done("calibrate", self.steps[name])

    def _sample(self, inside: set[str]) -> tuple[Sampling, Tensor]:
        implied: dict[str, int] = {}
        for name, step in self.steps.items():
            if step.choice and name in inside and step.choice.quantizer.needs_for(step.choice.options):
                for key, value in step.choice.quantizer.sampling(step.choice.options).items():
                    implied[key] = max(value, implied.get(key, 0))
        longest = getattr(self.skeleton.config, "max_position_embeddings", None)
        sampling = self.wishes.sampling(implied, longest)
        tokenizer = load_tokenizer(self.checkpoint.path, registry=self.registry)
        tokens = sample(sampling, tokenizer, longest)
        fewer = f" ({sampling.nsamples} were asked for)" if len(tokens) < sampling.nsamples else ""
        self.note(f"calibrating on {len(tokens)} samples of {tokens.shape[1]} tokens{fewer} of {sampling.dataset}")
        return sampling, tokens

    def _keep(self, results: Results) -> None:
        """Write the statistics that the user wants to keep."""
        wishes, tokens, dataset = self.wishes, self.tokens.numel(), self.sampling.dataset
        if wishes.statistics and not wishes.statistics.exists():
            write_statistics(wishes.statistics, results.measurements(), results.measurement, tokens, dataset)
        if wishes.save_imatrix:
            suffix = ".importance"
            names = [key.removesuffix(suffix) for key in results.measurements() if key.endswith(suffix)]
            importance = {name: Calibration(results.measurement(name + suffix).clone()) for name in names}
            self.registry.write_calibration(wishes.save_imatrix, importance, self.checkpoint, tokens, dataset)

    def _check_outputs(self) -> None:
        for path in (self.wishes.statistics, self.wishes.save_imatrix):
            if path is not None and not (path == self.wishes.statistics and path.exists()):
                check_destination(path, False)
        suffixes = {exporter.calibration_suffix for exporter in self.registry.exporters.values()} - {""}
        if self.wishes.save_imatrix and self.wishes.save_imatrix.suffix not in suffixes:
            raise OptionError(f"--save-imatrix {self.wishes.save_imatrix} must end in {' or '.join(sorted(suffixes))}")

    def _check_outside(self, inside: set[str], known: Mapping[str, Calibration]) -> None:
        """Refuse quantizers that need measurements for weights outside of blocks, where nothing is measured."""
        for name, step in self.steps.items():
            missing = lacks(step, known) - {"block_inputs"}
            if missing and name not in inside and step.choice:
                raise lacking(step.choice, name, missing)

    def _check_space(self, destination: Path) -> None:
        """Raise OutputError when the disk cannot hold the finished blocks and two generations of activations."""
        chain = self.tokens.numel() * int(self.skeleton.config.hidden_size) * self.skeleton.dtype.itemsize
        needed = sum(self.steps[name].target.nbytes for name in self.runner.choices)
        needed += 2 * chain * (1 + self.runner.carries)
        free = shutil.disk_usage(destination.parent).free
        if needed > free:
            raise OutputError(
                f"{work_path(destination)} needs {needed:,} bytes for activations and finished blocks, and its disk has "
                f"{free:,} free; free some space, or give fewer --nsamples"
            )


def _finish(step: Step, weight: Tensor, quantized: QuantizedTensor, error: ErrorSum | None) -> Result:
    try:
        return finish(step, weight, quantized, error)
    except (WeightError, SchemeError) as failure:
        raise type(failure)(f"{step.name}: {failure}") from failure


@contextmanager
def stoppable(note: Note) -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed; pressed again it stops at once. In other threads than the first nothing changes."""
    asked = False

    def interrupted(*_: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("stopping when this block is finished; Ctrl-C again stops now")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
