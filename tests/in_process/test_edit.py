"""The exact laws of the gated rank-1 edit, against references of numpy's own in double precision."""

from itertools import permutations

import numpy as np
import pytest
import torch
from concepts_pack.perfusion.edit import (
    KIN,
    components,
    dual_of,
    gate,
    gate_of_kin,
    similarity,
    withheld,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, LAYER, CLOSE = 24, 10, 1e-9
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 4)


def rank_one(weight, target_input, output, dual):
    """The ungated edit as a change Δ of the weight (d_l d), as in ROME: (o* - W i) (C⁻¹ i)ᵀ / <i, i>."""
    residual = output - weight @ target_input
    return torch.outer(residual, dual.to(weight)) / (target_input @ dual.to(target_input))


def law(*strategies):
    """A test that holds for anything these give, tried on thirty."""
    return lambda test: settings(max_examples=30)(given(*strategies)(test))


class World:
    """Random encodings, J concepts and one layer; `metric` is C⁻¹ of a well-spread C."""

    def __init__(self, seed, concepts=3, tokens=7, orthogonal=False):
        rng = np.random.default_rng(seed)
        spread = rng.standard_normal((4 * WIDTH, WIDTH)) * np.geomspace(0.3, 3, WIDTH)
        self.covariance = spread.T @ spread / len(spread)
        self.metric = np.linalg.inv(self.covariance)
        self.i = rng.standard_normal((concepts, WIDTH)) @ np.linalg.cholesky(self.covariance).T
        if orthogonal:
            self.i = orthonormal(self.i, self.metric)
        self.o = rng.standard_normal((concepts, LAYER))
        self.w = rng.standard_normal((LAYER, WIDTH))
        self.e = rng.standard_normal((tokens, WIDTH))
        self.e[0] += self.i.sum(0)
        self.present = rng.random((tokens, concepts)) < 0.6

    def similarities(self):
        return similarity(t(self.e), t(self.i), self.dual())

    def dual(self):
        return dual_of(t(self.i), t(self.metric))

    def components(self, present=None):
        return components(self.similarities(), t(self.i), self.dual(), present)

    def reference_similarities(self):
        """s_j(e) = <i_j, e> / <i_j, i_j>, one number at a time."""
        return np.array([[i @ self.metric @ e / (i @ self.metric @ i) for i in self.i] for e in self.e])


def t(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def orthonormal(vectors, metric):
    """Rows of the same span that are orthonormal under `metric`, by Cholesky and QR."""
    lower = np.linalg.cholesky(metric)
    turned, _ = np.linalg.qr((vectors @ lower).T)
    return np.linalg.solve(lower.T, turned).T


def left_over(world, c):
    """e⊥ = e - Σ_j c_j i_j."""
    return world.e - np.asarray(c) @ world.i


def change(c, gates, inputs, outputs):
    """Δh = Σ_j g_j o_j - c_j W i_j (equation 3)."""
    return gates @ outputs - c @ inputs


def inner(world, vectors):
    """<i_k, v> / (|i_k| |v|) under the metric."""
    sizes = np.sqrt(np.einsum("td,de,te->t", vectors, world.metric, vectors))
    own = np.sqrt(np.einsum("jd,de,je->j", world.i, world.metric, world.i))
    return vectors @ world.metric @ world.i.T / own / np.maximum(sizes, 1e-12)[:, None]


@law(seeds)
def test_rome_identity(seed):
    """(W + Δ) e = W (e - s i) + s o for every e, so (W + Δ) i = o and what is orthogonal to i stays as it is."""
    world = World(seed, 1)
    edited = (t(world.w) + rank_one(t(world.w), t(world.i[0]), t(world.o[0]), world.dual()[0])).numpy()
    s = world.reference_similarities()
    expected = (world.e - s * world.i) @ world.w.T + s * world.o
    np.testing.assert_allclose(world.e @ edited.T, expected, atol=CLOSE)
    np.testing.assert_allclose(edited @ world.i[0], world.o[0], atol=CLOSE)
    rest = left_over(world, s)
    np.testing.assert_allclose(rest @ edited.T, rest @ world.w.T, atol=CLOSE)


@law(seeds, counts)
def test_similarity_is_the_normalised_product_and_1_at_the_target(seed, concepts):
    world = World(seed, concepts)
    np.testing.assert_allclose(world.similarities(), world.reference_similarities(), rtol=1e-8, atol=CLOSE)
    np.testing.assert_allclose(similarity(t(world.i), t(world.i), world.dual()).diagonal(), 1, rtol=1e-12)


def test_similarity_in_single_precision_on_any_number_of_axes():
    world = World(0)
    batch = t(world.e).float().expand(2, 3, -1, -1)
    found = similarity(batch, t(world.i).float(), world.dual().float())
    assert found.shape == (2, 3, 7, 3) and found.dtype == torch.float32
    np.testing.assert_allclose(found[1, 2], world.reference_similarities(), rtol=1e-4, atol=1e-5)


@law(seeds, st.floats(1e-3, 1e3))
def test_the_scale_of_the_covariance_cancels(seed, scale):
    world, scaled = World(seed), World(seed)
    scaled.metric = world.metric / scale
    np.testing.assert_allclose(scaled.similarities(), world.similarities(), rtol=1e-9, atol=CLOSE)
    np.testing.assert_allclose(scaled.components(), world.components(), rtol=1e-7, atol=CLOSE)
    one, other = (rank_one(t(w.w), t(w.i[0]), t(w.o[0]), w.dual()[0]) for w in (world, scaled))
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=CLOSE)


def test_the_gate_is_a_sigmoid_of_the_distance_to_the_bias():
    """σ((s - β) / τ), reckoned by hand."""
    s = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    for bias, temperature, expected in (
        (0.75, 0.1, (0.0006, 0.076, 0.924)), (0.6, 0.15, (0.018, 0.339, 0.935)), (0.4, 0.15, (0.065, 0.661, 0.982)),
    ):
        np.testing.assert_allclose(gate(s, bias, temperature), expected, atol=6e-4)
        np.testing.assert_allclose(gate(s, bias, temperature), 1 / (1 + np.exp((bias - s.numpy()) / temperature)))


def test_the_gate_of_kin_is_closed_to_strangers():
    """0 at and below KIN for any bias, rising with s, and the published gate where that is closed at KIN."""
    s = torch.linspace(-1, 1.5, 101, dtype=torch.float64)
    for bias, temperature in ((0.75, 0.1), (0.4, 0.15), (-0.5, 0.3)):
        found = gate_of_kin(s, bias, temperature)
        assert (found[s <= KIN] == 0).all() and (found[s > KIN].diff() > 0).all() and (found < 1).all()
        floor = gate(torch.tensor(KIN, dtype=torch.float64), bias, temperature)
        np.testing.assert_allclose(found, torch.relu(gate(s, bias, temperature) - floor) / (1 - floor), atol=1e-9)
    np.testing.assert_allclose(gate_of_kin(s, 1.1, 0.05)[s > KIN], gate(s, 1.1, 0.05)[s > KIN], atol=1e-5)
    assert gate_of_kin(s.float(), -1.0, 0.01).isfinite().all()


def test_what_is_withheld_is_the_rest():
    c, g = torch.tensor([1.0, 1.0, 0.2, -0.5]), torch.tensor([0.25, 1.5, 0.0, 0.0])
    untouched, given = withheld(c, g, torch.tensor(0.5))
    assert (untouched + given).tolist() == [0.75, 0.0, pytest.approx(0.2), 0.0]
    assert untouched.tolist() == pytest.approx([0.75 * 0.25 * 1.5, 0.0, 0.2 * 0.5 * 1.5, 0.0])


@law(seeds)
def test_one_concept_holds_its_similarity(seed):
    world = World(seed, 1)
    assert torch.equal(world.components(), world.similarities())


@law(seeds, st.integers(2, 4))
def test_one_concept_beside_absent_ones_is_as_alone(seed, concepts):
    world, alone = World(seed, concepts), World(seed, concepts)
    alone.i = alone.i[1:2]
    present = torch.zeros(len(world.e), concepts, dtype=torch.bool)
    present[:, 1] = True
    found = world.components(present)
    np.testing.assert_allclose(found[:, 1:2], alone.components(), rtol=2e-6)
    assert not found[~present].any()


@law(seeds, st.integers(2, 4))
def test_gram_form_is_the_projection_by_cholesky_and_qr(seed, concepts):
    """e⊥ = e - Σ_j u_j <u_j, e> with u orthonormal under the metric (equations 6 to 10)."""
    world = World(seed, concepts)
    u = orthonormal(world.i, world.metric)
    np.testing.assert_allclose(u @ world.metric @ u.T, np.eye(concepts), atol=1e-9)
    expected = world.e - (world.e @ world.metric @ u.T) @ u
    difference = left_over(world, world.components()) - expected
    assert np.abs(difference).max() < 1e-4 * np.abs(world.e).max()


@law(seeds, st.integers(2, 4))
def test_nothing_of_any_concept_is_left(seed, concepts):
    world = World(seed, concepts)
    assert np.abs(inner(world, left_over(world, world.components()))).max() < 1e-4


@law(seeds)
def test_each_concept_may_have_a_metric_of_its_own(seed):
    """Nothing of any concept is left as its own metric measures it."""
    world, other = World(seed), World(seed + 1)
    dual = torch.cat([world.dual()[:1], t(world.i[1:] @ other.metric)])
    c = components(similarity(t(world.e), t(world.i), dual), t(world.i), dual)
    rest = similarity(t(left_over(world, c)), t(world.i), dual)
    assert rest.abs().max() < 1e-3


def test_nothing_of_two_similar_concepts_is_left_where_plain_similarities_take_too_much():
    world = World(3, 2)
    world.i[1] = world.i[0] + 0.2 * world.i[1]
    assert np.abs(inner(world, left_over(world, world.components()))).max() < 1e-4
    assert np.abs(inner(world, left_over(world, world.similarities()))).max() > 0.1


@law(seeds, st.integers(2, 4), st.booleans())
def test_plain_similarities_do_for_orthogonal_concepts_and_only_for_those(seed, concepts, orthogonal):
    world = World(seed, concepts, orthogonal=orthogonal)
    gram = world.i @ world.metric @ world.i.T
    assert (np.abs(gram - np.diag(np.diag(gram))).max() < 1e-9) == orthogonal
    difference = np.abs(world.components().numpy() - world.similarities().numpy()).max()
    assert difference < 1e-5 if orthogonal else difference > 1e-5


@law(seeds)
def test_the_order_of_concepts_does_not_matter(seed):
    world, gates = World(seed), t(np.random.default_rng(seed).random((7, 3)))
    present = t(world.present)
    c = world.components(present)
    delta = change(c, gates, t(world.i @ world.w.T), t(world.o))
    for order in map(list, permutations(range(3))):
        turned = World(seed)
        turned.i = world.i[order]
        again = turned.components(present[:, order])
        np.testing.assert_allclose(again, c[:, order], rtol=1e-7, atol=CLOSE)
        np.testing.assert_allclose(
            change(again, gates[:, order], t(turned.i @ world.w.T), t(world.o[order])), delta, rtol=1e-7, atol=1e-8)


@law(seeds, counts)
def test_absent_concepts_take_no_part_row_by_row(seed, concepts):
    world = World(seed, concepts)
    found = world.components(t(world.present)).numpy()
    for e, here, c in zip(world.e, world.present, found, strict=True):
        assert not c[~here].any()
        if here.any():
            i = world.i[here]
            expected = np.linalg.solve(i @ world.metric @ i.T, i @ world.metric @ e)
            np.testing.assert_allclose(c[here], expected, rtol=1e-3, atol=1e-4 * max(1, np.abs(expected).max()))


@law(seeds, counts)
def test_the_change_is_what_projecting_and_adding_outputs_changes(seed, concepts):
    """h = W e⊥ + Σ_j g_j o_j (equation 3 for several concepts)."""
    world = World(seed, concepts)
    s, c = world.similarities(), world.components()
    gates = gate(s, 0.6, 0.15)
    delta = change(c, gates, t(world.i @ world.w.T), t(world.o)).numpy()
    expected = left_over(world, c) @ world.w.T + gates.numpy() @ world.o
    np.testing.assert_allclose(world.e @ world.w.T + delta, expected, atol=1e-8)


@law(seeds)
def test_a_gate_that_equals_the_similarity_is_the_baked_weight(seed):
    """For any encoding where g = s. An open gate, bias towards -∞, is that where s = 1 and (1 - s) o* off elsewhere."""
    world = World(seed, 1)
    s = world.similarities()
    world.e = np.concatenate([world.e, left_over(world, s) + world.i])  # s = 1 at the second half
    s = world.similarities()
    baked = rank_one(t(world.w), t(world.i[0]), t(world.o[0]), world.dual()[0])
    expected = t(world.e) @ baked.T
    inputs, outputs = t(world.i @ world.w.T), t(world.o)
    np.testing.assert_allclose(change(s, s, inputs, outputs), expected, atol=1e-8)
    open_gate = gate(s, float("-inf"), 0.15)
    assert bool((open_gate == 1).all())
    found = change(s, open_gate, inputs, outputs)
    np.testing.assert_allclose(found[7:], expected[7:], atol=1e-8)
    np.testing.assert_allclose(found - expected, (1 - s) * outputs, atol=1e-8)


@law(seeds, st.floats(0, 1e-3))
def test_one_concept_twice_stays_finite_and_is_taken_out_once(seed, apart):
    world = World(seed, 2)
    world.i[1] = world.i[0] * (1 + apart)
    c = world.components()
    assert bool(c.isfinite().all()) and c.abs().max() <= 2 * world.similarities().abs().max()
    alone = World(seed, 2)
    alone.i = world.i[:1]
    difference = left_over(world, c) - left_over(alone, alone.components())
    assert np.abs(difference).max() < 1e-5 * np.abs(world.e).max() * np.abs(world.i).max()


@law(seeds)
def test_one_concept_twice_in_single_precision_stays_finite(seed):
    world = World(seed, 2)
    world.i[1] = world.i[0]
    i, dual = t(world.i).float(), world.dual().float()
    c = components(similarity(t(world.e).float(), i, dual), i, dual)
    assert c.dtype == torch.float32 and bool(c.isfinite().all())
    assert np.abs(inner(world, left_over(world, c.double()))).max() < 1e-3


class Cautious(TorchDispatchMode):
    """A device that has neither double precision nor a solve."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "mps":
            assert result.dtype != torch.float64
        assert "linalg" not in str(operation) or all(a.device.type == "cpu" for a in args if hasattr(a, "device"))
        return result


def test_other_devices_are_asked_for_no_double_and_no_solve():
    with FakeTensorMode(), Cautious():
        s, i = torch.zeros(7, 2, device="mps"), torch.zeros(2, WIDTH, device="mps")
        c = components(s, i, i)
        assert c.device.type == "mps" and c.dtype == torch.float32


@pytest.mark.parametrize("concepts", [1, 3])
def test_present_is_given_token_by_token(concepts):
    world = World(1, concepts)
    everything = torch.ones(len(world.e), concepts, dtype=torch.bool)
    assert torch.equal(world.components(everything), world.components())
    assert not world.components(~everything).any()
