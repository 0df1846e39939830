"""Log-probability of chosen tokens straight from hidden states, without the logits."""

from ale.kernels.linear_logprob.op import linear_logprob

__all__ = ["linear_logprob"]
