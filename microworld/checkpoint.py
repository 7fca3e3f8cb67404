"""Write what was trained as one fp16 checkpoint in Stable Diffusion's layout.

`python3 dev.py run microworld/checkpoint.py`
"""

from __future__ import annotations

from safetensors.torch import load_file, save_file

from .data import work
from .host import CHECKPOINT

PREFIXES = {"unet.": "model.diffusion_model.", "clip.": "cond_stage_model.transformer."}


def main() -> None:
    trained, vae = load_file(work("average.safetensors")), load_file(work("vae.safetensors"))
    for name in ("latent_mean", "latent_std"):
        print(name, [round(value, 4) for value in trained.pop(name).flatten().tolist()])
    sd = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": trained.pop("table")}
    for key, value in trained.items():
        prefix = next(p for p in PREFIXES if key.startswith(p))
        sd[PREFIXES[prefix] + key.removeprefix(prefix)] = value
    sd |= {f"first_stage_model.{key}": value for key, value in vae.items()}
    CHECKPOINT.parent.mkdir(exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in sd.items()}, CHECKPOINT)
    print(f"{CHECKPOINT.name}: {CHECKPOINT.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
