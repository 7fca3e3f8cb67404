"""The stock nodes on the sample model, in a real server."""

import shutil

import pytest


def graph(**changes):
    """Text to image with stock nodes; `changes` replace inputs as `node__input=value`."""
    nodes = {
        "checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "microworld.safetensors"}),
        "positive": ("CLIPTextEncode", {"text": "a red cat on the beach", "clip": ["checkpoint", 1]}),
        "negative": ("CLIPTextEncode", {"text": "", "clip": ["checkpoint", 1]}),
        "empty": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sampler": ("KSampler", {
            "model": ["checkpoint", 0], "positive": ["positive", 0], "negative": ["negative", 0],
            "latent_image": ["empty", 0], "seed": 1, "steps": 6, "cfg": 4.0, "sampler_name": "euler",
            "scheduler": "normal", "denoise": 1.0,
        }),
        "decode": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
        "save": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "stock"}),
    }  # fmt: skip
    prompt = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in nodes.items()}
    for place, value in changes.items():
        node, name = place.split("__")
        prompt[node]["inputs"][name] = value
    return prompt


def picture(client, prompt):
    """The one picture a graph saves, as bytes."""
    (data,) = client.images(client.run(prompt)["save"])
    return data


@pytest.fixture(scope="module")
def plain(client):
    return picture(client, graph())


@pytest.mark.parametrize("sampler, scheduler", [
    ("euler_ancestral", "karras"), ("dpmpp_2m", "karras"), ("ddim", "ddim_uniform"), ("uni_pc", "simple"),
    ("dpmpp_2m_sde", "exponential"), ("heun", "sgm_uniform"),
])  # fmt: skip
def test_samplers_draw(client, plain, sampler, scheduler):
    drawn = picture(client, graph(sampler__sampler_name=sampler, sampler__scheduler=scheduler))
    assert drawn.startswith(b"\x89PNG") and pixels(drawn) != pixels(plain)


def test_same_seed_same_picture(client, plain):
    picture(client, graph(sampler__seed=8))  # what is sampled is no longer taken from the host's cache
    again = graph()
    again["save"]["inputs"]["filename_prefix"] = "again"
    assert pixels(picture(client, again)) == pixels(plain)


def pixels(png):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()


@pytest.mark.parametrize("text", [
    "a (red:1.4) cat on the beach", "a red cat on the beach " + "with a hat " * 60, "ein gänzlich unbekanntes Wort",
])  # fmt: skip
def test_prompts_matter(client, plain, text):
    assert pixels(picture(client, graph(positive__text=text))) != pixels(plain)


def test_image_to_image(client, plain):
    prompt = graph(sampler__denoise=0.5, sampler__latent_image=["encode", 0])
    prompt["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["photos", 0], "vae": ["checkpoint", 2]}}
    prompt["photos"] = photos()
    assert pixels(picture(client, prompt)) != pixels(plain)


def photos():
    return {
        "class_type": "ConceptsMicroworldPhotos", "inputs": {"concept": "test cat", "count": 1, "seed": 0},
    }  # fmt: skip


def test_saved_word_is_an_embedding(client, models, plain):
    from safetensors.torch import save_file
    from torch import randn

    save_file({"emb_params": randn(2, 256)}, models / "embeddings" / "stock.safetensors")
    drawn = picture(client, graph(positive__text="a red embedding:stock on the beach"))
    without = picture(client, graph(positive__text="a red on the beach"))
    assert pixels(drawn) != pixels(without)


def test_native_lora_trains_and_loads(client, models, plain):
    prompt = graph()
    prompt["photos"] = photos()
    prompt["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["photos", 0], "vae": ["checkpoint", 2]}}
    prompt["train"] = {"class_type": "TrainLoraNode", "inputs": {
        "model": ["checkpoint", 0], "latents": ["encode", 0], "positive": ["positive", 0], "batch_size": 1,
        "grad_accumulation_steps": 1, "steps": 3, "learning_rate": 0.01, "rank": 4, "optimizer": "AdamW",
        "loss_function": "MSE", "seed": 0, "training_dtype": "fp32", "lora_dtype": "fp32", "quantized_backward": False,
        "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
        "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
    }}  # fmt: skip
    lora = {"lora": ["train", 0], "prefix": "loras/stock"}
    prompt["keep"] = {"class_type": "SaveLoRA", "inputs": lora}
    client.run(prompt)
    trained = next(models.parent.rglob("output/loras/stock*.safetensors"))
    shutil.copy(trained, models / "loras" / "stock.safetensors")
    loaded = graph(sampler__model=["lora", 0], positive__clip=["lora", 1])
    loaded["lora"] = {"class_type": "LoraLoader", "inputs": {
        "model": ["checkpoint", 0], "clip": ["checkpoint", 1], "lora_name": "stock.safetensors",
        "strength_model": 1.0, "strength_clip": 1.0,
    }}  # fmt: skip
    assert pixels(picture(client, loaded)) != pixels(plain)
