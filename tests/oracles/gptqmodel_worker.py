"""What gptqmodel makes of GPTQ and AWQ modules: run in a process of its own, which has gptqmodel on its path.

    python gptqmodel_worker.py FOLDER...     into each folder it writes

        read.safetensors     the weight, float16 (out, in), of the module in model.safetensors, by gptqmodel's torch kernels
        packed.safetensors   if there is codes.safetensors (weight, scales, zeros, g_idx): what gptqmodel packs of it

One process for all folders, because importing gptqmodel takes some ten seconds.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file, save_file


def linear(config, in_features, out_features):
    """Return gptqmodel's module for a layer."""
    settings = {name: config[name] for name in ("bits", "group_size", "sym", "desc_act")}
    return TorchLinear(**settings, in_features=in_features, out_features=out_features, bias=False)


def read(folder, config):
    """Return the weight of the one quantized module in the folder."""
    stored = load_file(folder / "model.safetensors")
    parts = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
    if config["quant_method"] == "awq":
        size = config["group_size"] if config["group_size"] > 0 else len(parts["qweight"])
        return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], config["bits"], size).T
    module = linear(config, len(parts["g_idx"]), parts["scales"].shape[1])
    surplus = module.load_state_dict(parts, strict=False).unexpected_keys
    assert not surplus, surplus
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, config["bits"], torch.int32)
    return module.dequantize_weight().T


def pack(folder, config):
    """Return the buffers into which gptqmodel packs a weight with given scales and zeros, as its version 2 stores them."""
    given = load_file(folder / "codes.safetensors")
    dense = torch.nn.Linear(*reversed(given["weight"].shape), bias=False)
    dense.weight = torch.nn.Parameter(given["weight"], requires_grad=False)
    module = linear(config, dense.in_features, dense.out_features)
    module.pack(dense, given["scales"], given["zeros"], given["g_idx"])
    return {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}


def main():
    """Read and pack in every folder that is named."""
    for name in sys.argv[1:]:
        folder = Path(name)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        save_file({"weight": read(folder, config).contiguous()}, folder / "read.safetensors")
        if (folder / "codes.safetensors").exists():
            save_file(pack(folder, config), folder / "packed.safetensors")


if __name__ == "__main__":
    main()
