"""A frontend without an engine: the real frontend on a real ZeroMQ link, whose other end is scripted by the test.

    async with Rig(folder) as rig:
        async with rig.post("/v1/completions", prompt="hi", stream=True) as response: ...
        submit = await rig.next(Submit)
        await rig.tokens(submit, "text", reason="stop")

The tokenizer has one token per byte, so a script spells its text and every multi-byte character spans tokens.
"""

import array
import asyncio
import contextlib
import json
import pathlib
import socket
import tempfile

import aiohttp
import msgspec
import zmq.asyncio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import nmoe
from nmoe import ipc
from nmoe.arena import ArenaLayout
from nmoe.config import Config, Model, Parallel, Server, Trace
from nmoe.config_json import read_architecture
from nmoe.frontend.server import Frontend
from nmoe.messages import Ended, FrontendToScheduler, Hello, Serving, Tokens
from nmoe.metrics import Board

BOS, EOS = 0, 1
SPECIALS = ["<bos>", "<eos>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_SEQ_LEN = 200
VOCAB_SIZE = 300  # padded past the tokenizer's 261
TIMEOUT = 5.0


def byte_tokenizer():
    """Special tokens 0 to 4, then one token per byte; BOS before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids_of(text):
    """One token id per byte of `text`."""
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def ints(data):
    """int32 bytes as a list."""
    return list(memoryview(data).cast("i"))


def write_model(folder, *, tokenizer=True, template=TEMPLATE, **config):
    """What a frontend reads of a checkpoint."""
    demo = json.loads((pathlib.Path(nmoe.__file__).parent / "demo" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**demo, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS, **config}))
    if tokenizer:
        TOKENIZER.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "special": True}}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def listening_socket():
    """As the launcher makes it."""
    return socket.create_server(("127.0.0.1", 0), backlog=64)


class Rig:
    """The frontend under test and the scheduler's end of its link. `serve=False`: without Serving."""

    def __init__(self, folder, *, serve=True, model=None, trace=None, **server):
        self._serve = serve
        self.generation = 1  # of the scheduler
        model = Model(path=str(folder), name="tiny", **(model or {}))
        self.config = Config(model, Parallel(1, "cpu"), server=Server(**server), trace=trace or Trace())
        self.board = Board(3)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self):
        enter = self._stack.enter_context
        run_dir = pathlib.Path(enter(tempfile.TemporaryDirectory(prefix="nmoe-test-")))
        http = enter(listening_socket())
        self.url = f"http://127.0.0.1:{http.getsockname()[1]}"
        self.launcher, control = ipc.Control.pair()
        self._stack.callback(control.close)
        self._context = enter(zmq.asyncio.Context())
        self._address = ipc.frontend_address(run_dir)
        self.router = ipc.bind_router(self._context, self._address)
        self._stack.callback(lambda: self.router.close())
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FrontendToScheduler).decode
        self.layout = ArenaLayout.of(read_architecture(self.config.model.path), 1)
        self.arena = self.layout.make()
        boot = ipc.Boot("frontend", 0, 1, self.config, run_dir, control, self.board, http, arena=self.arena)
        self.frontend = asyncio.create_task(Frontend.run(boot))
        self._stack.push_async_callback(self.stop)
        self.session = await self._stack.enter_async_context(aiohttp.ClientSession(self.url))
        hello = await self.next(Hello)
        assert hello.generation == 1
        if self._serve:
            await self.send(Serving(self.generation, MAX_SEQ_LEN))
            await self.told(ipc.Up)
        return self

    async def __aexit__(self, *_):
        await self._stack.aclose()

    async def stop(self):
        """The launcher ends; the frontend leaves."""
        self.launcher.close()
        await asyncio.wait_for(self.frontend, TIMEOUT)

    def restart_scheduler(self):
        """The scheduler's end dies with all that it knows, the launcher says so, and its next life listens."""
        self.router.close()
        self.launcher.send(ipc.Gone("scheduler", 0, 1))
        self.generation += 1
        self.router = ipc.bind_router(self._context, self._address)

    async def next(self, kind):
        """The frontend's next message, which must be of this kind."""
        frames = await asyncio.wait_for(self.router.recv_multipart(), TIMEOUT)
        message = self._decode(frames[1])
        assert isinstance(message, kind), message
        return message

    async def silent(self):
        """Whether the frontend has nothing to say."""
        return not await self.router.poll(50)

    async def send(self, message):
        """A message from the scheduler."""
        await self.router.send_multipart([ipc.identity(0), self._encode(message)])

    async def tokens(self, submit, output="", reason=None, block=b"", sibling=0, **ended):
        """One step's tokens for one request: a text or ids, and their block; with `reason` they are its last."""
        ids = ids_of(output) if isinstance(output, str) else output
        uid = submit.uid + sibling
        ended = {"status": 503, "code": "engine_restarted"} | ended if reason == "error" else ended
        last = (Ended(uid, reason, **ended),) if reason else ()
        uids = array.array("q", [uid] if ids or block else []).tobytes()
        counts = array.array("i", [len(ids)] if uids else []).tobytes()
        sizes = array.array("i", [len(block)]).tobytes() if block else None
        await self.send(Tokens(self.generation, uids, array.array("i", ids).tobytes(), counts, last, block, sizes))

    async def told(self, kind):
        """The frontend's next message to the launcher, which must be of this kind."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                if (message := self.launcher.receive()) is not None:
                    assert isinstance(message, kind), message
                    return message
                await asyncio.sleep(0.005)

    def post(self, path, headers=None, **body):
        """A POST with a JSON body."""
        return self.session.post(path, json=body, headers=headers)

    async def ask(self, path, headers=None, **body):
        """Status, headers and JSON of a POST."""
        async with self.post(path, headers, **body) as response:
            return response.status, response.headers, await response.json()


async def events(response):
    """The data of the server-sent events: parsed JSON, or "[DONE]"."""
    assert response.status == 200 and response.content_type == "text/event-stream"
    found = []
    for event in (await response.text()).removesuffix("\n\n").split("\n\n"):
        data = event.removeprefix("data: ")
        assert data != event
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def run(coroutine):
    """In the background."""
    return asyncio.ensure_future(coroutine)
