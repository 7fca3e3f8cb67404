"""Words in memory mean exactly what the same vectors in an embedding file mean to ComfyUI itself."""

import pytest
import torch
from comfy.sdxl_clip import SDXLTokenizer
from concepts_pack.host.clip_overlay import with_words, words_in
from concepts_pack.host.copies import private_copies
from concepts_pack.host.text import encode, encode_all, is_ordinary_word, rows, vocabulary, widths, written_words
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.concept import Concept, Word
from safetensors.torch import save_file

from .conftest import WIDTH, make_other_clip
from .test_perfusion import generator


def word(placeholder, count=1, seed=0, width=32, encoder="clip_l", class_word="cat"):
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return Word(placeholder, class_word, {encoder: vectors})


def same_tokens(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert len(left[name]) == len(right[name])
        for a, b in zip(sum(left[name], []), sum(right[name], []), strict=True):
            assert a[1] == b[1]
            assert torch.equal(a[0], b[0]) if torch.is_tensor(a[0]) else a[0] == b[0]


@pytest.mark.parametrize(("ours", "file"), [
    ("a photo of <one> on grass", "a photo of embedding:one on grass"),
    ("<one>", " embedding:one"),
    ("a <one>, on grass", "a embedding:one, on grass"),
    ("(a <one>:1.3) there", "(a embedding:one :1.3) there"),
    ("a (<one>:0.7)", "a ( embedding:one :0.7)"),
    ("a (<one>)", "a ( embedding:one )"),
    ("a ((<one>)) and [b]", "a (( embedding:one )) and [b]"),
    ("A <ONE>!", "A embedding:one !"),
    ("a <one><one>.", "a embedding:one embedding:one ."),
    ("a\n<one>\nb", "a\n embedding:one b"),
    ("a <three> b", "a embedding:three b"),
    ("word " * 70 + "<three> and " + "more " * 30, "word " * 70 + "embedding:three and " + "more " * 30),
])
def test_equals_the_embedding_file(clip, embeddings, ours, file):
    one, three = word("<one>"), word("<three>", 3, 1)
    save_file({"emb_params": one.vectors["clip_l"]}, embeddings / "one.safetensors")
    save_file({"emb_params": three.vectors["clip_l"]}, embeddings / "three.safetensors")
    same_tokens(with_words(clip, [one, three]).tokenize(ours), clip.tokenize(file))
    assert torch.equal(encode(with_words(clip, [one, three]), ours)[0], clip.encode_from_tokens(clip.tokenize(file)))


def test_rows_of_an_embedding_saved_with_its_gradient_on_can_be_learned_from(clip, embeddings):
    torch.save({"string_to_param": {"*": torch.ones(1, WIDTH, requires_grad=True)}}, embeddings / "trained.pt")
    assert not rows(clip, "embedding:trained")["clip_l"].requires_grad


@pytest.mark.parametrize(("written", "expected"), [
    ("<猫>", "<猫>"), ("<КОТ>", "<кот>"), ("<ΟΔΟΣ>", "<οδος>"), ("<οδοσ>", "<οδος>"), ("<İ>", "<İ>"), ("<ſ>", "<s>"),
    ("<été>", "<Été>"),
])
def test_words_of_any_script_are_found_in_any_case(clip, embeddings, written, expected):
    placeholders = ("<猫>", "<犬>", "<кот>", "<οδος>", "<İ>", "<s>", "<Été>")
    taught = with_words(clip, [word(placeholder, seed=number) for number, placeholder in enumerate(placeholders)])
    (meant,) = words_in(taught, f"a photo of {written}, {written}")
    assert meant.placeholder == expected
    save_file({"emb_params": meant.vectors["clip_l"]}, embeddings / "meant.safetensors")
    same_tokens(taught.tokenize(f"a photo of ({written}:1.2)"), clip.tokenize("a photo of ( embedding:meant :1.2)"))


def test_vectors_of_another_length_of_prompt_meet_the_section_border(clip):
    nine = word("<nine>", 9)
    tokens = with_words(clip, [nine]).tokenize("word " * 70 + "<nine>")["l"]
    assert [len(section) for section in tokens] == [77, 77]
    assert sum(torch.is_tensor(token) for section in tokens for token, _ in section) == 9


def test_original_clip_is_untouched(clip):
    prompt, before = "a <one> b", dict(vars(clip.tokenizer))
    expected = clip.tokenize(prompt)
    with_words(clip, [word("<one>")])
    assert vars(clip.tokenizer) == before and "learned_words" not in vars(clip.tokenizer.clip_l)
    same_tokens(clip.tokenize(prompt), expected)


def test_words_chain_in_either_order(clip):
    cat, dog, prompt = word("<cat>"), word("<dog>", 2, 1), "a <cat> beside a <dog>"
    chained = [with_words(with_words(clip, [a]), [b]) for a, b in ((cat, dog), (dog, cat))]
    together = with_words(clip, [cat, dog]).tokenize(prompt)
    for overlaid in chained:
        same_tokens(overlaid.tokenize(prompt), together)


def test_longest_placeholder_wins_and_none_matches_inside_a_word(clip):
    short, long = word("zwx"), word("zwxy", seed=1)
    overlaid = with_words(with_words(clip, [short]), [long])
    same_tokens(overlaid.tokenize("zwxy zwx"), with_words(clip, [long, short]).tokenize("zwxy zwx"))
    found = [t for t, _ in overlaid.tokenize("a zwxy, zwx's zwxyz my-zwx")["l"][0] if torch.is_tensor(t)]
    assert [torch.equal(t, w.vectors["clip_l"][0]) for t, w in zip(found, (long, short), strict=True)] == [True, True]


def test_a_word_that_one_encoder_of_a_pair_lacks_is_told(caplog):
    clip = make_other_clip("SDXL")
    for class_word, read in (("cat", "cat"), ("", "nothing")):
        caplog.clear()
        apply_words(clip, Concept((Word("<mine>", class_word, {"clip_l": torch.ones(1, WIDTH)}),)), 1.0)
        (record,) = caplog.records
        assert f"for clip_l; this CLIP's clip_g reads {read} in its place" in record.getMessage()


def test_what_a_word_holds_for_an_encoder_that_lacks_is_told(clip, caplog):
    vectors = {"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(1, 1280)}
    apply_words(clip, Concept((Word("<mine>", "cat", vectors),), metadata={"modelspec.base_model": "sdxl"}), 1.0)
    (record,) = caplog.records
    assert "<mine> was learned on sdxl for clip_g too, which this CLIP lacks" in record.getMessage()


@pytest.mark.parametrize("placeholder", ["_x", "-y", "__anna__"])
def test_a_placeholder_that_begins_with_a_line_is_not_found_inside_a_word(clip, placeholder):
    overlaid = with_words(clip, [word(placeholder)])
    found = [t for t, _ in overlaid.tokenize(f"my{placeholder} {placeholder} {placeholder}z, ({placeholder})")["l"][0]]
    assert sum(map(torch.is_tensor, found)) == 2


@pytest.mark.parametrize(("ours", "file"), [
    ("a embedding:<one> b", "a embedding:one b"),
    ("a embedding: <one>, b", "a embedding:one, b"),
    ("(embedding:<one>:1.3)", "(embedding:one :1.3)"),
    ("a embedding:ZWX, b", "a embedding:one, b"),
    ("a embedding:zwx. embedding:zwx", "a embedding:one . embedding:one"),
    ("a embedding:people/zwx and zwx", "a embedding:people/zwx and embedding:one"),
    ("embedding:zwx/anna, embedding: zwx.bin", "embedding:zwx/anna, embedding:zwx.bin"),
    ("embedding:other,zwx (embedding:other)zwx", "embedding:other, embedding:one (embedding:other) embedding:one"),
    ("embedding:other<one>", "embedding:other embedding:one"),
])
def test_behind_the_sign_of_an_embedding(clip, embeddings, ours, file):
    """A placeholder means its word there too, unless it is only a part of a file's name."""
    one = word("<one>")
    taught = with_words(clip, [one, Word("zwx", "cat", one.vectors)])
    for seed, name in enumerate(("one", "other", "people/zwx", "zwx/anna", "zwx.bin")):
        (embeddings / name).parent.mkdir(exist_ok=True)
        save_file({"emb_params": word("x", seed=seed).vectors["clip_l"]}, embeddings / f"{name}.safetensors")
    same_tokens(taught.tokenize(ours), clip.tokenize(file))
    assert bool(words_in(taught, ours)) == ("embedding:one" in file)


@pytest.mark.parametrize("text", ["a embedding:", "(embedding: :1.2) cat", "a embedding: embedding:<one>"])
def test_the_sign_of_an_embedding_without_a_name(clip, text):
    one = with_words(clip, [word("<one>")])
    same_tokens(one.tokenize(text), one.tokenize(text.replace("embedding:", "")))


def test_the_files_of_the_host_still_work(clip, embeddings):
    save_file({"emb_params": word("x", seed=5).vectors["clip_l"]}, embeddings / "other.safetensors")
    prompt = "a embedding:other, b"
    same_tokens(with_words(clip, [word("<one>")]).tokenize(prompt), clip.tokenize(prompt))


def test_one_placeholder_cannot_mean_two_things(clip):
    overlaid = with_words(clip, [word("<one>")])
    with_words(overlaid, [word("<one>")])
    with pytest.raises(ValueError, match="<One> already stands for another"):
        with_words(overlaid, [word("<One>", seed=1)])


def test_encoder_without_vectors_reads_the_class_word(clip):
    plain = clip.clone()
    plain.tokenizer = SDXLTokenizer()
    tokens = with_words(plain, [word("<one>", width=768)]).tokenize("a <one>, b")
    assert sum(torch.is_tensor(t) for t, _ in tokens["l"][0]) == 1
    assert tokens["g"] == plain.tokenize("a cat, b")["g"]


def test_gradient_reaches_a_leaf(model, clip):
    leaf = torch.randn(2, 32, requires_grad=True)
    with private_copies(model, clip) as (_, text):
        overlaid = with_words(text, [Word("<one>", "cat", {"clip_l": leaf})])
        context, _ = encode(overlaid, "a (<one>:1.2) " + "word " * 80)
        context.sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.abs().min() > 0


def test_strength_zero_returns_the_clip_itself(clip):
    assert apply_words(clip, Concept((word("<one>"),)), 0) is clip


def test_strength_moves_between_class_word_and_learned_word(clip):
    concept = Concept((word("<one>"),))
    half = apply_words(clip, concept, 0.5).tokenizer.clip_l.learned_words["<one>"].vectors["clip_l"]
    expected = (rows(clip, "cat")["clip_l"] + concept.words[0].vectors["clip_l"]) / 2
    assert torch.allclose(half, expected, atol=1e-6)
    same_tokens(apply_words(clip, concept, 1).tokenize("<one>"), with_words(clip, concept.words).tokenize("<one>"))


def test_word_of_another_size_is_refused(clip):
    with pytest.raises(ValueError, match=r"<one> was learned on .* width 768; this CLIP's clip_l has width 32: load a"):
        apply_words(clip, Concept((word("<one>", width=768),)), 1)
    with pytest.raises(ValueError, match="for clip_g; this CLIP has clip_l"):
        apply_words(clip, Concept((word("<one>", width=1280, encoder="clip_g"),)), 1)


def test_what_the_vocabulary_knows(clip):
    assert widths(clip) == {"clip_l": 32}
    assert is_ordinary_word(clip, "Cat") and not is_ordinary_word(clip, "<cat>") and not is_ordinary_word(clip, "zwx")
    assert len(rows(clip, "a tabby cat")["clip_l"]) == 3


def test_tokens_are_shown_in_the_letters_that_were_written(clip):
    start, *words, end = written_words(clip, "a Café, zwx")
    assert (start, words, end) == ("<|startoftext|>", ["a", "café", ",", "z", "wx"], "<|endoftext|>")
    names, table = vocabulary(clip, "clip_l")
    assert torch.equal(table[names.index("café")], rows(clip, "café")["clip_l"][0])


def test_a_word_without_a_class_word_is_scaled_from_nothing(clip):
    vectors = torch.randn(2, WIDTH, generator=generator(7))
    half = apply_words(clip, Concept((Word("<one>", "", {"clip_l": vectors}),)), 0.5)
    torch.testing.assert_close(half.tokenizer.clip_l.learned_words["<one>"].vectors["clip_l"], vectors / 2)


def test_prompts_of_any_number_of_sections_are_encoded_together(clip):
    texts = ["a cat", "word " * 100, "word " * 180]
    context, _ = encode_all(clip, texts)
    assert context.shape[:2] == (3, 6 * 77)
    for row, text in zip(context, texts, strict=True):
        own = encode(clip, text)[0][0]
        assert torch.equal(row, own.repeat(len(row) // len(own), 1))
