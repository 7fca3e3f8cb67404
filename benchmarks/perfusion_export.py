"""How near a concept's LoRA is to its gated edit: `python3 dev.py run benchmarks/perfusion_export.py`.

The concepts are those of `perfusion.py`. Outputs of the key and value layers are compared on the scenes'
prompts, at the concept's token and at the others, as shares of what the edit changes there; pictures of the exported
LoRA with the concept's word are judged beside those of the edit and of the class word.
"""

from __future__ import annotations

import comfy.sd
import numpy as np
import torch
from torch import Tensor

from ..host.cross_attention import cross_attentions, overridden
from ..host.lora_names import lora_names
from ..host.text import encode, ready, word_places
from ..microworld.data import parallel
from ..microworld.oracle import load
from ..microworld.world import concept_photos
from ..perfusion.apply import applied, overrides
from ..perfusion.covariance import precision
from ..perfusion.linear import linear_dual
from ..perfusion.lora import to_lora
from ..perfusion.use import apply_concept
from ..textual_inversion.apply import apply_words
from ..textual_inversion.concept import Concept
from .concepts import conditions, names_of, parser, report
from .perfusion import averages, learned
from .sampling import draw, load_checkpoint
from .textual_inversion import REAL_SEED, SCENES, judge

BIASES = (0.6, 0.8, 1.0)
STRENGTHS = (0.7, 1.0)


@torch.no_grad()
def layer_differences(base, concept: Concept, bias: float) -> dict[str, float]:
    """|LoRA - edit| ÷ |edit - plain| over all layers and scenes, at the concept's token and at the others."""
    model, clip = base[0], ready(apply_words(base[1], concept, 1.0))
    (word,) = concept.words
    lora, names = to_lora(model, concept, linear_dual(base[1], concept)), lora_names(model)
    attentions = cross_attentions(model.model.diffusion_model)
    edit = applied(concept.edit, precision(base[1]), word.placeholder, bias=bias)
    squares: dict[str, np.ndarray] = {}
    for scene, _ in SCENES:
        text = scene.format(word.placeholder)
        context, place = encode(clip, text)[0].float(), word_places(clip, text, word.vectors)[0]
        parts = {"concept's token": slice(place, place + 1), "tokens behind it": slice(place + 1, None)}
        layers, _ = overrides(attentions, [edit])
        for name, attention in attentions.items():
            for kind in ("to_k", "to_v"):
                layer = getattr(attention, kind)
                plain = layer(context)
                with overridden(layers):
                    edited = layer(context)
                change = lora_change(lora, names[f"diffusion_model.{name}.attn2.{kind}.weight"], context)
                for part, chosen in parts.items():
                    apart = [(x[:, chosen] ** 2).sum().item() for x in (plain + change - edited, edited - plain)]
                    label = f"{'keys' if kind == 'to_k' else 'values'}, {part}"
                    squares[label] = squares.get(label, 0) + np.array(apart)
    return {label: float(np.sqrt(off / moved)) for label, (off, moved) in squares.items()}


def lora_change(lora: dict[str, Tensor], name: str, context: Tensor) -> Tensor:
    return context @ lora[f"{name}.lora_down.weight"].float().T @ lora[f"{name}.lora_up.weight"].float().T


def pictures_of(base, concept: Concept, seed: int, cfg: float, label: str, amount: float) -> Tensor:
    """One picture of each scene (n h w 3)."""
    (word,), (model, clip, vae), written = concept.words, base, concept.words[0].placeholder
    if label == "edit":
        model, clip = apply_concept(model, clip, concept, 1.0, bias=amount)
    elif label == "LoRA":
        lora = to_lora(model, concept, linear_dual(clip, concept))
        model, clip = comfy.sd.load_lora_for_models(model, None, lora, amount, 0)[0], apply_words(clip, concept, 1.0)
    else:
        written = word.class_word
    return draw(model, clip, vae, [scene.format(written) for scene, _ in SCENES], 1000 * seed, cfg=cfg)


def one(name: str, seed: int, cfg: float) -> tuple[dict, dict[str, tuple[float, float]]]:
    """What `layer_differences` finds by bias, and ID and TXT by how the concept is used, for one training."""
    torch.set_num_threads(1)
    oracle, base = load(), load_checkpoint()
    concept, real = learned(base, name, seed, "locked keys"), torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0])
    variants = [("class word", 0.0), *(("edit", bias) for bias in BIASES), *(("LoRA", s) for s in STRENGTHS)]
    scores = {}
    for label, amount in variants:
        images = pictures_of(base, concept, seed, cfg, label, amount)
        scores[f"{label} {amount}"] = judge(oracle, images, concept.words[0].class_word, real)
        print(name, seed, label, amount, *scores[f"{label} {amount}"], flush=True)
    return {f"bias {bias}": layer_differences(base, concept, bias) for bias in BIASES}, scores


def main() -> None:
    args = parser(__doc__, seeds=2).parse_args()
    names = names_of(args)
    jobs = [(name, seed, args.cfg) for seed in range(args.seeds) for name in names]
    found = list(parallel(one, *zip(*jobs, strict=True), workers=args.workers))
    count = len(names)
    layers = {bias: averages([differences[bias] for differences, _ in found], count) for bias in found[0][0]}
    pictures = {label: averages([dict(zip(("ID", "TXT"), scores[label], strict=True)) for _, scores in found], count)
                for label in found[0][1]}
    result = {"|LoRA - edit| / |edit - plain|": layers, "pictures": pictures}
    report(result | conditions(args), "perfusion_export", args)


if __name__ == "__main__":
    main()
