"""What encoders hear of the host's CLIP vision, against open_clip's own arithmetic."""

import pytest
import torch
from comfy.clip_model import clip_preprocess
from concepts_pack.host.checkpoints import load_clip_vision
from concepts_pack.host.clip_vision import HEADS, Vision, from_open_clip
from safetensors.torch import save_file
from torch.nn.functional import conv2d, gelu, layer_norm, linear, multi_head_attention_forward

from .conftest import VISION, make_clip_vision

WIDTH, LAYERS = VISION["hidden_size"], VISION["num_hidden_layers"]
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2


def random_vision(seed=3, width=WIDTH, layers=LAYERS, patches=PATCHES, patch=14):
    """A CLIP vision under open_clip's names; every number is one that half precision has."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"class_embedding": (width,), "positional_embedding": (patches + 1, width),
             "conv1.weight": (width, 3, patch, patch)}
    for norm in ("ln_pre", "ln_post", *(f"transformer.resblocks.{k}.ln_{n}" for k in range(layers) for n in (1, 2))):
        sizes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for k in range(layers):
        block = f"transformer.resblocks.{k}"
        for name, out, into in (("attn.in_proj_", 3 * width, width), ("attn.out_proj.", width, width),
                                ("mlp.c_fc.", 2 * width, width), ("mlp.c_proj.", width, 2 * width)):
            sizes |= {f"{block}.{name}weight": (out, into), f"{block}.{name}bias": (out,)}
    return {name: (0.3 * torch.randn(size, generator=generator)).half().float() for name, size in sizes.items()}


def open_clip(tensors, pictures):
    """All tokens (b 1+p d) after each layer, and the norm behind the last, as open_clip's VisionTransformer has them
    of normalised pictures (b 3 h w)."""
    width = len(tensors["class_embedding"])

    def norm(name, x):
        return layer_norm(x, (width,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    patch = tensors["conv1.weight"].shape[-1]
    x = conv2d(pictures, tensors["conv1.weight"], stride=patch).flatten(2).transpose(1, 2)
    x = torch.cat([tensors["class_embedding"].expand(len(x), 1, -1), x], 1) + tensors["positional_embedding"]
    x, found = norm("ln_pre", x), []
    for k in range(sum(name.endswith("in_proj_weight") for name in tensors)):
        block = f"transformer.resblocks.{k}"
        own = {name.removeprefix(f"{block}."): t for name, t in tensors.items() if name.startswith(f"{block}.")}
        y = norm(f"{block}.ln_1", x).transpose(0, 1)
        y, _ = multi_head_attention_forward(
            y, y, y, width, HEADS, own["attn.in_proj_weight"], own["attn.in_proj_bias"], None, None, False, 0.0,
            own["attn.out_proj.weight"], own["attn.out_proj.bias"], need_weights=False)
        x = x + y.transpose(0, 1)
        y = gelu(linear(norm(f"{block}.ln_2", x), own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
        found.append(x)
    return found, lambda tokens: norm("ln_post", tokens)


def pictures(count=2, side=80, seed=9):
    return torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def opened():
    """The weights and the host's CLIP vision made of them, as a node has it."""
    tensors = random_vision()
    with torch.inference_mode():
        return tensors, Vision(from_open_clip(tensors))


def test_layers_are_the_cls_token_of_every_second_layer(opened):
    tensors, vision = opened
    states, norm = open_clip(tensors, clip_preprocess(pictures(), vision.side))
    found = vision.layers(pictures())
    assert found.shape == (2, LAYERS // 2, WIDTH) and vision.side == VISION["image_size"]
    torch.testing.assert_close(found, torch.stack([norm(x[:, 0]) for x in states[1::2]], 1), rtol=1e-3, atol=1e-3)


def test_patches_are_of_the_last_layer_and_not_normed(opened):
    tensors, vision = opened
    states, norm = open_clip(tensors, clip_preprocess(pictures(), vision.side))
    pooled, tokens = vision.patches(pictures())
    torch.testing.assert_close(pooled, norm(states[-1][:, 0]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tokens, states[-1][:, 1:], rtol=1e-3, atol=1e-3)
    assert tokens.shape == (2, PATCHES, WIDTH)


def test_what_is_seen_can_be_trained_on_and_leaves_no_trace(opened):
    _, vision = opened
    with torch.inference_mode():
        given = pictures()
        seen = vision.layers(given), *vision.patches(given)
    weight = torch.ones(WIDTH, requires_grad=True)
    sum((part * weight).sum() for part in seen).backward()
    assert weight.grad is not None and not any(part.requires_grad or part.is_inference() for part in seen)
    assert not any(layer._forward_hooks for layer in vision.model.encoder.layers)


def test_the_fingerprint_tells_visions_apart_but_not_precisions():
    one, same, other = (make_clip_vision(seed) for seed in (5, 5, 6))
    one.model.float()
    same.model.half()
    assert Vision(one).fingerprint == Vision(same).fingerprint != Vision(other).fingerprint
    assert Vision(one).fingerprint.startswith(f"{LAYERS} layers of {WIDTH} numbers, ")


def test_other_vision_models_are_one_sentence():
    with pytest.raises(ValueError, match="siglip_vision_model, which .* no CLS token.*ViT-H"):
        Vision(make_clip_vision(model_type="siglip_vision_model"))


@pytest.mark.parametrize(("name", "value", "said"), [
    ("conv1.weight", None, "damaged: 'conv1.weight'"), ("ln_post.weight", None, "it lacks .*post_layernorm.weight"),
    ("class_embedding", torch.ones(3), "size mismatch"), ("conv1.weight", torch.ones(3), "not enough values"),
    ("positional_embedding", torch.ones(()), "0-d tensor"), ("positional_embedding", torch.ones(3, 2), "size mismatch"),
    ("transformer.resblocks.1.mlp.c_fc.weight", torch.ones(3, 3), "size mismatch"),
])
def test_weights_that_are_of_no_vision(name, value, said):
    tensors = {key: tensor for key, tensor in (random_vision() | {name: value}).items() if tensor is not None}
    with pytest.raises(ValueError, match=said) as caught:
        from_open_clip(tensors)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_clip_vision(tmp_path):
    with pytest.raises(ValueError, match="There is no CLIP vision"):
        load_clip_vision(tmp_path / "gone.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no CLIP vision"):
        load_clip_vision(tmp_path / "other.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.safetensors cannot be loaded as a CLIP vision"):
        load_clip_vision(tmp_path / "bad.safetensors")
