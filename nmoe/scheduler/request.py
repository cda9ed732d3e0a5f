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
    """Where a request stands.

    SIBLING -> WAITING -> PREFILL -> DECODE -> LAUNCHED -> ENDED
                  ^          |          |
                  +----- DRAINING <-----+        and from every state to ENDED
    """

    SIBLING = enum.auto()  # waits until its first sibling's prompt is computed
    WAITING = enum.auto()  # in the queue
    PREFILL = enum.auto()  # placed on a rank; some of its known tokens are still to be planned
    DECODE = enum.auto()  # in its rank's batch, unless stalled; each step may plan one row
    LAUNCHED = enum.auto()  # all rows planned; the last results are on their way
    DRAINING = enum.auto()  # preempted; requeues when its rows in flight have returned
    ENDED = enum.auto()


class Request(msgspec.Struct, eq=False):
    """The part of a request's state that changes only when it begins, ends, or crosses a page.

    What changes with every token is in the arrays of `nmoe/scheduler/slots.py`.
    """

    uid: int
    order: tuple[int, int]  # (priority, arrival): the smaller goes first, the larger is preempted first
    prompt: bytes  # int32
    max_tokens: int
    sampling: Sampling
    eos_ids: tuple[int, ...]
    lane: Lane
    caches_outputs: bool
    lasting: bool  # its pages in the prefix cache are evicted last
    returns: Returns
    arrived_at: float
    known: bytes  # int32, the prompt, and after a preemption the output too: what is computed with ids
    keys: list[bytes] = []  # names of its full pages in the prefix tree, see nmoe/scheduler/prefix.py
    siblings: "list[Request]" = []  # those that wait for this one's prompt
    pinned: int | None = None  # the rank it must be placed on
    state: State = State.WAITING
    returned: int = 0  # positions whose block came back before the last preemption
    output: bytes = b""  # int32; the newest tokens are still in the slot's tail
    misfits: dict[int, int] = {}  # rank -> the rank's news when it did not fit there

    # While placed.
    rank: int = -1
    slot: int = -1  # global: rank * num_slots + slot
    pages: list[int] = []
    published: int = 0  # its leading pages that are in the tree
    stalled: bool = False  # it has no row, since the arena has no cell for its logits
    publishes: bool = False  # false once another request's page took the place of one of its own

    cached_tokens: int = 0
    scheduled_at: float = 0.0
    first_token_at: float = 0.0

    @property
    def numerics(self) -> Numerics:
        """The class of its steps."""
        return self.lane.numerics

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt) // 4

    @property
    def known_len(self) -> int:
        """Tokens to compute with ids."""
        return len(self.known) // 4

    @property
    def limit(self) -> int:
        """Tokens of prompt and output when it ends by length."""
        return self.prompt_len + self.max_tokens

    @property
    def last_computed(self) -> int:
        """Positions that are computed when it ends by length: the last sampled token is not, the whole prompt is."""
        return max(self.limit - 1, self.prompt_len)

    def shared_keys(self, page_size: int) -> list[bytes]:
        """The pages that it may take from the prefix cache.

        Records of the prompt come of computing it, so what has not returned is computed whatever the cache holds.
        """
        if not self.returns.prompt or self.returned >= self.prompt_len - 1:
            return self.keys
        return self.keys[: self.returned // page_size]

    def cells_for(self, first: int, count: int) -> int:
        """How many cells of the arena a row takes that computes `count` known tokens from position `first`."""
        if not self.returns.logits:
            return 0
        end = first + count
        told = min(end, self.prompt_len - 1) - max(first, self.returned) if self.returns.prompt else 0
        return max(0, told) + (end == self.known_len and self.max_tokens > 0)

    def returns_in(self, end: int, samples: bool) -> bool:
        """Whether a row with ids that ends before position `end` has something to return."""
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

    What the prompt returns comes back once: with the first.
    """
    profile = PROFILES[submit.profile]
    # In the lane that keeps the order of arrivals, priorities count for nothing.
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
