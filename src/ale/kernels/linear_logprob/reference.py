"""The torch twin of `linear_logprob`: same signature, all logits at once, autograd by torch."""

import torch
from torch import Tensor


def linear_logprob_reference(
    h_TD: Tensor, w_VD: Tensor, token_T: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`logp[t] = log_softmax(h[t] @ w^T / temperature)[token[t]]` in fp32 (fp64 stays fp64); entropy of the same."""
    wide = torch.float64 if h_TD.dtype is torch.float64 else torch.float32
    logp_TV = torch.log_softmax(h_TD.to(wide) @ w_VD.to(wide).T / temperature, dim=-1)
    logp_T = logp_TV.gather(1, token_T.long()[:, None])[:, 0]
    if not entropy:
        return logp_T
    return logp_T, -(logp_TV.exp() * logp_TV).sum(-1)
