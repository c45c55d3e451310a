import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.first_nonfinite import first_nonfinite as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.merge_inputs import DTYPES, misaligned, transposed

OP = "first_nonfinite"
NOT_FINITE = [math.nan, -math.nan, math.inf, -math.inf]
SHAPES = [(0,), (), (1,), (33, 65), (2, 0, 4), (8195,)]


def make(shape, dtype, device="cpu", seed=0):
    """Of all magnitudes there are, zeros, subnormal and largest numbers among them."""
    g = torch.Generator().manual_seed(seed)
    limits = torch.finfo(dtype)
    choice = torch.tensor(
        [0.0, -0.0, 1.0, -3.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 2],
        dtype=torch.float64,
    ).to(dtype)
    return choice[torch.randint(len(choice), shape, generator=g)].to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(backend, dtype, shape):
    tensor = make(shape, dtype, backend.device)
    out = backend.op(OP)(tensor)
    assert out.dtype == torch.int64 and out.shape == () and out.device == tensor.device
    assert out.item() == reference(tensor) == -1
    n = tensor.numel()
    for value in NOT_FINITE:
        for first in sorted({0, 1, 31, 32, 1023, 1024, n // 2, n - 1} & set(range(n))):
            spoiled = tensor.clone()
            spoiled.view(-1)[first] = value
            spoiled.view(-1)[n - 1] = math.nan
            assert backend.op(OP)(spoiled).item() == first
        if backend.emulated and n > 4000:
            break  # emulation takes its time


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    tensor = make((33, 65), dtype, backend.device)
    assert backend.op(OP)(layout(tensor)).item() == -1
    tensor[7, 11], tensor[9, 3] = math.inf, math.nan
    assert backend.op(OP)(layout(tensor)).item() == 7 * 65 + 11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_sixteen_bits(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for bits in range(0, 2**16, 61):
        alone = every[bits : bits + 1]
        assert CPU.op(OP)(alone.repeat(1100)).item() == (-1 if alone.isfinite() else 0)
    finite = every[every.isfinite()]
    assert CPU.op(OP)(finite).item() == -1
    for value in every[~every.isfinite()][::37]:
        assert CPU.op(OP)(torch.cat([finite, value[None]])).item() == len(finite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    tensor = make((3, 4), torch.float32, backend.device)
    torch.library.opcheck(backend.op(OP), (tensor,))
    assert not backend.op(OP)(tensor.requires_grad_()).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_rejects_bad_input(backend):
    message = f"mergeme::{OP}: expected tensor to be float16, .* got int32"
    with pytest.raises(TypeError, match=message):
        backend.op(OP)(torch.ones(3, dtype=torch.int32, device=backend.device))


@settings(max_examples=40)
@given(
    n=st.integers(1, 3000),
    places=st.lists(st.integers(0, 2999), max_size=3),
    value=st.sampled_from(NOT_FINITE),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_backends_agree(n, places, value, dtype, seed):
    tensor = make((n,), dtype, seed=seed)
    places = [p for p in places if p < n]
    tensor[places] = value
    expected = min(places, default=-1)
    assert CPU.op(OP)(tensor).item() == SIMT.op(OP)(tensor).item() == expected


def test_threads_find_the_first():
    tensor = torch.ones(2**20 + 5, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for first in (3, 2**17 - 1, 2**19 + 1, 2**20 + 4):
        spoiled = tensor.clone()
        spoiled[[first, 2**20 + 4]] = math.nan
        assert mergeme_ext.first_nonfinite(spoiled).item() == first
    torch.set_num_threads(before)
    assert mergeme_ext.first_nonfinite(tensor).item() == -1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_nothing(schedule):
    tensor = make((4099,), torch.float32)
    tensor[[2049, 4000]] = math.inf
    with schedule:
        assert SIMT.op(OP)(tensor).item() == 2049


@pytest.mark.slow
def test_compiles():
    tensor = make((33, 65), torch.float32)
    compiled = torch.compile(mergeme_ext.first_nonfinite, fullgraph=True)
    assert compiled(tensor).item() == -1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_gpu(dtype):
    tensor = make((1500, 1001), dtype, "cuda")
    tensor[1200, 7] = math.inf
    with torch.cuda.stream(torch.cuda.Stream()):
        out = mergeme_ext.first_nonfinite(tensor)
        torch.cuda.current_stream().synchronize()
    assert out.item() == 1200 * 1001 + 7
