"""The first element that is not finite, one loop."""

import math


def first_nonfinite(tensor):
    for i, value in enumerate(tensor.detach().double().flatten().tolist()):
        if not math.isfinite(value):
            return i
    return -1
