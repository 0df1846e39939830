"""The IPA advantage and objective over ragged chunks of tokens. Start at `op.py`; the equations are in README.md."""

from .op import chunk_advantage, chunk_counts
from .reference import ChunkAdvantage, Counts, Statistics, Weighting

__all__ = ["ChunkAdvantage", "Counts", "Statistics", "Weighting", "chunk_advantage", "chunk_counts"]
