"""Completions and chats, from the request's body to the end of the answer."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec
from aiohttp import web

from nmoe.architecture import Architecture
from nmoe.arena import ArenaLayout
from nmoe.errors import RequestError
from nmoe.frontend import openai, replies
from nmoe.frontend.bulk import Bulk
from nmoe.frontend.health import Health
from nmoe.frontend.http import Headers, json_response
from nmoe.frontend.logprobs import ChoiceFormats, Formats, PromptFormats, Vocabulary
from nmoe.frontend.openai import Call
from nmoe.frontend.prompt import Prompt, Prompts, end_ids, make_sampling, make_submit, output_limit
from nmoe.frontend.replies import Answer, Choice
from nmoe.frontend.requests import Requests
from nmoe.frontend.schema import Endpoint
from nmoe.frontend.sizes import check_answer, check_returned
from nmoe.frontend.sse import EventStream
from nmoe.frontend.streams import Stream, Streams
from nmoe.ipc import Boot
from nmoe.messages import Ended, Sampling, Submit
from nmoe.metrics import row_index
from nmoe.outputs import RoutingLayout
from nmoe.trace import Record, Recorder, sampling_fields

_log = logging.getLogger("nmoe.frontend")
_Respond = Callable[["Generation", web.BaseRequest, Headers], Awaitable[web.StreamResponse]]


class Generation(msgspec.Struct):
    """A request in progress: what was asked, what is sent to the scheduler, and what comes back."""

    call: Call
    arrived: float  # seconds, CLOCK_MONOTONIC
    submits: list[Submit]  # one per prompt
    choices: list[Choice]  # `n` per prompt
    is_streaming: bool = False  # the status has been sent, so an error can only end the stream


class Generations:
    """All generating requests of one frontend. `on_idle` is called when the last open one has ended."""

    def __init__(
        self,
        boot: Boot,
        prompts: Prompts,
        eos_ids: tuple[int, ...],
        architecture: Architecture,
        health: Health,
        streams: Streams,
        requests: Requests,
        recorder: Recorder | None,
        on_idle: Callable[[], None],
    ) -> None:
        self._config = boot.config
        self._generation = boot.generation
        self._row = boot.board.rows[row_index("frontend", boot.index, boot.config.parallel.world_size)]
        self._prompts = prompts
        self._vocabulary = Vocabulary(prompts.tokenizer)
        self._eos_ids = eos_ids
        self._vocab_size = architecture.vocab_size
        self._routing = RoutingLayout.of(architecture)
        self._health = health
        self._streams = streams
        self._requests = requests
        self._recorder = recorder
        arena = ArenaLayout.of(architecture, boot.config.parallel.world_size)
        self._bulk = Bulk(boot.config.model_name, boot.arena, arena, self._routing, streams, requests)
        self._on_idle = on_idle
        self.num_open = 0

    async def answer(self, endpoint: Endpoint, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """Handle a whole request."""
        arrived = time.monotonic()
        self._health.require_serving()
        self.num_open += 1
        try:
            return await self._run(await self._prepare(endpoint, request, arrived), request, headers)
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._on_idle()

    async def _prepare(self, endpoint: Endpoint, request: web.BaseRequest, arrived: float) -> Generation:
        """Everything before the scheduler. Raises RequestError."""
        read = self._requests.read_packed if endpoint == "generate" else self._requests.read
        call = await read(request, partial(openai.parse_call, endpoint, vocab_size=self._vocab_size))
        self._requests.check_model(call.model)
        self._check_number(max(1, len(call.prompts)), call.n)
        if call.return_routed_experts and not self._routing.layers:
            param = "return_routed_experts"
            raise RequestError(f"{param}: no layer of this model has routed experts", param=param)
        make_prompts = partial(self._prompts.of, call, self._health.require_serving())
        if self._prompts.is_long_work(call):
            prompts = await self._requests.run(make_prompts, call.text_length)
        else:
            prompts = make_prompts()
        check_returned(call, prompts, self._config.server.max_body_mb << 20)
        max_seq_len = self._health.require_serving()  # checked again, because time has passed
        limits = [output_limit(call, prompt, max_seq_len) for prompt in prompts]
        check_answer(call, prompts, limits, self._routing)
        generation = Generation(call, arrived, [], [])
        ends = end_ids(call, self._eos_ids)
        sampling = make_sampling(call, ends)
        for prompt, limit in zip(prompts, limits, strict=True):
            self._add(generation, prompt, limit, sampling, ends)
        return generation

    def _check_number(self, prompts: int, n: int) -> None:
        """Raises RequestError (400) for more answers than can ever queue: retrying would not help."""
        if prompts * n > (most := self._config.server.max_queue):
            field = "n" if prompts == 1 else "prompt"
            message = f"{field}: {prompts} prompts with n = {n} exceed [server] max_queue = {most}; ask for fewer"
            raise RequestError(message, param=field)

    def _add(
        self, generation: Generation, prompt: Prompt, max_tokens: int, sampling: Sampling, ends: tuple[int, ...]
    ) -> None:
        """Add one prompt's Submit, and a stream for each of its choices."""
        call, tokenizer = generation.call, self._prompts.tokenizer
        silent = frozenset(call.stop_token_ids)
        uids = self._streams.new_uids(call.n)
        for uid in uids:
            detokenizer = tokenizer.detokenizer() if tokenizer is not None else None
            stream = Stream(uid, detokenizer, call.stop, generation.arrived, call.min_tokens, silent)
            generation.choices.append(Choice(len(generation.choices), prompt, stream))
        submit = make_submit(call, self._generation, uids[0], prompt, max_tokens, sampling, ends)
        generation.submits.append(submit)
        if call.is_repeatable:
            for choice in generation.choices[-call.n :]:
                choice.seed = submit.sampling.seed

    async def _run(self, generation: Generation, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """From submission to the end of the response, whoever ends it."""
        streams = [choice.stream for choice in generation.choices]
        timeout = self._config.server.request_timeout_s
        timer = None
        if timeout:
            left = timeout - (time.monotonic() - generation.arrived)
            timer = asyncio.get_running_loop().call_later(left, _expire, generation, timeout)
        try:
            for place, submit in enumerate(generation.submits):
                mine = slice(place * submit.n, (place + 1) * submit.n)
                self._streams.submit(streams[mine], submit)
                if submit.returns and generation.call.endpoint != "generate":
                    self._add_formats(generation.call, generation.choices[mine])
            response = await self._respond(generation)(generation, request, headers)
        finally:
            if timer is not None:
                timer.cancel()
            for stream in streams:
                self._streams.close(stream)
        for choice in generation.choices:
            self._finished(generation, choice)
        longest = max(stream.num_tokens for stream in streams)
        self._row.observe("nmoe:request_max_num_generation_tokens", longest)
        return response

    def _respond(self, generation: Generation) -> _Respond:
        if generation.call.endpoint == "generate":
            return self._respond_in_bulk
        return self._respond_in_events if generation.call.stream else self._respond_whole

    async def _respond_in_bulk(
        self, generation: Generation, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        call, choices = generation.call, generation.choices
        if call.logits:
            return await self._bulk.respond_in_frames(call, choices, request, headers)
        await _any_error(choices, [choice.stream.ended for choice in choices])
        return await self._bulk.respond_whole(call, choices, headers)

    def _add_formats(self, call: Call, siblings: Sequence[Choice]) -> None:
        """Set up rendering of the outputs of one prompt's choices."""
        formats = Formats(call, self._vocabulary, self._routing)
        first = siblings[0].stream.outputs
        assert first is not None
        of_prompt = PromptFormats(formats, siblings[0].prompt, first)
        for choice in siblings:
            assert choice.stream.outputs is not None
            choice.formats = ChoiceFormats(formats, of_prompt, len(choice.prompt.text), choice.stream.outputs)

    async def _respond_whole(
        self, generation: Generation, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        await _any_error(generation.choices, [choice.stream.ended for choice in generation.choices])
        make_body = partial(replies.whole_body, generation.call, self._config.model_name, generation.choices)
        # Outputs are slow to render, so a thread does it.
        body = await self._requests.run(make_body, 0) if generation.call.returns else make_body()
        return json_response(body, headers)

    async def _respond_in_events(
        self, generation: Generation, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        # The status is not known until something has started.
        started = [choice.stream.started for choice in generation.choices]
        if len(started) == 1:
            await started[0]
        else:
            await asyncio.wait(started, return_when=asyncio.FIRST_COMPLETED)
        _raise_error(generation.choices)
        if generation.call.returns.prompt:
            await self._render_prompts(generation)
            _raise_error(generation.choices)
        generation.is_streaming = True
        answer = Answer(generation.call, self._config.model_name, generation.choices)
        events = await EventStream.open(request, headers, answer)
        try:
            return await events.follow()
        except ConnectionError:
            raise
        except RequestError as error:  # from the tokenizer, while outputs are rendered
            return events.give_up(error)
        except Exception:
            _log.exception("request %x failed in its stream", generation.choices[0].stream.uid)
            return events.give_up(RequestError("internal error", status=500))

    async def _render_prompts(self, generation: Generation) -> None:
        """Render the prompts' outputs once all prompts are computed; this is slow, so a thread does it."""
        first = generation.choices[:: generation.call.n]
        await asyncio.wait([choice.stream.started for choice in first])
        _raise_error(generation.choices)
        for choice in first:
            assert choice.formats is not None
            await self._requests.run(choice.formats.prompt.render, 0)

    def _finished(self, generation: Generation, choice: Choice) -> None:
        """Count and record a completed choice."""
        stream, submit = choice.stream, generation.submits[choice.index // generation.call.n]
        if stream.error is not None or stream.reason is None:
            return
        now = time.monotonic()
        latency = now - stream.arrived
        self._row.observe("nmoe:e2e_request_latency_seconds", latency)
        self._observe(stream, submit, len(choice.prompt.ids))
        if self._recorder is not None:
            self._recorder.add(partial(_record, generation.call, choice, submit, time.time() - latency, latency))

    def _observe(self, stream: Stream, submit: Submit, prompt_len: int) -> None:
        """Observe the sizes and times of a completed answer."""
        observe = self._row.observe
        if stream.scheduled_at and stream.first_token_at:
            decode = stream.last_token_at - stream.first_token_at
            observe("nmoe:request_inference_time_seconds", max(0.0, stream.last_token_at - stream.scheduled_at))
            observe("nmoe:request_decode_time_seconds", decode)
            if stream.num_tokens > 1:
                observe("nmoe:request_time_per_output_token_seconds", decode / (stream.num_tokens - 1))
        observe("nmoe:request_prompt_tokens", prompt_len)
        observe("nmoe:request_generation_tokens", stream.num_tokens)
        observe("nmoe:request_params_max_tokens", submit.max_tokens)
        observe("nmoe:request_params_n", submit.n)


def _record(call: Call, choice: Choice, submit: Submit, arrived: float, latency: float) -> Record:
    """The trace record of a completed choice; `arrived` is in seconds since the epoch."""
    stream = choice.stream
    assert stream.reason is not None
    return Record(
        arrived=arrived,
        prompt_token_ids=choice.prompt.ids,
        sampling=sampling_fields(submit.sampling, submit.max_tokens),
        output_tokens=stream.num_tokens,
        finish_reason=stream.reason,
        ttft=stream.first_token_at - stream.arrived if stream.num_tokens else None,
        e2e=latency,
        user=call.user,
        metadata=call.metadata,
    )


def _raise_error(choices: Sequence[Choice]) -> None:
    for choice in choices:
        if choice.stream.error is not None:
            raise choice.stream.error


async def _any_error(choices: Sequence[Choice], ended: Sequence["asyncio.Future[None]"]) -> None:
    """Wait until all have ended. Raises the first error as soon as there is one."""
    if len(choices) == 1:
        await ended[0]
    else:
        ends: asyncio.Queue[None] = asyncio.Queue()
        for future in ended:
            future.add_done_callback(lambda _: ends.put_nowait(None))
        for _ in ended:
            await ends.get()
            _raise_error(choices)
    _raise_error(choices)


def _expire(generation: Generation, timeout: float) -> None:
    """The request has timed out. An answer that is already streaming ends with what it has."""
    streams = [choice.stream for choice in generation.choices]
    for stream in streams:
        if stream.reason is None and generation.is_streaming:
            stream.finish(Ended(stream.uid, "abort"))
        elif stream.reason is None:
            stream.fail(RequestError(f"not finished within {timeout:g} s", status=504, code="timeout"))
