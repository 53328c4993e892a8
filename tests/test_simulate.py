"""The serving simulators: small cases by hand, properties on random ones, and llama.cpp itself beside them."""

from __future__ import annotations

import numpy as np
import pytest

from labkit import LabkitError, simulate
from labkit.simulate import OutOfBlocks, Pager, Served


def test_positions_with_and_without_a_cache():
    assert simulate.positions_read(10, 3, cached=True) == 12  # 10 at once, then 2 more; the last id is never read
    assert simulate.positions_read(10, 3, cached=False) == 10 + 11 + 12


def test_a_page_is_taken_when_the_last_is_full():
    pager = Pager(4, 16)
    pager.add("a", 16)
    assert pager.used == 1 and pager.empty == 0
    pager.add("a")
    assert pager.used == 2 and pager.empty == 15 and pager.lengths["a"] == 17


def test_a_fork_shares_until_it_writes():
    pager = Pager(8, 4)
    pager.add("a", 6)
    pager.fork("a", "b")
    assert pager.used == 2
    pager.add("b")  # into the half-full shared block
    assert pager.used == 3 and pager.copies == 1 and pager.tables["a"][0] == pager.tables["b"][0]
    assert pager.tables["a"][1] != pager.tables["b"][1] and pager.empty == 2 + 1
    pager.add("a")  # now its own again: no second copy
    assert pager.used == 3 and pager.copies == 1
    pager.free("a")
    assert pager.used == 2 and pager.lengths == {"b": 7}
    pager.free("b")
    assert pager.used == 0 and not pager.owners


def test_when_all_blocks_are_taken_the_sequence_keeps_what_it_has():
    pager = Pager(2, 4)
    with pytest.raises(OutOfBlocks, match="All 2 blocks of 4 tokens"):
        pager.add("a", 9)
    assert pager.lengths["a"] == 8


def test_no_block_is_lost_or_owned_by_nobody():
    rng, pager, alive = np.random.default_rng(3), Pager(40, 4), []
    for n in range(400):
        if alive and rng.random() < 0.3:
            pager.free(alive.pop(int(rng.integers(len(alive)))))
        elif alive and rng.random() < 0.4:
            pager.fork(alive[int(rng.integers(len(alive)))], f"s{n}")
            alive.append(f"s{n}")
        else:
            name = alive[int(rng.integers(len(alive)))] if alive and rng.random() < 0.6 else f"s{n}"
            alive += [] if name in alive else [name]
            try:
                pager.add(name, int(rng.integers(1, 9)))
            except OutOfBlocks:
                assert pager.used == pager.blocks
        counted = [block for table in pager.tables.values() for block in table]
        assert {b: counted.count(b) for b in counted} == pager.owners
        assert all(len(t) == -(-pager.lengths[name] // 4) for name, t in pager.tables.items())


def test_static_batches_wait_for_their_longest():
    assert simulate.batches([1, 3, 2, 1], 2, continuous=False) == [[0, 1], [1], [1], [2, 3], [2]]


def test_continuous_batches_refill():
    assert simulate.batches([1, 3, 2, 1], 2) == [[0, 1], [1, 2], [1, 2], [3]]


def test_prompts_apart_take_a_step_of_their_own():
    assert simulate.batches([2, 3, 2], 2, prompts_apart=True) == [[0, 1], [0, 1], [2], [1, 2]]


def test_batches_do_all_the_work_and_continuous_is_never_longer():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, slots = rng.integers(1, 20, 12).tolist(), int(rng.integers(1, 6))
        static, refilled = (simulate.batches(lengths, slots, kind) for kind in (False, True))
        for steps in (static, refilled, simulate.batches(lengths, slots, prompts_apart=True)):
            assert [sum(i in step for step in steps) for i in range(12)] == lengths and max(map(len, steps)) <= slots
        assert max(-(-sum(lengths) // slots), max(lengths)) <= len(refilled) <= len(static)
    with pytest.raises(LabkitError, match="expected 1 or more"):
        simulate.batches([1, 0], 2)


def test_a_queue_by_hand():
    assert simulate.queue([0, 1, 10], [4, 4, 1]) == [Served(0, 4), Served(4, 8), Served(10, 11)]
    assert simulate.queue([0, 1, 2], [4, 4, 1], servers=2) == [Served(0, 4), Served(1, 5), Served(4, 5)]
    with pytest.raises(LabkitError, match="sort them"):
        simulate.queue([1, 0], [1, 1])


def test_what_speculation_yields_on_average():
    assert simulate.expected_tokens(0, 4) == 1 and simulate.expected_tokens(1, 4) == 5
    for a in (0.3, 0.8):
        drawn = simulate.drawn_tokens(a, 4, 200_000)
        assert drawn.min() >= 1 and drawn.max() <= 5
        assert abs(drawn.mean() - simulate.expected_tokens(a, 4)) < 5 * drawn.std() / 200_000**0.5


class Counting:
    """Next id = (7 * id + 3) % 50, except that a draft with `wrong` errs after every id divisible by it."""

    def __init__(self, wrong: int = 0):
        self.wrong, self.ids, self.passes = wrong, [], 0

    def follow(self, ids):
        assert len(ids)
        self.ids += ids
        self.passes += 1
        return [(7 * i + 3 + (self.wrong > 0 and i % self.wrong == 0)) % 50 for i in ids]

    def keep(self, length):
        assert length <= len(self.ids)
        del self.ids[length:]


@pytest.mark.parametrize("wrong", [0, 2, 1])
@pytest.mark.parametrize("drafted", [1, 3, 8])
@pytest.mark.parametrize("new", [1, 2, 17])
def test_speculation_writes_what_the_target_would(wrong, drafted, new):
    truth = [5]
    for _ in range(new):
        truth.append((7 * truth[-1] + 3) % 50)
    target, draft = Counting(), Counting(wrong)
    found = simulate.speculate(target, draft, [1, 9, 5], new, drafted)
    assert found.ids == truth[1:] and target.passes == found.passes + 1
    assert target.ids == [1, 9, 5, *truth[1:]][: len(target.ids)]  # what it remembers is what was written
    if wrong == 0 and new > 1:
        assert found.acceptance == 1 and found.passes == -(-(new - 1) // (drafted + 1))
    if wrong == 1 and new > 1:
        assert found.acceptance == 0 and found.passes == new - 1


def test_accepted_stops_at_the_first_difference():
    assert [simulate.accepted([1, 2, 3], row) for row in ([1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4])] == [3, 1, 0]


# --- llama.cpp ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    import labkit
    from labkit.engines import llamacpp

    path = tmp_path_factory.mktemp("seq") / "model.gguf"
    house = labkit.checkpoint("edgehome")
    llamacpp.write_gguf(house, path, "f32")
    return house, path


def test_llama_cpp_is_full_when_the_pager_of_single_cells_is(gguf):
    from labkit.serve.sequences import Full, Sequences

    _, path = gguf
    pager = Pager(256, 1)
    with Sequences(path, 3, 256, threads=1) as cache:
        pager.add("0", 100)
        cache.step([(0, [5] * 100, 0)])
        for other in (1, 2):
            pager.fork("0", str(other))
            cache.share(0, other)
        assert [cache.length(i) for i in range(3)] == [100] * 3 and pager.used == 100
        for n in range(52):
            cache.step([(i, [7], 100 + n) for i in range(3)])
            for i in range(3):
                pager.add(str(i))
        assert pager.used == 256
        with pytest.raises(Full, match="256 cells"):
            cache.step([(0, [7], 152)])
        with pytest.raises(OutOfBlocks):
            pager.add("0")
        cache.forget(1, 100)
        pager.free("1")
        cache.step([(0, [7], 152)])  # the cells came back
    with pytest.raises(LabkitError, match="multiple of 256"):
        Sequences(path, 1, 100)


def test_bytes_of_a_saved_sequence_are_keys_and_values(gguf):
    from labkit import planner
    from labkit.serve.sequences import Sequences

    house, path = gguf
    with Sequences(path, 1, 256, threads=1) as cache:
        sizes = []
        for n in (20, 60):
            cache.clear()
            cache.step([(0, [5] * n, 0)])
            sizes.append(cache.state_bytes(0))
    a_token = (sizes[1] - sizes[0]) / 40
    assert planner.cache_per_token(house.config) <= a_token <= planner.cache_per_token(house.config) + 24  # position, owner


def test_batched_sequences_say_what_single_ones_say(gguf):
    from labkit.serve.sequences import Sequences

    house, path = gguf
    texts = ["turn on the light", "what is the temperature outside", "close"]
    ids = [house.encode(text) for text in texts]
    with Sequences(path, 3, 256, kv_type="f32", threads=1) as cache:
        together = cache.step([(i, one, 0) for i, one in enumerate(ids)])
        ends = np.cumsum([len(one) for one in ids]) - 1
        for i, one in enumerate(ids):
            cache.clear()
            alone = cache.step([(0, one, 0)])
            assert np.abs(alone[-1] - together[ends[i]]).max() < 1e-3 * np.abs(alone[-1]).max()


def test_speculation_in_llama_cpp_equals_greedy_decoding(gguf):
    import labkit
    from labkit import Recipe
    from labkit.engines import llamacpp
    from labkit.serve.sequences import Greedy

    house, path = gguf
    prompt = house.encode(house.chat([{"role": "user", "content": "Turn on the lights in the kitchen"}]))
    small = labkit.build(house, Recipe("llamacpp", "q2_k")).path / llamacpp.FILE
    with llamacpp.LlamaRunner(path, exact=True, threads=1) as run:
        truth = list(run.generate(prompt, 24))
    for other in (path, small):
        target, draft = Greedy(path, kv_type="f32", threads=1), Greedy(other, kv_type="f32", threads=1)
        found = simulate.speculate(target, draft, prompt, 24, 4)
        assert found.ids == truth and target.passes == found.passes + 1
        if other == path:
            assert found.acceptance == 1 and found.passes == 5
        target.close()
        draft.close()


@pytest.fixture(scope="module")
def half(gguf):
    """The same in float16, which OpenVINO reads."""
    from labkit.engines import llamacpp

    path = gguf[1].with_name("half.gguf")
    llamacpp.write_gguf(gguf[0], path, "f16")
    return gguf[0], path


# --- OpenVINO's paged and batched pipeline ----------------------------------------------------------------------------


def test_the_pipeline_takes_the_steps_and_blocks_that_are_simulated(half):
    pytest.importorskip("openvino_genai")
    from labkit.serve.batching import BLOCK, Batching

    house, path = half
    prompt = house.encode(house.chat([{"role": "user", "content": "Turn on the lights in the kitchen"}]))
    lengths = [3, 12, 5, 20, 7, 9, 2, 16]
    seen = Batching(path, slots=4, blocks=32).run([prompt] * 8, lengths)
    assert [len(ids) for ids in seen.ids] == lengths
    expected = simulate.batches(lengths, 4, prompts_apart=True)
    assert seen.scheduled == [len(step) for step in expected]
    pager, blocks = Pager(32, BLOCK), []
    for step in expected:
        for i in step:
            pager.add(str(i), 1 if str(i) in pager.tables else len(prompt))
        blocks.append(pager.used)
        for i in step:
            if pager.lengths[str(i)] == len(prompt) + lengths[i] - 1:
                pager.free(str(i))
    assert max(seen.blocks) == max(blocks)
    longest = max(seen.ids, key=len)
    assert all(ids == longest[: len(ids)] for ids in seen.ids)  # the same question, cut at different lengths


def test_the_pipeline_shares_a_prefix_it_has_read(half):
    pytest.importorskip("openvino_genai")
    from labkit.serve.batching import BLOCK, Batching

    house, path = half
    start = (house.encode("turn on the light in the kitchen and then ") * 20)[: 3 * BLOCK]
    prompts = [[*start, 5 + i] for i in range(4)]
    taken = {}
    for prefix in (False, True):
        pipeline, pager = Batching(path, slots=4, blocks=32, prefix=prefix), Pager(32, BLOCK)
        first = pipeline.run(prompts[:1], [4])
        others = pipeline.run(prompts[1:], [4] * 3)
        assert [len(ids) for ids in first.ids + others.ids] == [4] * 4
        pager.add("prefix", len(start))
        for i in range(3):
            if prefix:
                pager.fork("prefix", str(i))
                pager.add(str(i), 1 + 4 - 1)  # its own token, and all answers but the last are stored
            else:
                pager.add(str(i), len(start) + 1 + 4 - 1)
        if not prefix:
            pager.free("prefix")
        assert max(others.blocks) == pager.used
        taken[prefix] = others.ids
    assert taken[True] == taken[False]
