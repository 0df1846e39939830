"""Attention of a forward whose tokens lie one after the other: some rows have one new token, others a prompt, no
padding. Everything else in a transformer looks at one token at a time and takes such a forward as it is.

Axes: N tokens of all rows, R rows, H key-value heads, G query heads for each of them, T positions, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from ale.policy.kv_cache import KVRows
from ale.policy.packed import Product


class FlatCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Where each token of one forward is written and what it sees; the same for every layer, worked out once.

    Row `rows[i]` continues at position `start_B[i]` with `count_B[i]` tokens. The rows with one token are computed
    together, over all rows of the cache up to the last of them, so that the cache is read in place; a prompt is
    computed by itself.
    """

    def __init__(self, store: KVRows, rows: list[int], start_B: list[int], count_B: list[int]) -> None:
        super().__init__(layers=[])
        store.reserve(max(start + count for start, count in zip(start_B, count_B, strict=True)))
        self._store = store
        row_B, first_B, many_B = (np.array(x) for x in (rows, start_B, count_B))
        at_B = np.cumsum(many_B) - many_B  # each row's first token
        self.position_N = torch.from_numpy(np.arange(many_B.sum()) + (first_B - at_B).repeat(many_B))
        row_NH = torch.from_numpy(row_B.repeat(many_B))[:, None] * store.heads + torch.arange(store.heads)
        self._places_NH = (row_NH * store.length + self.position_N[:, None]).view(-1)
        self._prompts: list[tuple[int, slice, int, Tensor | None]] = []  # row, its tokens, its end, what they see
        for i in np.flatnonzero(many_B > 1):
            start, count, at = start_B[i], count_B[i], int(at_B[i])
            sees = torch.ones(count, start + count, dtype=torch.bool).tril_(start) if start else None
            self._prompts.append((rows[i], slice(at, at + count), start + count, sees))
        one = np.flatnonzero(many_B == 1)
        self._rows = int(row_B[one].max(initial=-1)) + 1
        self._single: tuple[Tensor, Tensor] | None = None  # the rows of one token, and the token; None: all, in order
        if not self._rows:
            return
        if len(one) < self._rows or bool((at_B[one] != row_B[one]).any()):
            self._single = torch.from_numpy(row_B[one]), torch.from_numpy(at_B[one])
        last_R = np.zeros(self._rows, np.int64)
        last_R[row_B[one]] = first_B[one]
        self._end = int(last_R.max()) + 1
        after_RT = torch.arange(self._end) > torch.from_numpy(last_R)[:, None]
        hidden_RT = torch.zeros(after_RT.shape, dtype=store.dtype).masked_fill_(after_RT, -math.inf)
        self._hidden_MT = hidden_RT.repeat_interleave(store.heads, 0)[:, None]

    def attend(self, layer: int, q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor) -> Tensor:
        """Writes the tokens' keys and values, and gives what each token sees [N, H * G * D]; `q` is scaled."""
        keys, values = self._store.keys[layer], self._store.values[layer]
        D = keys.shape[-1]
        for store, states in ((keys, k_NHD), (values, v_NHD)):
            store.view(-1, D).index_copy_(0, self._places_NH, states.reshape(-1, D))
        if not self._prompts and self._single is None:
            return self._one_each(q_NHD, keys, values)
        out_ND = q_NHD.new_empty(q_NHD.shape[0], q_NHD.shape[1] * D)
        if self._rows and self._single is not None:
            row_S, token_S = self._single
            q_RHD = q_NHD.new_zeros(self._rows, *q_NHD.shape[1:]).index_copy_(0, row_S, q_NHD[token_S])
            out_ND[token_S] = self._one_each(q_RHD, keys, values)[row_S]
        elif self._rows:
            out_ND[: self._rows] = self._one_each(q_NHD[: self._rows], keys, values)
        for row, tokens, end, sees in self._prompts:
            out = F.scaled_dot_product_attention(
                q_NHD[tokens].transpose(0, 1)[None],
                keys[row : row + 1, :, :end],
                values[row : row + 1, :, :end],
                attn_mask=sees,
                is_causal=sees is None,
                scale=1.0,
                enable_gqa=q_NHD.shape[1] > keys.shape[1],
            )
            out_ND[tokens] = out[0].transpose(0, 1).reshape(out.shape[2], -1)
        return out_ND

    def _one_each(self, q_RHD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What one token of each row sees; M: rows times key-value heads."""
        R, H, D = self._rows, keys.shape[1], keys.shape[3]
        q_MGD = q_RHD.reshape(R * H, -1, D)
        k_MTD, v_MTD = (store[:R, :, : self._end].flatten(0, 1) for store in (keys, values))
        share_MGT = torch.baddbmm(self._hidden_MT, q_MGD, k_MTD.mT).softmax(-1)
        return torch.bmm(share_MGT, v_MTD).view(R, -1)


class FusedAttention:
    """Takes the place of the `forward` of a rotary attention layer where it is called with a `FlatCache`: one product
    for queries, keys and values, norms and rotation of queries and keys at once.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module, self._own = module, module.forward
        self._width = int(module.head_dim)
        self._keys = module.k_proj.out_features // self._width
        self._queries = module.q_proj.out_features // self._width
        self._norms = (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None
        self._qkv = Product([module.q_proj, module.k_proj, module.v_proj], dtype)
        self._out = Product([module.o_proj], dtype)
        self.products = (self._qkv, self._out)
        self._gain_HD = self._gains()

    @staticmethod
    def fits(module: Any) -> bool:
        """By its parts. Whether it computes what they suggest is seen from what it gives (`fuse`)."""
        parts, projections = {name for name, _ in module.named_children()}, {"q_proj", "k_proj", "v_proj", "o_proj"}
        if not projections <= parts or not all(hasattr(module, name) for name in ("layer_idx", "scaling", "head_dim")):
            return False
        norms = parts - projections
        biases = {getattr(module, name).bias is None for name in projections - {"o_proj"}}
        return (
            all(type(getattr(module, name)) is nn.Linear for name in projections)
            and len(biases) == 1
            and norms in (set(), {"q_norm", "k_norm"})
            and all(getattr(module, name).weight.shape == (module.head_dim,) for name in norms)
            and all(hasattr(getattr(module, name), "variance_epsilon") for name in norms)
        )

    def pack(self) -> None:
        for product in self.products:
            product.pack()
        self._gain_HD = self._gains()

    @torch.no_grad()
    def _gains(self) -> Tensor | None:
        """Of the norms of queries, scaled, and of keys."""
        if self._norms is None:
            return None
        query, key = self._norms
        return torch.stack([query.weight * self.module.scaling] * self._queries + [key.weight] * self._keys)

    def __call__(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        cache = named.get("cache")
        if not isinstance(cache, FlatCache):
            return self._own(hidden_states, *args, **named)
        Q, H, D = self._queries, self._keys, self._width
        qkv = self._qkv(hidden_states).view(-1, Q + 2 * H, D)
        qk, v = qkv[:, : Q + H], qkv[:, Q + H :]
        if self._norms is not None and self._gain_HD is not None:
            qk = F.rms_norm(qk, (D,), None, self._norms[0].variance_epsilon).mul_(self._gain_HD)
        cos_1ND, sin_1ND = named["position_embeddings"] if "position_embeddings" in named else args[0]
        first, second = qk.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        qk = (qk * cos_1ND[0, :, None]).addcmul_(turned, sin_1ND[0, :, None])
        q = qk[:, :Q] if self._norms is not None else qk[:, :Q] * self.module.scaling
        out_ND = cache.attend(self.module.layer_idx, q, qk[:, Q:], v)
        return self._out(out_ND[None]), None
