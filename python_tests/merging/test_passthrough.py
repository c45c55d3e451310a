import pytest
import torch

from mergeme_ext.merging import get
from python_tests.support.toy import DTYPES, make

PASSTHROUGH = get("passthrough")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_every_bit(dtype):
    _, (model, *_) = make(dtype)
    model[0, 0], model[0, 1] = torch.nan, -0.0
    out = PASSTHROUGH(None, [model])
    assert torch.equal(out.view(torch.uint8), model.view(torch.uint8))
    assert out.data_ptr() != model.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0, 0.3, -2])
def test_scales(dtype, scale):
    _, (model, *_) = make(dtype)
    out = PASSTHROUGH(None, [model], scale=scale)
    wide = model if dtype == torch.float64 else model.float()
    assert out.dtype == dtype and torch.equal(out, (scale * wide).to(dtype))


def test_takes_one_model():
    _, models = make(torch.float32)
    with pytest.raises(ValueError, match="passthrough: expected 1 model, got 3"):
        PASSTHROUGH(None, models)
