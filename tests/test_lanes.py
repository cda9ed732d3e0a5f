"""How lanes share the engine: whose step is next, who is admitted, who yields to whom."""

import itertools

import numpy as np
import pytest

from nmoe.messages import ROW_HAS_IDS, Rejected
from nmoe.outputs import Returns
from nmoe.profiles import PROFILES, Lane
from nmoe.scheduler.request import State
from tests.simulated_engine import Client, Engine, limits

PRODUCTION, EXACT, EVALUATION, BULK = "production_generate", "rl_sample", "eval_exact", "offline_distill"
DISTILL = "online_distill"


def steps(engine: Engine, count: int) -> list[Lane]:
    """Plan and answer so many steps; whose they were."""
    before = len(engine.lanes)
    for _ in range(count):
        engine.plan()
        engine.answer_all()
    return engine.lanes[before:]


def clients(engine: Engine, *uids: int) -> list[Client]:
    return [engine.clients[uid] for uid in uids]


def states(engine: Engine, uids: list[int]) -> list[State]:
    return [engine.request(uid).state for uid in uids]


def test_every_second_step_is_productions_and_the_others_take_turns():
    engine = Engine(limits(num_pages=64, max_batch_size=8))
    for profile in (PRODUCTION, EXACT, EVALUATION, BULK):
        engine.submit([1, 2, 3], 30, profile=profile)
    one_round = [lane for other in Lane if other is not Lane.PRODUCTION for lane in (Lane.PRODUCTION, other)]
    assert steps(engine, 12) == one_round * 2
    engine.run()


@pytest.mark.parametrize("busy", [lanes for n in (1, 2, 3) for lanes in itertools.combinations(Lane, n)])
def test_lanes_without_work_take_no_turns(busy):
    engine = Engine(limits(num_pages=64, max_batch_size=8))
    profiles = {profile.lane: name for name, profile in PROFILES.items()}
    for lane in busy:
        engine.submit([1, 2, 3], 30, profile=profiles[lane])
    planned = steps(engine, 12)
    shares = {lane: planned.count(lane) for lane in busy}
    others = [lane for lane in busy if lane is not Lane.PRODUCTION]
    left = 12
    if Lane.PRODUCTION in busy:
        assert shares[Lane.PRODUCTION] == (6 if others else 12)
        left -= shares[Lane.PRODUCTION]
    assert all(shares[lane] == left / len(others) for lane in others)
    engine.run()


def test_evaluation_keeps_the_order_of_arrivals():
    engine = Engine(limits(num_pages=8, max_batch_size=1))
    uids = [engine.submit([i], 3, profile=EVALUATION, priority=-i) for i in range(4)]
    engine.run()
    ended = sorted(uids, key=lambda uid: engine.clients[uid].ended.scheduled_at)
    assert ended == uids
    by_priority = [engine.submit([i], 3, profile=EXACT, priority=-i) for i in range(4)]
    engine.run()
    assert sorted(by_priority, key=lambda uid: engine.clients[uid].ended.scheduled_at) == by_priority[::-1]


def bulk_steps(engine):
    """Of each BULK step, until one has no chunks: the tokens of its chunks, and its rows."""
    sizes = []
    while not sizes or sizes[-1][0]:
        planned = engine.plan()
        engine.answer_all()
        if engine.lanes[-1] is Lane.BULK:
            rows = engine.workers[0].rows_of(planned[0])
            sizes.append((sum(row[2] for row in rows if row[3] & ROW_HAS_IDS), len(rows)))
    return sizes


def test_bulk_fills_the_batch_before_it_decodes():
    engine = Engine(limits(num_pages=400, max_batch_size=7, page_size=4, max_prefill_tokens=64))
    bulk = [engine.submit([i] * 32, 12, profile=BULK) for i in range(12)]
    # Two prompts fill the step's 64 tokens. The last prompt's step is the first in which nobody else can be admitted,
    # so the six rows before it go on.
    assert bulk_steps(engine) == [(64, 2), (64, 2), (64, 2), (32, 7), (0, 7)]
    assert states(engine, bulk) == [State.DECODE] * 7 + [State.WAITING] * 5
    engine.run()


def test_bulk_delays_a_stream_by_no_more_than_other_prompts_do():
    engine = Engine(limits(num_pages=400, max_batch_size=3, page_size=4, max_prefill_tokens=64))
    stream = engine.submit([1, 2, 3], 200)
    steps(engine, 2)
    bulk = [engine.submit([i] * 32, 12, profile=BULK) for i in range(4)]
    assert bulk_steps(engine) == [(16, 1), (16, 1), (16, 2), (16, 2), (0, 2)]
    assert states(engine, bulk) == [State.DECODE] * 2 + [State.WAITING] * 2
    assert engine.request(stream).state is State.DECODE
    engine.run()


def test_bulk_waits_with_its_rows_for_prompts_that_can_still_be_admitted_only():
    """A long prompt that is under way fills nobody else's place: the rows beside it go on."""
    engine = Engine(limits(num_pages=400, max_batch_size=2, max_prefill_tokens=16))
    first = engine.submit([1] * 16, 30, profile=BULK)
    steps(engine, 1)
    engine.submit([2] * 160, 5, profile=BULK)
    engine.submit([3] * 16, 5, profile=BULK)
    before = engine.scheduler._ranks.table.position[engine.request(first).slot]
    steps(engine, 5)
    assert engine.scheduler._ranks.table.position[engine.request(first).slot] == before + 5
    engine.run()


def filled_with_bulk(**sizes) -> tuple[Engine, list[int]]:
    """An engine that BULK has filled, with as much again waiting."""
    engine = Engine(limits(**({"num_pages": 24, "max_batch_size": 4, "max_prefill_tokens": 64} | sizes)))
    uids = [engine.submit([i] * 16, 12, profile=BULK) for i in range(12)]
    steps(engine, 3)
    assert State.WAITING in states(engine, uids)
    return engine, uids


@pytest.mark.parametrize("sizes", [{}, {"max_batch_size": 12}], ids=["no place in the batch", "no pages"])
@pytest.mark.parametrize("profile", [PRODUCTION, EXACT, EVALUATION])
def test_bulk_yields_at_once_to_whoever_finds_no_room(sizes, profile):
    engine, uids = filled_with_bulk(**sizes)
    running = sum(state is State.DECODE for state in states(engine, uids))
    newcomers = [engine.submit([20 + i] * 16, 4, profile=profile) for i in range(2)]
    steps(engine, 2)
    assert State.WAITING not in states(engine, newcomers)
    assert 0 < engine.scheduler.stats.preemptions < running, "as many as it takes, and no more"
    preempted = [engine.request(uid).state is not State.DECODE for uid in uids]
    assert preempted == sorted(preempted), "the youngest yield"
    engine.run()


def test_bulk_holds_back_nobody_and_everybody_holds_it_back():
    engine = Engine(limits(num_pages=11, max_batch_size=8, max_prefill_tokens=64))
    engine.submit([1] * 12, 20)  # 3 pages, and one more soon
    steps(engine, 1)
    bulk = [engine.submit([2] * 30, 4, profile=BULK) for _ in range(3)]  # finds no room
    steps(engine, 2)
    assert states(engine, bulk) == [State.WAITING] * 3
    younger = engine.submit([3] * 4, 20)
    steps(engine, 1)
    assert engine.request(younger).state is State.DECODE
    blocked = engine.submit([4] * 36, 2)
    steps(engine, 2)
    small = engine.submit([5], 2, profile=BULK, priority=-5)
    steps(engine, 4)
    assert states(engine, [blocked, small]) == [State.WAITING] * 2
    engine.run()


def test_a_row_that_needs_a_page_takes_bulks_before_any_other():
    engine = Engine(limits(num_pages=12, max_batch_size=4, max_prefill_tokens=64))
    bulk = engine.submit([1] * 12, 20, profile=BULK)
    steps(engine, 1)
    streams = [engine.submit([2 + i] * 8, 14) for i in range(2)]
    while not engine.scheduler.stats.preemptions:
        steps(engine, 1)
    assert engine.scheduler.stats.preemptions == 1
    assert engine.request(bulk).state in (State.WAITING, State.DRAINING)
    assert states(engine, streams) == [State.DECODE] * 2
    engine.run()


def test_pages_of_lasting_requests_are_evicted_after_all_others():
    engine = Engine(limits(num_pages=16, max_prefill_tokens=64))
    lasting = engine.submit(list(range(8)), 5, profile=DISTILL)  # the older: by use alone it would go first
    engine.run()
    plain = engine.submit(list(range(8, 16)), 5, profile=EXACT)
    engine.run()
    for i in range(20, 24):
        engine.submit([i] * 16, 4)  # five of these pages are free, so the others are evicted for them
        engine.run()
    assert engine.scheduler.stats.evictions > 0
    again = [
        engine.submit(client.prompt + client.tokens + [39], 1, profile=EXACT)
        for client in clients(engine, lasting, plain)
    ]
    engine.run()
    assert [client.ended.cached_tokens for client in clients(engine, *again)] == [12, 0]


def test_lasting_pages_are_evicted_when_nothing_else_is_left():
    engine = Engine(limits(num_pages=8, max_prefill_tokens=64))
    engine.submit(list(range(16)), 2, profile=DISTILL)
    engine.run()
    engine.submit([1] * 30, 2)
    engine.run()
    assert engine.scheduler.stats.evictions == 4
    assert sum(engine.scheduler._ranks.pools[0]._lasting) == 0


def test_a_prefix_that_a_lasting_request_shares_lasts():
    engine = Engine(limits(num_pages=16, max_prefill_tokens=64))
    engine.submit(list(range(9)), 2, profile=EXACT)
    engine.run()
    assert sum(engine.scheduler._ranks.pools[0]._lasting) == 0
    engine.submit(list(range(13)), 2, profile=DISTILL)
    engine.run()
    assert sum(engine.scheduler._ranks.pools[0]._lasting) == 3


def test_a_flood_of_bulk_never_keeps_production_waiting():
    """Each production request has its first row within two steps of its arrival, whatever waits in BULK."""
    engine = Engine(limits(world_size=2, num_pages=40, max_batch_size=4, max_prefill_tokens=128, max_queue=500))
    for i in range(300):
        engine.submit([i % 40] * (1 + i % 20), 1 + i % 30, profile=BULK)
    rng = np.random.default_rng(0)
    for i in range(60):
        steps(engine, int(rng.integers(1, 5)))
        running = sum(request.lane is Lane.PRODUCTION for request in engine.scheduler._requests.values())
        if running < 6:
            uid = engine.submit([i % 40] * int(rng.integers(1, 30)), int(rng.integers(1, 20)))
            planned = len(engine.planned)
            request = engine.request(uid)
            while request.state is State.WAITING:
                steps(engine, 1)
            assert len(engine.planned) - planned <= 2
    engine.run()


def test_each_lane_has_a_queue_of_its_own():
    engine = Engine(limits(num_pages=8, max_batch_size=1, max_queue=3))
    for _ in range(3):
        engine.submit([1], 2, profile=BULK)
    rejected = engine.submit([1], 2, profile=BULK)
    assert isinstance(rejected, Rejected)
    assert rejected.status == 429
    assert not isinstance(engine.submit([1], 2), Rejected)
    assert engine.scheduler.num_waiting == 4
    engine.run()


@pytest.mark.parametrize("profile", list(PROFILES))
def test_a_request_for_records_of_its_prompt_computes_all_of_it(profile):
    engine = Engine(limits(num_pages=32, max_prefill_tokens=64))
    prompt = list(range(12))
    engine.submit(prompt, 3, profile=profile)
    engine.run()
    scored = engine.submit(prompt, 3, profile=profile, returns=Returns(records=True, prompt=True))
    engine.run()
    assert engine.clients[scored].ended.cached_tokens == 0
    assert len(engine.clients[scored].records) == 11 + 3
    plain = engine.submit([*prompt, 1], 3, profile=profile)
    engine.run()
    assert engine.clients[plain].ended.cached_tokens == 12


def test_what_it_computed_is_there_for_others():
    engine = Engine(limits(num_pages=32, max_prefill_tokens=64))
    prompt = list(range(12))
    engine.submit(prompt, 3, returns=Returns(records=True, prompt=True), n=2)
    engine.run()
    first, second = engine.clients.values()
    assert (len(first.records), len(second.records)) == (11 + 3, 3)
    assert (first.ended.cached_tokens, second.ended.cached_tokens) == (0, 11)


def test_after_a_preemption_only_what_has_not_come_back_comes_back():
    engine = Engine(limits(num_pages=12, max_batch_size=2, max_prefill_tokens=4, steps_in_flight=2))
    returns = Returns(records=True, prompt=True, routing=True)
    young = engine.submit(list(range(20)), 8, profile=BULK, returns=returns)
    steps(engine, 3)
    assert 0 < len(engine.clients[young].records) < 19
    old = engine.submit([1] * 24, 20)
    engine.run()
    assert engine.scheduler.stats.preemptions > 0
    assert engine.clients[old].ended.reason == "length"
    assert len(engine.clients[young].records) == 19 + 8  # and the engine has compared each
    assert len(engine.clients[young].routed) == 20 + 7


def test_records_of_one_request_in_one_step_fit_in_a_message():
    returns = Returns(records=True, prompt=True, top_k=128, scored_ids=tuple(range(128)))
    most = (1 << 20) // returns.record_bytes
    engine = Engine(limits(num_pages=100, page_size=64, max_prefill_tokens=4096, vocab_size=200))
    engine.submit([1] * 2000, 1, returns=returns)
    sizes = []
    while (planned := engine.plan()) is not None:
        sizes += [row[2] for row in engine.workers[0].rows_of(planned[0])]
        engine.answer_all()
    assert sizes == [most, most, 2000 - 2 * most]


def test_a_prompt_is_scored_without_sampling():
    engine = Engine(limits(num_pages=8))
    scored = engine.submit(list(range(32)), 0, returns=Returns(records=True, prompt=True))  # fills all pages
    silent = engine.submit(list(range(9)), 0)
    engine.run()
    ended = engine.clients[scored].ended
    assert (ended.reason, ended.first_token_at, len(engine.clients[scored].records)) == ("length", 0.0, 31)
    assert engine.clients[silent].ended.reason == "length"
    assert engine.clients[silent].tokens == []
    assert isinstance(engine.submit([1] * 33, 0), Rejected)
