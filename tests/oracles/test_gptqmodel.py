"""GPTQ and AWQ files that lowbit writes, read by gptqmodel 7.7 on a CPU; and what gptqmodel packs, read by lowbit.

``make test-oracles`` installs gptqmodel beside the environment, not into it: its torchao would change what transformers does in the
other tests. Its kernels compute in float16, so weights are compared after one rounding of the exact product to float16.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit import Grid, Metadata, Scheme, Zero, dequantize, installed
from lowbit.testing import samples
from lowbit_formats.gptq import GptqImporter
from lowbit_formats.gptq_layout import GptqPacker, GptqV2Packer

BESIDE = Path(sys.prefix) / "gptqmodel"
WORKER = Path(__file__).with_name("gptqmodel_worker.py")
UP = "model.layers.0.mlp.up_proj"
SHAPE = (64, 128)

GPTQ = {
    f"gptq-{bits}-{zero.value}-{group_size}{'-act-order' if permutation else ''}": Scheme(
        Grid.AFFINE, bits, group_size, zero, permutation=permutation
    )
    for bits in (2, 3, 4, 8)
    for zero in (Zero.SYMMETRIC, Zero.INTEGER)
    for group_size, permutation in ((32, False), (None, False), (64, True))
}
AWQ = {f"awq-{zero.value}": Scheme(Grid.AFFINE, 4, 32, zero) for zero in (Zero.SYMMETRIC, Zero.INTEGER)}


def weight(name):
    """Return the weight of a case; its scales are positive, as those of every GPTQ quantizer are."""
    quantized = samples.quantized({**GPTQ, **AWQ}[name], SHAPE, len(name))
    quantized.parts["scales"].abs_()
    return quantized


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case as lowbit writes it, with what gptqmodel reads there and what it packs itself."""
    if not BESIDE.is_dir() and importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed; make test-oracles puts it beside the environment")
    root = tmp_path_factory.mktemp("gptqmodel")
    for name in (*GPTQ, *AWQ):
        write(root / name, weight(name), name)
    path = os.pathsep.join(filter(None, (str(BESIDE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(WORKER), *(str(root / name) for name in (*GPTQ, *AWQ))]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def write(folder, quantized, name):
    """Write a case by lowbit's exporter, and beside it the numbers of which gptqmodel shall make the same."""
    layout = "awq-gemm" if name in AWQ else "gptq" if quantized.scheme.symmetric else "gptq_v2"
    packed = installed().packers[layout].pack(quantized)
    stream = iter([(f"{UP}.weight", packed)])
    installed().exporters[layout.partition("-")[0].removesuffix("_v2")].write(
        folder, {f"{UP}.weight": packed.spec}, stream, Metadata()
    )
    if name in GPTQ:
        zeros = quantized.parts.get("zeros", torch.full_like(quantized.parts["scales"], quantized.scheme.midpoint))
        codes = {"scales": quantized.parts["scales"].float(), "zeros": zeros.float()}
        codes |= {"weight": dequantize(quantized), "g_idx": packed.buffers["g_idx"]}
        save_file({key: value.contiguous() for key, value in codes.items()}, folder / "codes.safetensors")


@pytest.mark.parametrize("name", [*GPTQ, *AWQ])
def test_gptqmodel_reads_what_lowbit_writes(folders, name):
    found = load_file(folders / name / "read.safetensors")["weight"]
    assert torch.equal(found.float(), dequantize(weight(name)).half().float())


@pytest.mark.parametrize("name", GPTQ)
def test_lowbit_reads_what_gptqmodel_packs(folders, name, tmp_path):
    buffers, quantized = load_file(folders / name / "packed.safetensors"), weight(name)
    config = json.loads((folders / name / "config.json").read_text())["quantization_config"]
    config |= {
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
    }  # what gptqmodel packs, before it takes 1 from zeros
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({f"{UP}.{key}": value for key, value in buffers.items()}, tmp_path / "model.safetensors")
    with GptqImporter().open(tmp_path) as checkpoint:
        packed = checkpoint.read(f"{UP}.weight")
    packer = GptqPacker() if packed.layout == "gptq" else GptqV2Packer()
    assert torch.equal(dequantize(packer.unpack(packed)), dequantize(quantized))
