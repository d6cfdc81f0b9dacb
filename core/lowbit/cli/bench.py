"""``lowbit bench``."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowbit.cli.console import human_bytes, json_option, print_json, print_table
from lowbit.cli.models import check_at_least, load_model, model_bytes, place_options

if TYPE_CHECKING:
    from lowbit.runtime.bench import LayerTime


@click.command("bench", short_help="Time loading, prefill, decode and layers.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt-tokens", default=128, show_default=True, help="Tokens of the (random) prompt.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to decode.")
@click.option("--repeat", default=3, show_default=True, help="Runs after the one that warms up; the median counts.")
@click.option("--explain", is_flag=True, help="Say for each kind of layer why faster kernels do not serve it.")
@place_options
@json_option
def bench_command(model: Path, device: str, dtype: str | None, explain: bool, as_json: bool, **flags: Any) -> None:
    """Time MODEL: tokens per second of prefill and decode, memory, and each kind of layer against a dense one."""
    from lowbit.runtime.bench import import_model_code, measure_layers, measure_rates
    from lowbit.runtime.explain import explain as explain_model

    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeat", 1)):
        check_at_least(name.replace("_", "-"), flags[name], least)
    import_model_code(model)
    started = time.perf_counter()
    loaded = load_model(model, device, dtype)
    seconds = time.perf_counter() - started
    rates = measure_rates(loaded, flags["prompt_tokens"], flags["new_tokens"], flags["repeat"])
    document = {
        "model": str(model),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "load_seconds": seconds,
        "prefill_tokens_per_second": rates.prefill,
        "decode_tokens_per_second": rates.decode,
        "model_bytes": model_bytes(loaded),
        "peak_bytes": _peak(loaded),
    }
    layers = measure_layers(loaded)
    if as_json:
        print_json({**document, **flags, "layers": [_layer_json(layer) for layer in layers]})
    else:
        _show(document, layers)
        if explain:
            click.echo(str(explain_model(loaded)))


def _peak(model: Any) -> int:
    """Return the most bytes that were resident: on the device of the model, or of the process."""
    import torch

    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _show(document: dict[str, Any], layers: list[LayerTime]) -> None:
    rates = document["prefill_tokens_per_second"], document["decode_tokens_per_second"]
    click.echo(f"{document['model']} on {document['device']} in {document['dtype']}")
    click.echo(f"  loaded in {document['load_seconds']:.2f} s, {human_bytes(document['model_bytes'])}")
    click.echo(f"  prefill {rates[0]:.1f} tokens/s, decode {rates[1]:.1f} tokens/s")
    click.echo(f"  peak memory {human_bytes(document['peak_bytes'])}")
    if layers:
        rows = [
            (
                layer.kernel,
                layer.layout,
                "x".join(map(str, layer.shape)),
                str(layer.count),
                f"{layer.packed:.0f}",
                f"{layer.dense:.0f}",
                f"{layer.dense / layer.packed:.2f}",
            )
            for layer in layers
        ]
        columns = ("kernel", "layout", "shape", ">layers", ">us packed", ">us dense", ">dense / packed")
        replayed = ", replayed from CUDA graphs" if all(layer.replayed for layer in layers) else ""
        print_table(f"One row of activations{replayed}", columns, rows)


def _layer_json(layer: LayerTime) -> dict[str, Any]:
    return {
        "kernel": layer.kernel,
        "layout": layer.layout,
        "shape": list(layer.shape),
        "layers": layer.count,
        "packed_us": layer.packed,
        "dense_us": layer.dense,
        "replayed": layer.replayed,
    }
