"""A digest of many results of the merge ops, for comparing instruction sets bit by bit."""

import hashlib
import os
import subprocess
import sys

import torch

import mergeme_ext
from python_tests.support.merge_inputs import DTYPES, models


def digest():
    done = hashlib.sha256()

    def add(t):
        done.update(t.view(torch.uint8).numpy().tobytes())

    for dtype in DTYPES:
        base, tensors = models((5_003,), dtype)
        weights = torch.tensor([0.3, 1.0, -0.2], dtype=torch.float64)
        add(mergeme_ext.weighted_sum(tensors, weights))
        cuts = mergeme_ext.magnitude_threshold(base, tensors, [3_000, 4_999, 5])
        add(cuts)
        large, others = models((40_003,), dtype, 2)  # counts digits before it collects
        add(mergeme_ext.magnitude_threshold(large, others, [8_000, 30_000]))
        drops = torch.tensor([[0.5, 0.0], [0.9, 0.0], [0.1, 0.0]], dtype=torch.float64)
        for axis, count in (("all", 1), ("row", 64), ("column", 79)):
            shaped = [t[:4_977].view(63, 79) for t in (base, *tensors)]
            for num_models in (1, 2, 3):
                add(mergeme_ext.gram(shaped[0], shaped[1 : 1 + num_models], axis=axis))
                add(mergeme_ext.gram(None, (shaped * 2)[: 4 + num_models], axis=axis))
            by_group = torch.linspace(-1, 2, count * 3, dtype=torch.float64).view(count, 3)
            options = {"axis": axis, "offset": 7, "row_length": 79}
            for start in (None, base):
                add(mergeme_ext.combine_rows(start, tensors, by_group, **options))
        add(mergeme_ext.drop_by_rank(base, tensors, drops, key=5, inverse_prob=True))
        top = mergeme_ext.magnitude_threshold(base, tensors, [100, 200, 4])
        band = torch.cat([cuts, top], 1)
        selections = {"all": cuts, "magnitude": cuts, "random": drops, "band": band}
        for mask, selection in selections.items():
            add(mergeme_ext.masked_norms(base, tensors, selection, mask=mask, key=5))
            for elect in ("none", "sum", "count", "unweighted"):
                for normalize in (False, True):
                    options = {"mask": mask, "key": 5, "offset": 3, "elect": elect}
                    options |= {"normalize": normalize, "lam": 0.3}
                    args = base, tensors, weights, weights, selection
                    add(mergeme_ext.merge_task_vectors(*args, **options))
    return done.hexdigest()


def digests_of_other_sets():
    """By instruction set: the digest that a process restricted to it computes."""
    info = mergeme_ext._load._C.build_info()
    code = "from python_tests.support.merge_digest import digest; print(digest())"
    return {
        isa: subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MERGEME_CPU_ISA": isa},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for isa in info["cpu_available"].split(", ")
        if isa != info["cpu_chosen"]
    }
