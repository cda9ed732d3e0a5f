"""The endpoints: completions, chat, models, health and metrics."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial

import msgspec
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from nmoe.errors import RequestError
from nmoe.frontend import openai, replies
from nmoe.frontend.body import parse_object
from nmoe.frontend.health import Health
from nmoe.frontend.http import Endpoint, Headers, json_response, read_json_body
from nmoe.frontend.openai import Call
from nmoe.frontend.prompt import Prompts, make_submit, output_limit
from nmoe.frontend.sse import EventStream
from nmoe.frontend.streams import Stream, Streams
from nmoe.ipc import Boot
from nmoe.messages import Submit
from nmoe.metrics import row_index
from nmoe.trace import Record, Recorder, sampling_fields

_log = logging.getLogger("nmoe.frontend")
_INLINE_BYTES = 1 << 15  # a body up to this size is decoded faster than a thread is reached


class Generation(msgspec.Struct):
    """One request on its way: what was asked, and what comes back."""

    call: Call
    prompt: list[int]
    submit: Submit
    stream: Stream


class Endpoints:
    """All endpoints of one frontend.

    `threads` runs what would hold up the event loop; `on_idle` is called when the last open request has ended.
    """

    def __init__(
        self,
        boot: Boot,
        prompts: Prompts,
        eos_ids: tuple[int, ...],
        health: Health,
        streams: Streams,
        threads: Executor,
        recorder: Recorder | None,
        on_idle: Callable[[], None],
    ) -> None:
        self._config = boot.config
        self._generation = boot.generation
        self._row = boot.board.rows[row_index("frontend", boot.index, boot.config.parallel.world_size)]
        self._prompts = prompts
        self._eos_ids = eos_ids
        self._health = health
        self._streams = streams
        self._threads = threads
        self._recorder = recorder
        self._on_idle = on_idle
        self._created = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(boot.board)
        self.num_open = 0

    def routes(self) -> dict[str, tuple[str, Endpoint]]:
        """Path -> method and endpoint."""
        return {
            "/v1/completions": (hdrs.METH_POST, partial(self._generate, "completions")),
            "/v1/chat/completions": (hdrs.METH_POST, partial(self._generate, "chat")),
            "/v1/models": (hdrs.METH_GET, self._models),
            "/v1/models/": (hdrs.METH_GET, self._model),
            "/health": (hdrs.METH_GET, self._answer_health),
            "/metrics": (hdrs.METH_GET, self._metrics),
        }

    # ----------------------------------------------------------------------------------------------------- generation

    async def _generate(
        self, endpoint: openai.Endpoint, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        arrived = time.monotonic()
        self._health.require_serving()
        self.num_open += 1
        try:
            generation = await self._prepare(endpoint, request, arrived)
            return await self._run(generation, request, headers)
        finally:
            self.num_open -= 1
            if not self.num_open:
                self._on_idle()

    async def _prepare(self, endpoint: openai.Endpoint, request: web.BaseRequest, arrived: float) -> Generation:
        """Everything up to the scheduler. Raises RequestError."""
        body = await read_json_body(request, self._config.server.max_body_mb << 20)
        in_thread = partial(asyncio.get_running_loop().run_in_executor, self._threads)
        parse = partial(_parse, endpoint)
        call = parse(body) if len(body) <= _INLINE_BYTES else await in_thread(parse, body)
        self._check_model(call.model)
        prompts = self._prompts
        if call.stop and prompts.tokenizer is None:
            raise RequestError("stop: this model has no tokenizer.json, so there is no text to look in", param="stop")
        is_ids = call.endpoint == "completions" and isinstance(call.prompt, list)
        prompt = prompts.ids(call) if is_ids else await in_thread(prompts.ids, call)
        # Asked again, because time has passed.
        max_tokens = output_limit(call, len(prompt), self._health.require_serving())
        uid = self._streams.new_uid()
        submit = make_submit(call, self._generation, uid, prompt, max_tokens, self._eos_ids)
        detokenizer = prompts.tokenizer.detokenizer() if prompts.tokenizer is not None else None
        return Generation(call, prompt, submit, Stream(uid, detokenizer, call.stop, arrived))

    async def _run(self, generation: Generation, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        """From the scheduler to the end of the response, whoever ends it."""
        stream = generation.stream
        timeout = self._config.server.request_timeout_s
        timer = None
        if timeout:
            error = RequestError(f"not finished within {timeout:g} s", status=504, code="timeout")
            left = timeout - (time.monotonic() - stream.arrived)
            timer = asyncio.get_running_loop().call_later(left, stream.fail, error)
        try:
            self._streams.submit(stream, generation.submit)
            respond = self._respond_in_events if generation.call.stream else self._respond_whole
            response = await respond(generation, request, headers)
        finally:
            if timer is not None:
                timer.cancel()
            self._streams.close(stream)
        self._finished(generation)
        return response

    async def _respond_whole(
        self, generation: Generation, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        stream = generation.stream
        await stream.ended
        if stream.error is not None:
            raise stream.error
        body = replies.whole_body(generation.call, self._config.model_name, stream, generation.prompt)
        return json_response(body, headers)

    async def _respond_in_events(
        self, generation: Generation, request: web.BaseRequest, headers: Headers
    ) -> web.StreamResponse:
        stream, call = generation.stream, generation.call
        await stream.started  # only then is the status known
        if stream.error is not None:
            raise stream.error
        chunks = replies.Chunks(call, self._config.model_name, stream, generation.prompt)
        events = await EventStream.open(request, headers, stream, chunks)
        try:
            await stream.ended
            return await events.finish(include_usage=call.include_usage)
        except ConnectionError:
            raise
        except Exception:
            _log.exception("request %x failed in its stream", stream.uid)
            return events.give_up(RequestError("internal error", status=500))

    def _finished(self, generation: Generation) -> None:
        stream = generation.stream
        if stream.error is not None:
            return
        now = time.monotonic()
        latency = now - stream.arrived
        self._row.observe("nmoe:e2e_request_latency_seconds", latency)
        if self._recorder is not None:
            assert stream.reason is not None
            self._recorder.add(
                Record(
                    arrived=time.time() - latency,
                    prompt_token_ids=generation.prompt,
                    sampling=sampling_fields(generation.submit.sampling, generation.submit.max_tokens),
                    output_tokens=stream.num_tokens,
                    finish_reason=stream.reason,
                    ttft=stream.first_token_at - stream.arrived,
                    e2e=latency,
                )
            )

    def _check_model(self, name: str) -> None:
        if name not in ("", self._config.model_name):
            message = f"model {name[:200]!r} does not exist; this server has {self._config.model_name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    # --------------------------------------------------------------------------------------------------- the server

    async def _models(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        body = replies.models_body(self._config.model_name, self._created, self._health.max_seq_len)
        return json_response(body, headers)

    async def _model(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        self._check_model(request.path.removeprefix("/v1/models/") or "(empty)")
        body = replies.model_body(self._config.model_name, self._created, self._health.max_seq_len)
        return json_response(body, headers)

    async def _answer_health(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        self._health.check()
        return json_response({"status": "ok"}, headers)

    async def _metrics(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={**headers, hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})


def _parse(endpoint: openai.Endpoint, body: bytes) -> Call:
    return openai.parse_call(endpoint, parse_object(body))
