"""The scheduler's policy: what must hold whatever the stream of events. One rule at a time: test_scheduler_rules.py."""

import random

import msgspec
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from nmoe.outputs import Returns
from nmoe.profiles import PROFILES
from tests.simulated_engine import Engine, limits
from tests.simulated_worker import VOCABULARY

SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def sizes(draw, **fixed):
    """Limits so tight that eviction and preemption are common."""
    world_size = draw(st.sampled_from([1, 1, 2, 2, 3, 4, 8]))
    drawn = {
        "world_size": world_size,
        "page_size": draw(st.sampled_from([1, 2, 4])),
        "num_pages": draw(st.integers(4, 14)),
        "max_batch_size": draw(st.integers(1, 5)),
        "max_prefill_tokens": world_size * draw(st.integers(1, 12)),
        "max_queue": draw(st.integers(8, 60)),
        "cells_per_rank": draw(st.sampled_from([1, 2, 3, 8])),
        "routing_bytes": draw(st.sampled_from([8, 1 << 20])),
        "steps_in_flight": draw(st.sampled_from([1, 2, 2, 2])),
        "enable_prefix_cache": draw(st.sampled_from([True, True, True, False])),
    }
    return limits(**(drawn | fixed))


SUBMIT = st.fixed_dictionaries(
    {
        "stem": st.integers(0, 2),  # prompts of one stem share their beginnings
        "length": st.integers(0, 60),
        "tail": st.integers(0, 3),
        "max_tokens": st.integers(0, 60),
        "n": st.sampled_from([1, 1, 1, 2, 4]),
        "frontend": st.integers(0, 2),
        "eos": st.sampled_from([0, 0, 1, 3]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "profile": st.sampled_from(["production_generate", "production_generate", *PROFILES]),
        "returns": st.integers(0, 9),
    }
)
ACTION = st.one_of(
    SUBMIT,
    SUBMIT,
    st.just("plan"),
    st.just("plan"),
    st.tuples(st.just("answer"), st.integers(0, 7)),
    st.just("round"),
    st.just("round"),
    st.tuples(st.just("release"), st.integers(0, 7)),
    st.tuples(st.just("die"), st.integers(0, 2)),
    st.tuples(st.just("abort"), st.integers(0, 50)),
    st.tuples(st.just("finish"), st.integers(0, 50)),
    st.tuples(st.just("break"), st.integers(0, 50)),
)


RETURNS = [
    Returns(),
    Returns(),
    Returns(),
    Returns(records=True),
    Returns(records=True, top_k=3, scored_ids=(1, 2)),
    Returns(records=True, prompt=True),
    Returns(routing=True),
    Returns(records=True, prompt=True, top_k=1, routing=True),
    Returns(records=True, logits=True),
    Returns(records=True, prompt=True, logits=True, routing=True),
]


def submit(engine: Engine, fields: dict) -> None:
    """Submit a request that fits the engine's limits, but only just if its numbers are large."""
    room = engine.limits.max_seq_len
    length = 1 + fields["length"] % (room - 1)
    tail = min(fields["tail"], length)
    stem = fields["stem"]
    prompt = [(stem * 7 + i * i) % VOCABULARY for i in range(length - tail)] + [stem + tail + 1] * tail
    others = {name: fields[name] for name in ("n", "frontend", "priority", "profile")}
    one_each = engine.limits.row_tokens == 1
    others["returns"] = msgspec.structs.replace(
        returns := RETURNS[fields["returns"]], logits=returns.logits and one_each
    )
    engine.submit(prompt, fields["max_tokens"] % (room - length + 1), eos_ids=tuple(range(fields["eos"])), **others)


def act(engine: Engine, action) -> None:
    """Apply one random action."""
    if isinstance(action, dict):
        submit(engine, action)
    elif action == "plan":
        engine.plan()
    elif action == "round":
        engine.plan()
        for rank in range(engine.limits.world_size):
            engine.answer(rank)
    elif action[0] == "answer":
        engine.answer(action[1] % engine.limits.world_size)
    elif action[0] == "release":
        engine.release(action[1])
    elif action[0] == "die":
        engine.die(action[1] % 3)
    elif engine.clients:
        uid = list(engine.clients)[action[1] % len(engine.clients)]
        if action[0] == "abort":
            engine.abort(uid)
        elif action[0] == "break":
            engine.break_logits(uid)
        else:
            engine.finish(uid, len(engine.clients[uid].tokens))


def play(engine: Engine, actions: list) -> None:
    """All actions, then on to the end; the engine asserts its invariants after each."""
    for action in actions:
        act(engine, action)
    engine.run()
    assert sum(engine.scheduler.stats.ended.values()) == len(engine.clients) + engine.forgotten


def note(engine: Engine) -> None:
    """Tell hypothesis' statistics what happened."""
    stats = engine.scheduler.stats
    event(f"preempted: {stats.preemptions > 0}")
    event(f"evicted: {engine.scheduler.stats.evictions > 0}")
    event(f"prefix hits: {stats.prefix_hits > 0}")


KINDS = {"submit": 8, "plan": 8, "answer": 4, "round": 8, "release": 4, "abort": 4, "finish": 4, "break": 1, "die": 1}


def long_stream(seed: int, length: int = 150) -> list:
    """A long stream of actions, with more submits than a shrinking generator would make."""
    rng = random.Random(seed)
    profiles = list(PROFILES) + ["production_generate"] * 4
    actions: list = []
    for _ in range(length):
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        if kind == "submit":
            actions.append(
                {
                    "stem": rng.randrange(3),
                    "length": rng.randrange(60),
                    "tail": rng.randrange(4),
                    "max_tokens": rng.randrange(60),
                    "n": rng.choice([1, 1, 1, 2, 4]),
                    "frontend": rng.randrange(3),
                    "eos": rng.choice([0, 0, 1, 3]),
                    "priority": rng.choice([0, 0, 0, 1, -1]),
                    "profile": rng.choice(profiles),
                    "returns": rng.randrange(10),
                }
            )
        else:
            actions.append(kind if kind in ("plan", "round") else (kind, rng.randrange(50)))
    return actions


@SETTINGS
@given(sizes(), st.lists(ACTION, max_size=60))
def test_random_streams_keep_every_invariant(sizes, actions):
    play(Engine(sizes), actions)


@SETTINGS
@given(sizes(), st.integers(0, 2**32))
def test_long_random_streams_keep_every_invariant(sizes, seed):
    engine = Engine(sizes)
    play(engine, long_stream(seed))
    note(engine)


@SETTINGS
@given(sizes(), st.integers(0, 2**32), st.sets(st.integers(0, 2), min_size=1, max_size=2))
def test_frontends_that_release_nothing_stop_no_bystander(sizes, seed, stubborn):
    engine = Engine(sizes)
    engine.stubborn = stubborn
    play(engine, long_stream(seed, 80))


@SETTINGS
@given(sizes(), st.integers(2, 4), st.integers(0, 2**32))
def test_rows_of_several_tokens(sizes, row_tokens, seed):
    play(Engine(msgspec.structs.replace(sizes, row_tokens=row_tokens)), long_stream(seed, 80))


@SETTINGS
@given(sizes(), st.integers(0, 2**32), st.integers(0, 2**32))
def test_reset_ends_everything_once_and_starts_clean(sizes, before, after):
    engine = Engine(sizes)
    for action in long_stream(before, 40):
        act(engine, action)
    live = [uid for uid, client in engine.clients.items() if client.ended is None]
    engine.reset()
    assert all(engine.clients[uid].ended.reason == "error" for uid in live)
    assert all("restarted" in engine.clients[uid].ended.detail for uid in live)
    assert engine.scheduler.idle
    assert engine.scheduler.usage == 0
    play(engine, long_stream(after, 40))


PLAIN = {"priority": 0, "profile": "production_generate", "returns": 0}


def test_eviction_and_preemption_happen_and_lose_nothing():
    engine = Engine(limits(num_pages=30, page_size=4, max_prefill_tokens=64, max_seq_len=110))
    for stem in range(8):
        submit(
            engine, {"stem": stem, "length": 15, "tail": 2, "max_tokens": 88, "n": 1, "frontend": 0, "eos": 0} | PLAIN
        )
    engine.run()
    assert engine.scheduler.stats.preemptions > 0
    assert engine.scheduler.stats.evictions > 0
    assert any(len(client.tokens) > 64 for client in engine.clients.values())  # longer than a slot's tail


def test_the_same_events_give_the_same_steps():
    planned = []
    for _ in range(2):
        engine = Engine(limits(world_size=2, num_pages=12))
        play(engine, long_stream(7))
        planned.append(engine.planned)
    assert planned[0] == planned[1]
