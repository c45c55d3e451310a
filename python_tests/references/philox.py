"""Philox4x32-10 (Salmon et al. 2011) in numpy, written from the paper, and the drop masks."""

import numpy as np

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter, key):
    """Four uint64 arrays with 32-bit words; ``counter`` has four such entries and ``key`` two."""
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    k = [np.asarray(x, dtype=np.uint64) for x in key]
    for _ in range(10):
        first = c[0] * np.uint64(0xD2511F53)
        second = c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> HALF) ^ c[1] ^ k[0],
            second & LOW,
            (first >> HALF) ^ c[3] ^ k[1],
            first & LOW,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & LOW, (k[1] + np.uint64(0xBB67AE85)) & LOW]
    return c


def uniforms(key, model, indices):
    """The 16-bit number behind the decision on each flat index."""
    i = np.asarray(indices, dtype=np.uint64)
    group, place = i // np.uint64(8), (i % np.uint64(8)).astype(np.int64)
    zero = np.zeros_like(group)
    words = philox(
        (group & LOW, group >> HALF, zero + np.uint64(model), zero),
        (np.uint64(key) & LOW, np.uint64(key) >> HALF),
    )
    word = np.choose(place // 2, words)
    return np.where(place % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))


def keeps(key, model, indices, probability):
    return uniforms(key, model, indices) < round(probability * 65536)
