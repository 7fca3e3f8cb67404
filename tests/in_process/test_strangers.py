"""Whether a picture is of the domain, as the sample model tells it."""

import logging

import pytest
import torch
from concepts_pack.e4t import domain
from concepts_pack.e4t.method import Predictor
from concepts_pack.e4t.strangers import strangeness, tell_strangers
from concepts_pack.host.checkpoints import load_checkpoint
from concepts_pack.host.copies import private_copies
from concepts_pack.host.pictures import vae_encode
from concepts_pack.host.text import encode
from concepts_pack.microworld.domain import instance_photos
from concepts_pack.microworld.host import CHECKPOINT, WEIGHTS
from concepts_pack.microworld.world import concept_photos

OTHERS = ("validation car", "validation teapot", "validation cat")


@pytest.fixture(scope="module")
def latents():
    """Of four teddies, and of two pictures of each of the others."""
    model, _, vae = load_checkpoint(CHECKPOINT)
    teddies = torch.cat([torch.from_numpy(instance_photos("teddy", "test", number, 1)[0]) for number in range(4)])
    others = torch.cat([torch.from_numpy(concept_photos(name, 2, 5)[0]) for name in OTHERS])
    pictures = torch.cat([teddies.float() / 255, others])
    return model.model.process_latent_in(vae_encode(vae, pictures))


@pytest.fixture
def predictor():
    model, clip, _ = load_checkpoint(CHECKPOINT)
    known = domain.load(WEIGHTS / "domains" / "teddy.safetensors")
    with private_copies(model, clip) as (unet, text):
        metric = torch.eye(encode(text, "")[0].shape[-1])
        made = Predictor(unet, text, known.word, known.encoder, {}, known.scale, metric)
        yield made
        made.installed.close()


def test_the_class_word_explains_teddies_and_nothing_else(predictor, latents):
    found = strangeness(predictor, latents, 0)
    assert found[:4].max() < 1 < found[4:].min()


def test_strangers_are_told_by_their_number(predictor, latents, caplog):
    with caplog.at_level(logging.WARNING, logger="concepts"):
        tell_strangers(predictor, latents[3:5], 0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Picture 2 does not look like a teddy")
