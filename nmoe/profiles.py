"""The five named ways to use the engine, and the numerics classes and lanes they run in."""

import enum
from typing import Literal

import msgspec


class Numerics(enum.IntEnum):
    """All ranks run a step in one class. EXACT is batch-invariant: a request's bits do not depend on its batch."""

    FAST = 0
    EXACT = 1


class Lane(enum.IntEnum):
    """Requests of one lane share steps. Lanes take turns; while PRODUCTION has work, it gets every second step."""

    PRODUCTION = 0
    EXACT = 1
    EVALUATION = 2  # in arrival order, regardless of priority
    BULK = 3  # full batches, in the room left by other lanes

    @property
    def numerics(self) -> Numerics:
        """The numerics class of the lane's steps."""
        return Numerics.EXACT if self in (Lane.EXACT, Lane.EVALUATION) else Numerics.FAST


class Profile(msgspec.Struct, frozen=True):
    """How a request is computed, what it returns unless it says otherwise, and what it leaves in the cache.

    `caches`: which pages enter the prefix cache, only the prompt's or also the output's. `lasting`: they are evicted
    after all others. `scores`: return log-probabilities of the sampled tokens by default, along with the `top_k`
    likeliest tokens at each position; with `scores_prompt`, those of the prompt's tokens too.
    """

    name: str
    lane: Lane
    caches: Literal["prompts", "prompts and outputs"]
    lasting: bool = False
    streams: bool = False
    scores: bool = True
    scores_prompt: bool = False
    top_k: int = 0

    @property
    def numerics(self) -> Numerics:
        """The numerics class of its steps."""
        return self.lane.numerics


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("production_generate", Lane.PRODUCTION, "prompts", streams=True, scores=False),
        Profile("online_distill", Lane.EXACT, "prompts and outputs", lasting=True, top_k=10),
        Profile("rl_sample", Lane.EXACT, "prompts"),
        Profile("eval_exact", Lane.EVALUATION, "prompts", scores_prompt=True),
        Profile("offline_distill", Lane.BULK, "prompts and outputs", top_k=10),
    )
}
