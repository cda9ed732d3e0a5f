"""The five named ways to use the engine, and the numerics classes they run in."""

import enum
from typing import Literal

import msgspec


class Numerics(enum.IntEnum):
    """A step is of one class on all ranks. EXACT is batch-invariant: a request's bits do not depend on its company."""

    FAST = 0
    EXACT = 1


class Profile(msgspec.Struct, frozen=True):
    """How a request is computed, and what it leaves in the cache.

    `caches`: which pages enter the prefix cache, the prompt's only or the output's too.
    """

    name: str
    numerics: Numerics
    caches: Literal["prompts", "prompts and outputs"]


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("production_generate", Numerics.FAST, "prompts"),
        Profile("online_distill", Numerics.EXACT, "prompts and outputs"),
        Profile("rl_sample", Numerics.EXACT, "prompts"),
        Profile("eval_exact", Numerics.EXACT, "prompts"),
        Profile("offline_distill", Numerics.FAST, "prompts and outputs"),
    )
}
