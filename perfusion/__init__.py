"""Perfusion: key-locked, gated rank-1 edits of cross-attention (Tewel et al., arXiv 2305.01644)."""
