"""The arena's cells: credits, what gives them back, and that nobody waits for them but those who need them."""

import numpy as np
import pytest

from nmoe.outputs import Returns
from nmoe.profiles import PROFILES, Lane
from nmoe.scheduler.cells import Cells, life_of
from nmoe.scheduler.request import State
from tests.simulated_engine import Engine, limits

LOGITS = Returns(records=True, logits=True)
ALL_LOGITS = Returns(records=True, prompt=True, logits=True)
BULK, EVALUATION = "offline_distill", "eval_exact"


def packed(*cells: int) -> bytes:
    return np.array(cells, np.int32).tobytes()


def uids_of(*lives: int) -> np.ndarray:
    return np.array([life << 38 if life >= 0 else -1 for life in lives], np.int64)


def test_cells_go_round():
    cells = Cells(2, 3)
    mine, other = life_of(0, 1), life_of(1, 1)
    taken = np.array(cells.take(1, 3), np.int32)
    assert sorted(taken.tolist()) == [3, 4, 5]
    assert (cells.num_free(0), cells.num_free(1)) == (3, 0)
    with pytest.raises(RuntimeError, match="3 still in flight, though no step is"):
        cells.check()
    cells.deliver(taken, uids_of(mine, other, -1))
    cells._touched = True
    cells.check()
    assert cells.num_free(1) == 1
    assert cells.release(packed(taken[0], taken[0], taken[1], taken[2], 99, -1), mine) == 5  # only the first is its
    assert cells.num_free(1) == 2
    assert cells.release(packed(taken[1]), life_of(1, 2)) == 1  # another life of the same frontend
    assert cells.release(packed(taken[1]), other) == 0
    assert cells.num_free(1) == 3
    cells.check()


def test_a_death_gives_back_what_that_life_had():
    cells = Cells(1, 6)
    taken = np.array(cells.take(0, 5), np.int32)
    cells.deliver(taken, uids_of(life_of(0, 1), life_of(0, 2), life_of(1, 1), life_of(1, 2), life_of(2, 1)))
    cells.forget(1, 2)
    assert cells.num_free(0) == 2
    cells.forget(0, None)
    assert cells.num_free(0) == 4
    cells.forget(3, None)
    cells.check()
    assert cells.num_free(0) == 4


def test_cells_in_flight_come_back_when_the_workers_are_gone():
    engine = Engine(limits(cells_per_rank=4))
    engine.submit([1, 2, 3], 5, returns=LOGITS)
    engine.plan()
    engine.answer_all()
    engine.plan()
    assert engine.cells.num_free(0) == 2
    engine.reset()  # the engine checks that the delivered one stays with its frontend
    assert engine.cells.num_free(0) == 3
    engine.run()


def test_cells_of_rows_whose_request_has_ended_come_back_when_the_step_lands():
    engine = Engine(limits(cells_per_rank=4))
    uid = engine.submit([1, 2, 3], 5, returns=LOGITS)
    engine.plan()
    engine.abort(uid)
    assert engine.cells.num_free(0) == 3
    engine.answer_all()
    assert engine.cells.num_free(0) == 4
    engine.scheduler.forget(0, None)


def test_a_leak_is_noticed_when_the_engine_is_idle():
    engine = Engine(limits(cells_per_rank=4))
    engine.submit([1, 2, 3], 1, returns=LOGITS)
    engine.plan()
    engine.cells._free[0].pop()
    with pytest.raises(RuntimeError, match="do not add up: 2 free of 4, 1 at frontends"):
        engine.scheduler.complete(engine.unanswered[0].popleft(), engine.now)


def test_a_prompt_with_logits_goes_by_the_cells_that_are_free():
    engine = Engine(limits(cells_per_rank=5, max_prefill_tokens=64))
    uid = engine.submit(list(range(16)), 2, returns=ALL_LOGITS)
    chunks = []
    for _ in range(20):
        if planned := engine.plan():
            chunks += [row[2] for row in engine.workers[0].rows_of(planned[0])]
        engine.answer_all()
        engine.release(2)
    assert engine.clients[uid].ended
    # Five cells, then two more with each pause. The last token's row has a record only because it samples.
    assert chunks == [5, 2, 2, 2, 2, 2, 1, 1]
    engine.run()


def test_rows_without_a_cell_stand_still_and_the_oldest_goes_on():
    engine = Engine(limits(cells_per_rank=2, num_pages=64, max_prefill_tokens=64))
    uids = [engine.submit([i], 6, returns=LOGITS) for i in range(4)]
    seen = []
    while engine.scheduler.num_open:
        engine.plan()
        engine.answer_all()
        seen.append([len(engine.clients[uid].tokens) for uid in uids])
        engine.release()
    assert seen[0] == [1, 1, 0, 0]
    assert all(counts == sorted(counts, reverse=True) for counts in seen)
    assert seen[-1] == [6] * 4


def test_a_slow_reader_of_one_request_leaves_cells_to_others():
    engine = Engine(limits(cells_per_rank=128, num_pages=200, max_prefill_tokens=64, max_seq_len=400))
    engine.stubborn.add(1)
    prompt = engine.submit([1] * 300, 2, returns=ALL_LOGITS, frontend=1)
    rows = engine.submit([2] * 3, 200, returns=LOGITS, frontend=1)
    for _ in range(100):
        engine.plan()
        engine.answer_all()
    share = engine.scheduler.limits.cells_share
    assert share == 32
    # A prompt's chunks in flight are not counted yet: it may have one share more, and as much again.
    assert share <= engine.cells.held(prompt) <= 3 * share
    assert share <= engine.cells.held(rows) <= share + engine.scheduler.limits.steps_in_flight
    uid = engine.submit([3] * 20, 20, returns=ALL_LOGITS)
    while engine.clients[uid].ended is None:
        assert engine.plan() is not None, "stuck"
        engine.answer_all()
        engine.release()
    engine.stubborn.clear()
    engine.run()


def test_who_begins_anew_with_all_its_share_unread_has_a_row_all_the_same():
    engine = Engine(limits(cells_per_rank=64, max_batch_size=1))
    engine.stubborn.add(1)
    slow = engine.submit(list(range(17)), 3, returns=ALL_LOGITS, frontend=1)  # of its prompt it has its share of cells
    other = None
    for _ in range(20):
        engine.plan()
        engine.answer_all()
        if other is None and engine.request(slow).stalled:
            other = engine.submit([30, 31, 32], 3)  # for which it yields; what it has computed stays in the cache
    assert other is not None and engine.clients[other].ended and engine.cells.held(slow) >= 16
    engine.stubborn.clear()
    engine.run()


def stuck(profile: str, **sizes) -> tuple[Engine, list[int]]:
    """An engine filled by requests of a frontend that releases nothing."""
    engine = Engine(
        limits(**({"world_size": 2, "cells_per_rank": 3, "num_pages": 24, "max_prefill_tokens": 128} | sizes))
    )
    engine.stubborn.add(1)
    uids = []
    for i in range(12):
        returns = ALL_LOGITS if i % 3 == 0 else LOGITS
        uids.append(engine.submit([i] * (3 + i), 6, profile=profile, returns=returns, frontend=1))
    for _ in range(20):
        engine.plan()
        engine.answer_all()
    assert engine.plan() is None
    assert [engine.cells.num_free(rank) for rank in range(2)] == [0, 0]
    assert any(engine.request(uid).stalled for uid in uids if engine.clients[uid].ended is None)
    return engine, uids


@pytest.mark.parametrize("theirs", list(PROFILES))
@pytest.mark.parametrize("mine", [EVALUATION, BULK, "production_generate"])
def test_a_frontend_that_releases_nothing_stops_nobody_who_needs_no_cells(theirs, mine):
    engine, _ = stuck(theirs)
    uids = [engine.submit([20 + i] * 20, 8, profile=mine, n=1 + i % 2) for i in range(6)]
    while any(engine.clients[uid].ended is None for uid in uids):
        assert engine.plan() is not None or any(engine.unanswered), "stuck"
        engine.answer_all()
    engine.stubborn.clear()
    engine.run()  # and with its cells back, it gets what it asked for


def test_siblings_that_need_cells_do_not_close_their_rank():
    engine = Engine(limits(cells_per_rank=2, num_pages=64, max_prefill_tokens=64))
    engine.stubborn.add(1)
    engine.submit([1] * 9, 6, returns=LOGITS, n=3, frontend=1)
    for _ in range(6):
        engine.plan()
        engine.answer_all()
    assert engine.plan() is None
    uid = engine.submit([2] * 9, 6, n=2)
    while engine.scheduler._requests.keys() & {uid, uid + 1}:
        assert engine.plan() is not None, "stuck"
        engine.answer_all()
    engine.stubborn.clear()
    engine.run()


def test_siblings_on_a_rank_without_cells_leave_it_to_others():
    engine = Engine(limits(world_size=2, cells_per_rank=2, num_pages=64, max_batch_size=2, max_prefill_tokens=64))
    engine.stubborn.add(1)
    engine.submit([1] * 9, 6, returns=LOGITS, n=3, frontend=1)
    for _ in range(6):
        engine.plan()
        engine.answer_all()
    assert [engine.cells.num_free(rank) for rank in range(2)] == [0, 2]
    uids = [engine.submit([2 + i] * 9, 30) for i in range(4)]
    for _ in range(3):
        engine.plan()
        engine.answer_all()
    assert sorted(engine.request(uid).rank for uid in uids) == [0, 0, 1, 1]
    engine.stubborn.clear()
    engine.run()


def test_who_had_no_room_is_asked_again_when_somebody_stalls():
    """Its lane's turn was before the one in which the other came to a standstill, and nothing else will happen."""
    engine = Engine(limits(num_pages=8, cells_per_rank=2, max_prefill_tokens=64))
    engine.stubborn.add(1)
    engine.submit([1] * 20, 6, returns=LOGITS, frontend=1)
    for _ in range(2):
        engine.plan()
        engine.answer_all()
    other = engine.submit([2] * 20, 4, profile="rl_sample")
    assert engine.plan() is not None
    assert engine.request(other).state is State.DECODE
    engine.run()


def test_a_frontends_death_frees_the_arena():
    engine, _ = stuck(BULK)
    engine.scheduler.forget(1, None)
    engine.cells.forget(1, None)
    assert [engine.cells.num_free(rank) for rank in range(2)] == [3, 3]
    assert engine.scheduler.idle


def test_with_cells_for_all_evaluation_keeps_its_order():
    engine = Engine(limits(max_batch_size=2, num_pages=32, cells_per_rank=100))
    wanted = [ALL_LOGITS, Returns(), LOGITS, Returns(records=True), ALL_LOGITS, Returns()]
    uids = [engine.submit([i] * 5, 4, profile=EVALUATION, returns=returns) for i, returns in enumerate(wanted)]
    engine.run()
    ended = sorted(uids, key=lambda uid: engine.clients[uid].ended.scheduled_at)
    assert ended == uids


def test_bulk_keeps_its_rows_until_prompts_have_had_their_cells():
    engine = Engine(limits(cells_per_rank=4, num_pages=64, max_prefill_tokens=4, max_batch_size=4))
    uids = [engine.submit([i] * 4, 5, profile=BULK, returns=LOGITS) for i in range(6)]
    engine.run()
    assert set(engine.lanes) == {Lane.BULK}
    assert all(len(engine.clients[uid].records) == 5 for uid in uids)
    assert all(request.state is State.ENDED for request in engine.requests)
