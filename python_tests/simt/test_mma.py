"""ldmatrix and mma against the fragment layouts of the PTX manual, written out here once more."""

import numpy as np
import pytest
import torch

from python_tests.simt.support import run

DTYPES = [torch.bfloat16, torch.float16]


def bits(x):
    return x.view(torch.uint16).numpy()


def pair(low, high):
    return np.uint32(low) | np.uint32(high) << np.uint32(16)


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": a lane's element i.
def a_place(lane, i):
    row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
    column = lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def b_place(lane, i):
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def d_place(lane, i):
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def fragments(matrix, place, count):
    out = np.zeros((32, count // 2), np.uint32)
    for lane in range(32):
        for i in range(0, count, 2):
            out[lane, i // 2] = pair(matrix[place(lane, i)], matrix[place(lane, i + 1)])
    return out


def mma(a, b, d):
    accumulators = np.array([[d[d_place(lane, i)] for i in range(4)] for lane in range(32)])
    name = f"mma_{str(a.dtype).removeprefix('torch.')}"
    frag_a, frag_b = fragments(bits(a), a_place, 8), fragments(bits(b), b_place, 4)
    result = run(name, (frag_a, frag_b, accumulators), ((32, 4), np.float32))
    out = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            out[d_place(lane, i)] = result[lane, i]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_rounds_the_exact_sum_once(dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double()
    np.testing.assert_array_max_ulp(mma(a, b, d.numpy()), expected.float().numpy(), maxulp=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mma_places_every_element(dtype):
    """Products of single ones find each element of A and B, and nothing else, in its place."""
    zero = np.zeros((16, 8), np.float32)
    values = torch.arange(1, 17).to(dtype)
    for k in range(16):
        a, b = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8, dtype=dtype)
        a[:, k], b[k] = values, values[:8]
        expected = np.outer(np.arange(1, 17), np.arange(1, 9)).astype(np.float32)
        np.testing.assert_array_equal(mma(a, b, zero), expected)


def test_mma_carries_nan_and_infinity():
    a, b = torch.ones(16, 16).half(), torch.ones(16, 8).half()
    a[3, 5], b[2, 6] = torch.inf, torch.nan
    out = mma(a, b, np.zeros((16, 8), np.float32))
    assert np.isnan(out[:, 6]).all() and np.isinf(np.delete(out[3], 6)).all()
    assert np.isfinite(np.delete(np.delete(out, 3, 0), 6, 1)).all()


def ldmatrix(matrix, offsets, count, transpose):
    name = f"ldmatrix_x{count}" + ("_trans" if transpose else "")
    return run(
        name,
        (offsets.astype(np.int32), matrix),
        ((32, count), np.uint32),
        n=matrix.nbytes,
        shared=matrix.nbytes,
    )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix_follows_the_manual(count, transpose):
    stride = 24  # elements between rows; 48 bytes, so rows stay at multiples of 16
    tile = np.arange(40 * stride, dtype=np.uint16).reshape(40, stride)
    rng = np.random.default_rng(0)
    row, column = rng.permutation(40)[:32], 8 * rng.integers(0, 3, 32)
    out = ldmatrix(tile, 2 * (row * stride + column), count, transpose)
    for m in range(count):
        lanes = range(8 * m, 8 * m + 8)  # these give the addresses of matrix m's rows
        matrix = np.stack([tile[row[t], column[t] : column[t] + 8] for t in lanes])
        if transpose:
            matrix = matrix.T
        for lane in range(32):
            i, j = lane // 4, 2 * (lane % 4)
            assert out[lane, m] == pair(matrix[i, j], matrix[i, j + 1])


def test_ldmatrix_x2_ignores_the_upper_lanes_addresses():
    tile = np.arange(128, dtype=np.uint16)
    offsets = np.where(np.arange(32) < 16, 16 * (np.arange(32) % 16), -(10**6) + 1)
    assert ldmatrix(tile, offsets, 2, False)[5, 0] == pair(tile[8 + 2], tile[8 + 3])


@pytest.mark.parametrize("offset", [8, 256, -16])
def test_ldmatrix_rejects_a_bad_row(offset):
    offsets = 16 * (np.arange(32) % 16)
    offsets[9] = offset
    with pytest.raises(RuntimeError, match=r"ldmatrix_x4: ldmatrix: expected lane 9 to give 16 b"):
        ldmatrix(np.zeros(128, np.uint16), offsets, 4, False)


def test_fragments_from_ldmatrix_feed_mma():
    """The pairing that matmul kernels use: A by x4, row-major B by x2_trans, B^T by x2."""
    a = torch.randn(16, 16).bfloat16()
    b = torch.randn(16, 8).bfloat16()
    lane = np.arange(32)
    # Matrices in the order of the registers: rows 0-7, rows 8-15, then the same of columns 8-15.
    at = 2 * (16 * (lane % 8 + 8 * (lane // 8 % 2)) + 8 * (lane // 16))
    assert (ldmatrix(bits(a), at, 4, False) == fragments(bits(a), a_place, 8)).all()
    expected = fragments(bits(b), b_place, 4)
    assert (ldmatrix(bits(b), 2 * 8 * (lane % 16), 2, True) == expected).all()
    transposed = bits(b.T.contiguous())
    at = 2 * (16 * (lane % 8) + 8 * (lane // 8 % 2))
    assert (ldmatrix(transposed, at, 2, False) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_pair_rounds_to_even_and_puts_the_first_below(dtype):
    ulp = torch.finfo(dtype).eps
    x = torch.tensor([[1 + ulp / 2, 1 + 1.5 * ulp], [-0.0, float("inf")], [1e-30, 1e30], [0.1, -3]])
    name = f"round_pair_{str(dtype).removeprefix('torch.')}"
    out = run(name, (x.numpy(),), ((4, 3), np.uint32), block=(4, 1, 1))
    rounded = x.to(dtype)
    assert np.array_equal(out[:, 0], pair(*bits(rounded).astype(np.uint32).T))
    assert np.array_equal(out[:, 1:].view(np.float32), rounded.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_pair_keeps_nan(dtype):
    x = np.array([[np.nan, 1]], np.float32)
    out = run(
        f"round_pair_{str(dtype).removeprefix('torch.')}",
        (x,),
        ((1, 3), np.uint32),
        block=(1, 1, 1),
    )
    assert np.isnan(out[0, 1].view(np.float32)) and out[0, 2].view(np.float32) == 1
