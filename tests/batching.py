"""Batches for tests: input files, whole runs in a process, a server's answers without a server."""

import asyncio
import json
import pathlib

import msgspec

from nmoe.__main__ import main
from nmoe.batch import results
from nmoe.native import Answer, Choice, Logits, Tensor
from tests.forking import fork_call

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/v1/generate"


def line(custom_id, url=COMPLETIONS, **body):
    """One line of an input, as a dict."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write_input(path, lines):
    """An input of dicts, and of strings as they are."""
    with path.open("w") as file:
        file.writelines((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in lines)
    return path


def read_output(folder):
    """The output's lines by input line; none may be there twice. As bytes: a text's lines also end at U+0085 and the
    like, which answers may have."""
    lines = [json.loads(text) for text in (folder / "output.jsonl").read_bytes().splitlines()]
    by_number = {int(entry["id"].removeprefix("batch_req_")): entry for entry in lines}
    assert len(by_number) == len(lines), "a line was answered twice"
    return by_number


def shard_names(folder):
    """The shards that are there."""
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def batch(arguments, max_shard_bytes):
    """`nmoe batch` with small shards, in this process."""
    results.Results.__init__.__defaults__ = (max_shard_bytes,)
    return main(["batch", *arguments])


def start_batch(config, source, folder, *options, output, max_shard_bytes=1 << 20):
    """`nmoe batch` in a process of its own."""
    arguments = ["--config", str(config), *options, str(source), str(folder)]
    return fork_call(batch, arguments, max_shard_bytes, output=output)


class FakeEngine:
    """What a driver knows of an engine."""

    def __init__(self):
        self.ended = asyncio.Event()
        self.how = "exit code 1"


class FakeClient:
    """Answers every request with its own body, after `pause` seconds. `script` may hold statuses to answer with first,
    by request id."""

    def __init__(self, pause=0.0, script=None):
        self.pause = pause
        self.script = script or {}
        self.running = self.most_running = self.num_asked = self.num_health = 0
        self.asked = []

    async def post_json(self, path, body, request_id):
        self.num_asked += 1
        self.asked.append(request_id)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await asyncio.sleep(self.pause)
        finally:
            self.running -= 1
        statuses = self.script.get(request_id)
        status = statuses.pop(0) if statuses else 200
        if status == 0:
            raise ConnectionError("gone")
        if status != 200:
            return status, b'{"error":{"message":"no","type":"server_error","param":null,"code":null}}'
        return 200, json.dumps({"echo": json.loads(body), "usage": {"total_tokens": 3}}).encode()

    async def raw_parts(self, body, request_id):
        fields = msgspec.msgpack.decode(body)
        rows = fields.get("rows", 0)
        for first in range(rows):
            yield Logits(0, "logits", first, Tensor("float32", (1, 2), bytes([first] * 8)))
        ids = Tensor("int32", (1,), b"\1\0\0\0")
        routing = Tensor("uint8", (3, 1), b"abc")
        choice = Choice(index=0, text="t", finish_reason="length", token_ids=ids, routed_experts=routing)
        yield Answer("gen-1", "m", 0, [choice], {"total_tokens": 2})

    async def is_healthy(self):
        self.num_health += 1
        return self.num_health > 2


def write_jsonl(path: pathlib.Path, count: int) -> pathlib.Path:
    """An input of `count` short completions."""
    with path.open("w") as file:
        for number in range(count):
            item = line(f"id-{number}", prompt=[2, 3, number % 200 + 5], max_tokens=24, ignore_eos=True)
            file.write(json.dumps(item) + "\n")
    return path
