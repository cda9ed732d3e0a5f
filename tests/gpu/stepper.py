"""Requests for a Runner without a scheduler: prefilled in chunks of any size, then decoded, all of them in one step."""

import numpy as np

from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, ROW_HAS_IDS, ROW_SAMPLES, Admit, Sampling, Step
from nmoe.profiles import Numerics


class Requests:
    """Prompts in slots 0, 1, ..., with pages of their own, scattered."""

    def __init__(self, runner, prompts, output_len, *, page_size, num_pages, sampling=None, numerics=Numerics.FAST):
        self.runner = runner
        self.prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        self.computed = [0] * len(prompts)
        self.outputs = [[] for _ in prompts]
        self.sampling = sampling or [Sampling(temperature=0.0)] * len(prompts)
        self.numerics = numerics
        self.num_steps = 0
        order = np.random.default_rng(0).permutation(num_pages).tolist()
        needed = [-(-(len(prompt) + output_len) // page_size) for prompt in prompts]
        self.pages = [[order.pop() for _ in range(count)] for count in needed]

    def step(self, counts):
        """One step: a request with 0 takes no part, one with its whole prompt computed decodes, others take a chunk."""
        rows, ids, pages, admits, sampling = [], [], [], [], []
        decodes = [slot for slot, count in enumerate(counts) if count and self.outputs[slot]]
        chunks = [slot for slot, count in enumerate(counts) if count and not self.outputs[slot]]
        for slot in decodes:
            rows.append((slot, self.computed[slot], 1, ROW_SAMPLES))
            self.computed[slot] += 1
        for slot in chunks:
            first, prompt = self.computed[slot], self.prompts[slot]
            last = min(first + counts[slot], len(prompt))
            if not first:
                admits.append(Admit(slot, 0, self.sampling[slot]))
                pages += [(slot, page) for page in self.pages[slot]]
            rows.append((slot, first, last - first, ROW_HAS_IDS | (ROW_SAMPLES if last == len(prompt) else 0)))
            ids.append(prompt[first:last])
            self.computed[slot] = last
        sampling = [slot for slot, _, _, flags in rows if flags & ROW_SAMPLES]
        self.num_steps += 1
        step = Step(
            generation=1,
            step_id=self.num_steps,
            numerics=self.numerics,
            channel=CHANNEL_PREFILL if chunks else CHANNEL_DECODE,
            num_tokens=sum(row[2] for row in rows),
            rows=np.array(rows, np.int32).tobytes(),
            ids=np.concatenate([np.empty(0, np.int32), *ids]).tobytes(),
            pages=np.array(pages, np.int32).reshape(-1, 2).tobytes(),
            admits=tuple(admits),
        )
        tokens = np.frombuffer(self.runner.launch(step).tokens(), np.int32).tolist()
        for slot, token in zip(sampling, tokens, strict=True):
            self.outputs[slot].append(token)

    def generate(self, output_len, chunk):
        """Prompts in turn in chunks of `chunk` while those before decode; then all decode to `output_len`."""
        while any(len(output) < output_len for output in self.outputs):
            unfinished = [slot for slot, output in enumerate(self.outputs) if not output]
            counts = [int(0 < len(output) < output_len) for output in self.outputs]
            if unfinished:
                counts[unfinished[0]] = chunk
            self.step(counts)
        return self.outputs
