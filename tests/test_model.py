"""The whole model from a checkpoint on disk against transformers' DeepseekV3ForCausalLM, in every shape it may have."""

import json
import logging

import pytest
import torch

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Model, Parallel
from nmoe.config_json import read_architecture
from nmoe.errors import LaunchError
from nmoe.profiles import Numerics
from nmoe.worker.model import load_model
from tests.checkpoints import TINY, load_tensors, make_checkpoint, save_shards
from tests.stepping import Stepper

FAST = Numerics.FAST
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
VARIANTS = {
    "default": {},
    "full query projection": {"q_lora_rank": None},
    "no dense layer": {"first_k_dense_replace": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "two shared experts": {"n_shared_experts": 2, "first_k_dense_replace": 2},
    "no shared expert": {"n_shared_experts": 0},
    "one group": {"n_group": 1, "topk_group": 1},
    "one group of four": {"topk_group": 1, "num_experts_per_tok": 2},
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 0.7},
    "yarn": {"rope_parameters": YARN},
    "yarn, old spelling": {
        "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if not k.startswith("rope")}},
        "rope_theta": 5000.0,
    },
    "halves on disk": {"rope_interleave": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "sharded": {"shards": 4},
    "another epsilon": {"rms_norm_eps": 0.05},
    "odd dimensions": {
        "hidden_size": 54,
        "num_attention_heads": 3,
        "q_lora_rank": 13,
        "kv_lora_rank": 29,
        "qk_nope_head_dim": 7,
        "qk_rope_head_dim": 6,
        "v_head_dim": 9,
        "intermediate_size": 37,
        "moe_intermediate_size": 11,
        "vocab_size": 301,
    },
}
PROMPT = torch.randint(0, 300, (90,), generator=torch.Generator().manual_seed(1))


def config_of(folder, **model):
    return Config(model=Model(path=str(folder), **model), parallel=Parallel(world_size=1, device="cpu"))


def ours(folder, **model):
    config = config_of(folder, **model)
    return load_model(open_checkpoint(config), config, 0, torch.device("cpu"), lambda *_: None)


def theirs(folder, tokens):
    """transformers' logits of a prompt, float32 [T, V]."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging as theirs_logging

    theirs_logging.disable_progress_bar()
    model = DeepseekV3ForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(tokens[None]).logits[0].float()


def at_once(model, tokens):
    """Logits of a prompt prefilled in one step."""
    stepper = Stepper(model.architecture, dtype=model.dtype)
    sequence = stepper.add(tokens)
    return model.logits(model.forward(stepper.batch([(sequence, len(tokens))]), stepper.cache, FAST), FAST)


def close(actual, expected):
    """Equal up to the rounding of float32: logits here are as large as 10."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers' of no shared expert
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_are_those_of_transformers(variant, tmp_path):
    folder = make_checkpoint(tmp_path, **VARIANTS[variant])
    expected = theirs(folder, PROMPT)
    model = ours(folder)
    close(at_once(model, PROMPT), expected)

    # In chunks, then token by token beside another request.
    stepper = Stepper(model.architecture)
    sequence, other = stepper.add(PROMPT), stepper.add(PROMPT.flip(0))
    steps = [([(sequence, 33)], 0), ([(sequence, 2), (other, 20)], 0), ([(other, 1), (sequence, 50)], 1)]
    steps += [([(sequence, 1), (other, 1)], 2)] * 5
    outs = []
    for rows, decodes in steps:
        logits = model.logits(model.forward(stepper.batch(rows, decodes=decodes), stepper.cache, FAST), FAST)
        parts = zip(rows, logits.split([count for _, count in rows]), strict=True)
        outs += [part for (row, _), part in parts if row is sequence]
    close(torch.cat(outs), expected)


@pytest.mark.parametrize("equal", [False, True])
def test_a_head_that_is_not_the_embedding_to_which_it_is_said_to_be_tied(tmp_path, equal):
    folder = make_checkpoint(tmp_path)
    if equal:
        tensors = load_tensors(folder)
        save_shards(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))


@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 64}])
def test_yarn_whose_positions_are_not_among_its_parameters(tmp_path, beside):
    """As transformers itself does not write it: then those beside it count, or else all that the model has."""
    folder = make_checkpoint(tmp_path, rope_parameters=YARN)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]["original_max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | beside))
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_whose_positions_are_said_twice(tmp_path, spelling):
    """Those beside its parameters count."""
    folder = make_checkpoint(tmp_path, rope_parameters=YARN)
    config = json.loads((folder / "config.json").read_text())
    config[spelling] = config.pop("rope_parameters")
    config["original_max_position_embeddings"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))


def test_bfloat16(tmp_path):
    """As near to the float32 model as transformers' bfloat16 model is."""
    folder = make_checkpoint(tmp_path / "narrow", dtype=torch.bfloat16)
    wide = make_checkpoint(tmp_path / "wide")
    save_shards(wide, {name: tensor.float() for name, tensor in load_tensors(folder).items()}, 1)
    exact = at_once(ours(wide), PROMPT)
    model = ours(folder)
    assert model.dtype == torch.bfloat16
    error, reference = (at_once(model, PROMPT) - exact).abs(), (theirs(folder, PROMPT) - exact).abs()
    assert 0 < error.mean() <= 1.1 * reference.mean()
    assert ours(folder, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("block", [(128, 128), (16, 24)])
def test_fp8_is_its_dequantised_weights(block, tmp_path):
    sizes = {"hidden_size": 160, "intermediate_size": 200, "moe_intermediate_size": 40}
    folder = make_checkpoint(tmp_path / "fp8", fp8=block, **sizes)
    real = make_checkpoint(tmp_path / "real", **sizes)
    tensors = load_tensors(folder)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")].float()
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                rows = slice(row * block[0], (row + 1) * block[0])
                weight[rows, column * block[1] : (column + 1) * block[1]] *= scale[row, column]
        tensors[name.removesuffix("_scale_inv")] = weight
    save_shards(real, tensors, 1)
    assert torch.equal(at_once(ours(folder), PROMPT), at_once(ours(real), PROMPT))
    close(at_once(ours(folder), PROMPT), theirs(real, PROMPT))


def test_the_mtp_layer_is_skipped_with_a_line_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        with_mtp = ours(make_checkpoint(tmp_path / "mtp", mtp=True))
    assert "skipping the multi-token-prediction layer (model.layers.3" in caplog.text
    assert torch.equal(at_once(with_mtp, PROMPT), at_once(ours(make_checkpoint(tmp_path / "plain")), PROMPT))


@pytest.mark.parametrize("count", [0, None])
def test_an_mtp_layer_that_config_json_does_not_count_is_skipped(tmp_path, count):
    folder = make_checkpoint(tmp_path, mtp=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": count}))
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))


def test_a_single_file_comes_before_an_index(tmp_path, caplog):
    """As in transformers; here the shards are another model's, of which one is missing."""
    folder = make_checkpoint(tmp_path)
    other = {name: tensor * 1.5 for name, tensor in load_tensors(folder).items()}
    save_shards(folder, other, 3)
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))
    assert "has both model.safetensors and model.safetensors.index.json" in caplog.text
    (folder / "model-00002-of-00003.safetensors").unlink()
    ours(folder)


def test_both_rope_spellings_read_the_same(tmp_path):
    folder = make_checkpoint(tmp_path, rope_parameters=YARN)
    document = json.loads((folder / "config.json").read_text())
    new = read_architecture(folder)
    parameters = document.pop("rope_parameters")
    document["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    document["rope_scaling"] = parameters
    (folder / "config.json").write_text(json.dumps(document))
    assert read_architecture(folder) == new
    close(at_once(ours(folder), PROMPT), theirs(folder, PROMPT))


def test_a_step_without_rows_computes_nothing(tmp_path):
    """An idle rank still takes part in the step."""
    model = ours(make_checkpoint(tmp_path))
    stepper = Stepper(model.architecture)
    hidden = model.forward(stepper.batch([]), stepper.cache, FAST)
    assert hidden.shape == (0, TINY["hidden_size"]) and model.logits(hidden, FAST).shape == (0, TINY["vocab_size"])
    assert stepper.cache.rows_LNSC.isnan().all()


def test_random_weights_need_only_a_config(tmp_path):
    folder = make_checkpoint(tmp_path)
    file = folder.rename(tmp_path.with_name("elsewhere")) / "config.json"
    reports = []
    config = config_of(file, weights="random")
    model = load_model(open_checkpoint(config), config, 0, torch.device("cpu"), lambda *report: reports.append(report))
    logits = at_once(model, PROMPT)
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    total = model.architecture.weight_bytes("float32")
    assert reports[0] == ("making random weights", 0, total) and reports[-1] == ("making random weights", total, total)


def test_more_than_one_rank_needs_memory_between_them(tmp_path):
    config = Config(model=Model(path=str(make_checkpoint(tmp_path))), parallel=Parallel(world_size=2, device="cpu"))
    with pytest.raises(LaunchError, match="world_size = 2"):
        load_model(open_checkpoint(config), config, 0, torch.device("cpu"), lambda *_: None)
