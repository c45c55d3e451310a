"""A method on one tensor, chunk by chunk, as the engine does it."""

import torch


def merge_chunks(
    method, tensor_name, base, tensors, parameters, *, dtype, chunk_elements=2**20, **options
):
    """Yield the first element's flat index, and the merged flat chunk."""
    every = [*tensors] if base is None else [base, *tensors]
    common = every[0].dtype
    for tensor in every:
        common = torch.promote_types(common, tensor.dtype)
    every = [t.to(common) for t in every]
    whole_base, whole = (None, every) if base is None else (every[0], every[1:])
    wide = torch.float64 if common == torch.float64 else torch.float32
    work = dtype if dtype == common else wide
    combine = method.prepare(whole_base, whole, parameters, tensor_name=tensor_name, **options)
    step = chunk_elements
    if method.whole_rows:
        row = max(1, whole[0].shape[-1] if whole[0].dim() else 1)
        step = max(1, chunk_elements // row) * row
    flat_base = None if whole_base is None else whole_base.reshape(-1)
    for start in range(0, whole[0].numel(), step):
        chunk = slice(start, start + step)
        base_chunk = None if flat_base is None else flat_base[chunk].to(work)
        chunks = [t.reshape(-1)[chunk].to(work) for t in whole]
        yield start, combine(base_chunk, chunks, start).to(dtype)
