"""Where the places of a picture attend while the host's UNet runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from comfy.ldm.modules.attention import CrossAttention
from einops import einsum, rearrange
from torch import Tensor

from .cross_attention import cross_attentions, overridden


@contextmanager
def attention_to(model: torch.nn.Module, places: Sequence[int]) -> Iterator[list[Tensor]]:
    """What share of its attention each place of the picture pays to the tokens at `places`, whenever the UNet runs.

    Yields a list that gets one map (b q) for each cross-attention, the mean of its heads; places of the picture row by
    row.
    """
    maps: list[Tensor] = []

    def watch(attention: CrossAttention, forward: Callable, x: Tensor, context: Tensor, *args, **kwargs) -> Tensor:
        heads = attention.heads
        q, k = (rearrange(layer(tokens), "b n (h d) -> b h n d", h=heads)
                for layer, tokens in ((attention.to_q, x), (attention.to_k, context)))
        weights = (einsum(q.float(), k.float(), "b h q d, b h k d -> b h q k") * q.shape[-1] ** -0.5).softmax(-1)
        maps.append(weights[..., list(places)].sum(-1).mean(1))
        return forward(x, context, *args, **kwargs)

    attentions = cross_attentions(model.diffusion_model).values()
    with overridden({attention: partial(watch, attention) for attention in attentions}):
        yield maps
