"""The KV cache of the embedded engine: one row for each running sequence, rows packed at the front.

Axes: L layers, R rows, H key-value heads, T positions, D head width. A sequence that waits for its environment is
parked: its keys and values are copied out and its row is given to another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ale.errors import ModelError

_GROW = 128  # positions are added in blocks, so that a growing sequence rarely copies the cache


class KVRows:
    """Keys and values [L][R, H, T, D] of up to `rows` running sequences."""

    def __init__(self, config: PretrainedConfig, rows: int, dtype: torch.dtype) -> None:
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        window = getattr(config, "sliding_window", None)
        if kinds or (window is not None and window < config.max_position_embeddings):
            other = ", ".join(sorted(kinds)) or f"a sliding window of {window}"
            raise ModelError(
                f"model.path: {type(config).__name__} has {other}; "
                "the embedded engine runs models with full attention in every layer."
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layers = int(config.num_hidden_layers)
        self.heads, self.dtype = heads, dtype
        self._shape = (rows, heads, 0, width)
        self.keys = [torch.empty(self._shape, dtype=dtype) for _ in range(self.layers)]
        self.values = [torch.empty(self._shape, dtype=dtype) for _ in range(self.layers)]
        self.length = 0

    def reserve(self, length: int) -> None:
        """Makes room for `length` positions in every row."""
        if length <= self.length:
            return
        new = -(-length // _GROW) * _GROW
        rows, heads, _, width = self._shape
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                # Zeros: what is masked out must still be finite, since 0 * NaN is NaN.
                grown = old.new_zeros(rows, heads, new, width)
                grown[:, :, : self.length] = old
                store[layer] = grown
        self.length = new

    def park(self, row: int, length: int) -> Tensor:
        """A copy of a row's first `length` positions: [L, 2, H, length, D]."""
        return torch.stack(
            [torch.stack((k[row, :, :length], v[row, :, :length])) for k, v in zip(self.keys, self.values, strict=True)]
        )

    def unpark(self, row: int, parked: Tensor, length: int) -> None:
        for layer in range(self.layers):
            self.keys[layer][row, :, :length] = parked[layer, 0, :, :length]
            self.values[layer][row, :, :length] = parked[layer, 1, :, :length]

    def copy(self, source: int, target: int, length: int) -> None:
        for store in (self.keys, self.values):
            for layer in store:
                layer[target, :, :length] = layer[source, :, :length]


class RowsCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """Lets a transformers model read and write some rows of `KVRows` in one forward.

    `start_B` is the first position each row writes; `count_B` how many of the Q queries of a row are real (the rest is
    padding and is not written). Attention sees positions up to the longest row; the mask hides the rest.
    """

    def __init__(self, store: KVRows, rows: list[int], start_B: list[int], count_B: list[int]) -> None:
        end = max(start + count for start, count in zip(start_B, count_B, strict=True))
        store.reserve(end)
        write = _Write(rows, start_B, count_B, end)
        super().__init__(layers=[_Layer(store.keys[i], store.values[i], write) for i in range(store.layers)])


class _Write:
    """Where one forward writes; the same for every layer, so it is worked out once."""

    def __init__(self, rows: list[int], start_B: list[int], count_B: list[int], end: int) -> None:
        self.spans = [(row, slice(s, s + n), n) for row, s, n in zip(rows, start_B, count_B, strict=True)]
        self.start = max(start_B)
        self.end = end
        # Rows at the front are read as a view: decoding copies nothing.
        self.read = slice(len(rows)) if rows == list(range(len(rows))) else rows
        self.one = (torch.tensor(rows), slice(None), torch.tensor(start_B)) if max(count_B) == 1 else None


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor, write: _Write) -> None:
        super().__init__()
        self._keys, self._values, self._write = keys, values, write
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        write = self._write
        for store, states in ((self._keys, key_states), (self._values, value_states)):
            if write.one is not None:
                store[write.one] = states[:, :, 0]
            else:
                for i, (row, span, count) in enumerate(write.spans):
                    store[row, :, span] = states[i, :, :count]
        return self._keys[write.read, :, : write.end], self._values[write.read, :, : write.end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._write.end, 0

    def get_seq_length(self) -> int:
        return self._write.start

    def get_max_length(self) -> int:
        return -1
