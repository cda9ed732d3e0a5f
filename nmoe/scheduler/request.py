"""One request as the scheduler sees it, from Submit to its terminal entry."""

import enum
import operator

import msgspec

from nmoe.messages import Sampling, Submit
from nmoe.outputs import Returns
from nmoe.profiles import PROFILES, Lane, Numerics

ORDER = operator.attrgetter("order")  # a sort key
_MASK64 = (1 << 64) - 1


class State(enum.Enum):
    """The lifecycle of a request.

    SIBLING -> WAITING -> PREFILL -> DECODE -> LAUNCHED -> ENDED
                  ^          |          |
                  +----- DRAINING <-----+        and from every state to ENDED
    """

    SIBLING = enum.auto()  # waiting for its first sibling to compute the prompt
    WAITING = enum.auto()  # queued
    PREFILL = enum.auto()  # placed on a rank; some known tokens are not planned yet
    DECODE = enum.auto()  # in its rank's batch unless stalled; each step may plan one row
    LAUNCHED = enum.auto()  # all rows planned; waiting for the last results
    DRAINING = enum.auto()  # preempted; requeued when its rows in flight have returned
    ENDED = enum.auto()


class Request(msgspec.Struct, eq=False):
    """The state of a request that changes only when it starts, ends or crosses a page boundary.

    State that changes with every token is in the arrays of `nmoe/scheduler/slots.py`.
    """

    uid: int
    order: tuple[int, int]  # (priority, arrival): smaller goes first, larger is preempted first
    prompt: bytes  # int32
    max_tokens: int
    sampling: Sampling
    eos_ids: tuple[int, ...]
    lane: Lane
    caches_outputs: bool
    lasting: bool  # its pages in the prefix cache are evicted last
    returns: Returns
    arrived_at: float
    known: bytes  # int32; the prompt, and after a preemption also the output: tokens computed from ids
    keys: list[bytes] = []  # keys of its full pages in the prefix tree, see nmoe/scheduler/prefix.py
    siblings: "list[Request]" = []  # those waiting for this one's prompt
    pinned: int | None = None  # the rank it must be placed on
    state: State = State.WAITING
    returned: int = 0  # positions whose blocks were returned before the last preemption
    output: bytes = b""  # int32; the newest tokens are still in the slot's tail
    misfits: dict[int, int] = {}  # rank -> the rank's `news` when it did not fit there

    # While placed.
    rank: int = -1
    slot: int = -1  # global: rank * num_slots + slot
    pages: list[int] = []
    published: int = 0  # number of leading pages that are in the tree
    stalled: bool = False  # has no row because the arena has no cell for its logits
    publishes: bool = False  # false once another request's page has taken the place of one of its own

    cached_tokens: int = 0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def numerics(self) -> Numerics:
        """The numerics class of its steps."""
        return self.lane.numerics

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt) // 4

    @property
    def known_len(self) -> int:
        """Number of tokens computed from ids."""
        return len(self.known) // 4

    @property
    def limit(self) -> int:
        """Prompt and output tokens if it ends by length."""
        return self.prompt_len + self.max_tokens

    @property
    def last_computed(self) -> int:
        """Positions computed if it ends by length: the whole prompt, and all output but the last token."""
        return max(self.limit - 1, self.prompt_len)

    def shared_keys(self, page_size: int) -> list[bytes]:
        """The keys of the pages it may take from the prefix cache.

        Prompt records exist only for tokens that are computed, so unreturned positions are recomputed even if cached.
        """
        if not self.returns.prompt or self.returned >= self.prompt_len - 1:
            return self.keys
        return self.keys[: self.returned // page_size]

    def cells_for(self, first: int, count: int) -> int:
        """How many arena cells a row takes that computes `count` known tokens from position `first`."""
        if not self.returns.logits:
            return 0
        end = first + count
        told = min(end, self.prompt_len - 1) - max(first, self.returned) if self.returns.prompt else 0
        return max(0, told) + (end == self.known_len and self.max_tokens > 0)

    def returns_in(self, end: int, samples: bool) -> bool:
        """Whether a row with ids that ends before position `end` returns anything."""
        wanted = self.returns
        return bool(wanted) and (samples or ((wanted.prompt or wanted.routing) and end > self.returned))


def sibling_seed(seed: int, index: int) -> int:
    """The seed of sibling `index`: the request's own for 0, else 63 bits of splitmix64's output `index` after `seed`.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK64
    return (z ^ z >> 31) >> 1


def siblings(submit: Submit, arrival: int, now: float) -> list[Request]:
    """The `n` requests of a Submit, in order; their arrivals are consecutive.

    What the prompt returns is returned once, by the first.
    """
    profile = PROFILES[submit.profile]
    # This lane keeps arrival order, so priorities are ignored.
    priority = 0 if profile.lane is Lane.EVALUATION else submit.priority
    later = msgspec.structs.replace(submit.returns, prompt=False)
    return [
        Request(
            uid=submit.uid + index,
            order=(priority, arrival + index),
            prompt=submit.prompt,
            max_tokens=submit.max_tokens,
            sampling=msgspec.structs.replace(submit.sampling, seed=sibling_seed(submit.sampling.seed, index)),
            eos_ids=submit.eos_ids,
            lane=profile.lane,
            caches_outputs=profile.caches == "prompts and outputs",
            lasting=profile.lasting,
            returns=later if index else submit.returns,
            arrived_at=now,
            known=submit.prompt,
        )
        for index in range(submit.n)
    ]
