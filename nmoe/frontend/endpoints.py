"""The endpoints other than completions and chat: models, tokens, health, metrics, version and the API description."""

import time
from collections.abc import Iterator
from functools import partial

import orjson
from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from nmoe import __version__
from nmoe.errors import RequestError
from nmoe.frontend import openai, replies
from nmoe.frontend.generation import Generations
from nmoe.frontend.health import Health
from nmoe.frontend.http import Endpoint, Headers, json_response
from nmoe.frontend.openai import ToTokenize
from nmoe.frontend.openapi import document
from nmoe.frontend.prompt import Prompts
from nmoe.frontend.requests import Requests
from nmoe.frontend.schema import PATHS
from nmoe.ipc import Boot
from nmoe.metrics import Board

_MOST_TOKENS = 1 << 18  # the most that /tokenize returns


class _Named:
    """The board's metrics, with the label that vLLM's dashboards select on."""

    def __init__(self, board: Board, model_name: str) -> None:
        self._board = board
        self._label = {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        for metric in self._board.collect():
            metric.samples = [sample._replace(labels=self._label | sample.labels) for sample in metric.samples]
            yield metric


class Endpoints:
    """All endpoints of one frontend."""

    def __init__(
        self, boot: Boot, prompts: Prompts, health: Health, requests: Requests, generations: Generations
    ) -> None:
        self._name = boot.config.model_name
        self._prompts = prompts
        self._health = health
        self._requests = requests
        self._generations = generations
        self._created = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(_Named(boot.board, boot.config.model_name))

    def routes(self) -> dict[str, tuple[str, Endpoint]]:
        """Path -> method and endpoint."""
        answer = self._generations.answer
        return {
            **{path: (hdrs.METH_POST, partial(answer, endpoint)) for endpoint, path in PATHS.items()},
            "/v1/models": (hdrs.METH_GET, self._models),
            "/v1/models/": (hdrs.METH_GET, self._model),
            "/tokenize": (hdrs.METH_POST, self._tokenize),
            "/detokenize": (hdrs.METH_POST, self._detokenize),
            "/health": (hdrs.METH_GET, self._answer_health),
            "/metrics": (hdrs.METH_GET, self._metrics),
            "/version": (hdrs.METH_GET, self._version),
            "/openapi.json": (hdrs.METH_GET, self._describe),
        }

    async def _models(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        return json_response(replies.models_body(self._name, self._created, self._health.max_seq_len), headers)

    async def _model(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        self._requests.check_model(request.path.removeprefix("/v1/models/") or "(empty)")
        return json_response(replies.model_body(self._name, self._created, self._health.max_seq_len), headers)

    async def _tokenize(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        asked = await self._requests.read(request, openai.parse_tokenize)
        self._requests.check_model(asked.model)
        body = await self._requests.run(partial(self._tokens, asked), asked.text_length)
        return json_response(body, headers)

    def _tokens(self, asked: ToTokenize) -> bytes:
        """Build the answer's body; runs in a thread, because it may be large."""
        prompts, special = self._prompts, asked.add_special_tokens
        if isinstance(asked.text, str):
            ids = prompts.text_ids(asked.text, "prompt", _MOST_TOKENS, add_special_tokens=special, may_be_empty=True)
        else:
            ids = prompts.conversation_ids(asked.text, _MOST_TOKENS, add_special_tokens=special)
        strings = prompts.tokenizer.strings(ids) if asked.return_token_strs and prompts.tokenizer is not None else None
        answer = {"count": len(ids), "max_model_len": self._health.max_seq_len, "tokens": ids, "token_strs": strings}
        return orjson.dumps(answer)

    async def _detokenize(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        asked = await self._requests.read(request, openai.parse_detokenize)
        self._requests.check_model(asked.model)
        self._prompts.check_ids(asked.tokens, "tokens")
        if (tokenizer := self._prompts.tokenizer) is None:
            raise RequestError("tokens: this model has no tokenizer.json, so there is no text", param="tokens")
        text = await self._requests.run(partial(tokenizer.decode, asked.tokens), len(asked.tokens))
        return json_response({"prompt": text}, headers)

    async def _answer_health(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        self._health.check()
        return json_response({"status": "ok"}, headers)

    async def _metrics(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={**headers, hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})

    async def _version(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        return json_response({"version": __version__}, headers)

    async def _describe(self, request: web.BaseRequest, headers: Headers) -> web.StreamResponse:
        return json_response(document(), headers)
