"""The covariance of a text encoder: what is counted, what it is kept for, and that it is measured once."""

import logging
import re

import comfy.model_management
import concepts_pack.perfusion.covariance as covariance
import folder_paths
import pytest
import torch
from concepts_pack.host.clip_overlay import with_words
from concepts_pack.host.progress import Cancelled
from concepts_pack.host.text import encode, encode_batch, fingerprint_of, plain, widths
from concepts_pack.microworld import captions as microworld
from concepts_pack.microworld.scene import COLOURS, PATTERNS, RELATIONS
from concepts_pack.microworld.shapes import CLASSES
from concepts_pack.perfusion.corpus import captions
from concepts_pack.perfusion.covariance import corpus_name, precision, precision_of, uncentred
from concepts_pack.textual_inversion.concept import Word
from safetensors.torch import load_file, save, save_file

TEXTS = ["a cat", *captions(count=40), "a " + "very " * 100 + "long one"]
OWN = "\n".join(TEXTS)
KEY = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The empty user folder's place for covariances, with nothing remembered."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "concepts" / "covariances"


@pytest.fixture
def batches(monkeypatch):
    """The sizes of the batches that are encoded."""
    sizes = []

    def counted(clip, texts):
        sizes.append(len(texts))
        return encode_batch(clip, texts)

    monkeypatch.setattr(covariance, "encode_batch", counted)
    return sizes


@pytest.fixture(params=["SD15", "SD20", "SDXL"])
def any_clip(request, clip):
    if request.param == "SD15":
        return clip
    from .conftest import make_other_clip

    with torch.inference_mode():
        return make_other_clip(request.param)


def forget(monkeypatch):
    monkeypatch.setattr(covariance, "_remembered", {})


def with_lora(clip):
    tuned = clip.clone()
    tuned.add_patches({KEY: (torch.ones_like(clip.cond_stage_model.state_dict()[KEY]),)}, 0.5)
    return tuned


def reference(clip, texts):
    """Σ e eᵀ / n one caption and one token at a time, from the start token to the first end token."""
    total, count = 0, 0
    for text in texts:
        tokens = [token for token, _ in next(iter(clip.tokenize(text).values()))[0]]
        for row in encode(clip, text)[0][0, : tokens.index(49407) + 1].double():
            total, count = total + torch.outer(row, row), count + 1
    return total / count, count


def test_captions_are_many_different_and_the_same_every_time():
    found = captions()
    assert len(found) == len(set(found)) == 4000
    assert found == captions(0, 4000) != captions(1, 4000)
    lengths = sorted(len(text.split()) for text in found)
    assert lengths[0] == 2 and lengths[400] <= 5 and 8 <= lengths[2000] <= 12
    assert 30 <= lengths[-40] <= lengths[-1] <= 40
    assert all(re.fullmatch(r"[A-Za-z0-9 ,.;'-]+", text) and "  " not in text for text in found)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in found)
    counts = {}
    for word in re.findall(r"[\w'-]+", " ".join(found)):
        counts[word] = counts.get(word, 0) + 1
    assert len(counts) > 900 and sum(count >= 5 for count in counts.values()) > 700


def test_captions_use_the_words_of_the_sample_world():
    found = " ".join(captions())
    places = [place for options in microworld.PLACES.values() for place in options]
    known = [*CLASSES, *COLOURS, *PATTERNS, *RELATIONS, *places, *microworld.FILLERS, "wearing a hat",
             "to the right of", *filter(None, microworld.PREFIXES)]
    assert not [word for word in known if f"{word.strip()} " not in found]


def test_a_batch_is_encoded_as_its_texts_one_by_one(any_clip):
    found = encode_batch(any_clip, TEXTS)
    for text, encoding in zip(TEXTS, found, strict=True):
        context = encode(any_clip, text)[0][0, : len(encoding)]
        torch.testing.assert_close(encoding, context, rtol=1e-4, atol=1e-5)
    assert len(found[0]) == 4 and len(found[-1]) == 77  # start, a, cat, end; and 75 of a long caption
    assert all(len(encoding) < 77 for encoding in found[:-1])


def test_the_covariance_is_that_of_single_tokens_without_padding(any_clip):
    width = sum(widths(any_clip).values())
    found, count = uncentred(covariance._encodings(any_clip, TEXTS), width)
    expected, tokens = reference(any_clip, TEXTS)
    assert count == tokens < 77 * len(TEXTS) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_precision_inverts_the_covariance_with_a_ridge(any_clip, folder):
    width = sum(widths(any_clip).values())
    with torch.inference_mode():
        found = precision(any_clip, OWN)
    assert found.shape == (width, width) and found.dtype == torch.float32 and not found.is_inference()
    c, count = reference(any_clip, TEXTS)
    ridge = 1e-3 if count < 10 * width else 1e-6
    expected = c + ridge * c.trace() / width * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(found.double() @ expected, torch.eye(width, dtype=torch.float64), rtol=0, atol=0.02)
    assert torch.equal(found, found.T)
    assert {name: tensor.shape for name, tensor in load_file(*folder.iterdir()).items()} == {
        "covariance": (width, width)}


@pytest.mark.parametrize(("tokens", "ridge"), [(39, 1e-3), (40, 1e-6)])
def test_few_tokens_take_a_larger_ridge(tokens, ridge):
    c = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(precision_of(c, tokens), torch.diag(1 / (c.diag() + ridge * 2)))


@pytest.mark.parametrize("broken", [
    torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.diag(torch.tensor([1.0, 1.0, float("inf")])),
    torch.diag(torch.tensor([1.0, 1.0, -1.0])),
])
def test_what_cannot_be_inverted_is_said_in_one_sentence(broken):
    with pytest.raises(ValueError, match=r"^The covariance of this text encoder cannot be inverted: [^.]+\.$"):
        precision_of(broken, 1000)


def test_without_own_text_the_captions_of_the_pack_are_used(clip, batches, monkeypatch):
    monkeypatch.setattr(covariance, "captions", lambda: TEXTS)
    covariance.own_captions.cache_clear()
    try:
        blank = precision(clip, " \n\n")
        assert sum(batches) == len(TEXTS) and torch.equal(precision(clip), blank)
        assert torch.equal(precision(clip, f"\n{OWN}\n\n"), blank) and sum(batches) == len(TEXTS)
    finally:
        covariance.own_captions.cache_clear()


def test_it_is_measured_once_also_by_another_process(clip, folder, batches, monkeypatch):
    first = precision(clip, OWN)
    measured = len(batches)
    assert measured == -(-len(TEXTS) // covariance.BATCH) and len(list(folder.iterdir())) == 1
    assert precision(clip, OWN) is first
    forget(monkeypatch)
    assert torch.equal(precision(clip, OWN), first) and len(batches) == measured


def test_only_the_last_few_are_remembered(clip, folder):
    for number in range(covariance.REMEMBERED + 2):
        precision(clip, f"a cat\na dog\n{number}")
    assert len(covariance._remembered) == covariance.REMEMBERED < len(list(folder.iterdir()))


def test_texts_clip_skip_and_encoder_have_files_of_their_own(clip, folder):
    from .conftest import fill, make_clip

    skipped = clip.clone()
    skipped.clip_layer(-2)
    with torch.inference_mode():
        other = make_clip()
        fill(other.cond_stage_model, 5)
    found = [precision(clip, OWN), precision(skipped, OWN), precision(other, OWN), precision(clip, "a cat\na dog")]
    assert len(list(folder.iterdir())) == 4
    assert not any(torch.allclose(one, two) for n, one in enumerate(found) for two in found[:n])
    assert len({fingerprint_of(one) for one in (clip, skipped, other)}) == 3
    expected, _ = reference(skipped, TEXTS)
    skipped_c = min((load_file(path)["covariance"] for path in folder.iterdir()), key=lambda c: (c - expected).norm())
    torch.testing.assert_close(skipped_c.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_clip_skip_that_changes_nothing_changes_no_fingerprint(any_clip):
    """-1 is the last layer of SD1.x and SD2.x, whose norm the host applies; SDXL leaves that norm out."""
    standard = fingerprint_of(any_clip)
    for layer in (-1, -2, -99):
        skipped = any_clip.clone()
        skipped.clip_layer(layer)
        same = torch.equal(encode(skipped, "a cat")[0], encode(any_clip, "a cat")[0])
        assert same == (fingerprint_of(skipped) == standard)


def test_fingerprints_ignore_precision_and_what_encodings_do_not_depend_on(clip):
    from .conftest import make_clip

    with torch.inference_mode():
        other = make_clip()
        other.cond_stage_model.clip_l.transformer.text_projection.weight.data.fill_(7)
        other.cond_stage_model.clip_l.logit_scale.data.fill_(7)
        assert fingerprint_of(other) == fingerprint_of(clip)
        other.cond_stage_model.half()
        assert fingerprint_of(other) == fingerprint_of(clip)
        other.cond_stage_model.clip_l.transformer.text_model.final_layer_norm.weight.data.add_(1)
    assert fingerprint_of(other) != fingerprint_of(clip)


def test_a_lora_on_the_clip_changes_nothing_and_stays(clip, folder, batches, monkeypatch):
    """Also while its weights are the ones loaded."""
    expected, fingerprint = precision(clip, OWN), fingerprint_of(clip)
    tuned = with_lora(clip)
    before = tuned.encode_from_tokens(tuned.tokenize("a cat"))
    assert not torch.equal(before, encode_of(clip, "a cat"))
    tuned.encode_from_tokens(tuned.tokenize("a cat"))
    assert fingerprint_of(tuned) == fingerprint_of(clip) == fingerprint
    measured = len(batches)
    assert precision(tuned, OWN) is expected and len(batches) == measured
    forget(monkeypatch)
    next(folder.iterdir()).unlink()
    torch.testing.assert_close(precision(tuned, OWN), expected)
    assert len(batches) == 2 * measured and tuned.patcher.patches
    assert torch.equal(tuned.encode_from_tokens(tuned.tokenize("a cat")), before)


def encode_of(clip, text):
    return clip.encode_from_tokens(clip.tokenize(text))


def test_learned_words_embeddings_and_weights_mean_nothing_in_own_text(clip, embeddings):
    save_file({"emb_params": torch.ones(2, 32)}, embeddings / "two.safetensors")
    overlaid = with_words(clip, [Word("cat", "dog", {"clip_l": torch.ones(3, 32)})])
    text = "a (striped:1.4) cat on embedding:two"
    assert any(torch.is_tensor(token) for token, _ in overlaid.tokenize(text)["l"][0])
    tokens = plain(overlaid).tokenize(text)["l"][0]
    assert all(isinstance(token, int) and weight == 1 for token, weight in tokens)
    ids = clip.tokenizer.clip_l.tokenizer(text)["input_ids"]
    assert [token for token, _ in tokens[: len(ids)]] == ids
    assert torch.equal(precision(overlaid, OWN), precision(clip, OWN))
    assert any(torch.is_tensor(token) for token, _ in overlaid.tokenize(text)["l"][0])


@pytest.mark.parametrize("damaged", [
    b"", b"not safetensors", save({"covariance": torch.eye(31)}, {"tokens": "9"}),
    save({"covariance": torch.eye(32)}), save({"covariance": torch.eye(32)}, {"tokens": "many"}),
    save({"other": torch.eye(32)}, {"tokens": "9"}), save({"covariance": torch.zeros(32, 32)}, {"tokens": "9"}),
    save({"covariance": torch.full((32, 32), float("nan"))}, {"tokens": "9"}),
])
def test_a_damaged_file_is_measured_again_and_replaced(clip, folder, batches, monkeypatch, damaged):
    first = precision(clip, OWN)
    (path,) = folder.iterdir()
    whole, measured = path.read_bytes(), len(batches)
    for content in (damaged, whole[:-5]):
        path.write_bytes(content)
        forget(monkeypatch)
        assert torch.equal(precision(clip, OWN), first) and path.read_bytes() == whole
    assert len(batches) == 3 * measured


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(clip, folder, caplog):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "concepts"):
        found = precision(clip, OWN)
    assert "will be measured again next time" in caplog.text and precision(clip, OWN) is found


def test_progress_counts_captions_and_cancel_leaves_nothing(clip, folder, batches, monkeypatch):
    seen = []

    def hook(value, total, *_, **__):
        seen.append((value, total))
        comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", hook)
    with pytest.raises(Cancelled):
        precision(clip, OWN)
    assert seen == [(covariance.BATCH, len(TEXTS))] and len(batches) == 1 and not folder.exists()
    monkeypatch.setattr("comfy.utils.PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    precision(clip, OWN)
    assert seen[-1] == (len(TEXTS), len(TEXTS))


def test_each_corpus_has_a_name_of_its_own():
    """By which a stopped training knows its own states."""
    assert corpus_name(" a cat\n\n a dog ") == corpus_name("a cat\na dog") != corpus_name("a cat\na bird")
    assert corpus_name(" \n") == ""
