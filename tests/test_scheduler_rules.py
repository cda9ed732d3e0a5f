"""The scheduler's policy, one rule at a time."""

import msgspec
import numpy as np
import pytest

from nmoe.messages import ROW_HAS_IDS, Rejected, make_uid
from nmoe.outputs import Returns
from nmoe.profiles import Numerics
from nmoe.scheduler import planner
from nmoe.scheduler.request import State, sibling_seed
from tests.simulated_engine import Engine, limits
from tests.simulated_worker import VOCABULARY, expected_output


def rows_of(engine: Engine, steps) -> list[list[tuple[int, int, int, int]]]:
    """The rows that each rank's workers ran last; call right after `plan`."""
    return [worker.previous_rows for worker in engine.workers]


def test_a_long_prompt_delays_a_stream_by_one_small_chunk_at_a_time():
    engine = Engine(limits(world_size=2, num_pages=100, max_prefill_tokens=64))
    stream = engine.submit([1, 2, 3], 100)
    engine.plan()
    engine.submit(list(range(40)) * 4, 4)
    slot = engine.request(stream).slot
    for _ in range(20):
        engine.answer_all()
        steps = engine.plan()
        rows = rows_of(engine, steps)
        assert slot in [row[0] for row in rows[0] if row[2] == 1]
        assert sum(row[2] for mine in rows for row in mine if row[3] & ROW_HAS_IDS) in (8, 0)
    assert limits(world_size=2, max_prefill_tokens=64).chunk(decoding=True) == 8
    engine.run()


def test_a_head_that_fits_nowhere_blocks_the_smaller_ones_behind_it():
    engine = Engine(limits(num_pages=8, max_prefill_tokens=32))
    first = engine.submit(list(range(12)), 14)
    engine.plan()
    large = engine.submit(list(range(20, 40)), 2)
    small = engine.submit([1], 2)
    engine.answer_all()
    engine.plan()
    assert engine.request(first).state is State.DECODE
    assert engine.request(large).state is engine.request(small).state is State.WAITING
    engine.run()


def test_a_blocked_head_is_not_matched_again_until_something_changes():
    engine = Engine(limits(num_pages=8, max_prefill_tokens=32))
    engine.submit(list(range(12)), 14)
    engine.plan()
    engine.submit(list(range(20, 40)), 2)
    engine.answer_all()
    engine.plan()
    tree = engine.scheduler._ranks.pools[0].tree
    looked_up = []
    tree.match = lambda keys: looked_up.append(keys) or 0  # the head's memory must make this unreachable
    for _ in range(3):
        engine.answer_all()
        engine.plan()
    assert not looked_up


def test_a_fully_cached_aligned_prompt_recomputes_its_last_token_only():
    engine = Engine(limits())
    prompt = list(range(8))
    engine.submit(prompt, 3)
    engine.run()
    again = engine.submit(prompt, 3)
    (step,) = engine.plan()
    assert step.admits[0].cached == 8
    assert rows_of(engine, step)[0][0][1:3] == (7, 1)
    engine.run()
    assert engine.clients[again].ended.cached_tokens == 7


def test_identical_prompts_in_one_step_leak_nothing():
    engine = Engine(limits(num_pages=32, max_prefill_tokens=64))
    for _ in range(3):
        engine.submit(list(range(12)), 3)
    engine.run()
    pool = engine.scheduler._ranks.pools[0]
    assert (pool.num_cached, pool.num_free) == (3, 29)


def test_a_page_behind_a_duplicate_stays_private():
    """Both compute the first page in one step; the second's next page must not hang on the first's node."""
    engine = Engine(limits(num_pages=12, max_prefill_tokens=64))
    first = engine.submit([1, 2, 3, 4], 1)
    second = engine.submit([1, 2, 3, 4, 5, 6, 7, 8], 24)
    engine.plan()
    engine.answer_all()
    assert engine.clients[first].ended
    assert engine.scheduler._ranks.pools[0].num_cached == 1
    for filler in range(10, 16):  # their pages push out the first's, which is the least recently used
        engine.submit([filler] * 12, 1)
        engine.plan()
        engine.answer_all()
    assert engine.scheduler.stats.evictions > 0
    assert engine.request(second).state is State.DECODE
    engine.run()


def test_a_preempted_row_gets_no_page_in_that_step():
    """Two rows reach the end of their pages together and one page is left: it is the older's, whoever comes first."""
    engine = Engine(limits(num_pages=5, max_batch_size=2, max_prefill_tokens=32, steps_in_flight=1))
    low = engine.submit([1] * 4, 12, priority=1)
    engine.plan()
    engine.answer_all()
    high = engine.submit([2] * 5, 12, priority=0)
    while not engine.scheduler.stats.preemptions:
        steps = engine.plan()
        engine.answer_all()
    assert engine.request(low).state is State.WAITING
    assert np.frombuffer(steps[0].pages, np.int32).tolist() == [1, engine.request(high).pages[-1]]
    engine.run()


def test_a_popular_prefix_spreads_when_its_rank_fills():
    engine = Engine(limits(world_size=4, num_pages=600, max_batch_size=4, max_prefill_tokens=4 * 2000))
    prefix = [i * i % VOCABULARY for i in range(440)]
    engine.submit(prefix, 3)
    engine.run()
    uids = [engine.submit([*prefix, i], 100) for i in range(10)]
    engine.plan()
    placed = [engine.request(uid).rank for uid in uids]
    assert placed[:4] == [0] * 4
    assert sorted(placed[4:7]) == [1, 2, 3]
    assert max(map(placed.count, range(4))) == 4


def test_idle_ranks_get_an_empty_step_and_an_idle_engine_none():
    engine = Engine(limits(world_size=4))
    assert engine.plan() is None
    engine.submit([1, 2, 3], 2)
    steps = engine.plan()
    assert [len(step.rows) for step in steps] == [16, 0, 0, 0]
    assert {step.num_tokens for step in steps} == {3}
    engine.run()
    assert engine.plan() is None


def test_an_unchanged_decode_step_is_a_few_bytes():
    engine = Engine(limits(max_batch_size=64, num_pages=1000, page_size=16, max_prefill_tokens=4096))
    for i in range(64):
        engine.submit([i % VOCABULARY] * 4, 11)
    sizes = []
    for _ in range(8):
        (step,) = engine.plan()
        sizes.append(len(msgspec.msgpack.encode(step)))
        engine.answer_all()
    assert sizes[1] > 16 * 64  # the first decode rows are spelled out
    assert max(sizes[2:]) < 40
    engine.run()


def test_the_prompt_of_siblings_is_computed_once_on_one_rank():
    engine = Engine(limits(world_size=2, num_pages=64, max_batch_size=8, max_prefill_tokens=64))
    uid = engine.submit(list(range(10)), 5, n=4)
    engine.plan()
    engine.submit([1, 2], 3)  # behind the siblings
    assert engine.scheduler.num_waiting == 4
    engine.plan()
    siblings = [engine.request(uid + i) for i in range(4)]
    assert {request.rank for request in siblings} == {0}
    assert [len(set(request.pages) - set(siblings[0].pages)) for request in siblings] == [0, 1, 1, 1]
    engine.run()
    assert [engine.clients[uid + i].ended.cached_tokens for i in range(4)] == [0, 8, 8, 8]
    assert len({tuple(engine.clients[uid + i].tokens) for i in range(4)}) == 4


def test_sibling_seeds_are_splitmix64():
    # The first outputs of splitmix64 started at 1234567, from the authors' reference code, without their last bit.
    reference = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [sibling_seed(1234567, i) for i in range(4)] == [1234567, *(value >> 1 for value in reference)]


def test_siblings_outlive_the_first():
    engine = Engine(limits(world_size=2, max_prefill_tokens=8))
    uid = engine.submit(list(range(20)), 3, n=3)
    engine.plan()
    engine.abort(uid)
    engine.run()
    assert [engine.clients[uid + i].ended.reason for i in range(3)] == ["abort", "length", "length"]


def test_siblings_without_room_on_their_rank_hold_up_only_that_rank():
    engine = Engine(limits(world_size=2, num_pages=64, max_batch_size=2, max_prefill_tokens=64))
    uid = engine.submit(list(range(10)), 30, n=4)
    engine.plan()
    others = [engine.submit([1, 2], 30) for _ in range(4)]
    engine.plan()
    assert [engine.request(uid + i).state for i in (2, 3)] == [State.WAITING] * 2
    assert [engine.request(other).rank for other in others] == [1, 1, -1, -1]
    engine.run()


def test_classes_take_turns_and_share_no_prefix():
    engine = Engine(limits(num_pages=32, max_prefill_tokens=64))
    prompt = list(range(8))
    uids = [engine.submit(prompt, 6, profile=profile) for profile in ("production_generate", "rl_sample")]
    classes = []
    for _ in range(6):
        (step,) = engine.plan()
        classes.append(step.numerics)
        engine.answer_all()
    assert classes == [Numerics.FAST, Numerics.EXACT] * 3
    engine.run()
    assert [engine.clients[uid].ended.cached_tokens for uid in uids] == [0, 0]


@pytest.mark.parametrize(("profile", "cached"), [("production_generate", 8), ("offline_distill", 20)])
def test_which_outputs_are_cached_is_the_profiles_choice(profile, cached):
    engine = Engine(limits(num_pages=32, max_prefill_tokens=64))
    first = engine.submit(list(range(9)), 14, profile=profile)
    engine.run()
    follow_up = list(range(9)) + engine.clients[first].tokens + [1, 2]
    second = engine.submit(follow_up, 2, profile=profile)
    engine.run()
    third = engine.submit([*follow_up, 3, 4], 2, profile=profile)
    engine.run()
    assert engine.clients[second].ended.cached_tokens == cached
    assert engine.clients[third].ended.cached_tokens == 24  # the prompt that began with a hit is cached to its end


def test_ranks_may_answer_at_different_speeds():
    engine = Engine(limits(world_size=2))
    uid = engine.submit([1, 2, 3], 4)
    engine.plan()
    engine.plan()
    assert engine.plan() is None
    assert engine.answer(1)
    assert engine.answer(1)
    assert engine.clients[uid].tokens == []
    assert engine.answer(0)
    assert len(engine.clients[uid].tokens) == 1
    engine.run()


def test_the_row_after_an_eos_is_dropped():
    prompt = [1, 2, 3]
    eos = expected_output(prompt, 1000 + make_uid(0, 1, 0), 10, ())[2]
    engine = Engine(limits())
    uid = engine.submit(prompt, 10, eos_ids=(eos,))
    engine.plan()
    for _ in range(6):
        engine.plan()
        engine.answer(0)
    assert engine.clients[uid].ended.reason == "stop"
    assert engine.clients[uid].tokens[-1] == eos
    assert len(engine.planned) == len(engine.clients[uid].tokens) + 1
    engine.run()


def test_late_finish_and_abort_are_ignored():
    engine = Engine(limits())
    uid = engine.submit([1, 2, 3], 2)
    engine.run()
    engine.finish(uid, 1)
    engine.abort(uid)
    assert engine.clients[uid].ended.reason == "length"


def test_priority_goes_first_and_is_preempted_last():
    engine = Engine(limits(num_pages=6, max_batch_size=2, max_prefill_tokens=32))
    low = engine.submit([1] * 4, 16, priority=1)
    high = engine.submit([2] * 4, 16, priority=0)
    engine.plan()
    assert engine.request(high).slot == 0
    while not engine.scheduler.stats.preemptions:
        engine.plan()
        engine.answer_all()
    assert engine.request(low).rank == -1
    assert engine.request(high).state is State.DECODE
    engine.run()


def test_each_frontend_gets_one_message_per_step():
    engine = Engine(limits())
    for frontend in (2, 0, 2):
        engine.submit([1, 2, 3], 1, frontend=frontend)
    engine.plan()
    engine.scheduler.complete(engine.unanswered[0].popleft(), engine.now)
    messages = engine.scheduler.drain()
    assert [frontend for frontend, _ in messages] == [0, 2]
    assert [len(message.ended) for _, message in messages] == [1, 2]


def test_a_frontend_that_is_gone_is_forgotten_silently():
    engine = Engine(limits())
    mine, other = engine.submit([1, 2, 3], 5, frontend=1), engine.submit([1, 2, 3], 5, frontend=0)
    engine.plan()
    engine.scheduler.forget(1, 1)
    assert mine in engine.scheduler._requests  # its life 1 is still there
    engine.scheduler.forget(1, 2)
    assert list(engine.scheduler._requests) == [other]
    assert engine.scheduler.drain() == []


def refused(engine: Engine, *arguments, **fields) -> tuple[int, str]:
    rejected = engine.submit(*arguments, **fields)
    assert isinstance(rejected, Rejected)
    return rejected.status, rejected.detail


def test_refusals_say_why():
    engine = Engine(limits(num_pages=4, max_seq_len=30, max_queue=2))
    assert refused(engine, [1] * 20, 11) == (
        400,
        "the prompt's 20 tokens and max_tokens = 11 together exceed the limit of 30 tokens",
    )
    assert refused(engine, [1] * 10, 8) == (
        400,
        "the prompt's 10 tokens and max_tokens = 8 need 5 pages of 4 tokens; the cache has 4 per rank",
    )
    assert refused(engine, [1], n=3)[0] == 400
    assert refused(engine, [], 1)[0] == 400
    assert refused(engine, [1], -1)[0] == 400
    assert refused(engine, [1], returns=Returns(prompt=True))[0] == 400
    assert refused(engine, [1], returns=Returns(records=True, top_k=129))[0] == 400
    assert refused(engine, [-1], 1)[0] == 400
    assert refused(engine, [1, VOCABULARY], 1)[1] == "the prompt's token ids go from 1 to 40; the model has 0 to 39"
    assert refused(engine, [1], returns=Returns(records=True, scored_ids=(40,)))[0] == 400
    assert refused(engine, [1], returns=Returns(records=True, scored_ids=(1,) * 129))[0] == 400
    assert refused(engine, [1], returns=Returns(records=True, top_k=41))[0] == 400
    assert refused(engine, [1], 1, profile="nobody")[0] == 400
    assert refused(engine, [1], 1, n=0)[0] == 400
    engine.submit([1] * 9, 8)  # just fits
    assert refused(engine, [1], n=2) == (429, "the queue is full: 1 requests wait, 2 more exceed max_queue = 2")
    engine.next_counter -= 2
    engine.next_counter = 0
    engine.submit([1], 1)
    engine.next_counter -= 1
    assert "are not all new" in refused(engine, [1], 1)[1]
    engine.run()


def test_a_wrong_answer_is_a_defect():
    engine = Engine(limits())
    engine.submit([1, 2, 3], 2)
    engine.plan()
    done = engine.unanswered[0][0]
    for wrong in (
        msgspec.structs.replace(done, tokens=done.tokens * 2),
        msgspec.structs.replace(done, counts=np.array([0], np.int32).tobytes(), tokens=b""),
        msgspec.structs.replace(done, step_id=7),
    ):
        with pytest.raises(RuntimeError, match="rank 0 answered step"):
            engine.scheduler.complete(wrong, engine.now)


def test_pages_that_do_not_add_up_are_noticed_when_a_rank_becomes_idle():
    engine = Engine(limits())
    uid = engine.submit([1, 2, 3], 2)
    engine.plan()
    engine.scheduler._ranks.pools[0]._free.append(engine.request(uid).pages[0])
    with pytest.raises(RuntimeError, match="do not add up"):
        engine.run()


@pytest.mark.parametrize("returns", [Returns(), Returns(records=True, prompt=True, logits=True, routing=True)])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_logits_that_are_not_finite_end_that_request_alone(max_tokens, returns):
    engine = Engine(limits())
    broken = engine.submit([1, 2, 3], max_tokens, returns=returns)
    other = engine.submit([1, 2, 3, 4], 6, returns=returns)
    if max_tokens:
        engine.plan()
        engine.plan()
    engine.break_logits(broken)
    engine.run()
    ended = engine.clients[broken].ended
    assert engine.clients[other].ended.reason == "length"  # with the right tokens, see Engine.check_end
    if returns or max_tokens:
        assert (ended.reason, ended.status, ended.code) == ("error", 500, "logits_not_finite")
        assert "logits are not finite" in ended.detail
    assert len(engine.clients[broken].tokens) == (2 if max_tokens else 0)


@pytest.mark.parametrize("routing", [True, False])
def test_long_cached_prompts_that_return_their_routing_begin_one_by_one(monkeypatch, routing):
    monkeypatch.setattr(planner, "_ROUTED_BYTES", 100)
    engine = Engine(limits(num_pages=32, routing_bytes=8))
    prompt = list(range(20))
    engine.submit(prompt, 1)
    engine.run()
    siblings = [engine.submit(prompt, 2, returns=Returns(routing=routing)) for _ in range(4)]
    begun = []
    while sum(begun) < len(siblings):
        (steps,) = engine.plan()
        begun.append(len(steps.admits))
        engine.answer_all()
    assert begun == ([1, 1, 1, 1] if routing else [4])
    engine.run()
    short = [engine.submit([7, i], 2, returns=Returns(routing=True)) for i in range(4)]
    assert len(engine.plan()[0].admits) == len(short)
    engine.run()


def ask(engine: Engine, prompt: list[int], *, broken: bool = False) -> str | int:
    """Run one request alone: how many of its tokens were cached, or "error"."""
    uid = engine.submit(prompt, 2)
    if broken:
        engine.break_logits(uid)
    engine.run()
    ended = engine.clients[uid].ended
    return "error" if ended.reason == "error" else ended.cached_tokens


def test_what_a_request_without_finite_logits_computed_is_shared_with_nobody():
    engine = Engine(limits(num_pages=32))
    prompt, good = list(range(13)), list(range(20, 33))
    assert ask(engine, prompt, broken=True) == "error"
    assert [ask(engine, prompt) for _ in range(2)] == [0, 12]
    # Nor is what it computed and left behind unseen; the first to find it suffers, the next does not.
    uid = engine.submit(good, 2)
    engine.break_logits(uid)
    engine.plan()
    engine.abort(uid)
    assert [ask(engine, good) for _ in range(3)] == ["error", 0, 12]
    # Pages whose logits were finite stay.
    assert ask(engine, [*prompt[:8], *range(30, 38)], broken=True) == "error"
    assert ask(engine, prompt) == 12
    assert ask(engine, [*prompt[:8], *range(30, 38)]) == 8


def test_nothing_hangs_on_pages_that_were_cut_off():
    engine = Engine(limits(num_pages=32, max_prefill_tokens=8))
    prompt = list(range(20))
    first, follower = engine.submit(prompt[:9], 2), engine.submit(prompt, 2)
    engine.break_logits(first)
    for _ in range(3):
        engine.plan()
    assert engine.request(follower).published and engine.request(follower).state is State.PREFILL
    engine.run()  # an orphan would be noticed, see Engine.check_pages
    assert {engine.clients[uid].ended.reason for uid in (first, follower)} == {"error"}
    assert [ask(engine, prompt) for _ in range(2)] == [0, 19]


def test_who_holds_pages_that_were_cut_off_goes_on():
    engine = Engine(limits(num_pages=32, max_prefill_tokens=8))
    healthy = engine.submit(list(range(32)), 2, priority=1)
    engine.plan()
    broken = engine.submit([*range(6), 7], 2)  # goes first, and shares the healthy one's page
    engine.break_logits(broken)
    while engine.clients[broken].ended is None:
        engine.plan()
        engine.answer(0)
    assert engine.request(healthy).state is State.PREFILL
    engine.run()
    assert engine.clients[healthy].ended.reason == "length"
    assert [ask(engine, list(range(32))) for _ in range(2)] == [0, 31]
