"""The frontend's parts on their own: slow readers, chat templates, the trace, and the whole process."""

import array
import asyncio
import json
import os
import pathlib
import threading
import time
import urllib.request
from functools import partial
from types import SimpleNamespace

import msgspec
import psutil
import pytest
import zmq

from nmoe import ipc, trace
from nmoe.config import Config, Model, Parallel, Trace
from nmoe.errors import CheckpointError, NmoeError, RequestError
from nmoe.frontend import server, sse
from nmoe.frontend.health import Health
from nmoe.frontend.link import Link
from nmoe.frontend.openai import parse_call
from nmoe.frontend.prompt import Prompt
from nmoe.frontend.replies import Answer, Choice, Chunks
from nmoe.frontend.schema import ChatMessage, Conversation, TextPart
from nmoe.frontend.special_tokens import read_tokenizer_config
from nmoe.frontend.sse import EventStream
from nmoe.frontend.streams import Stream, Streams
from nmoe.frontend.template import load_template
from nmoe.messages import Abort, Ended, FrontendToScheduler, Hello, Sampling, Serving, Submit, Tokens
from nmoe.metrics import Board
from nmoe.trace import Record, Recorder, sampling_fields
from tests.forking import fork_call
from tests.scripted import TOKENIZER, Rig, listening_socket, run, write_model

# --------------------------------------------------------------------------------------------------------------- events


class Transport:
    """Keeps what is written; `unsent` is what it says is still waiting."""

    def __init__(self):
        self.written = []
        self.unsent = 0

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return False

    def write(self, data):
        self.written.append(data)


class Letters:
    """A detokenizer of code points."""

    feed = staticmethod(chr)

    def flush(self):
        return ""


class Response:
    chunked = False
    content_type = ""

    async def prepare(self, request):
        pass

    async def write_eof(self):
        pass

    def force_close(self):
        pass


@pytest.mark.parametrize("asked", [{"echo": True}, {"return_token_ids": True}])
async def test_repeated_prompts_wait_for_their_reader(asked):
    """Eight answers that each repeat a prompt of more than the buffer is to hold."""
    call = parse_call("completions", {"prompt": "a", "n": 8, **asked})
    prompt = Prompt([7] * 200_000, "prompt", "y" * 400_000 if call.echo else "")
    choices = [Choice(i, prompt, Stream(i, Letters(), (), 0.0)) for i in range(8)]
    transport = Transport()
    most = []

    async def drain():
        most.append(transport.unsent)
        transport.unsent = 0

    def write(data):
        transport.written.append(data)
        transport.unsent += len(data)

    transport.write = write
    request = SimpleNamespace(version=(1, 0), transport=transport, writer=SimpleNamespace(drain=drain))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sse.web, "StreamResponse", lambda headers: Response())
        events = await EventStream.open(request, {}, Answer(call, "tiny", choices))
    for choice in choices:
        choice.stream.finish(Ended(choice.stream.uid, "length"))
    await events.follow()
    assert sum(map(len, transport.written)) > 8 * 400_000
    assert most and max(most) < 1_500_000


async def test_a_slow_reader_gets_fewer_larger_events():
    stream = Stream(1, Letters(), (), 0.0)
    call = parse_call("completions", {"prompt": "a", "return_token_ids": True})
    transport = Transport()
    choice = Choice(0, Prompt([5], "prompt"), stream)
    answer = Answer(call, "tiny", [choice])

    async def drain():
        transport.unsent = 0

    events = EventStream(Response(), transport, answer, drain)
    events._begin(choice, Chunks(answer, choice))
    for token, unsent in ((97, 0), (98, 1 << 20), (99, 1 << 20), (100, 0), (101, 1 << 20)):
        transport.unsent = unsent
        stream.feed([token])
        stream.on_tokens()
    stream.finish(Ended(1, "length"))
    await events.follow()
    *chunks, done, nothing = b"".join(transport.written).split(b"\n\n")
    choices = [json.loads(chunk.removeprefix(b"data: "))["choices"][0] for chunk in chunks]
    assert [(choice["text"], choice["token_ids"]) for choice in choices] == [
        ("a", [97]),
        ("bcd", [98, 99, 100]),
        ("e", [101]),
    ]
    assert (done, nothing) == (b"data: [DONE]", b"")


async def test_what_comes_after_the_end_of_a_stream_is_dropped():
    """Its time may be up between two steps: what was held back is out, and must not come again with the next token."""
    sent = []
    streams = Streams(0, 1, sent.append, Board(3).rows[0])
    stream = Stream(7, Letters(), ("zz",), 0.0)
    streams.submit([stream], Submit(1, 7, b"", 9, Sampling()))
    uid = array.array("q", [7]).tobytes()
    streams.deliver(Tokens(1, uid, array.array("i", map(ord, "xz")).tobytes(), array.array("i", [2]).tobytes()), 1.0)
    stream.finish(Ended(7, "abort"))
    streams.deliver(Tokens(1, uid, array.array("i", [ord("y")]).tobytes()), 2.0)
    assert stream.take() == ("xz", [*b"xz"]) and stream.num_tokens == 2
    streams.close(stream)
    assert sent[1:] == [Abort(1, 7)]


async def test_what_the_scheduler_did_not_take_is_sent_without_further_traffic(tmp_path, monkeypatch):
    """A frontend that falls idle while its link is full still gives back what the scheduler lent it."""
    full, sent = [True], []

    def send(message):
        if full:
            raise RequestError("full")
        sent.append(message)

    streams = Streams(0, 1, send, Board(3).rows[0])
    streams.release([5])
    full.clear()
    monkeypatch.setattr(server, "_HEARTBEAT_S", 0.01)
    monkeypatch.setattr(Streams, "catch_up", lambda _, real=Streams.catch_up: real(streams))
    async with Rig(write_model(tmp_path)):
        assert [message.cells for message in sent] == [array.array("i", [5]).tobytes()]


# ------------------------------------------------------------------------------------------------------------- template


def say(role, content):
    return ChatMessage(role=role, content=content)


def template_of(folder, source, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **settings}))
    return load_template(folder, read_tokenizer_config(folder))


def test_template_renders_as_transformers_does(tmp_path):
    from transformers import PreTrainedTokenizerFast

    source = """{% for message in messages %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
    {% if message['role'] == 'tool' %}
        {% continue %}
    {% endif %}
    <|{{ message.role }}|>{{ message.content | trim }} {{ message | tojson }} {{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}
{{ strftime_now('%Y') }}
"""
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, bos_token="<bos>", eos_token="<eos>")
    theirs.chat_template = source
    ours = template_of(tmp_path, source, bos_token="<bos>", eos_token={"content": "<eos>", "lstrip": False})
    messages = [{"role": "system", "content": " é & <b> "}, {"role": "user", "content": 'say "hi"\n'}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render(Conversation([ChatMessage(**message) for message in messages])) == expected


def test_generation_blocks_are_as_if_unmarked(tmp_path):
    from transformers import PreTrainedTokenizerFast

    source = """{% set mark = 'outside' %}
{% for message in messages %}
    {% generation %}
    {% set mark = 'inside' %}
    {{ loop.index }} {{ message.content }} {{ mark }}
    {% endgeneration %}
    {{- mark }}
{% endfor %}"""
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], chat_template=source, tokenize=False
    )
    assert expected.count("inside") == expected.count("outside") == 2
    ours = template_of(tmp_path, source)
    assert ours.render(Conversation([say("user", "a"), say("assistant", "b")])) == expected


def test_special_tokens_may_lie_in_a_file_of_their_own(tmp_path):
    older = {"bos_token": "<b>", "eos_token": {"content": "<e>", "lstrip": False}, "pad_token": "<p>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}"
    newer = {"bos_token": None, "pad_token": "<pad>", "extra_special_tokens": {"image_token": "<i>"}}
    assert template_of(tmp_path, source, **newer).render(Conversation([say("user", "a")])) == "<b><e><pad><i>"


def test_a_template_has_every_special_token(tmp_path):
    """Those that each tokenizer may have, and a model's own, whose names end in _token; flags end so too."""
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image")
    source = "".join(f"{{{{ {name}_token }}}}" for name in (*names, "add_bos"))
    tokens = {f"{name}_token": f"<{name}>" for name in names} | {"add_bos_token": True}
    shown = template_of(tmp_path, source, **tokens).render(Conversation([say("user", "a")]))
    assert shown == "<bos><eos><unk><sep><pad><cls><mask><image>"


def test_template_of_its_own_file_comes_first(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert template_of(tmp_path, "config").render(Conversation([say("user", "a")])) == "file a"


def test_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert template_of(tmp_path, named).render(Conversation([say("user", "a")])) == "yes"
    assert template_of(tmp_path, named[:1]) is None
    assert template_of(tmp_path, None) is None


def test_contents_and_roles(tmp_path):
    template = template_of(tmp_path, "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    parts = [TextPart(type="text", text="a"), TextPart(type="text", text="b")]
    assert template.render(Conversation([say("developer", parts), say("user", "c")])) == "system=a\nb;user=c;"


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('roles must alternate') }}", "{{ messages.append(1) }}", "{{ ''.x.y }}"]
)
def test_a_template_that_refuses_is_a_400(tmp_path, source):
    with pytest.raises(RequestError, match="the chat template refuses them") as caught:
        template_of(tmp_path, source).render(Conversation([say("user", "a")]))
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_a_broken_template_is_the_checkpoints_fault(tmp_path, forbid_reading):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: the chat template is not valid: line 1"):
        template_of(tmp_path, "{% if %}")
    for source in (5, ["a"], [{"nam": "default"}]):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is neither a text nor"):
            template_of(tmp_path, source)
    with pytest.raises(CheckpointError, match=r"a special token of tokenizer_config\.json .* neither a text nor"):
        template_of(tmp_path, "a", bos_token={"x": 1})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is not UTF-8"):
        template_of(tmp_path, "a")
    forbid_reading(".jinja", "read_text")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read: Permission denied; check"):
        template_of(tmp_path, "a")


# ---------------------------------------------------------------------------------------------------------------- trace


def test_trace_lines_of_several_recorders_do_not_mix(tmp_path):
    path = tmp_path / "trace.jsonl"
    recorders = [Recorder(str(path)) for _ in range(3)]
    makers = []

    def make(seed):
        makers.append(threading.current_thread())
        return Record(1.0, [seed] * 5000, sampling_fields(Sampling(seed=seed), 5), 5, "stop", 0.1, 0.2)

    for i in range(60):
        recorders[i % 3].add(partial(make, i))
    for recorder in recorders:
        recorder.close()
    assert len(set(makers)) == 3 and threading.current_thread() not in makers
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sampling"]["seed"] for line in lines) == [*range(60)]
    assert all(line["prompt_token_ids"] == [line["sampling"]["seed"]] * 5000 for line in lines)


def test_a_trace_that_cannot_be_written_stops_the_start(tmp_path):
    with pytest.raises(NmoeError, match=r"\[trace\] record = .*: cannot be opened: No such file .*; set it to"):
        Recorder(str(tmp_path / "no" / "trace.jsonl"))


def test_a_pipe_that_nobody_reads_stops_the_start(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(NmoeError, match="cannot be opened: No such device or address"):
        Recorder(str(path))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    recorder = Recorder(str(path))
    recorder.add(partial(Record, 1.0, [1] * 100_000, {}, 5, "stop", 0.1, 0.2))  # more than a pipe holds
    os.set_blocking(reader, True)
    with open(reader, "rb") as lines:
        assert json.loads(lines.readline())["prompt_token_ids"] == [1] * 100_000
    recorder.close()


def test_a_record_that_is_cut_off_or_cannot_be_made_spoils_no_other(tmp_path, monkeypatch, caplog):
    path, write = tmp_path / "trace.jsonl", os.write
    record = partial(Record, 1.0, [1], {}, 5, "stop", 0.1, 0.2)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:9] if b'"torn"' in data else data))
    recorder = Recorder(str(path))
    for make in (partial(record, user="torn"), lambda: 1 // 0, partial(record, user="a"), partial(record, user="b")):
        recorder.add(make)
    recorder.close()
    cut, *lines = path.read_text().splitlines()
    assert len(cut) == 9 and [json.loads(line)["user"] for line in lines] == ["a", "b"]
    assert "No space left on device" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_disk_that_blocks_costs_bounded_memory_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trace, "_MOST_WAITING", 3)
    path, goes_on, begun = tmp_path / "trace.jsonl", threading.Event(), threading.Event()
    record = Record(1.0, [1], {}, 5, "stop", 0.1, 0.2)

    def slow():
        begun.set()
        goes_on.wait()
        return record

    recorder = Recorder(str(path))
    recorder.add(slow)
    begun.wait()
    for _ in range(8):
        recorder.add(lambda: record)
    goes_on.set()
    recorder.close()
    assert len(path.read_text().splitlines()) == 4 and "5 requests were not recorded" in caplog.text


async def test_each_answer_is_recorded_with_what_it_was_asked_for(tmp_path):
    path = tmp_path / "trace.jsonl"
    async with Rig(write_model(tmp_path), trace=Trace(str(path))) as rig:
        fields = {"n": 2, "user": "me", "metadata": {"a": "b"}, "logit_bias": {"7": 1}, "min_p": 0.1, "min_tokens": 1}
        asked = run(rig.ask("/v1/completions", prompt=[5], max_tokens=3, **fields))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "a", "length")
        await rig.tokens(msgspec.structs.replace(submit, uid=submit.uid + 1), "bc", "stop")
        assert (await asked)[0] == 200
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["output_tokens"] for line in lines] == [1, 2]
    assert all(line["user"] == "me" and line["metadata"] == {"a": "b"} for line in lines)
    assert all(line["sampling"]["logit_bias"] == {"7": 1} and line["sampling"]["min_p"] == 0.1 for line in lines)
    assert all(set(line["sampling"]) & {"presence_penalty", "barred_ids"} == set() for line in lines)


async def test_finished_requests_are_recorded(tmp_path):
    path = tmp_path / "trace.jsonl"
    async with Rig(write_model(tmp_path), trace=Trace(str(path))) as rig:
        before = time.time()
        asked = run(rig.ask("/v1/completions", prompt=[5, 6], max_tokens=3, seed=7, temperature=0.5, top_k=2))
        submit = await rig.next(Submit)
        await rig.tokens(submit, "a")
        await rig.tokens(submit, "b", "stop")
        await asked
        left = run(rig.ask("/v1/completions", prompt="never finished"))
        await rig.next(Submit)
        left.cancel()
        await rig.next(Abort)
    (line,) = map(json.loads, path.read_text().splitlines())
    assert before <= line.pop("arrived") <= time.time()
    assert 0 < line.pop("ttft") <= line.pop("e2e") < 5
    assert line == {
        "prompt_token_ids": [5, 6],
        "sampling": {"temperature": 0.5, "top_k": 2, "top_p": 1.0, "seed": 7, "max_tokens": 3},
        "output_tokens": 2,
        "finish_reason": "stop",
    }


async def test_an_answer_whose_time_was_up_before_its_first_token_has_no_time_of_it(tmp_path):
    path = tmp_path / "trace.jsonl"
    async with Rig(write_model(tmp_path), trace=Trace(str(path)), request_timeout_s=0.1) as rig:
        asked = run(rig.post("/v1/completions", prompt="a", n=2, stream=True))
        await rig.tokens(await rig.next(Submit), "x")
        async with await asked as response:
            await response.read()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["output_tokens"], line["ttft"] is None) for line in lines] == [(1, False), (0, True)]


# ---------------------------------------------------------------------------------------------------------- the engine


def test_a_death_heard_late_does_not_end_the_next_life():
    """The launcher and the scheduler talk over links of their own, and a busy frontend may hear the latter first."""
    config = Config(parallel=Parallel(world_size=1))
    health = Health(config, Board(3))
    health.begin(Serving(1, 100, workers=1))
    health.begin(Serving(1, 100, workers=2))
    health.note_death(ipc.Gone("worker", 0, 1))
    assert health.require_serving() == 100
    health.note_death(ipc.Gone("worker", 0, 2))
    with pytest.raises(RequestError, match="starting"):
        health.require_serving()
    health.begin(Serving(1, 100, workers=2))  # said before they died
    with pytest.raises(RequestError, match="starting"):
        health.require_serving()
    health.begin(Serving(1, 100, workers=3))
    assert health.require_serving() == 100


async def test_a_flood_of_messages_leaves_http_its_turns(tmp_path):
    """Also when each message is answered, as ends by stop strings are."""
    count, turns, done = 4000, [0], asyncio.Event()

    def take(message):
        turns[-1] += 1
        link.send(Hello(1))
        if sum(turns) == count:
            done.set()

    def turn():
        turns.append(0)
        if not done.is_set():
            asyncio.get_running_loop().call_soon(turn)

    with zmq.Context() as context, ipc.bind_router(context, ipc.frontend_address(tmp_path)) as scheduler:
        link = Link(ipc.frontend_address(tmp_path), 0, take)
        link.send(Hello(1))
        assert scheduler.poll(5000)
        data = msgspec.msgpack.encode(Serving(1, 100))
        for _ in range(count):
            assert ipc.route(scheduler, 0, data) == "sent"
        turn()
        await done.wait()
        link.close()
    assert max(turns) <= 32  # a burst that was due, and one because the descriptor was readable too


# -------------------------------------------------------------------------------------------------------------- process


def frontend_process(folder, run_dir, control, http):
    """What the launcher's child does, on uvloop."""
    from nmoe.frontend.server import main

    config = Config(Model(path=folder, name="tiny"), Parallel(1, "cpu"))
    boot = ipc.Boot("frontend", 0, 1, config, pathlib.Path(run_dir), control, Board(3), http)
    ipc.settle_in(boot)
    main(boot)


def test_the_process_answers_waits_idly_and_leaves(tmp_path):
    launcher, control = ipc.Control.pair()
    with zmq.Context() as context, ipc.bind_router(context, ipc.frontend_address(tmp_path)) as router:
        with listening_socket() as http:
            url = f"http://127.0.0.1:{http.getsockname()[1]}"
            child = fork_call(frontend_process, str(write_model(tmp_path)), str(tmp_path), control, http)
        control.close()
        try:
            assert router.poll(10_000)
            who, data = router.recv_multipart()
            assert msgspec.msgpack.Decoder(FrontendToScheduler).decode(data) == Hello(1)
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                assert json.load(response)["data"][0]["max_model_len"] is None
            router.send_multipart([who, msgspec.msgpack.encode(Serving(1, 100))])
            process = psutil.Process(child.pid)
            used = sum(process.cpu_times()[:2])
            time.sleep(1.0)
            assert sum(process.cpu_times()[:2]) - used < 0.05
            launcher.close()
            assert child.wait(5) == 0
        finally:
            child.end()
