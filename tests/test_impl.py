"""The choice of a backend: what "auto" takes, what a named backend says when it cannot run."""

import itertools
import json
import warnings

import pytest
import torch

from latro_kernels import _gpu, _native, _triton, impl
from latro_kernels.impl import BACKENDS, DEVICES, OPERATORS, Status

CPU = torch.device("cpu")


@pytest.fixture
def native_missing(monkeypatch):
    """As on a machine without a compiler."""
    monkeypatch.setitem(impl._STATUS, ("native", "cpu"), Status(False, "no compiler", "install one"))
    monkeypatch.setattr(impl, "_warned", set())


@pytest.mark.parametrize(("operator", "device"), itertools.product(OPERATORS, DEVICES))
@pytest.mark.filterwarnings("ignore:.* runs on reference")
def test_auto_takes_the_first_that_is_ready(operator, device):
    in_interpreter = {"triton"} if device == "cpu" else set()
    candidates = [backend for backend in BACKENDS if backend not in in_interpreter]
    ready = [backend for backend in candidates if impl.status(operator, backend, device).ready]
    assert impl.choose(operator, "auto", torch.device(device)) == ready[0]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_runs_everywhere(operator, device):
    assert impl.status(operator, "reference", device) == Status(True)
    assert impl.choose(operator, "reference", torch.device(device)) == "reference"


@pytest.mark.parametrize("name", ["cuda", "Native", "", None, 1])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match="self_reward: impl must be one of 'auto', 'native', 'triton', 'reference', got"
    ):
        impl.choose("self_reward", name, CPU)


def test_a_kernel_that_is_not_written_is_refused():
    message = (
        "tree_attention: impl='native' cannot run on cuda: tree_attention has no native kernel for cuda; use impl="
    )
    with pytest.raises(RuntimeError, match=message):
        impl.choose("tree_attention", "native", torch.device("cuda"))


def test_a_kernel_that_is_not_ready_is_refused_with_reason_and_mend(native_missing):
    message = "self_reward: impl='native' cannot run on cpu: no compiler; install one"
    with pytest.raises(RuntimeError, match=message):
        impl.choose("self_reward", "native", CPU)


def test_auto_says_once_that_a_kernel_is_missing(native_missing):
    message = "self_reward on cpu runs on reference: no compiler; install one"
    with pytest.warns(UserWarning, match=message) as caught:
        assert [impl.choose("self_reward", "auto", CPU) for _ in range(3)] == ["reference"] * 3
    assert len(caught) == 1


def test_auto_is_silent_where_nothing_is_missing(native_missing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.choose("linear_logprobs", "auto", CPU, torch.float64) == "reference"  # has no kernel to miss
        assert impl.choose("self_reward", "auto", torch.device("meta")) == "reference"
        assert impl.choose("self_reward", "reference", CPU) == "reference"


def test_auto_takes_what_stands_in_for_a_missing_kernel(monkeypatch):
    monkeypatch.setitem(impl._STATUS, ("native", "cuda"), Status(False, "built without CUDA", "build it with"))
    monkeypatch.setitem(impl._STATUS, ("triton", "cuda"), impl.READY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert impl.choose("linear_logprobs", "auto", torch.device("cuda"), torch.float16) == "triton"
    monkeypatch.setitem(impl._STATUS, ("native", "cuda"), impl.READY)
    monkeypatch.setattr(_native, "cuda_arches", ("sm_90a",))
    assert impl.choose("linear_logprobs", "auto", torch.device("cuda"), torch.float16) == "native"


def test_choosing_is_traced_without_a_break_and_without_a_warning(native_missing):
    def double(x):
        impl.refusal("tree_attention", "triton", x.device, x.dtype, 64)  # asks for the GPU's capability
        return x * 2 if impl.choose("self_reward", "auto", x.device) == "reference" else x

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(double, fullgraph=True, backend="eager")
        assert compiled(torch.ones(())) == 2


@pytest.mark.parametrize(("operator", "backend"), impl.KERNELS)
def test_ready_native_kernels_are_registered(operator, backend):
    ready = [device for device in impl.KERNELS[operator, backend] if impl.status(operator, backend, device).ready]
    if not ready:
        pytest.skip(f"{backend}: {impl.status(operator, backend, 'cpu').reason}")
    parts = ["linear_logprobs", "self_reward"] if operator == "fused_self_reward_loss" else [operator]
    for device, part in itertools.product(ready, parts):
        if backend == "native":
            name = {("linear_logprobs", "cuda"): "head_epilogue"}.get((part, device), part)
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"latro_kernels::{name}", device.upper())


def test_the_extension_explains_itself():
    assert _native.available == (_native.reason is None) == (_native.mend is None)
    assert (_native.fault("cpu") is None) == _native.available


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0", "3.0.0+cpu", "1.13.0.dev20220101"])
def test_a_torch_out_of_range_is_not_loaded_into(version):
    reason, mend = _native._load({}, version)
    assert reason == f"the extension serves torch>=2.11,<2.14, this is torch {version}"
    assert mend == "install torch>=2.11,<2.14"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'latro_kernels._C'"), "the extension latro_kernels._C is not built"),
        (ImportError("undefined symbol: f"), "the extension latro_kernels._C does not load: undefined symbol: f"),
    ],
)
def test_an_extension_that_does_not_load_says_why(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(_native.importlib, "import_module", fail)
    assert _native._load({}, "2.11.0") == (reason, "run `pip install -e .` again")


def test_an_install_without_a_compiler_is_remembered():
    build = {"missing": {"cpu": ["no compiler", "install one"], "cuda": ["no compiler", "install one"]}}
    assert _native._load(build, "2.11.0") == ("no compiler", "install one")


def test_triton_on_a_cpu_is_for_tests_alone(monkeypatch):
    triton = pytest.importorskip("triton")
    assert impl.choose("tree_attention", "auto", CPU, torch.float16) == "reference", "even where the interpreter is on"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    reason, mend = _triton.fault("cpu")
    assert reason == "Triton runs on a CPU in its interpreter alone"
    assert mend == "to test kernels, slowly, set TRITON_INTERPRET=1"
    assert _triton.fault("cuda") is None


def test_triton_that_is_missing_or_old_is_told(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert _triton.fault("cuda") == ("the kernels need triton>=3.6, this is triton 3.5.1", "install triton>=3.6")
    monkeypatch.setattr(_triton, "available", False)
    assert _triton.fault("cuda") == ("triton is not installed", "install triton>=3.6, which is there for Linux")


ROWS = [(kernel, row) for kernel, rows in json.loads(_gpu.TABLE.read_text()).items() for row in rows]


@pytest.mark.parametrize(("kernel", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_each_row_of_the_table_is_found_and_has_a_reason(kernel, row):
    found = _gpu._tile_sizes(kernel, row["size"], row["bytes"], row["arch"])
    assert found == {name: value for name, value in row.items() if name not in ("arch", "bytes", "size", "why")}
    assert len(row["why"]) > 20


def test_a_gpu_takes_the_newest_rows_that_are_not_newer_than_itself():
    def arch_of(capability):
        found = _gpu._tile_sizes("tree_attention.grad_keys", 200, 2, capability)
        rows = [row for kernel, row in ROWS if kernel == "tree_attention.grad_keys" and row["size"] == 256]
        return [row["arch"] for row in rows if row["bytes"] == 2 and row.items() >= found.items()]

    assert [80 in arch_of(80), 86 in arch_of(89), 90 in arch_of(100)] == [True, True, True]


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float32, 128), (torch.bfloat16, 256), (torch.float16, 256)])
def test_auto_leaves_large_heads_to_the_reference(dtype, fits):
    device = torch.device("cuda")
    assert impl.refusal("tree_attention", "triton", device, dtype, fits) is None
    assert impl.choose("tree_attention", "auto", device, dtype, fits + 1) == "reference"
    with pytest.raises(
        RuntimeError, match=f"tree_attention: impl='triton' takes heads of at most {fits} in {dtype}, got"
    ):
        impl.choose("tree_attention", "triton", CPU, dtype, fits + 1)


@pytest.mark.parametrize("operator", ["tree_attention", "linear_logprobs", "fused_self_reward_loss"])
def test_auto_leaves_old_gpus_to_the_reference(operator, monkeypatch):
    monkeypatch.setattr(_gpu, "capability", lambda device: 75)
    assert impl.choose(operator, "auto", torch.device("cuda"), torch.float16, 64) == "reference"
    message = f"{operator}: impl='triton' needs a GPU of capability 8.0 or later, got 7.5; use impl='reference'"
    with pytest.raises(RuntimeError, match=message):
        impl.choose(operator, "triton", CPU, torch.float16, 64)


@pytest.mark.parametrize(
    ("arches", "capability", "serves"),
    [
        (("compute_80", "sm_80", "sm_90a"), 80, True),
        (("compute_80", "sm_80", "sm_90a"), 90, True),
        (("compute_80", "sm_80", "sm_90a"), 120, True),  # by PTX
        (("sm_80",), 86, True),
        (("sm_80",), 90, False),
        (("sm_86",), 80, False),
        (("sm_90a",), 90, True),
        (("sm_90a",), 100, False),
        (("compute_90", "sm_90a"), 80, False),
        (("",), 80, False),
    ],
)
def test_auto_leaves_gpus_that_were_not_built_for(arches, capability, serves, monkeypatch):
    monkeypatch.setattr(_native, "cuda_arches", arches)
    monkeypatch.setattr(_gpu, "capability", lambda device: capability)
    for backend in ("native", "triton"):
        monkeypatch.setitem(impl._STATUS, (backend, "cuda"), impl.READY)
    device = torch.device("cuda")
    assert _native.serves(capability) == serves
    assert impl.choose("linear_logprobs", "auto", device, torch.bfloat16) == ("native" if serves else "triton")
    if not serves:
        message = (
            f"linear_logprobs: impl='native' was built for .*, which does not serve capability {capability / 10}; "
        )
        with pytest.raises(RuntimeError, match=message):
            impl.choose("linear_logprobs", "native", device, torch.bfloat16)
