"""Words go to diffusers and come back; both programs then encode a prompt alike."""

import os
from pathlib import Path

import comfy.sd1_clip
import pytest
import torch
from concepts_pack.host.clip_overlay import with_words
from concepts_pack.perfusion.lora import to_bytes, to_lora
from concepts_pack.textual_inversion.concept import Concept, Word
from concepts_pack.textual_inversion.file import LAYOUTS, load, save

os.environ["HF_HUB_OFFLINE"] = "1"
from diffusers import StableDiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from .test_lora import made_for  # noqa: E402

VECTORS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) * 0.1
PROMPT = "a photo of {} on the beach"


@pytest.fixture
def pipeline(clip):
    """diffusers' text half of Stable Diffusion, with the toy CLIP's weights."""
    encoder = clip.cond_stage_model.clip_l.transformer
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=32, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )
    model = CLIPTextModel(config).eval()
    own = model.state_dict()
    weights = {name: w for name, w in encoder.state_dict().items() if not name.startswith("text_projection")}
    if not own.keys() & weights.keys():  # transformers 5 drops the prefix
        weights = {name.removeprefix("text_model."): w for name, w in weights.items()}
    assert not model.load_state_dict({k: v.clone() for k, v in weights.items()}, strict=False).unexpected_keys
    tokenizer = CLIPTokenizer.from_pretrained(Path(comfy.sd1_clip.__file__).parent / "sd1_tokenizer")
    return StableDiffusionPipeline(
        vae=None, text_encoder=model, tokenizer=tokenizer, unet=None, scheduler=None, safety_checker=None,
        feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )


def theirs(pipeline, placeholder):
    text = pipeline.maybe_convert_prompt(PROMPT.format(placeholder), pipeline.tokenizer)
    tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        return pipeline.text_encoder(tokens.input_ids)[0]


def ours(clip, concept):
    taught = with_words(clip, concept.words)
    return taught.encode_from_tokens(taught.tokenize(PROMPT.format(concept.words[0].placeholder)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2])
def test_our_files_there(pipeline, clip, tmp_path, layout, count):
    concept = Concept((Word("<mine>", "cat", {"clip_l": VECTORS[:count]}),))
    path = save(concept, tmp_path, "mine", layout=layout)
    pipeline.load_textual_inversion(str(path), token="<mine>")
    torch.testing.assert_close(theirs(pipeline, "<mine>"), ours(clip, concept), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_their_files_here(pipeline, clip, tmp_path, ending):
    path = tmp_path / f"learned_embeds.{ending}"
    (save_file if ending == "safetensors" else torch.save)({"<dog>": VECTORS}, path)
    pipeline.load_textual_inversion(str(path))
    concept = load(path)
    assert concept.words[0].placeholder == "<dog>"
    torch.testing.assert_close(theirs(pipeline, "<dog>"), ours(clip, concept), rtol=1e-4, atol=1e-5)


def test_every_name_of_a_lora_is_one_of_diffusers_where_the_word_lies_beside_it(model, tmp_path):
    """It refuses all of a file with a name that does not say lora."""
    made = made_for(model)
    dual = torch.randn(len(made.edit.target_input), generator=torch.Generator().manual_seed(1))
    for with_word in (True, False):
        path = tmp_path / f"{with_word}.safetensors"
        path.write_bytes(to_bytes(to_lora(model, made, dual, with_word=with_word), made))
        names = StableDiffusionPipeline.lora_state_dict(path)[0].keys()
        assert all("lora" in name for name in names) != with_word
    assert all(name.startswith("unet.") for name in names) and len(names) == 4 * len(made.edit.values)
