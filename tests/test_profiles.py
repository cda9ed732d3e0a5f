"""The five profiles through HTTP: what they return is right, and what they promise to be exact is so to the last bit.

transformers' logits of each answer's own tokens are the oracle, in float32, for everything that a request can ask for,
while requests of all profiles share a server so small that prompts are computed in chunks and requests are preempted.
Then each exact profile's answers are compared with themselves: alone, with a cached prefix, among others of all
profiles, on each rank, after preemption, after a restart.
"""

import asyncio
import base64
import json
import math
import random

import aiohttp
import numpy as np
import pytest
import torch

from nmoe.messages import Sampling, bias_fields
from nmoe.profiles import PROFILES, Numerics
from tests.checkpoints import make_checkpoint
from tests.serving import Server
from tests.test_adjustments import distribution

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PAGE = 8
ENGINE = {"num_pages": 64, "page_size": PAGE, "max_batch_size": 16, "max_prefill_tokens": 40}
WITHIN = 1e-5
EXPERTS, LAYERS = 3, 2  # per token; with routed experts
OWN = [17, 300, 5]  # token ids to be scored


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # Logits of one digit before the point: so 1e-5 is not their float32's last bit.
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return Oracle(checkpoint)


class Oracle:
    """transformers' log-probabilities and routing of whole sequences."""

    def __init__(self, checkpoint):
        from transformers import DeepseekV3ForCausalLM

        self._model = DeepseekV3ForCausalLM.from_pretrained(checkpoint, experts_implementation="eager").eval()
        self._routed = []
        for layer in self._model.model.layers[-LAYERS:]:
            layer.mlp.gate.register_forward_hook(lambda _gate, _inputs, output: self._routed.append(output[2]))

    @torch.no_grad()
    def of(self, ids):
        """Logits float32 [T, V], and the experts of each token [T, layers, experts per token] in ascending order."""
        self._routed.clear()
        logits = self._model(torch.tensor([ids])).logits[0].numpy()
        return logits, torch.stack(self._routed, 1).sort(-1).values.numpy()


def log_softmax(logits):
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def near(found, expected):
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=0, atol=WITHIN)


async def ask(session, body):
    """The answer of one request; of a stream, put together."""
    async with session.post(CHAT if "messages" in body else COMPLETIONS, json=body) as response:
        text = await response.text()
        assert response.status == 200, (body, text)
    if not body.get("stream"):
        return json.loads(text)
    answer, choices = {}, {}
    for event in text.removesuffix("\n\n").split("\n\n")[:-1]:
        chunk = json.loads(event.removeprefix("data: "))
        for piece in chunk.pop("choices"):
            _append(choices.setdefault(piece["index"], {}), piece)
        answer |= chunk
    return {**answer, "choices": [choices[index] for index in sorted(choices)]}


def _append(whole, piece):
    """Lists and texts of a stream's chunks go on; the rest is said once."""
    for name, value in piece.items():
        old = whole.get(name)
        if value is None or isinstance(old, int):
            whole.setdefault(name, value)
        elif old is None:
            whole[name] = value
        elif isinstance(old, dict):
            _append(old, value)
        else:
            whole[name] = old + value


def ask_all(server, bodies):
    """The answers of requests that are sent at once."""

    async def run():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(server.url, connector=connector) as session:
            return await asyncio.gather(*(ask(session, {"ignore_eos": True, **body}) for body in bodies))

    return asyncio.run(run())


def flattened(answer):
    """The choices of any answer in the form of completions."""
    if "message" not in answer["choices"][0] and "delta" not in answer["choices"][0]:
        return answer["choices"]
    of_prompt = {name: value for name, value in answer.items() if name.startswith("prompt_")}
    choices = []
    for choice in answer["choices"]:
        choices.append({**of_prompt, **choice})
        if choice["logprobs"] is not None:
            content = choice["logprobs"]["content"]
            choices[-1]["logprobs"] = {
                "token_ids": choice["token_ids"],
                "token_logprobs": [entry["logprob"] for entry in content],
                "drawn_logprobs": [entry["drawn_logprob"] for entry in content],
                "top_logprobs": [
                    {place: each["logprob"] for place, each in enumerate(entry["top_logprobs"])} for entry in content
                ],
            }
    return choices


def prompt_of(seed, length):
    """Random ids."""
    rng = random.Random(seed)
    return [rng.randrange(6, 500) for _ in range(length)]


# ------------------------------------------------------------------------------------------------------ they are right

SAMPLED = {"temperature": 0.8, "top_k": 60, "top_p": 0.93, "seed": 11}
ADJUSTED = {
    "temperature": 1.3,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.2,
    "logit_bias": {"9": 4.0, "260": -3.0, "77": 5.5},
    "min_p": 0.01,
    "seed": 5,
}
EVERYTHING = {
    "logprobs": 4,
    "prompt_logprobs": 3,
    "top_k_logprobs": 24,
    "logprob_token_ids": OWN,
    "return_routed_experts": True,
}
STOPPED = {"stop": ["ab", "bcc"], "logit_bias": {"70": 6.0, "71": 6.0, "72": 6.0}, "seed": 4}  # a, b and c
SAID = {"messages": [{"role": "user", "content": "Good morning."}]}
BODIES = {
    "nothing unasked": {},
    "whole": {**EVERYTHING, **SAMPLED, "echo": True},
    "streamed": {**EVERYTHING, **SAMPLED, "stream": True},
    "stop strings": {"logprobs": 0, **STOPPED, "n": 3},
    "stop strings, streamed": {"logprobs": 0, **STOPPED, "n": 3, "stream": True},
    "three answers": {**EVERYTHING, **ADJUSTED, "n": 3},
    "three answers, streamed": {**EVERYTHING, **ADJUSTED, "n": 3, "stream": True},
    "penalties, greedy": {"logprobs": 2, **ADJUSTED, "temperature": 0},
    "scored only": {"prompt_logprobs": 5, "top_k_logprobs": 128, "max_tokens": 0},
    "end of text": {"logprobs": 1, "ignore_eos": False, "logit_bias": {"1": 6.0}, "seed": 2},
    "candidates alone": {"logprob_token_ids": [*range(100, 228)]},
    "chat": {**SAID, **EVERYTHING, **SAMPLED, "logprobs": True, "top_logprobs": 4},
    "chat, streamed": {**SAID, **EVERYTHING, **ADJUSTED, "logprobs": True, "stream": True, "n": 2},
    "chat, exact": {**SAID, "profile": "eval_exact", "top_k_logprobs": 7},
    "routing alone": {"return_routed_experts": True, "stream": True},
    **{name: {"profile": name} for name in PROFILES},
    **{f"{name}, {kind}": {"profile": name, **body} for name in PROFILES for kind, body in {
        "sampled": {**SAMPLED, "top_k_logprobs": 5},
        "adjusted": {**ADJUSTED, **EVERYTHING},
    }.items()},
}  # fmt: skip


def requests():
    """Every body twice, with prompts from one token to several chunks; some share a prefix of full pages."""
    shared = prompt_of(0, 5 * PAGE)
    bodies = []
    for place, body in enumerate([*BODIES.values(), *BODIES.values()]):
        length = [1, 9, 2 * PAGE, 37, 90][place % 5]
        prompt = shared + prompt_of(place, 7) if place % 3 == 0 else prompt_of(place, length)
        common = {"max_tokens": 20 + place % 9, "return_token_ids": True, **body}
        bodies.append(common if "messages" in body else {"prompt": prompt, **common})
    return bodies


@pytest.fixture(scope="module")
def answered(checkpoint):
    """All requests and their answers, from a server with few pages."""
    with Server({"model": {"path": str(checkpoint)}, "engine": ENGINE}) as server:
        bodies = requests()
        answers = ask_all(server, bodies)
        metrics = server.metrics()
        assert metrics["nmoe:num_preemptions_total"] > 0
        assert metrics["nmoe:prefix_cache_hits_total"] > 0
    return list(zip(bodies, answers, strict=True))


@pytest.mark.parametrize("name", BODIES)
def test_outputs_are_those_of_transformers(answered, oracle, name):
    for body, answer in answered[[*BODIES].index(name) :: len(BODIES)]:
        assert len(answer["choices"]) == body.get("n", 1)
        for choice in flattened(answer):
            Check(oracle, body, choice).all()


class Check:
    """One choice against the oracle."""

    def __init__(self, oracle, body, choice):
        self.body, self.choice = body, choice
        self.prompt, self.output = choice["prompt_token_ids"], choice["token_ids"]
        assert self.prompt == body.get("prompt", self.prompt)
        self.number = body.get("top_logprobs", 0) if "messages" in body else body.get("logprobs", 0)
        self.profile = PROFILES[body.get("profile", "production_generate")]
        self.logits, self.routed = oracle.of(self.prompt + self.output)
        self.logprobs = log_softmax(self.logits)
        self.before = self.logprobs[len(self.prompt) - 1 :]  # of each token of the output

    def all(self):
        """Whatever was asked for or comes unasked is there and right; the rest is not there."""
        body, profile = self.body, self.profile
        scores = "logprobs" in body or profile.scores
        assert (self.choice["logprobs"] is not None) == scores
        if scores:
            self.sampled(self.choice["logprobs"])
        prompt = "prompt_logprobs" in body or profile.scores_prompt
        assert ("prompt_logprobs" in self.choice) == prompt
        if prompt:
            self.scored_prompt(body.get("prompt_logprobs", 0))
        k = body.get("top_k_logprobs", profile.top_k)
        for name, is_there, rows in (
            ("top_k_logprobs", k, self.before[: len(self.output)]),
            ("prompt_top_k_logprobs", k and prompt, self.logprobs[: len(self.prompt) - 1]),
        ):
            assert (name in self.choice) == bool(is_there)
            if is_there:
                self.likeliest(self.choice[name], rows, k)
        ids = body.get("logprob_token_ids")
        assert ("token_id_logprobs" in self.choice) == bool(ids)
        if ids:
            near(self.choice["token_id_logprobs"], self.before[: len(self.output)][:, ids])
            if prompt:
                first, *rest = self.choice["prompt_token_id_logprobs"]
                assert first is None and len(rest) == len(self.prompt) - 1
                if rest:
                    near(rest, self.logprobs[: len(rest)][:, ids])
        assert ("routed_experts" in self.choice) == bool(body.get("return_routed_experts"))
        if body.get("return_routed_experts"):
            self.experts(self.choice["routed_experts"])

    def sampled(self, found):
        """Both log-probabilities of each token, after the prompt's if they are echoed."""
        skip = len(self.prompt) if self.body.get("echo") else 0
        assert found["token_ids"] == (self.prompt if skip else []) + self.output
        if skip:
            assert found["token_logprobs"][0] is None and found["drawn_logprobs"][:skip] == [None] * skip
            near(found["token_logprobs"][1:skip], [self.logprobs[i, t] for i, t in enumerate(self.prompt[1:])])
        near(found["token_logprobs"][skip:], [self.before[i, token] for i, token in enumerate(self.output)])
        near(found["drawn_logprobs"][skip:], [self.drawn(i, token) for i, token in enumerate(self.output)])
        for place, top in enumerate(found["top_logprobs"][skip:]):
            expected = np.sort(self.before[place])[::-1][: self.number]
            assert len(top) <= len(expected) + 1  # tokens with the same text count once
            if len(expected):
                near(max(top.values()), expected[0])

    def drawn(self, place, token):
        """The log-probability under the distribution that the token was drawn from."""
        body = self.body
        if body.get("temperature", 1) == 0:
            return 0.0
        bias = {int(each): value for each, value in body.get("logit_bias", {}).items()}
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        sampling = Sampling(**{name: body[name] for name in names if name in body}, **bias_fields(bias))
        logits = self.logits[len(self.prompt) - 1 + place]
        return math.log(distribution(logits, sampling, self.prompt, self.output[:place])[token])

    def scored_prompt(self, number):
        """vLLM's format."""
        first, *entries = self.choice["prompt_logprobs"]
        assert first is None and len(entries) == len(self.prompt) - 1
        for row, token, entry in zip(self.logprobs, self.prompt[1:], entries, strict=False):
            assert next(iter(entry)) == str(token) and number <= len(entry) <= number + 1
            near([each["logprob"] for each in entry.values()], [row[int(each)] for each in entry])
            assert abs(entry[str(token)]["rank"] - 1 - np.count_nonzero(row > row[token])) <= np.count_nonzero(
                (row != row[token]) & (abs(row - row[token]) < WITHIN)
            )

    def likeliest(self, found, rows, k):
        """nmoe's format; the lists of a prompt begin with null for its first token."""
        ids, logprobs = ([row for row in found[name] if row is not None] for name in ("ids", "logprobs"))
        assert len(ids) == len(logprobs) == len(rows)
        for mine, values, row in zip(ids, logprobs, rows, strict=True):
            assert len(set(mine)) == k
            near(values, row[mine])
            near(values, np.sort(row)[::-1][:k])

    def experts(self, found):
        """Of every computed position: all but the last sampled token's."""
        positions = len(self.prompt) + max(len(self.output) - 1, 0)
        assert found["shape"] == [positions, LAYERS, EXPERTS] and found["dtype"] == "uint8"
        ids = np.frombuffer(base64.b64decode(found["data"]), np.uint8).reshape(found["shape"])
        assert (np.sort(ids, -1) == self.routed[:positions]).all()


def test_the_cases_happened(answered):
    """Some answers ended early, in each of the ways."""
    reasons = {
        name: {choice["finish_reason"] for _, answer in answered[place :: len(BODIES)] for choice in answer["choices"]}
        for place, name in enumerate(BODIES)
    }
    for name in ("stop strings", "stop strings, streamed", "end of text"):
        assert "stop" in reasons[name], name
    assert reasons["whole"] == reasons["scored only"] == {"length"}


# ------------------------------------------------------------------------------------------------------ they are exact

EXACT = [name for name, profile in PROFILES.items() if profile.numerics is Numerics.EXACT]
SCARCE = {"num_pages": 40, "page_size": 4, "max_batch_size": 16, "max_prefill_tokens": 32}


def probes(prompt_tokens):
    """Of each exact profile: drawn and greedy, short and of several chunks, with everything that can come back."""
    bodies = []
    for place, name in enumerate(EXACT):
        common = {"profile": name, "return_token_ids": True, "top_k_logprobs": 20, "logprob_token_ids": OWN}
        common |= {"return_routed_experts": True, "ignore_eos": True}
        drawn = {"seed": 7, "temperature": 1.1, "repetition_penalty": 1.1, "top_p": 0.98}
        bodies.append({**common, **drawn, "prompt": prompt_of(50 + place, prompt_tokens), "max_tokens": 24})
        bodies.append({**common, "temperature": 0, "prompt": prompt_of(60 + place, 8 + place), "max_tokens": 12})
    return bodies


def others(seed, most_tokens):
    """64 requests of all profiles, which fill the pages."""
    rng = random.Random(seed)
    names = [*PROFILES]
    return [
        {
            "profile": names[place % len(names)],
            "prompt": prompt_of(rng.random(), rng.randint(1, 40)),
            "max_tokens": rng.randint(1, most_tokens),
            "temperature": rng.choice([0, 1.0]),
            "logprobs": rng.choice([0, 3]),
        }
        for place in range(64)
    ]


def told(answer):
    """All of an answer that must not change, floats as the text that a client got."""
    return json.dumps(answer["choices"])


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def computed_tokens(server, world_size):
    """How many tokens each rank has computed."""
    metrics = server.metrics()
    return [metrics[f'nmoe:rank_iteration_tokens_sum{{rank="{rank}"}}'] for rank in range(world_size)]


def check_repeats(sections, start_s=30.0, prompt_tokens=47, most_tokens=20):
    """The exact profiles' answers are the same to the bit in every situation that a server can bring them into. Prompts
    of `prompt_tokens` fill a page and outgrow the next; others' answers, up to `most_tokens` long, some pages."""
    world_size, bodies = sections["parallel"]["world_size"], probes(prompt_tokens)
    with Server(sections, start_s) as server:
        alone = [ask_all(server, [body])[0] for body in bodies]
        assert [cached(answer) for answer in alone] == [0] * len(bodies)
        expected = list(map(told, alone))

        again = [ask_all(server, [body])[0] for body in bodies]
        assert list(map(told, again)) == expected, "with a cached prefix"
        assert any(map(cached, again))

        before = computed_tokens(server, world_size)
        answers = ask_all(server, world_size * bodies)
        assert list(map(told, answers)) == world_size * expected, "on each rank"
        assert all(np.array(computed_tokens(server, world_size)) > before)

        preempted = server.metrics()["nmoe:num_preemptions_total"]
        late = [{**body, "priority": 9} for body in bodies]  # these lose their pages first
        crowd = others(world_size, most_tokens)
        answers = ask_all(server, [*crowd[:32], *bodies, *late, *crowd[32:]])[32 : 32 + 2 * len(bodies)]
        assert list(map(told, answers)) == 2 * expected, "among others"
        assert server.metrics()["nmoe:num_preemptions_total"] > preempted
    with Server(sections, start_s) as server:
        assert list(map(told, ask_all(server, bodies))) == expected, "after a restart, side by side"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exact_profiles_repeat_to_the_bit(checkpoint, world_size):
    """Each world size against itself: sums over ranks may differ between them."""
    check_repeats({"model": {"path": str(checkpoint)}, "parallel": {"world_size": world_size}, "engine": SCARCE})
