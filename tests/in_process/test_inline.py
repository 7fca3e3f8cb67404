"""Concepts as text in a workflow: they come back whole, and one sentence says what happened to those that do not."""

import base64
import json
import random
import re
import zlib
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from concepts_pack.nodes.inline_concept import ConceptsInline
from concepts_pack.perfusion import file
from concepts_pack.perfusion.inline import LARGEST, describe, from_text, to_text
from concepts_pack.textual_inversion import file as word_file
from concepts_pack.textual_inversion.concept import Concept, Word

from .test_concept_file import concept, one_sentence

COVER = "ssmd_cover_images"
KINDS = {
    "perfusion": concept(),
    "perfusion with keys": concept(keys=["middle_block.1.transformer_blocks.0"]),
    "perfusion of SDXL": concept(clip_l=32, clip_g=48),
    "word": Concept(concept().words, metadata=concept().metadata),
    "word of SDXL": Concept(concept(clip_l=32, clip_g=48).words, metadata=concept().metadata),
}
TEXT = to_text(concept())


def to_bytes(made):
    return word_file.to_bytes(made) if made.edit is None else file.to_bytes(made)


@pytest.fixture(params=KINDS)
def made(request):
    return KINDS[request.param]


def test_comes_back_as_from_its_file_without_the_cover(made):
    back = from_text(to_text(made))
    assert COVER in made.metadata and COVER not in back.metadata
    bare = replace(made, metadata={name: text for name, text in made.metadata.items() if name != COVER})
    assert to_bytes(back) == to_bytes(bare)
    assert to_text(back) == to_text(made) == to_text(made)


def test_is_plain_text_of_two_lines(made):
    text = to_text(made)
    assert re.fullmatch(r"concept (word|perfusion) \d+ [0-9a-f]{16}\n[A-Za-z0-9+/]+=*", text)
    assert json.loads(json.dumps(text)) == text


def test_survives_what_editors_do_to_text():
    head, body = TEXT.split("\n")
    wrapped = "\r\n".join(body[start:start + 76] for start in range(0, len(body), 76))
    assert to_text(from_text(f"\n  {head} \r\n{wrapped}\n\n")) == TEXT
    assert to_text(from_text(f"{head} {body}")) == to_text(from_text(TEXT.replace(" ", "\n"))) == TEXT


def test_is_small():
    large = concept({f"input_blocks.{n}.1.transformer_blocks.0": 780 for n in range(16)}, clip_l=768)
    assert len(to_text(large)) < 45_000 and len(to_text(large)) < 1.34 * len(file.to_bytes(large))


def packed(data, said=None, kind="perfusion"):
    """A text for any bytes, whose first line may be that of other bytes."""
    said = data if said is None else said
    head = f"concept {kind} {len(said)} {sha256(said).hexdigest()[:16]}"
    return f"{head}\n{base64.b64encode(zlib.compress(data)).decode()}"


FILE = file.to_bytes(concept())


@pytest.mark.parametrize(("text", "complaint"), [
    ("a cat on grass", "not a concept: it starts with 'a cat on grass'"),
    ("", "not a concept: it starts with ''"),
    (TEXT.split("\n")[1], "not a concept: it starts with"),
    (TEXT.replace("perfusion", "e4t", 1), "not a concept: it starts with 'concept e4t"),
    (f"concept perfusion {'9' * 5000} {'0' * 16}\nAAAA", "not a concept: it starts with"),
    (TEXT.split("\n")[0], "cut short: it holds 0 of"),
    (TEXT[:-8], "cut short"),
    (TEXT[:-1], "cut short"),
    (TEXT[:len(TEXT) // 2 // 4 * 4], "cut short: it holds"),
    (TEXT[:200] + "!" + TEXT[201:], "has been changed: what follows its first line cannot be unpacked"),
    (TEXT[:200] + "é" + TEXT[201:], "has been changed: what follows its first line cannot be unpacked"),
    (packed(FILE[:-1] + b"x", FILE), "has been changed: its checksum is [0-9a-f]{16}, not [0-9a-f]{16}"),
    (packed(FILE + b"x", FILE), f"has been changed: it holds more than its {len(FILE)} bytes"),
    (packed(b"\0" * 9_000_000, b"\0" * 9), "has been changed: it holds more than its 9 bytes"),
    (packed(b"hello"), "The concept's text is not a readable safetensors file"),
    (packed(FILE, kind="word"), "The concept's text is not an embedding"),
    (packed(word_file.to_bytes(KINDS["word"])), "The concept's text is not a Perfusion concept"),
    (TEXT + " " * LARGEST, f"characters long; at most {LARGEST} fit"),
])
def test_other_text_is_refused(text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        from_text(text)
    assert one_sentence(error.value)


def test_any_shorter_text_is_refused():
    for length in range(0, len(TEXT), 7):
        with pytest.raises(ValueError) as error:
            from_text(TEXT[:length])
        assert one_sentence(error.value)


def test_changed_text_is_refused():
    rng = random.Random(0)
    for _ in range(1000):
        place = rng.randrange(len(TEXT))
        changed = TEXT[:place] + rng.choice("AZaz09+/= \n") + TEXT[place + rng.randint(0, 3):]
        try:
            read = from_text(changed)
        except ValueError as error:
            assert one_sentence(error)
        else:
            assert to_text(read) == TEXT  # only blanks came in, or the same character


def test_a_concept_that_is_too_large():
    noise = base64.b64encode(random.Random(0).randbytes(LARGEST)).decode()
    with pytest.raises(ValueError, match="characters long; at most"):
        to_text(replace(concept(), metadata={"notes": noise}))


def test_several_words_do_not_fit():
    two = Concept((concept().words[0], Word("<two>", "dog", {"clip_l": torch.ones(1, 32)})))
    with pytest.raises(ValueError, match="A file holds one word; this concept has 2"):
        to_text(two)


def test_node_turns_a_concept_into_text_and_back(made):
    output = ConceptsInline.execute(text="left over", concept=made)
    given, text = output.result
    assert given is made and text == to_text(made)
    *_, size, checksum = text.split("\n")[0].split()
    shown = output.ui.as_dict()["text"][0]
    assert "<mine>" in shown and checksum in shown and f"{int(size) / 1000:.1f} KB" in shown
    again = ConceptsInline.execute(text=f"{text}\n")
    assert to_text(again.result[0]) == text and again.result[1] == f"{text}\n"
    assert describe(text) in again.ui.as_dict()["text"][0]


def test_node_reads_a_first_line_that_was_wrapped():
    wrapped = TEXT.replace("\n", " ").replace(" ", "\r\n", 3)
    output = ConceptsInline.execute(text=wrapped)
    assert to_text(output.result[0]) == TEXT
    *_, checksum = TEXT.split("\n")[0].split()
    assert output.ui.as_dict()["text"][0].endswith(f"checksum {checksum}")


@pytest.mark.parametrize("text", ["", "  \n"])
def test_node_without_either(text):
    with pytest.raises(ValueError, match="There is no concept: paste one as text, or connect one."):
        ConceptsInline.execute(text=text)
