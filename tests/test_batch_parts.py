"""The parts of a batch without an engine: its input, its folder after an interruption at any moment, its driver."""

import argparse
import asyncio
import contextlib
import errno
import io
import json
import os
import pathlib
import sys
import tempfile
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from nmoe.batch import command, folder, progress, results
from nmoe.batch.driver import Driver, remaining, room_of
from nmoe.batch.lines import BadLine, Line, parse_line, read_lines
from nmoe.batch.progress import Display, Tally
from nmoe.batch.results import Result, Results
from nmoe.batch.shards import Shard, Stored
from nmoe.batch.survey import survey
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.errors import NmoeError
from tests.batching import GENERATE, FakeClient, FakeEngine, line, read_output, shard_names, write_input

LONGEST = 1 << 16


def parse(item, profile=None):
    return parse_line(1, json.dumps(item).encode() if isinstance(item, dict) else item, LONGEST, profile)


# ------------------------------------------------------------------------------------------------------------- lines


def test_a_line_is_sent_as_it_came_unless_it_needs_a_profile():
    raw = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body": {"prompt":"x", "seed":1e0}}'
    assert parse(raw).body == b'{"prompt":"x", "seed":1e0}'
    assert parse(raw, "rl_sample").body == b'{"profile":"rl_sample","prompt":"x", "seed":1e0}'
    assert json.loads(parse(line("a", profile=None, prompt="x"), "rl_sample").body)["profile"] == "rl_sample"
    assert json.loads(parse(line("a", profile="eval_exact"), "rl_sample").body) == {"profile": "eval_exact"}
    assert json.loads(parse(line("a"), "rl_sample").body) == {"profile": "rl_sample"}


def test_a_native_request_becomes_msgpack():
    parsed = parse(line("a", GENERATE, prompt=[1, 2], logits=True), "offline_distill")
    expected = {"prompt": [1, 2], "logits": True, "profile": "offline_distill"}
    assert msgspec.msgpack.decode(parsed.body) == expected


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ({"prompt": "text", "n": 3}, 3),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"], "n": 2}, 4),
        ({"prompt": [[1], [2], [3]]}, 3),
        ({"prompt": "x", "n": "many"}, 1),
        ({"messages": []}, 1),
    ],
)
def test_a_line_takes_as_much_room_as_it_has_answers(body, weight):
    assert parse(line("a", **body)).weight == weight


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (b"nonsense\n", "malformed"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe{}", ""),
        (b"[" * 5000, ""),
        ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, "missing required field `body`"),
        (line("a") | {"extra": 1}, "unknown field `extra`"),
        (line("a") | {"method": "GET"}, "$.method"),
        (line("a", "/v1/models"), '`$.url`; a line is {"custom_id"'),
        (b"\xef\xbb\xbf" + json.dumps(line("a")).encode(), "byte order mark"),
        (line(""), "$.custom_id"),
        (line("a") | {"body": [1]}, "Expected `object`"),
        (line("a", stream=True), "body.stream"),
        (line("a", prompt="x" * LONGEST), "max_body_mb"),
    ],
)
def test_what_is_no_request_is_said_to_be_none(item, told):
    bad = parse(item)
    assert isinstance(bad, BadLine) and told in bad.problem


@pytest.mark.parametrize("url", ["/v1/completions", GENERATE])
@pytest.mark.parametrize("profile", [None, "rl_sample"])
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"custom_id":"b","method":"POST","custom_id":"a","url":"%s","body":{"prompt":"x"}}', "custom_id"),
        ('{"custom_id":"a","method":"POST","url":"%s","body":{},"body":{"prompt":"x"}}', "body"),
        ('{"custom_id":"a","method":"POST","url":"%s","body":{"n":1,"prompt":":","\\u006e":2}}', "body.n"),
        ('{"custom_id":"a","method":"POST","url":"%s","body":{"logit_bias":{"1":1,"1":2}}}', "body.logit_bias.1"),
        ('{"custom_id":"a","method":"POST","url":"%s","body":{"profile":null,"profile":null}}', "body.profile"),
        ('{"custom_id":"a","method":"POST","url":"%s","body":{"a":[0,[{"b":1,"b":2}]]}}', "body.a[1][0].b"),
    ],
)
def test_a_key_that_appears_twice_is_named(text, path, url, profile):
    bad = parse((text % url).encode(), profile)
    assert isinstance(bad, BadLine) and bad.problem.startswith(f"{path}: appears more than once")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
names = st.sampled_from(["prompt", "n", "profile", "stream", "seed"]) | st.text()


@settings(max_examples=50)
@given(st.dictionaries(names, values), st.sampled_from(["/v1/completions", GENERATE]), st.none() | st.just("rl_sample"))
def test_any_body_is_a_request_or_a_bad_line(body, url, profile):
    parsed = parse(line("a") | {"url": url, "body": body}, profile)
    if isinstance(parsed, BadLine):
        assert "body" in parsed.problem
        return
    sent = (msgspec.msgpack if url == GENERATE else msgspec.json).decode(parsed.body)
    named = {"profile": profile} if profile is not None and body.get("profile") is None else {}
    assert sent == body | named


def test_lines_keep_their_numbers_across_blank_and_overlong_ones():
    file = io.BytesIO(b"one\n\n  \n" + b"x" * 50 + b"\nlast")
    seen = bytearray()
    found = list(read_lines(file, 10, seen.extend))
    assert found == [(1, b"one\n"), (4, b"x" * 11), (5, b"last")]
    assert bytes(seen) == file.getvalue()


# ------------------------------------------------------------------------------------------------------------ survey


def test_repeated_custom_ids_are_refused_with_their_lines(tmp_path):
    source = write_input(tmp_path / "in.jsonl", [line("a"), "junk", line("b"), line("a"), "", line("a"), line("b")])
    with pytest.raises(NmoeError, match=r"2 custom_id\(s\)") as error:
        survey(source, LONGEST)
    assert "'a' is on lines 1, 4, 6" in str(error.value) and "'b' is on lines 3, 7" in str(error.value)


def test_the_survey_of_many_lines_takes_little_memory(tmp_path):
    source = write_input(tmp_path / "in.jsonl", (line(f"id-{number}", prompt="x" * 1000) for number in range(10_000)))
    tracemalloc.start()
    found = survey(source, LONGEST)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.num_lines, found.last_line, found.num_bytes) == (10_000, 10_000, source.stat().st_size)
    assert peak < 10_000 * 200, "more than a number per line is kept"


# ------------------------------------------------------------------------------------------------------------ folder

CONFIG = Config(Model(path="/model"), Parallel(2, "cpu"), Engine(max_batch_size=8))


def manifest(**changes):
    plain = folder.Manifest("abc", None, {"path": "/model", "dtype": "auto"}, 2)
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sha256": "abd"}, "another input"),
        ({"profile": "rl_sample"}, "no --profile"),
        ({"model": {"path": "/model", "dtype": "float32"}}, r"\[model\] dtype = 'auto', not 'float32'"),
        ({"world_size": 4}, r"\[parallel\] world_size = 2, not 4"),
        ({"format": 2}, "format 1, not 2"),
    ],
)
def test_a_folder_goes_on_with_the_same_only(tmp_path, changes, told):
    folder.claim(tmp_path, manifest(sha256="of a first attempt that came to nothing"))
    folder.claim(tmp_path, manifest())
    (tmp_path / "output.jsonl").write_bytes(b"something")
    folder.claim(tmp_path, manifest())
    with pytest.raises(NmoeError, match=told):
        folder.claim(tmp_path, manifest(**changes))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(NmoeError, match=r"thesis\.tex"):
        folder.open_folder(tmp_path)


def test_a_folder_has_one_batch_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_ENGINE_LEAVES_S", 0.1)
    with folder.open_folder(tmp_path / "out"), pytest.raises(NmoeError, match="another batch"):
        folder.open_folder(tmp_path / "out")
    folder.open_folder(tmp_path / "out").close()


def test_output_that_no_batch_wrote_is_refused(tmp_path):
    folder.recover(tmp_path, 3)
    for junk in (b"hello\n", b'{"id":"batch_req_9","custom_id":"a","response":null}\n'):
        (tmp_path / "output.jsonl").write_bytes(junk)
        with pytest.raises(NmoeError, match="changed by something else"):
            folder.recover(tmp_path, 3)


def test_a_disk_without_room_for_the_first_file_is_a_message(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NmoeError, match="cannot be written: No space left on device"):
        folder.claim(tmp_path, manifest())


def test_nobody_has_to_read_the_summary(tmp_path, monkeypatch, caplog):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        command._summarise(tmp_path, 3, 3, 0, "all done before")
        sys.stdout.close()
        with contextlib.suppress(OSError):
            full.close()  # what it still holds cannot be written either
    assert "No space left on device" in caplog.text and "3 of 3 lines done" in caplog.text


@pytest.mark.parametrize("name", ["batch.json", "output.jsonl", "index.jsonl"])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    folder.claim(tmp_path, manifest())
    (tmp_path / "output.jsonl").write_bytes(b"something")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(NmoeError, match=rf"{name}: cannot be written: Is a directory"):
        folder.claim(tmp_path, manifest())
        folder.recover(tmp_path, 3)


class Killed(BaseException):
    """The process dies here."""


def result_of(number, size):
    """A result of input line `number`; `size` is that of its tensor, 0: it has none."""
    name = f"c{number}"
    if not size:
        return Result(number=number, custom_id=name, status=200, body=msgspec.Raw(b'{"usage":{"total_tokens":5}}'))
    wide = np.full((size, 2), number, np.float32)
    small = np.full(size, number % 256, np.uint8)
    tensors = [
        Stored(f"{name}/0/routed_experts", "uint8", small.shape, io.BytesIO(small.tobytes())),
        Stored(f"{name}/0/logits", "float32", wide.shape, io.BytesIO(wide.tobytes())),
    ]
    return Result(number=number, custom_id=name, status=200, body={"choices": []}, tensors=tensors)


class Mortal:
    """Lets so many bytes of output and index through, and so many shards be finished; the process dies at the next."""

    def __init__(self, budget, shards, before):
        self.budget, self.shards, self.before = budget, shards, before
        self.write, self.finish = results._write, Shard.finish

    def __enter__(self):
        def write(descriptor, data):
            part = data[: self.budget]
            self.write(descriptor, part)
            self.budget -= len(part)
            if len(part) < len(data):
                raise Killed

        def finish(shard):
            self.shards -= 1
            if self.shards < 0 and self.before:
                raise Killed
            self.finish(shard)
            if self.shards < 0:
                raise Killed

        results._write, Shard.finish = write, finish

    def __exit__(self, *_):
        results._write, Shard.finish = self.write, self.finish


def run_until_killed(path, sizes, death):
    """One life of a batch; which lines it did. True at the end of the batch."""
    finished = folder.recover(path, len(sizes))
    writer = Results(path, finished, max_shard_bytes=200)
    with Mortal(*death) if death else contextlib.nullcontext():
        try:
            for number, size in enumerate(sizes, 1):
                if not finished.lines[number]:
                    writer.add(result_of(number, size))
        except Killed:
            writer.close()  # only lets go, as the kernel would
            return finished, False
        try:
            writer.close()
        except Killed:
            return finished, False
    return finished, True


def test_an_output_line_is_one_to_whoever_splits_lines():
    text = "a\x85b\u2028c\u2029d"
    line = Result(number=1, custom_id=text, status=200, body={"text": text}).line().decode()
    assert (
        len(line.splitlines()) == 1
        and json.loads(line)["custom_id"] == json.loads(line)["response"]["body"]["text"] == text
    )


def check_complete(path, sizes):
    """Every line once; every tensor in one shard, with its values; nothing else in the folder."""
    output = read_output(path)
    assert sorted(output) == list(range(1, len(sizes) + 1))
    index = [json.loads(text) for text in (path / "index.jsonl").read_text().splitlines()]
    assert shard_names(path) == sorted(entry["shard"] for entry in index)
    found = {}
    for entry in index:
        tensors = load_file(path / entry["shard"])
        assert tensors.keys() == {key for keys in entry["tensors"].values() for key in keys}
        assert not found.keys() & tensors.keys()
        found |= tensors
        for name in entry["tensors"]:
            assert output[int(name.removeprefix("c"))]["response"]["body"]["shard"] == entry["shard"]
    assert len(found) == 2 * sum(size > 0 for size in sizes)
    for number, size in enumerate(sizes, 1):
        if size:
            np.testing.assert_array_equal(found[f"c{number}/0/logits"], np.full((size, 2), number, np.float32))
            np.testing.assert_array_equal(found[f"c{number}/0/routed_experts"], np.full(size, number % 256, np.uint8))
    assert not list(path.glob("*.part"))


deaths = st.tuples(st.integers(0, 1500), st.integers(0, 3), st.booleans())


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.sampled_from([0, 0, 1, 3, 40]), min_size=1, max_size=12), lives=st.lists(deaths, max_size=4))
def test_whatever_interrupts_it_every_line_is_there_once(sizes, lives):
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        before = set()
        for death in [*lives, None]:
            finished, complete = run_until_killed(path, sizes, death)
            now = {number for number in range(1, len(sizes) + 1) if finished.lines[number]}
            assert before <= now, "finished work was lost"
            before = now
            if complete:
                break
        check_complete(path, sizes)
        assert folder.recover(path, len(sizes)).num_lines == len(sizes)


@pytest.mark.parametrize("size", [0, 3])
def test_after_a_write_that_failed_nothing_more_is_written(tmp_path, monkeypatch, size):
    write = results._write

    def fail(descriptor, data):
        write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    writer = Results(tmp_path, folder.recover(tmp_path, 9), max_shard_bytes=20)
    writer.add(result_of(1, 3))
    monkeypatch.setattr(results, "_write", fail)
    with pytest.raises(OSError, match="No space"):
        writer.add(result_of(2, size + 2 if size else 0))
    monkeypatch.undo()
    with pytest.raises(OSError, match="earlier result"):
        writer.add(result_of(3, 0))
    writer.close()
    assert folder.recover(tmp_path, 9).lines == bytearray(b"\0\1" + b"\0" * 8)
    check_complete(tmp_path, [3])


def test_a_shard_grows_to_its_bound_and_takes_one_larger_request(tmp_path):
    sizes = [10, 10, 40, 10, 0, 10]
    finished, complete = run_until_killed(tmp_path, sizes, None)
    assert complete and not finished.num_lines
    check_complete(tmp_path, sizes)
    names = shard_names(tmp_path)
    held = [{key.split("/")[0] for key in load_file(tmp_path / name)} for name in names]
    assert held == [{"c1", "c2"}, {"c3"}, {"c4", "c6"}]  # 90 bytes each, 360 for the third; a shard is full at 200


def test_a_shard_has_room_for_any_number_of_names(tmp_path):
    tensors = [
        Stored(f"{'x' * 500}/{i}/token_ids", "int32", (1,), io.BytesIO(bytes([i % 256, 0, 0, 0]))) for i in range(4000)
    ]
    shard = Shard(tmp_path, 1)
    shard.add(tensors)
    assert not shard.is_full
    shard.finish()
    assert load_file(tmp_path / shard.name)[f"{'x' * 500}/3/token_ids"].tolist() == [3]


# ------------------------------------------------------------------------------------------------------------ driver


async def drive(path, lines, client, room=8, stop=None):
    """A driver's whole run with a fake engine."""
    engine = FakeEngine()
    last = 100_000
    tally = Tally(last, 0, 0)
    driver = Driver(client, Results(path, folder.recover(path, last)), tally, path, room)
    if stop is not None:
        asyncio.get_running_loop().call_later(stop, driver.stop)
    await driver.run(lines, engine, Display(tally))
    return tally


def requests(count, made=None, weight=1):
    """An endless supply of lines that counts what is taken of it."""
    for number in range(1, count + 1):
        if made is not None:
            made.append(number)
        yield Line(number, f"c{number}", "/v1/completions", b'{"prompt":"x"}', weight)


async def test_the_engine_is_kept_full_and_lines_are_read_as_there_is_room(tmp_path):
    made = []

    class Watching(FakeClient):
        ahead = 0

        async def post_json(self, *arguments):
            self.ahead = max(self.ahead, len(made) - self.num_asked)
            return await super().post_json(*arguments)

    client = Watching(pause=0.001)
    tally = await drive(tmp_path, requests(2000, made), client, room=50)
    assert client.most_running == 50 and client.ahead <= 51
    assert (tally.done, tally.errors, tally.tokens) == (2000, 0, 6000)
    assert len(read_output(tmp_path)) == 2000


async def test_a_line_of_many_answers_takes_their_room(tmp_path):
    client = FakeClient(pause=0.001)
    await drive(tmp_path, requests(20, weight=4), client, room=8)
    assert client.most_running == 2
    client = FakeClient(pause=0.001)
    (tmp_path / "second").mkdir()
    await drive(tmp_path / "second", requests(3, weight=1000), client, room=8)  # more than there is: alone
    assert client.most_running == 1 and client.num_asked == 3


async def test_a_full_queue_is_asked_again_for_as_long_as_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.batch.driver._PAUSES_S", (0.001, 0.002))
    client = FakeClient(script={"batch_req_1": [429] * 10})
    tally = await drive(tmp_path, requests(3), client)
    assert tally.errors == 0 and client.num_asked == 13


async def test_a_failing_engine_is_asked_a_bounded_number_of_times(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.batch.driver._REST_S", 0.001)
    script = {"batch_req_1": [503, 0, 503], "batch_req_2": [503] * 9, "batch_req_3": [0] * 9, "batch_req_4": [400, 200]}
    client = FakeClient(script=script)
    tally = await drive(tmp_path, requests(5), client)
    output = read_output(tmp_path)
    assert tally.errors == 3 and client.num_health >= 3
    assert [client.asked.count(f"batch_req_{number}") for number in range(1, 6)] == [4, 4, 4, 1, 1]
    assert [entry["response"] and entry["response"]["status_code"] for _, entry in sorted(output.items())] == [
        200,
        503,
        None,
        400,
        200,
    ]
    assert output[3]["error"]["code"] == "engine_failed" and "line 3" in output[3]["error"]["message"]


async def test_a_line_that_kills_the_engine_does_not_take_others_along(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.batch.driver._REST_S", 0.001)

    class Fragile(FakeClient):
        """All that is under way fails with line 7, and what comes before the engine is back is refused."""

        deaths = 0
        is_up = True

        async def post_json(self, path, body, request_id):
            if not self.is_up:
                return 503, b'{"error":{"code":"loading"}}'
            deaths = self.deaths
            if request_id == "batch_req_7":
                await asyncio.sleep(0.002)
                self.deaths += 1
                self.is_up = False
                asyncio.get_running_loop().call_later(0.02, setattr, self, "is_up", True)
                raise ConnectionError("dead")
            answer = await super().post_json(path, body, request_id)
            if self.deaths > deaths:
                raise ConnectionError("dead")
            return answer

        async def is_healthy(self):
            return self.is_up

    tally = await drive(tmp_path, requests(100), Fragile(pause=0.004), room=64)
    failed = [number for number, entry in read_output(tmp_path).items() if entry["error"] is not None]
    assert (failed, tally.errors, tally.done) == ([7], 1, 100)


async def test_told_to_stop_it_lets_running_lines_finish_and_sends_no_more(tmp_path):
    client = FakeClient(pause=0.2)
    tally = await drive(tmp_path, requests(1000), client, room=4, stop=0.1)
    assert client.num_asked == tally.done == len(read_output(tmp_path)) == 4


async def test_what_does_not_finish_soon_is_left_for_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr("nmoe.batch.driver._FINISH_S", 0.05)
    tally = await drive(tmp_path, requests(1000), FakeClient(pause=60), room=4, stop=0.05)
    assert tally.done == 0 and read_output(tmp_path) == {}


async def test_an_engine_that_ends_ends_the_batch_with_what_is_finished(tmp_path):
    engine = FakeEngine()
    tally = Tally(9, 0, 0)

    class LastAsked(FakeClient):
        async def post_json(self, path, body, request_id):
            if tally.done:
                engine.ended.set()
            return await super().post_json(path, body, request_id)

    driver = Driver(LastAsked(pause=0.01), Results(tmp_path, folder.recover(tmp_path, 9)), tally, tmp_path, 2)
    with pytest.raises(NmoeError, match=r"engine ended \(exit code 1\).*same command again"):
        await driver.run(requests(1000), engine, Display(tally))
    assert 0 < len(read_output(tmp_path)) < 20


def test_progress_that_cannot_be_written_ends_nothing(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    tally = Tally(num_lines=5, done=2, errors=1)
    with open("/dev/full", "w", buffering=1) as full, caplog.at_level("INFO"):
        monkeypatch.setattr(sys, "stderr", full)
        with Display(tally) as display:
            tally.add(ok=True, tokens=7)
            display.show()
    assert caplog.messages[0].startswith("3 of 5 lines, ") and "1 errors" in caplog.messages[0]


async def test_a_disk_that_is_full_ends_the_batch_with_the_remedy(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Results, "add", fail)
    with pytest.raises(NmoeError, match="No space left on device; finished lines are kept"):
        await drive(tmp_path, requests(10), FakeClient())


async def test_native_answers_go_to_shards_and_bad_lines_to_the_output(tmp_path):
    source = write_input(
        tmp_path / "in.jsonl", [line("a", GENERATE, prompt="x", rows=3), "junk", line("b", prompt="y")]
    )
    out = tmp_path / "out"
    out.mkdir()
    await drive(out, remaining(source, bytearray(9), LONGEST, None), FakeClient())
    output = read_output(out)
    body = output[1]["response"]["body"]
    (name,) = shard_names(out)
    assert body["shard"] == name and "shard" not in output[3]["response"]["body"]
    tensors = load_file(out / name)
    described = body["choices"][0]["tensors"]
    assert {key: tensors[entry["key"]].shape for key, entry in described.items()} == {
        "token_ids": (1,),
        "routed_experts": (3, 1),
        "logits": (3, 2),
    }
    assert bytes(tensors["a/0/logits"].tobytes()) == b"".join(bytes([row] * 8) for row in range(3))
    assert tensors["a/0/routed_experts"].tobytes() == b"abc"
    assert output[2]["response"] is None and output[2]["error"]["line"] == 2 and output[2]["custom_id"] is None


def test_there_is_room_for_all_ranks_and_some_that_wait():
    assert room_of(CONFIG, 1024) == 16 + 4
    assert room_of(CONFIG, 94) == 10


def test_a_batch_without_a_usable_input_starts_nothing(tmp_path):
    def ask(source):
        return command.run(argparse.Namespace(config=None, profile=None, input=source, output=tmp_path / "out"))

    with pytest.raises(NmoeError, match="cannot be read"):
        ask(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NmoeError, match="no regular file"):
        ask(tmp_path / "pipe")
    with pytest.raises(NmoeError, match="rename all but one"):
        ask(write_input(tmp_path / "in.jsonl", [line("a"), line("a")]))
    assert not (tmp_path / "out").exists()
    assert ask(write_input(tmp_path / "empty.jsonl", [])) == command.DONE
