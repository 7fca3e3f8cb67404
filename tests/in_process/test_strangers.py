"""Whether a picture is of the domain, as the sample model tells it."""

import logging

import pytest
import torch
from concepts_pack.e4t import domain
from concepts_pack.e4t.method import Predictor
from concepts_pack.e4t.strangers import tell_strangers
from concepts_pack.e4t.tune import SHARE, predict_each
from concepts_pack.host.checkpoints import load_checkpoint
from concepts_pack.host.copies import private_copies
from concepts_pack.host.pictures import to_latents
from concepts_pack.host.text import encode
from concepts_pack.microworld.domain import instance_photos
from concepts_pack.microworld.host import CHECKPOINT, WEIGHTS
from concepts_pack.microworld.world import concept_photos

OTHERS = ("validation car", "validation teapot", "validation cat")


def encoded(pictures):
    model, _, vae = load_checkpoint(CHECKPOINT)
    return to_latents(model, vae, pictures)


def teddies(*views):
    """A picture (n h w 3) of each of these views of these test instances."""
    pictures = [instance_photos("teddy", "test", number, view + 1)[0][view] for number, view in views]
    return torch.stack([torch.from_numpy(picture) for picture in pictures]).float() / 255


@pytest.fixture
def predictor():
    model, clip, _ = load_checkpoint(CHECKPOINT)
    known = domain.load(WEIGHTS / "domains" / "teddy.safetensors")
    with private_copies(model, clip) as (unet, text):
        metric = torch.eye(encode(text, "")[0].shape[-1])
        made = Predictor(unet, text, known.word, known.encoder, {}, SHARE * known.scale, metric)
        yield made
        made.installed.close()


def said_of(predictor, pictures, caplog):
    latents = encoded(pictures)
    words = [start.words for start in predict_each(predictor, predictor.encoder.seen(pictures, None), latents, 0)]
    with caplog.at_level(logging.WARNING, logger="concepts"):
        tell_strangers(predictor, latents, words, 0)
    return [record.getMessage() for record in caplog.records]


def test_the_class_word_explains_teddies_and_nothing_else(predictor, caplog):
    assert not [said for number in range(4) for said in said_of(predictor, teddies((number, 0)), caplog)]
    others = torch.cat([torch.from_numpy(concept_photos(name, 2, 5)[0]) for name in OTHERS])
    said = said_of(predictor, others, caplog)
    assert len(said) == 6
    assert all(s.startswith(f"Picture {n} does not look like a teddy") for n, s in enumerate(said, 1))


def test_pictures_of_one_thing_are_not_told_apart(predictor, caplog):
    for number in range(5):
        assert said_of(predictor, teddies((number, 0), (number, 1), (number, 2)), caplog) == []


def test_a_picture_of_another_thing_is_told(predictor, caplog):
    """Of five times one is let pass."""
    for number in range(5):
        said_of(predictor, teddies((number, 0), (number, 1), (number + 1, 0)), caplog)
    said = [record.getMessage() for record in caplog.records]
    assert all("seems to show another teddy than the other pictures" in sentence for sentence in said)
    assert sum(sentence.startswith("Picture 3 ") for sentence in said) >= 4
