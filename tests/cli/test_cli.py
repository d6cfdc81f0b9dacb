"""The command line as a person or a script meets it: exit codes, sentences, JSON, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

UP = "model.layers.0.mlp.up_proj.weight"


def run(*arguments, **environment):
    command = [sys.executable, "-m", "lowbit", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {
        UP: torch.randn(128, 256, generator=generator).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(256, 128, generator=generator).bfloat16(),
        "model.embed_tokens.weight": torch.randn(32, 256, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(256).bfloat16(),
    }
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def fails(result, *words):
    """Exit code 2 and one sentence with these words, no traceback."""
    assert result.returncode == 2, result.stderr
    (sentence,) = result.stderr.strip().splitlines()
    assert sentence.startswith("Error: ")
    for word in words:
        assert word in sentence
    assert "Traceback" not in result.stderr


def test_help_is_instant_and_imports_no_torch():
    code = "import sys, lowbit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    fastest = min(_timed("--help") for _ in range(5))
    assert fastest < 1.0  # 0.11 s where it was written; the bound leaves room for a busy machine


def _timed(*arguments):
    started = time.perf_counter()
    assert run(*arguments).returncode == 0
    return time.perf_counter() - started


def test_convert_inspect_diff(model, tmp_path):
    out = tmp_path / "out"
    result = run("convert", model, out, "--quantizer", "kbit", "--bits", "4", "--group_size", "64")
    assert result.returncode == 0, result.stderr
    assert "every byte is as meant" in result.stdout
    names = ["README.md", "config.json", "lowbit.json", "lowbit.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    inspected = json.loads(run("inspect", out, "--json").stdout)
    (tensor,) = [tensor for tensor in inspected["tensors"] if tensor["name"] == UP]
    assert (tensor["layout"], tensor["scheme"]["bits"], tensor["scheme"]["group_size"]) == ("plain", 4, 64)
    assert "tokenizer.json" in inspected["side_files"]
    compared = json.loads(run("diff", model, out, "--json").stdout)
    assert not compared["exact"]
    assert 0.05 < compared["relative_rmse"] < 0.15
    assert run("diff", model, out, "--exit-code").returncode == 1
    assert run("diff", model, model, "--exit-code").returncode == 0
    assert "exact" in run("diff", model, model).stdout


def test_json_is_one_document(model, tmp_path):
    result = run("convert", model, tmp_path / "out", "-q", "autoround", "-b", "4", "-g", "128", "--json")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert document["verified"]
    assert {tensor["action"] for tensor in document["tensors"]} == {"quantize", "copy"}


def test_dry_run_does_nothing(model, tmp_path):
    result = run("convert", model, tmp_path / "out", "-q", "kbit", "-b", "3", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert len(document["tensors"]) == 4
    assert document["predicted_peak_memory"] > document["bytes"]
    assert "Nothing was written" in run("convert", model, tmp_path / "out", "-q", "kbit", "--dry-run").stdout
    assert not (tmp_path / "out").exists()


def test_the_same_seed_gives_the_same_bytes(model, tmp_path):
    for name in ("one", "two"):
        settings = ("-q", "kbit", "-b", "3", "--set", "codebook=learned", "--set", "scale=search")
        assert run("convert", model, tmp_path / name, *settings).returncode == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing", "out"), ("missing", "does not exist")),
        (("model", "out", "--quantizer", "kbti"), ("no quantizer named 'kbti'", "installed:", "'kbit'")),
        (("model", "out", "--quantizer", "qtip"), ("no quantizer named 'qtip'", "pip install lowbit-qtip")),
        (("model", "out", "--format", "onnx"), ("no export format named 'onnx'", "native")),
        (("model", "out", "--bits", "4"), ("bits is an option of a quantizer", "--quantizer")),
        (("model", "out", "-q", "kbit", "--bits", "9"), ("bits", "9")),
        (("model", "out", "-q", "kbit", "--set", "codebok=nf"), ("no option 'codebok'", "'codebook'")),
        (("model", "out", "-q", "kbit", "--rule", "nothing.*=kbit"), ("'nothing.*' matches no 2-D weight",)),
        (("model", "out", "-q", "kbit", "--shard-size", "big"), ("--shard-size", "'big'")),
        (
            ("model", "out.gguf", "-q", "kbit", "--format", "gguf"),
            ("_proj.weight: format 'gguf' cannot hold a codebook", "these formats can: ", "native"),
        ),
        (("model", "out.gguf", "-q", "autoround", "--format", "gguf:q9"), ("no variant 'q9'", "q4_0")),
        (
            ("model", "out", "-q", "autoround", "--format", "gptq:v1"),
            ("no variant 'v1'", "others as v2", "--format gptq"),
        ),
        (("model", "nowhere/out", "-q", "kbit"), ("nowhere", "create it first")),
        (("model", "model", "-q", "kbit"), ("exists", "--overwrite")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_sentence_and_leave_nothing(model, tmp_path, arguments, words):
    command = [sys.executable, "-m", "lowbit", "convert", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    fails(result, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nan_is_named_with_its_tensor(model, tmp_path):
    weight = torch.randn(64, 64)
    weight[5, 6] = float("inf")
    save_file({UP: weight}, model / "model.safetensors")
    fails(run("convert", model, tmp_path / "out", "-q", "autoround"), UP, "NaN or inf")
    assert not (tmp_path / "out").exists()


def test_every_reason_of_a_refusal_is_there_for_machines(model, tmp_path):
    result = run("convert", model, tmp_path / "out.gguf", "-q", "kbit", "--format", "gguf", "--json")
    assert result.returncode == 2
    document = json.loads(result.stdout)
    assert "and 12 more of the same kind" in document["error"]
    assert len(document["reasons"]) == 16
    assert all(layout.startswith("gguf-") and reason for layout, reason in document["reasons"].items())


def test_errors_are_json_for_machines(tmp_path):
    result = run("inspect", tmp_path / "missing", "--json")
    assert result.returncode == 2
    assert "does not exist" in json.loads(result.stdout)["error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_destination_as_it_was(tmp_path, number):
    folder = tmp_path / "model"
    folder.mkdir()
    weight = torch.randn(2048, 2048).bfloat16()
    save_file({f"model.layers.{i}.mlp.up_proj.weight": weight.clone() for i in range(6)}, folder / "model.safetensors")
    settings = ["-q", "kbit", "--set", "scale=search"]
    command = [sys.executable, "-m", "lowbit", "convert", str(folder), str(tmp_path / "out"), *settings]
    # A shell's background jobs ignore SIGINT, and so would ours.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes, preexec_fn=heard)  # noqa: PLW1509  # no threads here
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_a_sentence(model, tmp_path):
    """A tmpfs of 64 kB: enough for the free-space check to refuse, and too small for anything else."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        fails(run("convert", model, mount / "out", "-q", "kbit", "-b", "8"), "its disk has", "free")
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_plugins_and_doctor(tmp_path):
    listed = json.loads(run("plugins", "--json").stdout)
    assert {"kbit", "autoround"} <= listed["quantizers"].keys()
    assert {"hf", "native", "gguf"} <= listed["import_formats"].keys()
    matrix = json.loads(run("plugins", "--matrix", "--json").stdout)
    assert matrix["codebook 3-bit g64"]["native"]["layout"] == "plain"
    assert matrix["codebook 3-bit g64"]["gguf"]["reason"]
    assert json.loads(run("doctor", "--json").stdout)["packages"]["torch"]
    assert "quantizer kbit" in run("plugins").stdout


def test_a_disabled_plugin_is_gone():
    result = run("plugins", "--json", LOWBIT_DISABLE_PLUGINS="kbit")
    assert "kbit" not in json.loads(result.stdout)["quantizers"]
