"""Trains the demo that `make.py` made, in place: `python nmoe/demo/train.py`, some minutes on a GPU.

Needs transformers, whose DeepSeek-V3 is what is trained. As in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), the
experts are kept in use without a loss: after each step the router's bias of an expert moves against its load. Nothing
in nmoe imports this module.
"""

import functools
import logging
import math
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from nmoe.demo import make

STEPS, WARMUP = 2800, 200
BATCH, LENGTH = 64, 512  # sequences, tokens
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1
BIAS_STEP = 1e-3
HELD_OUT = 50  # one document in so many is not trained on
log = logging.getLogger("train")


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    """The training and the held-out documents in random order, each as one row of token ids.

    The tokenizer puts `<|begin|>` before each document.
    """
    tokenizer = Tokenizer.from_file(str(make.FOLDER / "tokenizer.json"))
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(make.documents()))]
    held: list[int] = []
    trained: list[int] = []
    for index in torch.randperm(len(encoded)).tolist():
        (trained if index % HELD_OUT else held).extend(encoded[index])
    return torch.tensor(trained), torch.tensor(held)


def batch(stream: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Random windows, [BATCH, LENGTH]."""
    starts = torch.randint(len(stream) - LENGTH, (BATCH, 1))
    return stream[starts + torch.arange(LENGTH)].to(device)


def learning_rate(step: int) -> float:
    """Of LEARNING_RATE: a linear warm-up, then half a cosine down to zero."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def count(load: torch.Tensor, _router: torch.nn.Module, _inputs: object, out: tuple[torch.Tensor, ...]) -> None:
    """How many tokens chose each expert, from the router's (logits, weights, indices)."""
    load.copy_(out[2].flatten().bincount(minlength=len(load)))


def main() -> None:
    """Train, and write model.safetensors anew."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(make.SEED)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(make.FOLDER, dtype=torch.float32)
    model.to(device)
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    loads = [torch.zeros(make.CONFIG["n_routed_experts"], device=device) for _ in routers]
    for router, load in zip(routers, loads, strict=True):
        router.register_forward_hook(functools.partial(count, load))
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    trained, held = streams()
    for step in range(STEPS):
        ids = batch(trained, device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for router, load in zip(routers, loads, strict=True):
            router.e_score_correction_bias += BIAS_STEP * (load.mean() - load).sign()
        if step % 500 == 499:
            with torch.no_grad():
                ids = batch(held, device)
                other = model(input_ids=ids, labels=ids, use_cache=False).loss
            spread = max(float(load.max() / load.mean()) for load in loads)
            log.info(
                "step %d: loss %.3f, held out %.3f, fullest expert %.2f", step + 1, loss.item(), other.item(), spread
            )
    make.write_weights(make.FOLDER / "model.safetensors", by_name(model))


def by_name(model: torch.nn.Module) -> dict[str, make.Array]:
    """The weights in float32 under a checkpoint's names; transformers keeps the experts of a layer in one tensor."""
    state = {name: tensor.float().cpu() for name, tensor in model.state_dict().items()}
    tensors = {}
    for name, _ in make.shapes():
        layer, found, expert = name.partition(".experts.")
        if not found:
            tensors[name] = state[name].contiguous().numpy()
            continue
        index, kind = expert.split(".")[:2]
        if kind == "down_proj":
            tensors[name] = state[f"{layer}.experts.down_proj"][int(index)].contiguous().numpy()
        else:
            halves = state[f"{layer}.experts.gate_up_proj"][int(index)].chunk(2)
            tensors[name] = halves[kind == "up_proj"].contiguous().numpy()
    return tensors


if __name__ == "__main__":
    main()
