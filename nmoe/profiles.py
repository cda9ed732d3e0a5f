"""The five named ways to use the engine, and the numerics classes and lanes they run in."""

import enum
from typing import Literal

import msgspec


class Numerics(enum.IntEnum):
    """A step is of one class on all ranks. EXACT is batch-invariant: a request's bits do not depend on its company."""

    FAST = 0
    EXACT = 1


class Lane(enum.IntEnum):
    """Which requests share steps. Lanes take turns; while PRODUCTION has work, every second step is its own."""

    PRODUCTION = 0
    EXACT = 1
    EVALUATION = 2  # in arrival order, whatever the priorities
    BULK = 3  # full batches, in the room that the others leave

    @property
    def numerics(self) -> Numerics:
        """The class of the lane's steps."""
        return Numerics.EXACT if self in (Lane.EXACT, Lane.EVALUATION) else Numerics.FAST


class Profile(msgspec.Struct, frozen=True):
    """How a request is computed, what comes back unless the request says otherwise, and what it leaves in the cache.

    `caches`: which pages enter the prefix cache, the prompt's only or the output's too. `lasting`: they are evicted
    after all others. `scores`: log-probabilities of the sampled tokens come back unasked, with the `top_k` likeliest
    tokens at each position, and with `scores_prompt` of the prompt's tokens too.
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
        """The class of its steps."""
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
