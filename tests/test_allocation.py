"""The bit-allocation game: sizes are the bytes stored, players keep the budget, the exact player is exact, llama.cpp obeys."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import labkit
from labkit import LabkitError, allocation, blocks


@pytest.fixture(scope="module")
def game():
    return allocation.game(labkit.checkpoint("edgehome"), windows=1, practice=1, window=64)


@pytest.fixture(scope="module")
def costs(game):
    return allocation.weight_error(game)


def same(game, bits):
    return {part.name: bits for part in game.parts}


def test_parts_cover_every_matrix_once(game):
    names = [name for part in game.parts for name in part.matrices]
    assert sorted(names) == sorted(name for name, w in game.model.weights.items() if w.ndim == 2)
    assert sum(part.weights for part in game.parts) == sum(game.model.weights[name].size for name in names)


def test_size_is_what_blocks_store(game):
    for bits in (2, 4):
        stored = sum(blocks.affine(game.model.weights[n], bits, per=32).bits_per_weight * game.model.weights[n].size / 8
                     for part in game.parts for n in part.matrices)  # fmt: skip
        assert allocation.size(game, same(game, bits)) == round(stored)


def test_divergence_is_none_in_float_and_grows_as_bits_fall(game):
    assert allocation.divergence(game, {}).value == pytest.approx(0, abs=1e-9)
    kl = [allocation.divergence(game, same(game, bits)).value for bits in (8, 4, 2)]
    assert 0 < kl[0] < kl[1] < kl[2]


def test_sensitivity_singles_out_the_tied_embedding(game):
    found = allocation.sensitivity(game)
    at_two = {part: widths[2] for part, widths in found.items()}
    assert max(at_two, key=at_two.get) == "embedding"
    for widths in found.values():
        assert set(widths) == set(allocation.BITS) and widths[2] > widths[4] > widths[8]
        assert widths[3] == pytest.approx(np.sqrt(widths[2] * widths[4]))  # on the line through the logarithms


def test_players_keep_the_budget_and_the_exact_one_is_never_worse(game, costs):
    total = lambda bits: sum(costs[part][width] for part, width in bits.items())  # noqa: E731
    least, most = (allocation.size(game, same(game, bits)) for bits in (2, 8))
    for budget in np.linspace(least, most, 5).astype(int):
        players = [
            allocation.uniform(game, budget),
            allocation.greedy(game, budget, costs),
            allocation.best_sum(game, budget, costs),
        ]
        assert all(allocation.size(game, bits) <= budget for bits in players)
        assert total(players[2]) <= min(map(total, players[:2])) * (1 + 1e-12)


def test_the_exact_player_equals_brute_force(game, costs):
    few = allocation.Game(game.model, game.parts[:4], game.windows, game.practice)
    budget = (allocation.size(few, same(few, 2)) + allocation.size(few, same(few, 6))) // 2
    every = [
        dict(zip([p.name for p in few.parts], widths, strict=True)) for widths in itertools.product(allocation.BITS, repeat=4)
    ]
    fitting = [bits for bits in every if allocation.size(few, bits) <= budget]
    best = min(sum(costs[part][width] for part, width in bits.items()) for bits in fitting)
    mine = allocation.best_sum(few, budget, costs)
    assert sum(costs[part][width] for part, width in mine.items()) == pytest.approx(best)


def test_scores_are_sorted_and_say_who_fits(game):
    budget = allocation.size(game, same(game, 4))
    board = allocation.scores(game, budget, {"two": same(game, 2), "eight": same(game, 8), "four": same(game, 4)})
    assert list(board["player"]) == ["four", "two", "eight"] and list(board["fits"]) == [True, True, False]
    assert (board["KL_low"] <= board["KL"]).all() and (board["KL"] <= board["KL_high"]).all()


def test_bad_moves_are_refused_in_words(game, costs):
    with pytest.raises(LabkitError, match="'embedding' has 5 bits; expected one of 2, 3, 4, 6, 8"):
        allocation.size(game, {**same(game, 4), "embedding": 5})
    with pytest.raises(LabkitError, match="no part 'head'"):
        allocation.size(game, {**same(game, 4), "head": 4})
    for player in (lambda: allocation.uniform(game, 1000), lambda: allocation.greedy(game, 1000, costs),
                   lambda: allocation.best_sum(game, 1000, costs)):  # fmt: skip
        with pytest.raises(LabkitError, match="1,000 bytes"):
            player()
    with pytest.raises(LabkitError, match="ask for fewer"):
        allocation.game(labkit.checkpoint("edgehome"), windows=10_000)


def test_llamacpp_stores_the_allocation(game, home):
    llamacpp = pytest.importorskip("labkit.engines.llamacpp")
    pytest.importorskip("llama_cpp")
    bits = {**same(game, 3), "embedding": 6, "1 attention": 8, "2 feed-forward": 2}
    recipe = labkit.Recipe("llamacpp", "q3_k_m", tensor_types=allocation.tensor_types(bits))
    stored = {
        t["name"]: t["type"].lower()
        for t in llamacpp.tensors(labkit.build(labkit.checkpoint("edgehome"), recipe).path / llamacpp.FILE)
    }
    assert stored["token_embd.weight"] == "q6_k" and stored["blk.1.attn_q.weight"] == "q8_0"
    assert stored["blk.2.ffn_down.weight"] == "q2_k" and stored["blk.0.ffn_up.weight"] == "q3_k"
