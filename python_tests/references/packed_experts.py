"""The packed order, one element at a time; what runs on packed weights has the references of
``grouped_experts`` and ``grouped_matmul``."""

import torch


def pack_experts(weight, gated=False, interleaved=False, transposed=False):
    if transposed:
        weight = weight.transpose(1, 2)
    experts, _, depth = weight.shape
    if gated and interleaved:
        weight = torch.cat([weight[:, ::2], weight[:, 1::2]], 1)
    halves = weight.chunk(2, 1) if gated else (weight,)
    columns = 32 // len(halves)
    panels = -(-halves[0].shape[1] // columns)
    packed = weight.new_zeros(experts, panels, -(-depth // 32) * 32, 32)
    for which, half in enumerate(halves):
        for row in range(half.shape[1]):
            column = which * columns + row % columns
            packed[:, row // columns, :depth, column] = half[:, row]
    if weight.element_size() == 2:  # two steps of a column side by side
        pairs = packed.view(experts, panels, packed.shape[2] // 2, 2, 32).transpose(3, 4)
        packed = pairs.reshape(packed.shape)
    return packed  # [E, panels, depth rounded up to 32, 32]
