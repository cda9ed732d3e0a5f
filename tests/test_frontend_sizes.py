"""An answer that may be too large for memory is refused at once, by a good estimate, and what is usual never is."""

import array
import random
import struct
import types

import pytest

from nmoe.errors import RequestError
from nmoe.frontend import sizes
from nmoe.frontend.logprobs import ChoiceFormats, Formats, PromptFormats, Vocabulary
from nmoe.frontend.openai import parse_call
from nmoe.frontend.outputs import Outputs
from nmoe.frontend.prompt import Prompt
from nmoe.frontend.replies import Choice, whole_body
from nmoe.frontend.sizes import check_answer
from nmoe.outputs import RoutingLayout, pack
from tests.scripted import Rig, write_model

DEEPSEEK_V3 = RoutingLayout(58, 8, 1)
ENDPOINTS = {
    "completions": {"prompt": [5] * 100},
    "chat": {"messages": [{"role": "user", "content": "a"}]},
    "generate": {"prompt": [5] * 100},
}


def check(endpoint, longest, prompt_len=100, **fields):
    call = parse_call(endpoint, ENDPOINTS[endpoint] | fields)
    prompts = [Prompt([5] * prompt_len, "prompt")] * max(1, len(call.prompts))
    check_answer(call, prompts, [longest] * len(prompts), DEEPSEEK_V3)


@pytest.mark.parametrize(
    ("endpoint", "longest", "fields"),
    [
        ("completions", 163_840, {"n": 128, "return_token_ids": True}),
        ("completions", 32_768, {"n": 64, "profile": "rl_sample"}),
        ("completions", 32_768, {"n": 32, "profile": "rl_sample", "return_routed_experts": True}),
        ("generate", 32_768, {"n": 64, "profile": "rl_sample", "return_routed_experts": True}),
        ("completions", 16_384, {"n": 8, "profile": "online_distill", "top_k_logprobs": 128}),
        ("generate", 2_048, {"prompt": [[5]] * 1024, "profile": "offline_distill", "top_k_logprobs": 50}),
        ("chat", 163_840, {"logprobs": True, "top_logprobs": 20}),
        ("chat", 32_768, {"n": 8, "logprobs": True, "top_logprobs": 20}),
        ("completions", 163_840, {"n": 128, "stream": True, "logprobs": 20}),
        ("generate", 0, {"max_tokens": 0, "prompt_logprobs": 0, "logits": True, "top_k_logprobs": 128}),
    ],
)
def test_what_is_usual_is_no_concern(endpoint, longest, fields):
    check(endpoint, longest, **fields)


@pytest.mark.parametrize(
    ("endpoint", "fields", "named", "streams"),
    [
        ("completions", {"n": 128, "logprobs": 20}, "logprobs", True),
        ("chat", {"n": 128, "logprobs": True, "top_logprobs": 20}, "logprobs", True),
        ("completions", {"n": 128, "top_k_logprobs": 128, "logprobs": 0}, "top_k_logprobs, logprobs", True),
        ("completions", {"n": 128, "profile": "online_distill"}, "top_k_logprobs, logprobs", False),
        ("completions", {"n": 128, "logprob_token_ids": [*range(128)]}, "logprob_token_ids", True),
        ("completions", {"n": 128, "return_routed_experts": True}, "return_routed_experts", False),
        ("chat", {"n": 128, "return_routed_experts": True, "stream": True}, "return_routed_experts", False),
        ("generate", {"n": 128, "top_k_logprobs": 100}, "top_k_logprobs", False),
        (
            "generate",
            {"n": 128, "logprobs": 0, "return_routed_experts": True},
            "return_routed_experts, logprobs",
            False,
        ),
        ("generate", {"n": 128, "logits": True, "return_routed_experts": True}, "return_routed_experts, logits", False),
        ("generate", {"n": 128, "logprobs": 20, "logprob_token_ids": [*range(9)]}, "logprobs", False),
        ("generate", {"n": 128, "logprobs": 0, "logprob_token_ids": [*range(99)]}, "logprob_token_ids", False),
        ("generate", {"n": 128, "logprobs": 0, "prompt_logprobs": 20}, "prompt_logprobs", False),
        ("generate", {"n": 128, "logprobs": 20, "echo": True}, "logprobs, echo", False),
    ],
)
def test_what_may_be_too_large_is_refused_with_the_fields_the_limit_and_the_remedy(endpoint, fields, named, streams):
    with pytest.raises(RequestError, match=rf"^{named}: for 1 prompts with n = 128 .* 1 GiB of an answer") as error:
        check(endpoint, 100_000, **fields)
    assert error.value.status == 400 and error.value.param == named.split(",")[0]
    assert ("stream the answer" in str(error.value)) == streams
    assert "lower max_tokens or n" in str(error.value) and "nmoe batch" in str(error.value)


def test_the_limit_to_lower_is_called_what_the_client_called_it():
    with pytest.raises(RequestError, match=r"and max_completion_tokens = 100000 .*; lower max_completion_tokens or n,"):
        check("chat", 100_000, n=128, logprobs=True, top_logprobs=20, max_completion_tokens=100_000)


def test_records_of_long_prompts_count_in_bulk():
    prompts = {"prompt": [[5]] * 64, "max_tokens": 0, "prompt_logprobs": 0, "top_k_logprobs": 128}
    with pytest.raises(RequestError, match=r"^prompt_logprobs: for 64 prompts .* 1\.\d GiB"):
        check("generate", 0, prompt_len=20_000, **prompts)


async def test_nothing_is_computed_of_what_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "MAX_ANSWER_BYTES", 4000)
    async with Rig(write_model(tmp_path)) as rig:
        fields = {"prompt": "a", "top_k_logprobs": 10, "n": 2}
        status, _, body = await rig.ask("/v1/completions", max_tokens=10, **fields)
        assert status == 400 and body["error"]["param"] == "top_k_logprobs"
        assert await rig.silent()


class Tokenizer:
    """Every token is a space and four letters, about what real ones are on average."""

    def token_bytes(self, token):
        return b" %04d" % (token % 10_000)

    def detokenizer(self):
        return types.SimpleNamespace(feed=lambda token: self.token_bytes(token).decode(), holds=False)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 0},
        {"logprobs": 5},
        {"logprobs": 20},
        {"top_k_logprobs": 50},
        {"logprob_token_ids": [*range(100)]},
        {"return_routed_experts": True},
    ],
    ids=str,
)
def test_the_estimate_is_near_the_truth(endpoint, fields, monkeypatch):
    count, rng = 400, random.Random(0)
    if endpoint == "chat" and "logprobs" in fields:
        fields = {"logprobs": True, "top_logprobs": fields["logprobs"]}
    call = parse_call(endpoint, ENDPOINTS[endpoint] | fields)
    returns, tokens = call.returns, [rng.randrange(100_000, 129_000) for _ in range(count)]
    records = b""
    for _ in tokens if returns.records else ():
        ids = [rng.randrange(100_000, 129_000) for _ in range(returns.top_k)]
        numbers = [rng.uniform(-12, 0) for _ in range(returns.top_k + len(returns.scored_ids))]
        head = struct.pack("<2fi", rng.uniform(-3, 0), rng.uniform(-3, 0), 1)
        records += head + array.array("i", ids).tobytes() + array.array("f", numbers).tobytes()
    routed = DEEPSEEK_V3.position_bytes * count if returns.routing else 0
    outputs = Outputs(returns, 1)
    outputs.add(memoryview(pack(b"", records, len(records) and count, bytes(routed), routed and count)))
    formats, prompt = Formats(call, Vocabulary(Tokenizer()), DEEPSEEK_V3), Prompt([5], "prompt")
    mine = ChoiceFormats(formats, PromptFormats(formats, prompt, outputs), 0, outputs)
    stream = types.SimpleNamespace(uid=1, reason="length", num_tokens=count, cached_tokens=0, take=lambda: ("", tokens))
    actual = len(whole_body(call, "m", [Choice(0, prompt, stream, mine)]))
    monkeypatch.setattr(sizes, "MAX_ANSWER_BYTES", int(0.95 * actual))
    with pytest.raises(RequestError):
        check_answer(call, [prompt], [count], DEEPSEEK_V3)
    monkeypatch.setattr(sizes, "MAX_ANSWER_BYTES", int(1.5 * actual))
    check_answer(call, [prompt], [count], DEEPSEEK_V3)
