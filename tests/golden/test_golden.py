"""Golden files: every layout that is registered has one, and what is in it still means the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit import installed
from lowbit.tensors import bit_equal

sys.path.insert(0, str(Path(__file__).parent))
import make  # the script beside this file

REGISTRY = installed()
FILES = sorted(make.FOLDER.glob("*.safetensors"))


@pytest.mark.parametrize("layout", list(REGISTRY.packers))
def test_every_layout_has_a_golden_file(layout):
    assert (make.FOLDER / f"{layout}.safetensors").exists(), "run: python tests/golden/make.py, and commit its file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_golden_file_means_the_same_bits(path):
    if path.stem not in REGISTRY.packers:
        pytest.skip(f"the plugin of layout {path.stem} is not installed")
    packer, found = REGISTRY.packers[path.stem], make.read(path, REGISTRY)
    assert found
    for packed, record, head in found:
        assert packer.why_not(packed.scheme, packed.shape) is None
        weight = make.dequantized(REGISTRY, packed)
        assert torch.equal(weight.flatten()[: len(head)], head)
        assert make.digest(weight) == record["sha256"]
        again = packer.pack(packer.unpack(packed))
        assert all(bit_equal(again.buffers[name], buffer) for name, buffer in packed.buffers.items())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files_are_small(path):
    assert path.stat().st_size < 64_000


def test_the_script_writes_nothing_twice():
    before = {path: path.stat().st_mtime_ns for path in FILES}
    subprocess.run([sys.executable, make.__file__, *(path.stem for path in FILES)], check=True)
    assert {path: path.stat().st_mtime_ns for path in FILES} == before
