"""Matrix products of rows grouped by expert: `y[t] = x[t] @ w[e(t)]`."""

from ale.kernels.grouped_gemm.op import grouped_gemm

__all__ = ["grouped_gemm"]
