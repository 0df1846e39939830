"""Kernels for reinforcement learning of language models: a small library of torch and triton, nothing else of `ale`.

Importing it imports torch only; triton comes in when the first CUDA tensor does, transformers in `register_experts`.
"""

from ale.kernels.chunk_advantage import Weighting, chunk_advantage
from ale.kernels.grouped_gemm import grouped_gemm
from ale.kernels.linear_logprob import linear_logprob
from ale.kernels.moe import moe_experts, register_experts

__all__ = ["Weighting", "chunk_advantage", "grouped_gemm", "linear_logprob", "moe_experts", "register_experts"]
