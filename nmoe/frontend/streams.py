"""Every request of this frontend that the scheduler has, by uid: token ids come in, text and ids go out.

Invariants: a stream ends exactly once, by whichever comes first: its terminal message, a failure, or the client's
leaving. What arrives for it later is dropped. A uid stays here until the scheduler is done with it, so `Streams.close`
knows whether there is anything to abort.

Messages about a request that the scheduler has (that it may stop, or which cells are free) wait here while the link is
full: a lost Release would cost a cell for as long as this process lives.

A token's path is short, because there are many tokens: `Streams.deliver` runs in the link's reader, feeds each stream,
and calls the stream's `on_tokens`, which writes to the client's transport. No task wakes up.
"""

import array
import asyncio
import collections
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

import msgspec

from nmoe.errors import RequestError
from nmoe.frontend.detokenizer import Detokenizer
from nmoe.frontend.outputs import Outputs
from nmoe.frontend.stops import StopFinder
from nmoe.messages import Abort, Ended, Finish, FrontendToScheduler, Reason, Rejected, Release, Submit, Tokens, make_uid
from nmoe.metrics import Row
from nmoe.outputs import cells_of

_log = logging.getLogger("nmoe.frontend")


class Stream:
    """One request's output. `started` completes with the first token or the end, `ended` with the end.

    After the end either `error` is set, or `reason` and the counts are.
    """

    def __init__(
        self,
        uid: int,
        detokenizer: Detokenizer | None,
        stops: tuple[str, ...],
        arrived: float,
        min_tokens: int = 0,
        silent_ids: frozenset[int] = frozenset(),
    ) -> None:
        """A stop string counts only if it ends after the first `min_tokens` tokens, wherever it begins. `silent_ids`
        have no text: they end the request."""
        loop = asyncio.get_running_loop()
        self.uid = uid
        self.num_siblings = 1
        self.arrived = arrived  # seconds, CLOCK_MONOTONIC
        self.started: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.on_tokens: Callable[[], None] | None = None
        self.on_outputs: Callable[[], None] | None = None  # called after `on_tokens`, also for steps without a token
        self.outputs: Outputs | None = None  # None if the request wants only tokens
        self.reason: Reason | None = None
        self.error: RequestError | None = None
        self.num_tokens = 0
        self.cached_tokens = 0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.scheduled_at = 0.0  # seconds, CLOCK_MONOTONIC; known at the end
        self._min_tokens = min_tokens
        self._silent_ids = silent_ids
        self._detokenizer = detokenizer
        self._stops = StopFinder(stops) if stops else None
        self.stopped = False  # a stop string has appeared: the output is complete
        self._texts: list[str] = []
        self._ids: list[int] = []

    @property
    def holds_text(self) -> bool:
        """Whether some text may still become part of a stop string, or is an incomplete character."""
        in_stops = self._stops is not None and self._stops.holds
        return in_stops or (self._detokenizer is not None and self._detokenizer.holds)

    @property
    def num_untaken(self) -> int:
        """How many tokens have arrived since the last call of `take`."""
        return len(self._ids)

    def take(self) -> tuple[str, list[int]]:
        """Text and ids since the last call."""
        text, ids = "".join(self._texts), self._ids
        self._texts, self._ids = [], []
        return text, ids

    def feed(self, tokens: Sequence[int]) -> None:
        """Add new tokens, at least one; those after a stop string are dropped."""
        if self._stops is not None:
            tokens = self._feed_until_stop(tokens, self._stops)
        else:
            self.num_tokens += len(tokens)
            if self._detokenizer is not None:
                for token in tokens:
                    if token not in self._silent_ids and (text := self._detokenizer.feed(token)):
                        self._texts.append(text)
        self._ids += tokens

    def begin(self) -> None:
        """The first tokens have arrived."""
        if not self.started.done():
            self.started.set_result(None)

    def finish(self, ended: Ended) -> None:
        """Handle the scheduler's terminal entry."""
        self.cached_tokens = ended.cached_tokens
        self.scheduled_at = ended.scheduled_at
        if ended.reason == "error":
            self.fail(RequestError(ended.detail, status=ended.status, code=ended.code))
            return
        try:
            rest = self._detokenizer.flush() if self._detokenizer is not None and not self.stopped else ""
        except Exception as error:  # as in Streams._advance
            _log.exception("request %x: its last text could not be made", self.uid)
            self.fail(_shown(error))
            return
        if self._stops is not None:
            if rest:
                self._show(rest, self._stops)
            rest = self._stops.flush()
        if rest:
            self._texts.append(rest)
        self._end("stop" if self.stopped else ended.reason, None)

    def fail(self, error: RequestError) -> None:
        """End with an error, unless a stop string has already completed the output."""
        if self.stopped:
            self._end("stop", None)
        else:
            self._end("error", error)

    def _feed_until_stop(self, tokens: Sequence[int], stops: StopFinder) -> Sequence[int]:
        """The tokens up to the one that completes a stop string."""
        for place, token in enumerate(tokens):
            self.num_tokens += 1
            if token in self._silent_ids or self._detokenizer is None:
                continue
            if text := self._detokenizer.feed(token):
                self._show(text, stops)
            if self.stopped:
                return tokens[: place + 1]
        return tokens

    def _show(self, text: str, stops: StopFinder) -> None:
        self._texts.append(stops.feed(text, early=self.num_tokens <= self._min_tokens))
        self.stopped = stops.found

    def _end(self, reason: Reason, error: RequestError | None) -> None:
        if self.reason is None:
            self.reason, self.error = reason, error
            for future in (self.started, self.ended):
                if not future.done():
                    future.set_result(None)


class Streams:
    """All streams of one frontend."""

    def __init__(self, index: int, generation: int, send: Callable[[FrontendToScheduler], None], row: Row) -> None:
        self._index = index
        self._generation = generation
        self._send = send
        self._row = row
        self._counter = 0
        self._live: dict[int, Stream] = {}
        self._untold: collections.deque[Abort | Finish | Release] = collections.deque()

    def new_uids(self, count: int) -> range:
        """Consecutive uids that no other request of this server uses."""
        first = make_uid(self._index, self._generation, self._counter + 1)
        self._counter += count
        return range(first, first + count)

    def submit(self, streams: Sequence[Stream], submit: Submit) -> None:
        """Hand a request to the scheduler, with a stream for each sibling. The caller must close them, however they
        end."""
        self.catch_up()
        self._send(submit)
        for stream in streams:
            self._live[stream.uid] = stream
            stream.num_siblings = submit.n
        if submit.returns:
            # The prompt's records come with the first sibling.
            others = msgspec.structs.replace(submit.returns, prompt=False)
            for place, stream in enumerate(streams):
                stream.outputs = Outputs(others if place else submit.returns, len(submit.prompt) // 4)

    def close(self, stream: Stream) -> None:
        """The stream has no reader any more: abort its request if the scheduler still computes for it."""
        stream.on_tokens = stream.on_outputs = None
        if stream.outputs is not None:
            self.release(stream.outputs.take_cells())
        if self._live.pop(stream.uid, None) is not None and not stream.stopped:
            self._tell(Abort(self._generation, stream.uid))

    def deliver(self, message: Tokens, now: float) -> None:
        """Deliver the tokens of one step, and the requests that ended with it. `now` is on CLOCK_MONOTONIC."""
        self.catch_up()
        uids = memoryview(message.uids).cast("q").tolist()
        tokens = memoryview(message.tokens).cast("i").tolist()
        with_outputs = self._add_outputs(uids, message) if message.block_sizes is not None else ()
        stopped: list[Stream] = []
        gaps: dict[float, int] = {}  # seconds between two tokens -> how often; the same for nearly all rows of a step
        for uid, mine in zip(uids, _split(tokens, message.counts), strict=True):
            stream = self._live.get(uid)
            if stream is None or stream.stopped or stream.reason is not None or not mine:
                continue
            if stream.last_token_at:
                gap = (now - stream.last_token_at) / len(mine)
                gaps[gap] = gaps.get(gap, 0) + len(mine)
            if self._advance(stream, mine, now):
                stopped.append(stream)
        for gap, times in gaps.items():
            self._row.observe("nmoe:inter_token_latency_seconds", gap, times)
        for stream in with_outputs:
            self._show_outputs(stream)
        for ended in message.ended:
            if (stream := self._live.pop(ended.uid, None)) is not None:
                stream.finish(ended)
        for stream in stopped:
            if stream.uid in self._live:
                self._tell(Finish(self._generation, stream.uid, stream.num_tokens))

    def release(self, cells: Sequence[int]) -> None:
        """Give cells of the arena back to the scheduler."""
        if cells:
            self._tell(Release(self._generation, array.array("i", cells).tobytes()))

    def _add_outputs(self, uids: list[int], message: Tokens) -> list[Stream]:
        """Hand each stream its block before its tokens. Returns the streams that got one; releases unread cells."""
        assert message.block_sizes is not None
        sizes = memoryview(message.block_sizes).cast("i").tolist()
        blocks, start = memoryview(message.blocks), 0
        streams, unread = [], array.array("i")
        for uid, size in zip(uids, sizes, strict=True):
            block, start = blocks[start : start + size], start + size
            if not size:
                continue
            stream = self._live.get(uid)
            if stream is None or stream.outputs is None or stream.stopped or stream.reason is not None:
                unread.extend(cells_of(block))
                continue
            try:
                stream.outputs.add(block)
                streams.append(stream)
            except ValueError:  # a defect
                _log.exception("request %x: its outputs could not be read", uid)
                stream.fail(RequestError("internal error", status=500))
        self.release(unread)
        return streams

    def _show_outputs(self, stream: Stream) -> None:
        """Notify the stream's reader of new outputs, once the tokens are there too."""
        if stream.outputs is not None and stream.stopped:
            self.release(stream.outputs.end(stream.num_tokens))
        if stream.on_outputs is None:
            return
        try:
            stream.on_outputs()
        except Exception as error:  # as in _advance
            _log.exception("request %x: its outputs could not be delivered", stream.uid)
            stream.fail(_shown(error))

    def reject(self, message: Rejected) -> None:
        """The scheduler accepted neither a request nor its siblings."""
        first = self._live.get(message.uid)
        for uid in range(message.uid, message.uid + (first.num_siblings if first is not None else 0)):
            if (stream := self._live.pop(uid, None)) is not None:
                stream.fail(RequestError(message.detail, status=message.status))

    def fail_all(self, error: RequestError) -> None:
        """The scheduler has forgotten every request, or this frontend is about to end."""
        streams, self._live = self._live, {}
        self._untold.clear()
        for stream in streams.values():
            if stream.outputs is not None:
                stream.outputs.take_cells()  # not released: the scheduler's next life hands these out again
            stream.fail(error)

    def _tell(self, message: Abort | Finish | Release) -> None:
        """Send now, or once the scheduler takes messages again."""
        self._untold.append(message)
        self.catch_up()
        if len(self._untold) == 1:
            _log.warning("the scheduler takes no messages: what it must hear waits")

    def catch_up(self) -> None:
        """Send what waits for the scheduler, as long as it takes messages."""
        while self._untold:
            try:
                self._send(self._untold[0])
            except RequestError:
                return
            self._untold.popleft()

    def _advance(self, stream: Stream, tokens: Sequence[int], now: float) -> bool:
        """Hand a stream its tokens. Returns whether a stop string has been completed."""
        stream.last_token_at = now
        try:
            stream.feed(tokens)
            if stream.on_tokens is not None:
                stream.on_tokens()
        except Exception as error:  # a defect, ours or the tokenizer's; the message's other streams must not suffer
            _log.exception("request %x: its tokens could not be delivered", stream.uid)
            stream.fail(_shown(error))
        if not stream.first_token_at:
            stream.first_token_at = now
            stream.begin()
            self._row.observe("nmoe:time_to_first_token_seconds", now - stream.arrived)
        return stream.stopped


def _shown(error: Exception) -> RequestError:
    """The error that the client is shown."""
    return error if isinstance(error, RequestError) else RequestError("internal error", status=500)


def _split(tokens: list[int], counts: bytes | None) -> Iterable[Sequence[int]]:
    """Each row's tokens."""
    if counts is None:
        return zip(tokens, strict=True)
    ends = [*itertools.accumulate(memoryview(counts).cast("i").tolist(), initial=0)]
    return [tokens[start:end] for start, end in itertools.pairwise(ends)]
