"""A prompt for the key layers of cross-attention beside the one that the value layers read."""

from collections.abc import Iterable
from typing import Any

import torch
from comfy.conds import CONDRegular
from comfy.hooks import EnumHookScope, HookGroup, TransformerOptionsHook, set_hooks_for_conditioning
from comfy.patcher_extension import WrappersMP
from comfy.sd import CLIP
from torch import Tensor

KEY = "concepts_key_text"
Conditioning = list[list[Any]]


def conditioning_of(clip: CLIP, text: str) -> Conditioning:
    """What CLIP Text Encode makes of `text`: an encoding (1 n d) and its options for each step of a CLIP schedule."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def with_key_text(conditioning: Conditioning, encodings: Iterable[Tensor]) -> Conditioning:
    """`conditioning` whose keys are made from `encodings` (1 n d), one for each of its entries, on any UNet.

    Tokens that are appended to it later keep their own keys.
    """
    entries = [[context, {**options, "model_conds": {**options.get("model_conds", {}), KEY: _KeyText(encoding)}}]
               for (context, options), encoding in zip(conditioning, encodings, strict=True)]
    group = HookGroup()
    group.add(TransformerOptionsHook({"wrappers": {WrappersMP.DIFFUSION_MODEL: {KEY: [_apart]}}},
                                     EnumHookScope.HookedOnly))
    return set_hooks_for_conditioning(entries, group)


class _KeyText(CONDRegular):
    """Computed by itself: beside a prompt of another length the host would repeat the one text and not the other."""

    def can_concat(self, other: CONDRegular) -> bool:
        return False


def _apart(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
    """Hands both texts to the host, which takes two where there is a patch. A negative prompt of an area has the hooks
    of the positive one, but no text of its own."""
    keys = kwargs.pop(KEY, None)
    if keys is not None:
        keys = torch.cat([keys, context[:, keys.shape[1]:]], 1)
        patches = transformer_options.get("patches", {})
        first = [lambda n, _, value, options: (n, keys, value), *patches.get("attn2_patch", ())]
        transformer_options = {**transformer_options, "patches": {**patches, "attn2_patch": first}}
    return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
