"""The direction of a concept without a gate: it tells the word from the tokens that have read it."""

import numpy as np
import pytest
import torch
from concepts_pack.host.text import encode, ready
from concepts_pack.perfusion import linear
from concepts_pack.perfusion.concept import Edit
from concepts_pack.perfusion.edit import similarity
from concepts_pack.perfusion.linear import linear_dual
from concepts_pack.textual_inversion.apply import apply_words
from concepts_pack.textual_inversion.concept import Concept, Word

from .test_covariance import with_lora

WIDTH = 32


@pytest.fixture
def concept(clip, monkeypatch):
    """A concept of random numbers whose target input is what the text encoder makes of its word."""
    root = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(linear, "precision", lambda clip: root @ root.T / WIDTH + torch.eye(WIDTH))
    word = Word("<mine>", "cat", {"clip_l": torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2))})
    taught = apply_words(clip, Concept((word,), None, {"modelspec.base_model": "SD15"}), 1.0)
    target = encode(ready(taught), "a <mine> at sea")[0][0, 2].float()
    return Concept((word,), Edit(target, target.flip(0), {"layer": torch.ones(4)}), {"modelspec.base_model": "SD15"})


def test_it_is_the_inverse_of_three_covariances(clip, concept):
    taught, target = ready(apply_words(clip, concept, 1.0)), concept.edit.target_input
    metric = linear.precision(clip)
    prompts = linear._prompts("<mine>")
    assert len(set(prompts)) == linear.PROMPTS and all("<mine>" in prompt for prompt in prompts)
    read, strays, count = np.zeros((WIDTH, WIDTH)), np.zeros((WIDTH, WIDTH)), 0
    for prompt in prompts:
        encoding = encode(taught, prompt)[0][0].double().numpy()
        tokens = [token for section in taught.tokenize(prompt)["l"] for token, _ in section]
        place = next(number for number, token in enumerate(tokens) if torch.is_tensor(token))
        for token in encoding[place + 1:]:
            read, count = read + np.outer(token, token), count + 1
        stray = encoding[place] - target.double().numpy()
        strays = strays + np.outer(stray, stray) / len(prompts)
    whole = np.linalg.inv(metric.double().numpy()) + read / count + strays
    whole += linear.RIDGE * np.trace(read / count + strays) / WIDTH * np.eye(WIDTH)
    expected = np.linalg.solve(whole, target.double().numpy())
    np.testing.assert_allclose(linear_dual(clip, concept), expected, rtol=1e-3, atol=1e-5)


def test_tokens_behind_the_word_are_less_like_it_and_the_word_is_not(clip, concept):
    target = concept.edit.target_input[None]
    duals = [target @ linear.precision(clip), linear_dual(clip, concept)[None]]
    taught = ready(apply_words(clip, concept, 1.0))
    encoding = encode(taught, "a painting of the <mine>, under a tree with two birds")[0][0].float()
    found = [similarity(encoding, target, dual)[:, 0] for dual in duals]
    (word, behind), (told_word, told_behind) = ((s[5].item(), s[6:].square().mean().item()) for s in found)
    assert told_behind < 0.7 * behind
    assert abs(told_word - 1) < max(0.3, abs(word - 1))


def test_loras_on_the_text_encoder_do_not_count(clip, concept):
    torch.testing.assert_close(linear_dual(with_lora(clip), concept), linear_dual(clip, concept))


def test_another_text_encoder_is_refused(clip, concept):
    wide = Edit(torch.ones(WIDTH + 16), torch.ones(WIDTH + 16), {"layer": torch.ones(4)})
    with pytest.raises(ValueError, match=f"<mine> was learned on .* gives {WIDTH + 16} numbers .* gives {WIDTH}:"):
        linear_dual(clip, Concept(concept.words, wide, concept.metadata))
