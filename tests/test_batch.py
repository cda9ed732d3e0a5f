"""`nmoe batch` as processes: answers equal to a server's, interruptions by every signal, engines that die."""

import json
import signal
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from nmoe.batch.command import DONE, SOME_FAILED, STOPPED
from nmoe.client import Client
from tests.batching import CHAT, GENERATE, line, read_output, shard_names, start_batch, write_input, write_jsonl
from tests.serving import write_config

NUM_LINES = 48


@pytest.fixture
def config(checkpoint, tmp_path):
    """A small engine: few lines at a time, so that a batch takes a while."""
    return write_config(tmp_path, {"model": {"path": str(checkpoint)}, "engine": {"max_batch_size": 4}})


def finish(process, output):
    """The exit code of a batch that ends by itself."""
    code = process.wait(60)
    return code, output.read_text()


def ask(url, body):
    """Status and JSON of a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def wait_for_lines(folder, count, process, output, name="output.jsonl"):
    """Until so many lines are finished, or shards."""
    deadline = time.monotonic() + 30
    file = folder / name
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.running and time.monotonic() < deadline, output.read_text()
        time.sleep(0.005)


def test_answers_are_the_servers(server, config, tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    lines = [
        line("text", prompt="abc", max_tokens=6, temperature=0),
        "not a request",
        line("chat", CHAT, messages=messages, max_tokens=5, temperature=0),
        "",
        line("ids", prompt=[[5, 6, 7], [8, 9]], max_tokens=4, n=2, seed=7, return_token_ids=True),
        line("wrong", prompt="abc", max_tokens=-1),
        line("model", model="another", prompt="abc"),
        line("stream", prompt="abc", stream=True),
    ]
    source, folder, log = write_input(tmp_path / "in.jsonl", lines), tmp_path / "out", tmp_path / "log"
    code, said = finish(start_batch(config, source, folder, output=log), log)
    assert code == SOME_FAILED, said
    assert "nmoe batch: 7 of 7 lines done, 4 with errors; " in said
    output = read_output(folder)
    assert sorted(output) == [1, 2, 3, 5, 6, 7, 8]
    for number, item in enumerate(lines, 1):
        if not isinstance(item, dict) or item["custom_id"] == "stream":
            continue
        entry = output[number]
        assert entry["custom_id"] == item["custom_id"] and entry["error"] is None
        got = entry["response"]
        status, same = ask(server.url + item["url"], item["body"])
        assert got["status_code"] == status
        for key in ("choices", "error"):
            assert got["body"].get(key) == same.get(key)
    assert output[2]["error"]["message"].startswith("line 2: ") and output[2]["custom_id"] is None
    assert output[8]["error"]["line"] == 8 and output[8]["custom_id"] == "stream"

    again = start_batch(config, source, folder, output=tmp_path / "again")
    code, said = finish(again, tmp_path / "again")
    assert code == SOME_FAILED and "all done before" in said
    assert read_output(folder) == output


def test_killed_at_any_moment_it_goes_on_and_every_line_is_there_once(config, tmp_path):
    source, folder, log = write_jsonl(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out", tmp_path / "log"
    seen = {}
    for count in (1, 20):
        process = start_batch(config, source, folder, output=log)
        wait_for_lines(folder, max(count, len(seen) + 1), process, log)
        engine = psutil.Process(process.pid).children()
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before"
        with (folder / "output.jsonl").open("ab") as file:
            file.write(b'{"id":"batch_req_torn')
        seen |= {number: entry for number, entry in read_output_until_torn(folder).items() if number not in seen}
        assert engine, "no engine was running"
    code, said = finish(start_batch(config, source, folder, output=log), log)
    assert code == DONE, said
    output = read_output(folder)
    assert sorted(output) == list(range(1, NUM_LINES + 1))
    assert all(output[number] == entry for number, entry in seen.items()), "finished work was repeated"
    psutil.wait_procs(engine, timeout=20)
    assert not any(process.is_running() for process in engine), "an engine outlived its batch"


def read_output_until_torn(folder):
    return {
        int(entry["id"].removeprefix("batch_req_")): entry
        for entry in map(json.loads, (folder / "output.jsonl").read_bytes().splitlines()[:-1])
    }


def test_killed_while_shards_are_written_no_tensor_is_lost_or_doubled(server, config, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    bodies = [{"prompt": [5, 6, number + 7], "max_tokens": 8, "temperature": 0} for number in range(NUM_LINES)]
    lines = [line(f"id-{number}", GENERATE, logits=True, **body) for number, body in enumerate(bodies)]
    lines.append(line("wrong", GENERATE, prompt=[]))
    source = write_input(tmp_path / "in.jsonl", lines)

    def start():
        options = ("--profile", "offline_distill")
        return start_batch(config, source, folder, *options, output=log, max_shard_bytes=150_000)

    for count in (1, 3):
        process = start()
        wait_for_lines(folder, count, process, log, "index.jsonl")
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was done before"
    code, said = finish(start(), log)
    assert code == SOME_FAILED, said

    output = read_output(folder)
    assert sorted(output) == list(range(1, NUM_LINES + 2))
    assert output[NUM_LINES + 1]["response"]["body"]["error"]["param"] == "prompt"
    index = [json.loads(text) for text in (folder / "index.jsonl").read_text().splitlines()]
    assert shard_names(folder) == sorted(entry["shard"] for entry in index)
    tensors = {}
    for name in shard_names(folder):
        found = load_file(folder / name)
        assert not found.keys() & tensors.keys()
        tensors |= found
    assert sum(name.endswith("/0/logits") for name in tensors) == NUM_LINES
    with Client(server.url) as client:
        for number in (0, 1, NUM_LINES - 1):
            body = output[number + 1]["response"]["body"]
            (choice,) = client.generate(profile="offline_distill", logits=True, **bodies[number]).choices
            described = body["choices"][0]["tensors"]
            assert body["choices"][0]["text"] == choice.text
            for name, entry in described.items():
                np.testing.assert_allclose(tensors[entry["key"]], getattr(choice, name), rtol=1e-4, atol=1e-4)
            assert {"logits", "top_k_ids", "top_k_logprobs", "logprobs", "token_ids"} <= described.keys()
            assert choice.top_k_ids.shape == (len(choice.token_ids), 10)


def test_seeds_that_were_drawn_are_told_and_repeat_their_samples(server, config, tmp_path):
    prompts = [[5, 6, 7], [8, 9]]
    lines = [
        line("one", GENERATE, prompt=prompts[0], max_tokens=6),
        line("two", GENERATE, prompt=prompts, max_tokens=6),
    ]
    source, folder, log = write_input(tmp_path / "in.jsonl", lines), tmp_path / "out", tmp_path / "log"
    code, said = finish(start_batch(config, source, folder, "--profile", "rl_sample", output=log), log)
    assert code == 0, said
    one, two = (read_output(folder)[number]["response"]["body"] for number in (1, 2))
    seeds = [one["seed"], *(choice["seed"] for choice in two["choices"])]
    with Client(server.url) as client:
        for prompt, seed, choice in zip([prompts[0], *prompts], seeds, one["choices"] + two["choices"], strict=True):
            (again,) = client.generate(prompt, profile="rl_sample", seed=seed, max_tokens=6).choices
            assert again.text == choice["text"]


def test_told_to_stop_it_leaves_a_state_that_goes_on(config, tmp_path):
    source, folder, log = write_jsonl(tmp_path / "in.jsonl", NUM_LINES), tmp_path / "out", tmp_path / "log"
    process = start_batch(config, source, folder, output=log)
    wait_for_lines(folder, 4, process, log)
    process.kill(signal.SIGINT)
    code, said = finish(process, log)
    stopped = read_output(folder)
    assert code == STOPPED, said
    assert 4 <= len(stopped) < NUM_LINES
    assert f"{NUM_LINES - len(stopped)} left for the same command" in said

    process = start_batch(config, source, folder, "--profile", "production_generate", output=tmp_path / "other")
    code, said = finish(process, tmp_path / "other")
    assert code == 1 and "was begun with no --profile" in said

    process = start_batch(config, source, folder, output=log)  # and goes on through the death of a worker
    wait_for_lines(folder, len(stopped) + 1, process, log)
    family = psutil.Process(process.pid).children(recursive=True)
    next(child for child in family if child.name() == "nmoe worker 0").kill()
    code, said = finish(process, log)
    assert code == DONE, said
    assert "restarting the workers" in said
    assert sorted(read_output(folder)) == list(range(1, NUM_LINES + 1))
