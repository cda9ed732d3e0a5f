"""Each parameter of the API has an effect that a client can see, through OpenAI's own client and a whole server."""

import asyncio
import json
import socket
import threading
import time
import urllib.request

import openai
import pytest
import torch

import nmoe
from nmoe.messages import Sampling, bias_fields
from tests.serving import Server
from tests.test_adjustments import adjusted

PROMPT = "Once upon a time"
EOS = 1


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client, server):
    """A function that makes a completion: 24 greedy tokens unless told otherwise; fields that OpenAI does not have
    may be named as well."""

    def complete(**fields):
        fields = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
        known = {"prompt", "max_tokens", "temperature", "n", "stop", "seed", "stream", "stream_options", "echo"}
        extra = {"return_token_ids": True} | {name: fields.pop(name) for name in [*fields] if name not in known}
        return client.completions.create(model=server.model, **fields, extra_body=extra)

    return complete


@pytest.fixture(scope="module")
def greedy(complete):
    """The greedy tokens."""
    return complete().choices[0].token_ids


def ids(answer, index=0):
    return answer.choices[index].token_ids


# ------------------------------------------------------------------------------------------------------------- sampling


def test_temperature(complete, greedy):
    assert ids(complete(temperature=1.5, seed=1)) != greedy == ids(complete(temperature=0, seed=1))


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_at_their_limit_are_greedy(complete, greedy, fields):
    assert ids(complete(temperature=2, **fields)) == greedy
    wider = {name: type(value)(0.5 if name != "top_k" else 5) for name, value in fields.items()}
    assert ids(complete(temperature=2, seed=3, **wider)) != greedy


def test_seed(complete):
    drawn = [ids(complete(temperature=1.5, seed=seed)) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert len({tuple(ids(complete(temperature=1.5))) for _ in range(3)}) > 1


def test_logit_bias(complete, greedy):
    assert ids(complete(logit_bias={"77": 100})) == [77] * 24
    assert greedy[0] not in ids(complete(logit_bias={str(greedy[0]): -100}))


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_spread_the_output(complete, name):
    """Among a few tokens that are favoured alike, more of them get their turn; a bonus has the opposite effect."""
    favoured = {str(token): 60 for token in range(70, 90)}
    fields = {"logit_bias": favoured, "max_tokens": 48}
    plain, spread = (ids(complete(**fields, **extra)) for extra in ({}, {name: 1.2}))
    assert set(plain) | set(spread) <= set(range(70, 90))
    assert plain[0] == spread[0] or name == "repetition_penalty"
    assert len(set(spread)) > len(set(plain))
    clings = 0.8 if name == "repetition_penalty" else -2
    assert len(set(ids(complete(**fields, **{name: clings})))) < len(set(plain))


def test_repetition_penalty_also_sees_the_prompt(complete):
    repeated = ids(complete(prompt=[77] * 5, logit_bias={"77": 100, "78": 60}, repetition_penalty=1.0, max_tokens=3))
    assert repeated == [77] * 3
    first = ids(complete(prompt=[77] * 5, logit_bias={"77": 100, "78": 60}, repetition_penalty=2.0, max_tokens=3))
    assert first[0] == 78


# --------------------------------------------------------------------------------------------------------------- length


def test_max_tokens(complete, greedy):
    answer = complete(max_tokens=5)
    assert ids(answer) == greedy[:5] and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


def test_ignore_eos_and_min_tokens(complete):
    favours_eos = {"logit_bias": {str(EOS): 100}}
    answer = complete(ignore_eos=False, **favours_eos)
    assert ids(answer) == [EOS] and answer.choices[0].finish_reason == "stop" and answer.choices[0].text == ""
    assert ids(complete(**favours_eos)) == [EOS] * 24
    answer = complete(ignore_eos=False, min_tokens=5, **favours_eos)
    assert len(ids(answer)) == 6 and EOS not in ids(answer)[:5] and answer.choices[0].finish_reason == "stop"
    assert ids(complete(ignore_eos=False, min_tokens=24, **favours_eos))[-1] != EOS


def test_stop_token_ids(complete, greedy):
    stop = greedy[7]
    end = greedy.index(stop) + 1
    answer = complete(stop_token_ids=[stop])
    assert ids(answer) == greedy[:end] and answer.choices[0].finish_reason == "stop"
    whole = complete(max_tokens=end - 1).choices[0].text if end > 1 else ""
    assert answer.choices[0].text == whole  # without the stop token's
    assert len(ids(complete(stop_token_ids=[stop], min_tokens=end))) > end


def test_stop(complete):
    text = complete(max_tokens=64).choices[0].text
    stop = text[20:22]
    answer = complete(max_tokens=64, stop=[stop, "never"])
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    later = complete(max_tokens=64, stop=stop, min_tokens=60).choices[0].text
    assert later.startswith(text[: text.index(stop) + 2])


# -------------------------------------------------------------------------------------------------- prompts and answers


def test_n(complete, client, server):
    one = ids(complete(temperature=1.5, seed=5))
    three = complete(temperature=1.5, seed=5, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2] and ids(three) == one
    assert len({tuple(ids(three, index)) for index in range(3)}) == 3
    assert three.usage.completion_tokens == 72 and three.usage.prompt_tokens == len(PROMPT)
    by_index = {0: [], 1: [], 2: []}
    for chunk in complete(temperature=1.5, seed=5, n=3, stream=True):
        by_index[chunk.choices[0].index] += chunk.choices[0].token_ids
    assert list(by_index.values()) == [ids(three, index) for index in range(3)]
    messages = [{"role": "user", "content": "a"}]
    chat = client.chat.completions.create(model=server.model, messages=messages, n=2, max_tokens=4)
    assert [choice.index for choice in chat.choices] == [0, 1]


def test_lists_of_prompts(complete):
    alone = [complete(prompt=prompt) for prompt in ("ab", "c")]
    texts = complete(prompt=["ab", "c"])
    assert [choice.token_ids for choice in texts.choices] == [ids(answer) for answer in alone]
    assert texts.usage.prompt_tokens == 3 and texts.usage.completion_tokens == 48
    as_ids = complete(prompt=[answer.choices[0].prompt_token_ids for answer in alone])
    assert [choice.text for choice in as_ids.choices] == [choice.text for choice in texts.choices]


def test_echo(complete):
    plain = complete().choices[0]
    assert complete(echo=True).choices[0].text == PROMPT + plain.text
    assert complete(prompt=plain.prompt_token_ids, echo=True).choices[0].text == PROMPT + plain.text
    assert "".join(chunk.choices[0].text for chunk in complete(echo=True, stream=True)) == PROMPT + plain.text


def test_return_token_ids(complete):
    answer = complete(max_tokens=2).choices[0]
    assert len(answer.prompt_token_ids) == len(PROMPT) and len(answer.token_ids) == 2
    assert not hasattr(complete(return_token_ids=False).choices[0], "token_ids")


def test_usage_in_a_stream(complete):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = complete(stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last.usage.completion_tokens == 24 and len(set(counts)) > 3
    plain = list(complete(stream=True))
    assert all(chunk.usage is None for chunk in plain)


def test_what_changes_nothing_is_taken(complete, greedy):
    fields = {"profile": "production_generate", "priority": 3, "user": "me", "metadata": {"a": "b"}}
    assert ids(complete(**fields)) == greedy


@pytest.mark.parametrize("profile", ["online_distill", "rl_sample", "eval_exact", "offline_distill"])
def test_profiles_that_do_not_stream_say_so(complete, profile):
    assert len(complete(profile=profile).choices[0].logprobs.token_logprobs) == 24
    with pytest.raises(openai.BadRequestError, match=f"profile {profile} does not stream") as caught:
        complete(profile=profile, stream=True)
    assert caught.value.param == "stream"


def test_logprobs_as_openais_client_reads_them(client, server, complete):
    choice = complete(logprobs=3, max_tokens=4).choices[0]
    assert choice.logprobs.token_ids == choice.token_ids
    # The likeliest token was taken; tokens with one text count once.
    assert [max(top.values()) for top in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs
    said = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "seed": 1}
    fields = {"model": server.model, "logprobs": True, "top_logprobs": 3, **said}
    content = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert len(content) == 4 and all(len(entry.top_logprobs) == 3 for entry in content)
    streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**fields, stream=True)]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs.content] == content


# ----------------------------------------------------------------------------------------------------------------- chat


def ask(server, path, **body):
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


def test_conversations(client, server):
    """What the template is asked for is in the prompt: the roles, the opening of the answer, an open last message."""

    def prompt_of(messages, **extra):
        answer = client.chat.completions.create(
            model=server.model, messages=messages, max_tokens=1, extra_body={"return_token_ids": True, **extra}
        )
        tokens = ask(server, "/tokenize", messages=messages, **extra)["tokens"]
        assert tokens == answer.prompt_token_ids
        return ask(server, "/detokenize", tokens=tokens)["prompt"]

    user, said = {"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "so"}
    assert prompt_of([user]) == "<|bos|><|user|>a<|end|><|assistant|>"
    assert prompt_of([user], add_generation_prompt=False) == "<|bos|><|user|>a<|end|>"
    assert prompt_of([user, said], continue_final_message=True) == "<|bos|><|user|>a<|end|><|assistant|>so"
    roles = [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant", "tool")]
    assert prompt_of(roles, chat_template_kwargs={"unused": 1, "self": 2}) == (
        "<|bos|><|system|>x<|end|><|system|>x<|end|><|user|>x<|end|><|assistant|>x<|end|><|tool|>x<|end|><|assistant|>"
    )


def test_version_tokens_and_description(server):
    with urllib.request.urlopen(f"{server.url}/version") as response:
        assert json.load(response) == {"version": nmoe.__version__}
    tokens = ask(server, "/tokenize", prompt="héllo", return_token_strs=True)
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 6
    assert ask(server, "/detokenize", tokens=tokens["tokens"]) == {"prompt": "héllo"}


# -------------------------------------------------------------------------------------------------------------- metrics

VLLM = """
    num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
    num_preemptions_total prompt_tokens_total generation_tokens_total request_success_total{finished_reason="stop"}
    request_success_total{finished_reason="length"} request_success_total{finished_reason="abort"}
    time_to_first_token_seconds_count inter_token_latency_seconds_count e2e_request_latency_seconds_count
    request_queue_time_seconds_count request_prefill_time_seconds_count request_decode_time_seconds_count
    request_inference_time_seconds_count iteration_tokens_total_count request_prompt_tokens_count
    request_time_per_output_token_seconds_count request_max_num_generation_tokens_count
    request_generation_tokens_count request_params_n_count request_params_max_tokens_count
"""


def settled(server):
    """The metrics once the processes have nothing more to put there."""
    previous = {}
    while (metrics := server.metrics()) != previous or metrics["nmoe:num_requests_running"]:
        previous = metrics
        time.sleep(0.05)
    return metrics


def test_metrics_have_vllms_names(server, complete):
    before = settled(server)
    names = [f"nmoe:{name}" for name in VLLM.split()] + ["nmoe:step_time_seconds_count"]
    assert set(names) <= set(before)
    complete(n=2, max_tokens=4)
    after = settled(server)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["nmoe:generation_tokens_total"] == 8
    assert grown['nmoe:request_success_total{finished_reason="length"}'] == 2
    for name in ("e2e_request_latency_seconds", "request_decode_time_seconds", "request_inference_time_seconds"):
        assert grown[f"nmoe:{name}_count"] == 2
    assert grown["nmoe:request_params_n_sum"] == 4 and grown["nmoe:request_generation_tokens_sum"] == 8
    assert grown["nmoe:request_max_num_generation_tokens_count"] == 1
    assert grown["nmoe:request_max_num_generation_tokens_sum"] == 4
    assert grown["nmoe:request_prompt_tokens_sum"] == 2 * len(PROMPT)
    by_rank = grown['nmoe:rank_iteration_tokens_sum{rank="0"}']
    assert by_rank == grown["nmoe:iteration_tokens_total_sum"] > 0


# --------------------------------------------------------------------------------------------------------- a full house


@pytest.fixture(scope="module")
def small_server(checkpoint):
    """Few pages and few places: requests are preempted, and wait."""
    engine = {"num_pages": 24, "page_size": 4, "max_batch_size": 4, "max_prefill_tokens": 16}
    with Server({"model": {"path": str(checkpoint)}, "engine": engine}) as running:
        yield running


def test_penalties_survive_preemption(small_server, checkpoint):
    """Every token is the largest of transformers' logits, adjusted by the definitions for all that came before."""
    from transformers import DeepseekV3ForCausalLM

    oracle = DeepseekV3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    few = bias_fields(dict.fromkeys(range(100, 108), 15.0))  # so that tokens come again and again
    rows = [
        Sampling(0.0, presence_penalty=1.7, frequency_penalty=0.3, **few),
        Sampling(0.0, repetition_penalty=1.5, **few),
        Sampling(0.0, repetition_penalty=1.2, frequency_penalty=0.9, **bias_fields({5: 3.0, 9: -2.0})),
        Sampling(0.0),
        Sampling(0.0, presence_penalty=-1.0, min_tokens=30, barred_ids=(EOS,), **bias_fields({EOS: 9.0})),
        Sampling(0.0, repetition_penalty=0.8, presence_penalty=0.5),
    ]
    prompts = [[(7 * row + 3 * i) % 250 for i in range(9 + row)] for row in range(len(rows))]

    def body_of(row, prompt):
        return {
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": 40,
            "return_token_ids": True,
            "ignore_eos": not row.min_tokens,
            "presence_penalty": row.presence_penalty,
            "frequency_penalty": row.frequency_penalty,
            "repetition_penalty": row.repetition_penalty,
            "logit_bias": {str(token): bias for token, bias in row.logit_bias.items()},
            "min_tokens": row.min_tokens,
        }

    async def ask_all():
        calls = (
            asyncio.to_thread(ask, small_server, "/v1/completions", **body_of(row, prompt))
            for row, prompt in zip(rows, prompts, strict=True)
        )
        return await asyncio.gather(*calls)

    answers = asyncio.run(ask_all())
    assert small_server.metrics()["nmoe:num_preemptions_total"] > 0
    plain = 0
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        output = answer["choices"][0]["token_ids"]
        assert len(output) == 40 or (row.min_tokens and output[-1] == EOS and len(output) > 30)
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + output])).logits[0]
        for at, token in enumerate(output):
            here = adjusted(logits[len(prompt) + at - 1], row, prompt, output[:at])
            assert here.max() - here[token] < 1e-4, (row, at)
            plain += int(logits[len(prompt) + at - 1].argmax()) == token
    assert plain < 0.8 * sum(len(answer["choices"][0]["token_ids"]) for answer in answers)  # it did change something


def test_priority(small_server):
    """Of those that wait, the one with the lowest number goes first, although it came last."""
    order, threads = [], []

    def wait_for(name, **body):
        ask(small_server, "/v1/completions", prompt=[5], temperature=0, ignore_eos=True, **body)
        order.append(name)

    def start(name, **body):
        threads.append(threading.Thread(target=wait_for, args=(name,), kwargs=body))
        threads[-1].start()

    def until_open(count):
        while True:
            metrics = small_server.metrics()
            if metrics["nmoe:num_requests_running"] + metrics["nmoe:num_requests_waiting"] >= count or order:
                return

    for _ in range(8):
        start("first", max_tokens=80, priority=-9)
    until_open(8)
    for _ in range(20):
        start("late", max_tokens=20, priority=5)
    until_open(28)
    start("early", max_tokens=20, priority=-5)
    for thread in threads:
        thread.join(30)
    # Four run at a time. In order of arrival it would end among the last four.
    assert [name for name in order if name != "first"].index("early") <= 12


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_the_queue_is_aborted(small_server, is_stream):
    """While it waits nothing is written to it that could fail."""
    aborted = 'nmoe:request_success_total{finished_reason="abort"}'
    before = settled(small_server)[aborted]
    host, port = small_server.url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": [5], "max_tokens": 80, "ignore_eos": True, "stream": is_stream})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    links = []
    for _ in range(8):  # four run, four wait
        links.append(socket.create_connection((host, int(port))))
        links[-1].sendall(f"{head}\r\n\r\n{body}".encode())
    while small_server.metrics()["nmoe:num_requests_waiting"] < 2:
        time.sleep(0.002)
    for link in links:
        link.close()
    assert settled(small_server)[aborted] - before >= 6  # two may have ended by themselves
    assert small_server.metrics()["nmoe:num_requests_waiting"] == 0
