"""A LoRA by ComfyUI's own training beside the concepts, from the same photos: `python3 dev.py run benchmarks/lora.py`.

As DreamBooth has it, the class word with a rare word in front stands for the thing, in training and in the scenes of
`textual_inversion.py`. The stock node takes no masks. Settings are chosen with `--split validation`; what is reported
comes from `--split test`.
"""

from __future__ import annotations

import json
import time

import comfy.sd
import torch
from comfy_extras.nodes_train import TrainLoraNode
from torch import Tensor

from ..host.pictures import vae_encode
from ..microworld.data import parallel
from ..microworld.oracle import load
from ..microworld.world import concept_photos, super_category
from .concepts import conditions, names_of, parser, report
from .perfusion import averages
from .sampling import draw, encode, load_checkpoint
from .textual_inversion import PHOTOS_SEED, REAL_SEED, SCENES, judge

RARE = "sks"
CHOSEN = {"steps": 200, "learning_rate": 2e-3, "rank": 8, "batch_size": 1}


def learn(base, name: str, seed: int, photos: int = 4, **changes) -> dict[str, Tensor]:
    """A LoRA of a sample concept's photos."""
    model, clip, vae = base
    pictures = torch.from_numpy(concept_photos(name, photos, PHOTOS_SEED + seed)[0])
    settings = {
        "grad_accumulation_steps": 1, "optimizer": "AdamW", "loss_function": "MSE", "seed": seed,
        "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA",
        "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]",
        "bucket_mode": False, "bypass_mode": False, **CHOSEN, **changes,
    }  # fmt: skip
    return TrainLoraNode.execute(
        model=[model], latents=[{"samples": vae_encode(vae, pictures)}],
        positive=[encode(clip, [f"a photo of a {RARE} {super_category(name)}"])],
        **{setting: [value] for setting, value in settings.items()},
    ).result[0]  # fmt: skip


def one(name: str, seed: int, cfg: float, variants: dict[str, dict], strengths: list[float]) -> dict[str, dict]:
    """ID, TXT and processor seconds of training by variant and strength."""
    torch.set_num_threads(1)
    oracle, (model, clip, vae) = load(), (base := load_checkpoint())
    kind, real, found = super_category(name), torch.from_numpy(concept_photos(name, 24, REAL_SEED)[0]), {}
    scenes = [scene.format(f"{RARE} {kind}") for scene, _ in SCENES]
    for label, changes in variants.items():
        start = time.process_time()
        lora = learn(base, name, seed, **changes)
        seconds = time.process_time() - start
        for strength in strengths:
            patched, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0)
            identity, text = judge(oracle, draw(patched, clip, vae, scenes, 1000 * seed, cfg=cfg), kind, real)
            found[f"{label}, strength {strength}"] = {"ID": identity, "TXT": text, "seconds": seconds}
            print(f"{name}, seed {seed}, {label}, strength {strength}: ID {identity:.3f} TXT {text:.3f} "
                  f"{seconds:.0f} s", flush=True)
    return found


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.75])
    own.add_argument("--variants", type=json.loads, default={"LoRA": {}}, help="settings by label, as JSON")
    args = own.parse_args()
    names = names_of(args)
    jobs = [(name, seed, args.cfg, args.variants, args.strengths) for seed in range(args.seeds) for name in names]
    found = list(parallel(one, *zip(*jobs, strict=True), workers=args.workers))
    result = {label: averages([each[label] for each in found], len(names)) for label in found[0]}
    report(result | CHOSEN | conditions(args), "lora", args)


if __name__ == "__main__":
    main()
