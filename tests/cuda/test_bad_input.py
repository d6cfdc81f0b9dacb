"""What can go wrong before a kernel runs is told in one sentence, on any machine."""

import sys

import pytest
import torch

from lowbit_cuda import available
from lowbit_cuda.available import capability_reason, driver_reason, why_not_cuda
from lowbit_cuda.errors import CudaError, CudaUnavailableError, KernelBuildError
from lowbit_cuda.loaded import check_buffer, explain, load
from lowbit_cuda.program import KernelProgram, compile_text
from lowbit_cuda.records import BuiltKernel, clear_records, read_records, write_record


@pytest.fixture(autouse=True)
def fresh():
    for function in (available._why_not_packages, available._why_not_device):
        function.cache_clear()
    yield
    for function in (available._why_not_packages, available._why_not_device):
        function.cache_clear()


def sentence(reason):
    assert isinstance(reason, str)
    assert reason.strip()
    assert "\n" not in reason
    return reason


def test_switched_off(monkeypatch):
    monkeypatch.setenv("LOWBIT_CUDA", "0")
    assert sentence(why_not_cuda()) == "LOWBIT_CUDA=0 switches the CUDA kernels off; unset it to use them"


def test_no_gpu(monkeypatch):
    monkeypatch.delenv("LOWBIT_CUDA", raising=False)
    monkeypatch.setattr(available, "_why_not_packages", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is available to torch" in sentence(why_not_cuda())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "there is no CUDA device 3; torch sees 1" in sentence(why_not_cuda(3))


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings"])
def test_no_cuda_core_and_no_nvrtc(module, monkeypatch):
    monkeypatch.delenv("LOWBIT_CUDA", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "lowbit[gpu]"' in sentence(why_not_cuda())


def test_a_missing_nvrtc_library_is_a_sentence(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.delenv("LOWBIT_CUDA", raising=False)

    def missing():
        raise RuntimeError('Failure finding "libnvrtc.so":\n  no such file')

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    assert "NVRTC is missing (Failure finding" in sentence(why_not_cuda())


def test_old_drivers_and_old_gpus():
    assert driver_reason(13000, (13, 3)) is None
    assert driver_reason(14010, (13, 3)) is None
    reason = sentence(driver_reason(12080, (13, 3)))
    assert "the NVIDIA driver supports CUDA 12.8, and the installed NVRTC is 13.3; update the driver" in reason
    assert '"nvidia-cuda-nvrtc<13"' in reason
    assert capability_reason((7, 5)) is None
    assert capability_reason((10, 3)) is None
    assert "compute capability 7.0, and the CUDA kernels need 7.5" in sentence(capability_reason((7, 0)))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("CUDA_ERROR_OUT_OF_MEMORY: The API call failed", "the GPU is out of memory; free some"),
        ("CUDA_ERROR_NO_BINARY_FOR_GPU: ...", "lowbit kernels clear"),
        ("CUDA_ERROR_INVALID_IMAGE: ...", "does not accept the compiled kernel"),
        ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: ...", "update the driver"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS: ...", "start it again"),
        ("CUDA_ERROR_SOMETHING:\n new", "kernel: CUDA_ERROR_SOMETHING: new"),
    ],
)
def test_faults_of_the_driver_are_explained(fault, words):
    assert words in sentence(str(explain(RuntimeError(fault), "kernel")))


def test_buffers_on_the_cpu_are_refused():
    with pytest.raises(
        CudaError, match=r"codes is on cpu, and the CUDA kernels read GPU memory; move it with .cuda\(\)"
    ):
        check_buffer("codes", torch.zeros(4))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_buffers_that_a_kernel_cannot_address():
    whole = torch.zeros(64, 64, device="cuda")
    check_buffer("x", whole)
    with pytest.raises(CudaError, match=r"x has strides \(1, 64\), and the kernel needs it contiguous"):
        check_buffer("x", whole.T)
    with pytest.raises(CudaError, match=r"no multiple of 16; pass a .clone"):
        check_buffer("x", whole.view(-1)[1:])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensors_elsewhere_are_refused_at_the_launch(tmp_path):
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void one(float* x) { *x = 1; }')
    kernel, x = load(KernelProgram(source, "one"), 0), torch.zeros(1, device="cuda:0")
    kernel(1, 1, x)
    assert float(x) == 1
    with pytest.raises(CudaError, match="runs on cuda:0, got a tensor on cpu; move it there"):
        kernel(1, 1, torch.zeros(1))
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_VALUE"):
        kernel(1, 4096, x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_loading_without_a_gpu_says_so(tmp_path):
    with pytest.raises(CudaUnavailableError, match=r"no CUDA device|LOWBIT_CUDA|cuda-core"):
        load(KernelProgram(tmp_path / "none.cu", "none"), 0)


def test_unknown_architectures_are_refused_by_the_compiler(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("LOWBIT_CACHE_DIR", str(tmp_path))
    with pytest.raises(KernelBuildError, match="does not compile for sm_20"):
        compile_text("", KernelProgram(tmp_path / "empty.cu", "empty"), "sm_20")


def test_records_survive_damage(tmp_path):
    built = BuiltKernel("a kernel", "sm_90a", 1234, 0.5)
    write_record(tmp_path, built, b"\1\2")
    (tmp_path / "records" / "damaged.json").write_text("{")
    (tmp_path / "records" / "other.json").write_text('{"key": "00", "arch": 3}')
    assert list(read_records(tmp_path)) == [(built, b"\1\2")]
    clear_records(tmp_path)
    assert list(read_records(tmp_path)) == []
    assert list((tmp_path / "records").iterdir()) == []
