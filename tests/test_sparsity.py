"""Masks that keep the largest, 2:4 packed and unpacked to the same bytes, and bits that are counted from what is stored."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import sparsity
from labkit.types import LabkitError

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 1.0])
def test_magnitude_keeps_the_largest(kept):
    weights = RNG.normal(size=(10, 20))
    mask = sparsity.magnitude(weights, kept)
    assert mask.sum() == round(kept * 200)
    if 0 < kept < 1:
        assert np.abs(weights[mask]).min() >= np.abs(weights[~mask]).max()


def test_ties_keep_exactly_the_share():
    assert sparsity.magnitude(np.ones((4, 4)), 0.25).sum() == 4


def test_two_of_four_keeps_the_two_largest_of_each_group():
    weights = np.array([[-9.0, 1, 2, -3, 0.5, -0.25, 0.125, 4]])
    assert sparsity.two_of_four(weights).tolist() == [[True, False, False, True, True, False, False, True]]
    groups = sparsity.two_of_four(RNG.normal(size=(7, 12))).reshape(7, 3, 4)
    assert (groups.sum(-1) == 2).all()


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (5, 12), (8, 64)])
def test_packing_loses_nothing_and_takes_nine_bits(shape):
    weights = RNG.normal(size=shape).astype(np.float16)
    pruned = np.where(sparsity.two_of_four(weights), weights, 0).astype(np.float16)
    pruned[0, :4] = 0  # a group of zeros only
    values, places = sparsity.pack(pruned)
    assert np.array_equal(sparsity.unpack(values, places), pruned)
    assert values.nbytes == pruned.nbytes // 2 and places.nbytes == -(-pruned.size // 8)
    if pruned.size % 8 == 0:
        assert 8 * (values.nbytes + places.nbytes) / pruned.size == sparsity.stored_bits(0.5, 16, "2:4") == 9


def test_bits_are_those_of_the_forms():
    assert sparsity.stored_bits(0.5, 16, "dense") == 16 and sparsity.stored_bits(0.5, 16, "bitmap") == 9
    assert sparsity.stored_bits(0.5, 16, "index") == 16
    assert sparsity.stored_bits(1 - 1 / 16, 16) == pytest.approx(16), "a bitmap pays from one zero in sixteen"


def test_senseless_input_gets_a_sentence():
    with pytest.raises(LabkitError, match="multiple of four"):
        sparsity.two_of_four(np.ones((2, 6)))
    with pytest.raises(LabkitError, match="more than two"):
        sparsity.pack(np.ones((1, 4)))
    with pytest.raises(LabkitError, match="share from 0 to 1"):
        sparsity.magnitude(np.ones((2, 2)), 1.5)
    with pytest.raises(LabkitError, match="form='csr'"):
        sparsity.stored_bits(0.5, 16, "csr")
