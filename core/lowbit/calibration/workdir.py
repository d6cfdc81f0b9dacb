"""``WorkDirectory``: finished blocks and the activations behind the last of them, so that a killed job goes on where it was.

::

    state.json                  identity of the job, number of finished blocks, shape and dtype of the activations
    block-00000.safetensors     a finished block: the bytes of each tensor's buffers, its error, its statistics
    float-1.bin                 activations of the float model before block 1, raw
    quantized-1.bin             the same of the quantized model

A file gets its name when it is complete, and ``state.json`` is replaced last: whatever the moment of a kill, the state names
complete files only. Nothing random outlives a block (samples are in the identity, quantizers have seeds of their own), so
no generator's state is kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from lowbit.calibration.chains import Chain
from lowbit.calibration.runner import Chains
from lowbit.errors import CheckpointError, OutputError
from lowbit.interfaces import Calibration, Value
from lowbit.metrics import ErrorSum
from lowbit.parts import torch_dtype
from lowbit.plan import Step
from lowbit.staging import remove, write_error
from lowbit.tensors import PackedSpec, PackedTensor, raw_bytes

STATE, VERSION = "state.json", 1
_STATISTICS = "statistics/"
Result = tuple[Value, ErrorSum]


def work_path(destination: Path) -> Path:
    """Return the work directory of a destination."""
    return destination.with_name(destination.name + ".lowbit-work")


class WorkDirectory:
    """A work directory that is in use.

    Args:
        path: Of the directory; it is created, or with ``resume`` taken up.
        identity: What the job is, by what a person would call it; all of it must agree to resume.
        resume: Whether to go on with what is there.

    Attributes:
        done: Blocks that are committed.
        added: Blocks that are written; those beyond ``done`` are lost in a kill.

    Raises:
        OutputError: When it exists and ``resume`` is false, is of another job, or cannot be written.
        CheckpointError: When its state is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], resume: bool) -> None:
        self.path = path
        self.done, self._activations = 0, ((0, 0, 0), "float32", False)
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        if (path / STATE).exists():
            if not resume:
                raise OutputError(
                    f"{path} holds an unfinished conversion; give --resume to go on with it, or delete the folder"
                )
            self._take_up()
        else:
            remove(path)
            with self._writing():
                path.mkdir()
                self._save_state()
        self.added = self.done
        self._sweep()

    def add(self, block: Mapping[str, Result], statistics: Mapping[str, Calibration]) -> None:
        """Write the next finished block; it counts once ``commit`` has the activations behind it."""
        tensors: dict[str, Tensor] = {}
        for name, (value, _) in block.items():
            buffers = value.buffers if isinstance(value, PackedTensor) else {"": value}
            tensors |= {f"{name}/{buffer}": raw_bytes(tensor) for buffer, tensor in buffers.items()}
        for name, measured in statistics.items():
            for kind, tensor in (("importance", measured.importance), ("hessian", measured.hessian)):
                if tensor is not None:
                    tensors[f"{_STATISTICS}{name}.{kind}"] = tensor.contiguous()
        errors = {name: json.dumps(asdict(error)) for name, (_, error) in block.items()}
        with self._writing():
            temporary = self.path / "block.tmp"
            save_file({name: tensor.numpy() for name, tensor in tensors.items()}, temporary, errors)
            _sync(temporary)
            temporary.replace(self.path / f"block-{self.added:05d}.safetensors")
        self.added += 1
        self._sweep()

    def commit(self, chains: Chains | None) -> None:
        """Make the added blocks count: keep the activations behind the last of them, and say so in the state.

        None when no block comes after them: nobody will ask for the activations.
        """
        with self._writing():
            if chains is not None:
                self._save_chains(chains)
            self.done = self.added
            self._save_state()
        self._sweep()

    def _save_chains(self, chains: Chains) -> None:
        for kind, chain in (("float", chains.floating), ("quantized", chains.quantized)):
            if chain is not None:
                chain.save(self.path / f"{kind}-{self.added}.bin")
        dtype = str(chains.floating.states.dtype).removeprefix("torch.")
        self._activations = chains.floating.shape, dtype, chains.quantized is not None

    def chains(self, device: torch.device, mapped: bool) -> Chains:
        """Return the activations behind the last finished block: in memory, or mapped from their files."""
        shape, dtype, carries = self._activations
        found = [
            Chain.map(self.path / f"{kind}-{self.done}.bin", shape, torch_dtype(dtype))
            for kind in ("float", "quantized")[: 1 + carries]
        ]
        chains = found if mapped else [chain.copy(device=device) for chain in found]
        return Chains(chains[0], chains[1] if carries else None, device)

    def results(self, steps: Mapping[str, Step]) -> Results:
        """Return what finished blocks hold, by tensor name."""
        return Results(self._files(), steps)

    def discard(self) -> None:
        """Remove the directory: the job is done, or has not come as far as one block."""
        remove(self.path)

    def _files(self) -> list[Path]:
        return [self.path / f"block-{number:05d}.safetensors" for number in range(self.done)]

    def _save_state(self) -> None:
        shape, dtype, carries = self._activations
        document = {"version": VERSION, "done": self.done, "shape": shape, "dtype": dtype, "carries": carries}
        temporary = self.path / "state.tmp"
        temporary.write_text(json.dumps({**document, "identity": self._identity}), encoding="utf-8")
        _sync(temporary)
        temporary.replace(self.path / STATE)
        _sync(self.path)

    def _take_up(self) -> None:
        try:
            state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            version, identity = state["version"], dict(state["identity"])
            self.done = int(state["done"])
            samples, seqlen, hidden = map(int, state["shape"])
            self._activations = (samples, seqlen, hidden), str(state["dtype"]), bool(state["carries"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / STATE} is damaged ({error}); delete {self.path} and start again"
            ) from error
        if version != VERSION:
            raise OutputError(f"{self.path} is of another version of lowbit; delete it and start again")
        if differences := list(_differences(identity, self._identity)):
            raise OutputError(
                f"{self.path} is of another job: {'; '.join(differences[:3])}; repeat the command that began it, or delete "
                "the folder"
            )

    def _sweep(self) -> None:
        """Remove what is not needed: what a kill left half written, and activations that were neither committed nor are last."""
        kept = {STATE, *(f"block-{number:05d}.safetensors" for number in range(self.added))}
        kept |= {f"{kind}-{number}.bin" for kind in ("float", "quantized") for number in {self.done, self.added} - {0}}
        for file in self.path.iterdir():
            if file.name not in kept:
                file.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(self.path, error) from error
        except SafetensorError as error:
            raise OutputError(f"{self.path} cannot be written: {error}") from error


class Results(Mapping[str, Result]):
    """Tensors of finished blocks, read when they are looked up, and the measurements beside them."""

    def __init__(self, files: list[Path], steps: Mapping[str, Step]) -> None:
        self._steps = steps
        self._files: list[Any] = [safe_open(str(file), "pt") for file in files]
        self._errors = {name: (file, text) for file in self._files for name, text in (file.metadata() or {}).items()}
        keys = ((key, file) for file in self._files for key in file.keys())  # noqa: SIM118  # no dict
        self._measured = {key.removeprefix(_STATISTICS): file for key, file in keys if key.startswith(_STATISTICS)}

    def __getitem__(self, name: str) -> Result:
        file, error = self._errors[name]
        target = self._steps[name].target
        if not isinstance(target, PackedSpec):
            return _typed(file.get_tensor(f"{name}/"), target.dtype, target.shape), ErrorSum(**json.loads(error))
        buffers = {
            buffer: _typed(file.get_tensor(f"{name}/{buffer}"), spec.dtype, spec.shape)
            for buffer, spec in target.buffers.items()
        }
        return PackedTensor(target, buffers), ErrorSum(**json.loads(error))

    def __iter__(self) -> Iterator[str]:
        return iter(self._errors)

    def __len__(self) -> int:
        return len(self._errors)

    def measurements(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what was measured, by ``NAME.importance`` and ``NAME.hessian``."""
        return {key: tuple(file.get_slice(_STATISTICS + key).get_shape()) for key, file in self._measured.items()}

    def measurement(self, key: str) -> Tensor:
        """Return one of them."""
        tensor: Tensor = self._measured[key].get_tensor(_STATISTICS + key)
        return tensor


def _typed(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return raw.clone().view(dtype).reshape(shape)  # a clone: aligned, and not mapped


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between two identities, in words; nested ones are named by both keys."""
    for key in {**before, **now}:
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            yield from (f"{key} {text}" for text in _differences(was, is_now))
        elif was != is_now:
            yield f"{key} was {was}, is {is_now}"
