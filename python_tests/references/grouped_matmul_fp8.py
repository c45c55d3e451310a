"""float64 reference: dequantise, then one product per expert. Returns value and magnitude."""

from python_tests.references import grouped_matmul
from python_tests.references.quantize_fp8 import dequantize


def grouped_matmul_fp8(a, a_scale, b, b_scale, expert_offsets):
    return grouped_matmul.grouped_matmul_nt(
        dequantize(a, a_scale), dequantize(b, b_scale, rows=128), expert_offsets
    )
