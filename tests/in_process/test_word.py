"""How vectors start and how long they are, and what may be a placeholder or a sentence."""

import pytest
import torch
from concepts_pack.textual_inversion.templates import BY_KIND, fill, sentences
from concepts_pack.textual_inversion.word import between, check_placeholder, spread, with_norm
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 6), st.integers(1, 6))
def test_spread_covers_every_row_in_order(rows, count):
    spread_out = spread(torch.eye(rows), count)
    assert spread_out.shape == (count, rows)
    torch.testing.assert_close(spread_out.norm(dim=1), torch.ones(count))
    assert (spread_out.sum(0) > 0).all()


def test_as_many_vectors_as_rows_are_the_rows():
    rows = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    torch.testing.assert_close(spread(rows, 3), rows)


def test_nothing_to_start_from():
    with pytest.raises(ValueError, match="says nothing"):
        spread(torch.zeros(0, 8), 1)


def test_norm_moves_by_the_share():
    v = torch.randn(4, 8)
    assert torch.equal(with_norm(v, 0.4, 0.0), v)
    torch.testing.assert_close(with_norm(v, 0.4, 1.0).norm(dim=1), torch.full((4,), 0.4))
    half = with_norm(v, 0.4, 0.5)
    torch.testing.assert_close(half.norm(dim=1), (v.norm(dim=1) + 0.4) / 2)
    torch.testing.assert_close(torch.cosine_similarity(half, v), torch.ones(4))


def test_between_ends_where_it_should():
    start, learned = torch.randn(2, 1, 8)
    torch.testing.assert_close(between(start, learned, 0.0), start)
    torch.testing.assert_close(between(start, learned, 1.0), learned)
    torch.testing.assert_close(between(start, learned, 2.0), 2 * learned - start)


@pytest.mark.parametrize("good", ["<mine>", "<my-cat_2>", "zwx", "Zwx7", "猫", "<кот>", "<été-2>"])
def test_placeholders(good):
    check_placeholder(good)


@pytest.mark.parametrize(("bad", "complaint"), [
    ("", "is empty"), ("my cat", "one word"), ("<my cat>", "one word"), ("a,b", "one word"), ("<a", "one word"),
    ("(a)", "one word"), ("a:1", "one word"), ("../a", "one word"), ("a\nb", "one word"), ("<>", "one word"),
    ("<黒 猫>", "one word"), ("猫/犬", "one word"), ("«mine»", "one word"),
])
def test_bad_placeholders(bad, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_placeholder(bad)


@pytest.mark.parametrize("kind", BY_KIND)
def test_templates_have_one_place(kind):
    assert sentences(kind, "  \n ") == BY_KIND[kind]
    assert all(sentence.count("{}") == 1 for sentence in BY_KIND[kind])


def test_own_sentences_replace_the_templates():
    assert sentences("object", "one {}\n\n {} {0}? \n") == ("one {}", "{} {0}?")
    assert fill("{} {0}?", "<mine>") == "<mine> {0}?"
    with pytest.raises(ValueError, match="'no place' does not"):
        sentences("object", "a {}\nno place")
