import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.io.operands import Stored
from mergeme_ext.vocabulary import VocabularyRows
from mergeme_ext.vocabulary.rows import AVERAGE, ZERO, gather
from python_tests.vocabulary.models import Computed


def matrix(rows, dtype=torch.float32, width=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=g, dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    picks=st.lists(st.integers(0, 10**6), max_size=60),
    computed=st.booleans(),
)
def test_gather_is_indexing(rows, picks, computed):
    tensor = matrix(rows)
    index = torch.tensor([p % rows for p in picks], dtype=torch.int64)
    operand = Computed(tensor) if computed else Stored(tensor)
    assert torch.equal(gather(operand, index), tensor[index])


def test_gather_reads_stretches_and_no_more():
    operand = Computed(matrix(30_000, width=1))
    gather(operand, torch.tensor([29_999, 3, 4, 10, 3]))
    assert operand.asked == [(3, 11), (29_999, 30_000)]
    operand.asked.clear()
    gather(operand, torch.arange(0, 30_000, 2))
    assert max(end - begin for begin, end in operand.asked) <= 4096
    with pytest.raises(IndexError, match="rows below 30000, got 30000"):
        gather(operand, torch.tensor([30_000]))


def plan(model, index, own=None):
    own = own or [torch.full((len(model),), -1)] * 3
    return torch.tensor(model, dtype=torch.int32), torch.tensor(index), own


@pytest.mark.parametrize("wrap", [Stored, Computed])
def test_takes_rows_of_any_operand(wrap):
    tensors = [matrix(4, seed=i) for i in range(3)]
    own = [torch.tensor(r) for r in ([-1, -1, -1, 2], [-1, -1, -1, 1], [-1, -1, -1, 0])]
    rows = VocabularyRows(*plan([1, ZERO, 0, AVERAGE], [3, 0, 1, 0], own), list(map(wrap, tensors)))
    mean = (tensors[0][2].double() + tensors[1][1].double() + tensors[2][0].double()) / 3
    expected = torch.stack([tensors[1][3], torch.zeros(2), tensors[0][1], mean.float()])
    assert torch.equal(rows.rows(0, 4), expected)
    assert torch.equal(rows.rows(1, 3), expected[1:3])
    assert rows.rows(2, 2).shape == (0, 2)
    assert rows.stored() is None and rows.shape == (4, 2)
    assert rows.models == [0, 1, 2]
    with pytest.raises(ValueError, match=r"part of \[0, 4\), got \[3, 5\)"):
        rows.rows(3, 5)


def test_vectors_work_as_matrices_do():
    bias = torch.arange(5.0)
    rows = VocabularyRows(*plan([0, ZERO, 0], [4, 0, 2]), [Stored(bias)] * 3)
    assert rows.rows(0, 3).tolist() == [4, 0, 2]


def test_passes_on_to_what_it_reads():
    operands = [Computed(matrix(3, seed=i)) for i in range(3)]
    rows = VocabularyRows(*plan([0, 2], [0, 1]), operands)
    rows.prefetch()
    rows.release()
    assert [o.calls for o in operands] == [["prefetch", "release"], [], ["prefetch", "release"]]


def test_dtype_is_the_widest_read():
    tensors = [matrix(3, torch.bfloat16), matrix(3, torch.float16), matrix(3, torch.float64)]
    operands = [Stored(t) for t in tensors]
    assert VocabularyRows(*plan([0, 0], [0, 1]), operands).dtype == torch.bfloat16
    assert VocabularyRows(*plan([0, 1], [0, 1]), operands).dtype == torch.float32
    assert VocabularyRows(*plan([0, 2], [0, 1]), operands).dtype == torch.float64
    assert VocabularyRows(*plan([ZERO, 0], [0, 1]), operands).dtype == torch.bfloat16
