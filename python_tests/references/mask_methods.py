"""float64 references of the methods that mask and select: loops on flat lists of numbers.

Each returns the merged values and the sum of absolute terms behind each, for rounding bounds.
"""

import math

from python_tests.references.drop_by_rank import probabilities
from python_tests.references.merge_methods import combine, norm, random_mask, task_vectors


def random_bits(n, seed, name, model):
    """The 16-bit number behind each decision, found by asking for every bit of it in turn."""
    low, high = [0] * n, [65536] * n  # kept at probability p iff the number is below p * 65536
    for _ in range(16):
        for middle in sorted({(a + b) // 2 for a, b in zip(low, high, strict=True)}):
            below = random_mask(n, middle / 65536, seed, name, model)
            for i in range(n):
                if (low[i] + high[i]) // 2 == middle and high[i] - low[i] > 1:
                    low[i], high[i] = (low[i], middle) if below[i] else (middle, high[i])
    return low
