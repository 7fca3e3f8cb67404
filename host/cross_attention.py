"""Cross-attention of the host's UNets: its key and value layers, and an edit of what they give."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from comfy.hooks import EnumHookScope, HookGroup, TransformerOptionsHook
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

KEY, RUNNING, MET = "concepts", "concepts_running", "concepts_met"
COMPILED = "_orig_mod"  # what torch.compile calls the module inside the one it makes
log = logging.getLogger("concepts")
# Held weakly: what is put in front of a layer may hold the UNet, which would keep both for good.
_known: WeakKeyDictionary[torch.nn.Module, Mapping[str, CrossAttention]] = WeakKeyDictionary()


class Applied(Protocol):
    """One concept on a model: how strongly and when it acts, in shares of the sampling, what prompts call it, how much
    of it a prompt must hold, and whether it acts in this call."""

    strength: float
    start: float
    end: float
    placeholder: str
    presence: float
    acting: bool


Overrides = Callable[[Mapping[str, CrossAttention], Sequence[Any]], tuple[Mapping[torch.nn.Module, Callable], Callable]]


def transformer_blocks(unet: torch.nn.Module) -> Iterator[tuple[str, BasicTransformerBlock]]:
    """Every transformer block and its name (`input_blocks.1.1…blocks.0`), which is the same where it is compiled."""
    for name, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock):
            yield ".".join(part for part in name.split(".") if part != COMPILED), block


def cross_attentions(unet: torch.nn.Module) -> Mapping[str, CrossAttention]:
    """The text-reading attention of every transformer block, by the block's name."""
    if unet not in _known:
        _known[unet] = WeakValueDictionary(
            {name: block.attn2 for name, block in transformer_blocks(unet) if block.attn2 is not None})
    return _known[unet]


def sizes(model: ModelPatcher) -> dict[str, tuple[int, int]]:
    """How many numbers each text-reading attention takes from a token and gives for it, by the block's name."""
    return {name: (attention.to_k.in_features, attention.to_k.out_features)
            for name, attention in cross_attentions(model.model.diffusion_model).items()}


@contextmanager
def overridden(layers: Mapping[torch.nn.Module, Callable]) -> Iterator[None]:
    """While it lasts, calling a layer calls `layers[layer](forward, …)` with the layer's own forward in front."""
    with ExitStack() as stack:
        for layer, override in layers.items():
            stack.enter_context(_overridden(layer, override))
        yield


@contextmanager
def _overridden(layer: torch.nn.Module, override: Callable) -> Iterator[None]:
    own = vars(layer).get("forward")  # one that another pack put on the instance
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: override(forward, *args, **kwargs)
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def with_edits(model: ModelPatcher, edits: Iterable[Applied], overrides: Overrides) -> ModelPatcher:
    """A clone of `model` whose calls run with the layers overridden as `overrides(attentions, edits)` says.

    That returns what `overridden` takes, and a function that tells how much of each edit's concept the prompts of the
    call held (a tensor). Edits that several nodes and hooks give to one model meet in one list, so that they can be
    seen together, also those that do not act in this call (`acting`); of one concept the first that acts counts, and
    those of hooks come first.
    """
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options[KEY] = [*options.get(KEY, ()), *edits]
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, _around_calls(overrides)), (WrappersMP.OUTER_SAMPLE, _watch)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def edits_on(model: ModelPatcher) -> Sequence[Any]:
    """The edits that `with_edits` gave to this model."""
    return model.model_options["transformer_options"].get(KEY, ())


class EditsHook(TransformerOptionsHook):
    """Edits whose strength the keyframes of the hook multiply; at 0 they do not act.

    The host's own class pays no heed to keyframes (`comfy/hooks.py:263`).
    """

    def on_apply_hooks(self, model: ModelPatcher, transformer_options: dict[str, Any]) -> None:
        edits = [replace(edit, strength=edit.strength * self.strength, acting=self.strength != 0)
                 for edit in self.transformers_dict[KEY]]
        merge_nested_dicts(transformer_options, {**self.transformers_dict, KEY: edits}, copy_dict1=False)


def hook_of(edits: Sequence[Applied], overrides: Overrides) -> HookGroup:
    """The same for single prompts: a hook on a conditioning."""
    group = HookGroup()
    group.add(EditsHook(
        {KEY: list(edits), "wrappers": {WrappersMP.APPLY_MODEL: {KEY: [_around_calls(overrides)]}}},
        EnumHookScope.HookedOnly,
    ))
    return group


def _around_calls(overrides: Overrides) -> Callable:
    def around(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006 - the host's signature
        if transformer_options.get(RUNNING):  # a hook's and the model's own: one runs for both
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        sampling = executor.class_obj.model_sampling
        every = [edit if _acts(edit, sampling, t) else replace(edit, acting=False)
                 for edit in transformer_options.get(KEY, ())]
        edits = list({edit.placeholder.lower(): edit for edit in sorted(reversed(every), key=attrgetter("acting"))}
                     .values())
        layers, held = overrides(cross_attentions(executor.class_obj.diffusion_model), edits)
        # Without what grows with every call, for which compiled models would be compiled again.
        passed = {name: option for name, option in transformer_options.items() if name != MET} | {RUNNING: True}
        with overridden(layers):
            result = executor(x, t, c_concat, c_crossattn, control, passed, **kwargs)
        if MET in transformer_options:
            transformer_options[MET].append((edits, held()))
        return result

    return around


def _acts(edit: Applied, sampling: torch.nn.Module, sigma: Tensor) -> bool:
    if not edit.acting:
        return False
    if edit.start <= 0 and edit.end >= 1:
        return True
    return sampling.percent_to_sigma(edit.end) <= float(sigma.max()) <= sampling.percent_to_sigma(edit.start)


def _watch(executor, *args, **kwargs):
    """Says after sampling which concepts did nothing, and why."""
    options = executor.class_obj.model_options["transformer_options"]
    met: deque[tuple[Sequence[Applied], Tensor]] = deque()  # a list would be copied with the options
    options[MET] = met
    try:
        result = executor(*args, **kwargs)
    finally:
        options.pop(MET, None)
    most: dict[str, float] = {}
    for edits, held in met:
        for edit, amount in zip(edits, held.tolist(), strict=True):
            if edit.acting:
                name = edit.placeholder.lower()
                most[name] = max(amount, most.get(name, amount))
    for edit in options.get(KEY, ()) if met else ():
        if (name := edit.placeholder.lower()) not in most:
            log.warning("No step of this sampling lies between the start (%.2f) and end (%.2f) of %s, so only its word "
                        "acted, without its edit; set them wider.", edit.start, edit.end, edit.placeholder)
        elif most[name] < edit.presence:
            log.warning("No prompt of this picture has enough of %s in it (at most %.2f, and it takes %.2f), so the "
                        "concept did nothing; write it, or raise its weight.", edit.placeholder, most[name],
                        edit.presence)
    return result
