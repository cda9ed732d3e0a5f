"""What the engine can hold, and which requests are refused immediately."""

from collections.abc import Container

import msgspec
import numpy as np

from nmoe.arena import ArenaLayout
from nmoe.config import Config
from nmoe.messages import Rejected, Submit
from nmoe.outputs import MAX_SCORED, MAX_TOP_K, Returns, RoutingLayout
from nmoe.profiles import PROFILES

_RECORDS_BYTES = 1 << 20  # that one request may return in one step
_FEWEST_CELLS = 16  # that one request may always have, whatever the others need


class Limits(msgspec.Struct, frozen=True):
    """The sizes that the policy works with; per rank unless noted otherwise."""

    world_size: int
    num_pages: int  # the smallest of all ranks
    page_size: int  # tokens
    max_batch_size: int  # requests with rows still to be launched
    num_slots: int  # 2 * max_batch_size, see Config.num_slots
    max_prefill_tokens: int  # per step, all ranks together
    max_seq_len: int  # prompt and output together; no more than the pages hold
    max_queue: int  # waiting requests of one lane, all ranks together
    cells_per_rank: int  # of the arena through which logits leave
    vocab_size: int
    steps_in_flight: int = 2
    enable_prefix_cache: bool = True
    row_tokens: int = 1  # the most tokens that one row returns
    routing_bytes: int = 0  # of one position's routing

    @classmethod
    def of(
        cls, config: Config, num_pages: int, max_seq_len: int, arena: ArenaLayout, routing: RoutingLayout
    ) -> "Limits":
        """The limits with `num_pages` per rank; `max_seq_len` is the model's, and capped here by the cache."""
        engine = config.engine
        return cls(
            world_size=config.parallel.world_size,
            num_pages=num_pages,
            page_size=engine.page_size,
            max_batch_size=engine.max_batch_size,
            num_slots=config.num_slots,
            max_prefill_tokens=engine.max_prefill_tokens,
            max_seq_len=min(max_seq_len, num_pages * engine.page_size),
            max_queue=config.server.max_queue,
            cells_per_rank=arena.cells_per_rank,
            vocab_size=arena.vocab_size,
            steps_in_flight=config.steps_in_flight,
            enable_prefix_cache=engine.enable_prefix_cache,
            routing_bytes=routing.position_bytes,
        )

    @property
    def cells_share(self) -> int:
        """How many cells a frontend may hold for one request before it gets more; slow readers must leave some."""
        return max(_FEWEST_CELLS, self.cells_per_rank // 4)

    @property
    def lookahead(self) -> int:
        """How far beyond its planned position a row may write: every step in flight may return `row_tokens`."""
        return self.steps_in_flight * (self.row_tokens - 1)

    def pages(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens`."""
        return -(-num_tokens // self.page_size)

    def chunk(self, decoding: bool) -> int:
        """The prefill token budget of one rank in one step: an even share of the total.

        While streams run, it is a quarter of that (but at least a page, if the share has one), since every stream waits
        for the step's chunks.
        """
        share = max(1, self.max_prefill_tokens // self.world_size)
        return min(share, max(self.page_size, share // 4)) if decoding else share

    def chunk_of(self, returns: Returns) -> int:
        """The most prompt tokens of one request in one step, so that its records fit in a message."""
        return max(1, _RECORDS_BYTES // returns.record_bytes) if returns.prompt else self.max_prefill_tokens

    def refusal(self, submit: Submit, live: Container[int], waiting: int, generation: int) -> Rejected | None:
        """Why `submit` cannot be accepted, or None; `live` holds the uids in use, `waiting` is the queue length."""
        problem = _malformed(submit, live) or self._unknown_ids(submit) or self._too_large(submit)
        if problem:
            return Rejected(generation, submit.uid, 400, problem)
        if waiting + submit.n > self.max_queue:
            detail = f"the queue is full: {waiting} requests wait, {submit.n} more exceed max_queue = {self.max_queue}"
            return Rejected(generation, submit.uid, 429, detail)
        return None

    def _unknown_ids(self, submit: Submit) -> str:
        ids, returns = np.frombuffer(submit.prompt, np.int32), submit.returns
        scored = returns.scored_ids or (0,)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            return (
                f"the prompt's token ids go from {ids.min()} to {ids.max()}; the model has 0 to {self.vocab_size - 1}"
            )
        if min(scored) < 0 or max(scored) >= self.vocab_size:
            return f"scored_ids go from {min(scored)} to {max(scored)}; the model has 0 to {self.vocab_size - 1}"
        if not 0 <= returns.top_k <= min(MAX_TOP_K, self.vocab_size):
            return f"top_k = {returns.top_k} is not in 0 to {min(MAX_TOP_K, self.vocab_size)}"
        return ""

    def _too_large(self, submit: Submit) -> str:
        prompt_len = len(submit.prompt) // 4
        both = f"the prompt's {prompt_len} tokens and max_tokens = {submit.max_tokens}"
        if prompt_len + submit.max_tokens > self.max_seq_len:
            return f"{both} together exceed the limit of {self.max_seq_len} tokens"
        # The last sampled token is never fed back in, so it needs no room.
        need = self.pages(max(prompt_len, prompt_len + submit.max_tokens - 1))
        if need > self.num_pages:
            return f"{both} need {need} pages of {self.page_size} tokens; the cache has {self.num_pages} per rank"
        if submit.n > self.max_queue:
            return f"n = {submit.n} exceeds max_queue = {self.max_queue}"
        return ""


def _malformed(submit: Submit, live: Container[int]) -> str:
    if submit.n < 1 or submit.max_tokens < 0:
        return f"n = {submit.n} must be at least 1, max_tokens = {submit.max_tokens} at least 0"
    if not submit.prompt or len(submit.prompt) % 4:
        return f"the prompt must be int32 token ids, at least one; it has {len(submit.prompt)} bytes"
    if submit.profile not in PROFILES:
        return f"unknown profile {submit.profile!r}; known: {', '.join(PROFILES)}"
    if any(uid in live for uid in range(submit.uid, submit.uid + submit.n)):
        return f"the uids from {submit.uid} to {submit.uid + submit.n - 1} are not all new"
    returns = submit.returns
    if len(returns.scored_ids) > MAX_SCORED:
        return f"{len(returns.scored_ids)} scored_ids are more than {MAX_SCORED}"
    if (returns.prompt or returns.logits) and not returns.records:
        return "records of the prompt, and logits, come with records of the sampled tokens only"
    return ""
