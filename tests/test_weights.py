"""A rank reads its own experts, random weights depend on names alone, and FP8 becomes real."""

import pytest
import torch

from nmoe.architecture import expected_tensors
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Model, Parallel
from nmoe.worker.kernels.fp8 import dequantise_blocks
from nmoe.worker.weights import CheckpointSource, RandomSource, rank_experts, rank_tensors
from tests.checkpoints import load_tensors, make_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "fp8", fp8=(16, 16), shards=2)


@pytest.fixture(scope="module")
def checkpoint(folder):
    return open_checkpoint(Config(model=Model(path=str(folder)), parallel=Parallel(world_size=4, device="cpu")))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_own_contiguous_blocks_of_experts(checkpoint, world_size):
    architecture = checkpoint.architecture
    owned = [expert for rank in range(world_size) for expert in rank_experts(architecture, rank, world_size)]
    assert owned == list(range(architecture.num_experts))
    loads = [rank_tensors(architecture, rank, world_size) for rank in range(world_size)]
    everything = dict(expected_tensors(architecture))
    assert {name: shape for load in loads for name, shape in load.items()} == everything
    shared = set.intersection(*(set(load) for load in loads))
    assert all(name in shared for name in everything if ".experts." not in name)
    if world_size > 1:
        assert not any(".experts." in name for name in shared)


def test_a_source_fills_from_disk_and_reports(checkpoint, folder):
    names = list(rank_tensors(checkpoint.architecture, 1, 4))
    reports, on_disk = [], load_tensors(folder)
    with CheckpointSource(checkpoint, names, CPU, lambda *report: reports.append(report)) as source:
        for name in names:
            out = torch.empty(checkpoint.tensors[name].shape)
            source.fill(out, name)
            if name + "_scale_inv" in on_disk:
                real = dequantise_blocks(on_disk[name], on_disk[name + "_scale_inv"], (16, 16), torch.float32)
                assert torch.equal(out, real)
            else:
                assert torch.equal(out, on_disk[name])
    total = sum(on_disk[name].nbytes for name in names)
    assert reports[0] == ("loading weights", 0, total) and reports[-1] == ("loading weights", total, total)
    done = [report[1] for report in reports]
    assert done == sorted(set(done)) and len(done) > 20


def test_a_source_converts_to_the_compute_dtype(checkpoint, folder):
    name = "model.norm.weight"
    out = torch.empty(64, dtype=torch.bfloat16)
    with CheckpointSource(checkpoint, [name], CPU, lambda *_: None) as source:
        source.fill(out, name)
    assert torch.equal(out, load_tensors(folder)[name].bfloat16())


def test_dequantised_blocks_with_partial_edges():
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 0.5]])
    real = dequantise_blocks(weight, scale, (2, 2), torch.float32)
    assert real.tolist() == [[1.0, 2.0, 30.0], [4.0, 5.0, 60.0], [700.0, 800.0, 4.5]]
    assert dequantise_blocks(weight, scale, (2, 2), torch.bfloat16).dtype == torch.bfloat16


def filled(source, name, shape):
    out = torch.empty(shape)
    source.fill(out, name)
    return out


def test_random_weights_follow_from_the_name_alone():
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(4)]
    first, second = (RandomSource(1, torch.float32, CPU, lambda *_: None) for _ in range(2))
    forward = {name: filled(first, name, (40, 50)) for name in names}
    backward = {name: filled(second, name, (40, 50)) for name in reversed(names)}
    assert all(torch.equal(forward[name], backward[name]) for name in names)
    assert len({tensor[0, 0].item() for tensor in forward.values()}) == len(names)
    whole = torch.stack(list(forward.values()))
    assert abs(whole.mean()) < 1e-3 and abs(whole.std() - 0.02) < 1e-3


def test_random_norms_are_one_and_the_router_bias_is_zero():
    source = RandomSource(1, torch.float32, CPU, lambda *_: None)
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.self_attn.kv_a_layernorm"):
        assert filled(source, f"{norm}.weight", (5,)).tolist() == [1.0] * 5
    assert filled(source, "model.layers.3.mlp.gate.e_score_correction_bias", (4,)).tolist() == [0.0] * 4
