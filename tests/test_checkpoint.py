"""What is refused about a model folder before anything is loaded, and how the message helps."""

import json
import math
import os
import pathlib
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from nmoe.architecture import expected_tensors
from nmoe.checkpoint import eos_ids, open_checkpoint, tokenizer_file
from nmoe.config import Config, Model, Parallel
from nmoe.config_json import read_architecture
from nmoe.errors import CheckpointError
from tests.checkpoints import load_tensors, make_checkpoint, save_shards

EMBEDDING = "model.embed_tokens.weight"
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A single-file, a sharded and an FP8 checkpoint, never changed."""
    root = tmp_path_factory.mktemp("originals")
    return {
        "single": make_checkpoint(root / "single"),
        "sharded": make_checkpoint(root / "sharded", shards=3),
        "fp8": make_checkpoint(root / "fp8", fp8=True),
    }


@pytest.fixture
def single(originals, tmp_path):
    return pathlib.Path(shutil.copytree(originals["single"], tmp_path / "single"))


@pytest.fixture
def sharded(originals, tmp_path):
    return pathlib.Path(shutil.copytree(originals["sharded"], tmp_path / "sharded"))


@pytest.fixture
def fp8(originals, tmp_path):
    return pathlib.Path(shutil.copytree(originals["fp8"], tmp_path / "fp8"))


def opened(folder, world_size=1, device="cpu", **model):
    return open_checkpoint(
        Config(model=Model(path=str(folder), **model), parallel=Parallel(world_size=world_size, device=device))
    )


def refused(folder, *words, **options):
    """The message of the refusal, which must hold every word."""
    with pytest.raises(CheckpointError) as caught:
        opened(folder, **options)
    for word in words:
        assert word in str(caught.value)


def edit(folder, **changes):
    """Change keys of config.json; `...` removes one."""
    document = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is ...:
            del document[key]
        else:
            document[key] = value
    (folder / "config.json").write_text(json.dumps(document))


def change_tensors(folder, change):
    tensors = load_tensors(folder)
    change(tensors)
    save_shards(folder, tensors, 1)


def test_a_whole_checkpoint_is_opened(single, sharded):
    checkpoint = opened(single)
    assert (checkpoint.dtype, checkpoint.max_seq_len) == ("float32", 1024)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == dict(
        expected_tensors(checkpoint.architecture)
    )
    assert opened(sharded).tensors.keys() == checkpoint.tensors.keys()
    assert opened(single, dtype="bfloat16", max_seq_len=100).max_seq_len == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_say_their_dtype_if_config_json_does_not(single, dtype):
    edit(single, dtype=...)
    save_shards(single, {name: tensor.to(dtype) for name, tensor in load_tensors(single).items()}, 1)
    assert f"torch.{opened(single).dtype}" == str(dtype)
    assert opened(single, weights="random").dtype == "float32"
    edit(single, torch_dtype="bfloat16")
    assert opened(single).dtype == opened(single, weights="random").dtype == "bfloat16"


def test_memory_follows_from_the_architecture(single):
    architecture = opened(single).architecture
    held = sum(tensor.numel() for tensor in load_tensors(single).values())
    assert architecture.num_params() == held
    experts = sum(t.numel() for name, t in load_tensors(single).items() if ".experts." in name)
    assert architecture.num_params(4) == held - experts * 3 // 4
    assert architecture.weight_bytes("bfloat16") == 2 * held
    assert architecture.kv_bytes_per_token("float32") == 3 * (32 + 16) * 4


def test_deepseek_v3_has_671_billion_parameters(single):
    edit(single, **REAL)
    architecture = read_architecture(single)
    assert math.isclose(architecture.num_params(), 671e9, rel_tol=2e-3)
    assert architecture.kv_bytes_per_token("bfloat16") == 61 * 576 * 2


REAL = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
}


def test_the_folder_is_missing(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder", "[model] path")


def test_config_json_is_missing(single):
    (single / "config.json").unlink()
    refused(single, "config.json", "No such file")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("\xff", "not valid"),
        ("[" * 100_000, "not valid"),
        (r'{"model_type": "\ud800"}', "surrogates not allowed"),
        (r'{"model_type": "\ud83d\ude00"}', "is not supported"),
    ],
)
def test_config_json_is_damaged(single, text, word):
    (single / "config.json").write_bytes(text.encode("latin-1"))
    refused(single, "config.json", word)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, ["'hidden_size' is missing"]),
        ({"hidden_size": "big"}, ["hidden_size = 'big'", "int"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0", "at least 1"]),
        ({"num_hidden_layers": 10**7}, ["num_hidden_layers = 10000000", "at most 1000"]),
        ({"n_routed_experts": 10**8}, ["n_routed_experts = 100000000", "at most 4096"]),
        ({"num_hidden_layers": 1000, "n_routed_experts": 4096}, ["1000", "n_routed_experts = 4096", "in all"]),
        ({"max_position_embeddings": 10**15}, ["max_position_embeddings = 1000000000000000", "at most 16777216"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps = -1.0", "at least 0"]),
        ({"routed_scaling_factor": math.inf}, ["routed_scaling_factor = inf", "a number"]),
        ({"routed_scaling_factor": math.nan}, ["routed_scaling_factor = nan", "a number"]),
        ({"model_type": "llama"}, ["'llama' is not supported", "deepseek_v3"]),
        ({"model_type": ...}, ["'model_type' is missing"]),
        ({"model_type": "deepseek_v32"}, ["deepseek_v32", "sparse attention", "does not exist yet"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"scoring_func": "softmax"}, ["scoring_func = 'softmax'", "'sigmoid'"]),
        ({"topk_method": "greedy"}, ["topk_method = 'greedy'", "'noaux_tc'"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"moe_layer_freq": 2}, ["moe_layer_freq = 2"]),
        ({"num_key_value_heads": 2}, ["num_key_value_heads = 2"]),
        ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim = 15", "even"]),
        ({"n_group": 3}, ["n_routed_experts = 8", "n_group = 3"]),
        ({"topk_group": 5}, ["topk_group = 5", "n_group = 4"]),
        ({"num_experts_per_tok": 5}, ["num_experts_per_tok = 5", "4 experts"]),
        ({"dtype": "int8"}, ["dtype = 'int8'"]),
        ({"dtype": "float16"}, ["float16", "[model] dtype"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, ["'llama3' is not supported", "'yarn'"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["'factor' is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear' is not supported"]),
        ({"rope_parameters": {"rope_theta": -1.0}}, ["rope_theta = -1.0", "above 0"]),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, ["rope_theta = 1.0", "above 1"]),
        ({"rope_parameters": YARN | {"factor": 0}}, ["factor = 0", "above 0"]),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": -64}}, ["= -64", "above 0"]),
        ({"rope_parameters": YARN | {"beta_fast": -1}}, ["beta_fast = -1", "above 0"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["'awq' is not supported", "'fp8'"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["'weight_block_size' is missing", "in blocks"]),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            ["'weight_block_size' is missing", "in blocks"],
        ),
    ],
)
def test_an_architecture_that_cannot_be_served(single, changes, words):
    edit(single, **changes)
    refused(single, "config.json", *words)


def test_absent_keys_take_the_defaults_of_transformers(single):
    for key in ("n_shared_experts", "norm_topk_prob", "rope_interleave", "rope_parameters", "tie_word_embeddings"):
        edit(single, **{key: ...})
    edit(single, q_lora_rank=None, dtype=...)
    architecture = read_architecture(single)
    assert (architecture.rope.theta, architecture.rope.interleave, architecture.rope.yarn) == (10000.0, True, None)
    assert architecture.q_lora_rank is None and architecture.norm_topk_prob and architecture.dtype is None


def test_experts_must_divide_among_the_workers(originals, single):
    assert opened(originals["single"], world_size=8).architecture.num_experts == 8
    edit(single, n_routed_experts=12)
    refused(single, "n_routed_experts = 12", "world_size = 8", world_size=8)


def test_limits_of_the_config(single):
    refused(single, "max_seq_len = 2000", "max_position_embeddings = 1024", max_seq_len=2000)
    refused(single, "max_seq_len = 1", "2 tokens", "raise it", max_seq_len=1)
    refused(single, "attention_type = 'dsa'", "does not exist yet", attention_type="dsa")


def test_a_shard_is_missing(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "1 of 3 shards", "model-00002-of-00003.safetensors", "download")


@pytest.mark.parametrize(("name", "shown"), [("x" * 5000, "x" * 200 + ";"), ("\x85", r"\x85")])
def test_the_index_names_what_cannot_be_a_file(sharded, name, shown):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    refused(sharded, "1 of 1 shards", shown, "download")


def test_the_index_is_missing(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "shards but no", INDEX)


def test_the_index_has_no_map(sharded):
    (sharded / INDEX).write_text("{}")
    refused(sharded, INDEX, "weight_map")


def test_the_index_names_a_tensor_that_its_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "lacks lm_head.weight")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_shard_is_truncated(sharded, keep):
    file = sharded / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    refused(sharded, file.name, "truncated")


def test_a_header_is_damaged(single):
    file = single / "model.safetensors"
    header = b'{"x": {"dtype": "F32"}}'
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(single, file.name, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [header],
        lambda header: header | {EMBEDDING: 5},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"dtype": [1]}},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"dtype": "BF16"}},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"shape": [512.0, 64.0]}},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"data_offsets": ["a", "b"]}},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"data_offsets": [-8, 8]}},
        lambda header: header | {EMBEDDING: header[EMBEDDING] | {"data_offsets": [0, 8]}},
    ],
)
def test_a_header_says_what_cannot_be(single, change):
    file = single / "model.safetensors"
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps(change(json.loads(data[8:end]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    refused(single, file.name, "header is damaged", "download it again")


def test_files_that_cannot_be_read(single, sharded, forbid_reading):
    refused(single / ("x" * 300), "cannot be read", "name too long", "[model] path")
    forbid_reading(".safetensors", "open")
    refused(sharded, "model-00001-of-00003.safetensors", "Permission denied", "permissions")


def test_git_lfs_placeholders(single):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (single / "model.safetensors").write_bytes(pointer)
    refused(single, "model.safetensors", "git lfs pull")
    (single / "config.json").write_bytes(pointer)
    refused(single, "config.json", "git lfs pull")


def test_there_are_no_weights(single):
    file = single / "model.safetensors"
    file.rename(single / "pytorch_model.bin")
    refused(single, "pickles", "save_pretrained")
    (single / "pytorch_model.bin").unlink()
    refused(single, "neither", "weights = 'random'")
    refused(single / "config.json", "single file", "weights = 'random'")
    assert opened(single / "config.json", weights="random").tensors == {}


def test_a_tensor_is_missing(single):
    change_tensors(single, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    refused(single, "model.layers.1.mlp.experts.3.up_proj.weight is not in the checkpoint")


def test_a_tensor_has_another_shape(single):
    edit(single, moe_intermediate_size=40)
    refused(single, "model.layers.1.mlp.experts.0.gate_proj.weight", "[32, 64]", "[40, 64]")


def test_a_tensor_has_another_type(single):
    change_tensors(single, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    refused(single, "model.norm.weight is I32", "convert it to one of F32")


def test_the_experts_of_a_layer_are_one_tensor(single):
    """As transformers writes them with save_original_format = False."""

    def fuse(tensors):
        experts = [name for name in tensors if ".experts." in name]
        names = dict.fromkeys(name.partition(".experts.")[0] + ".experts.gate_up_proj" for name in experts)
        for name in experts:
            del tensors[name]
        tensors.update({name: torch.zeros(8, 64, 64) for name in names})

    change_tensors(single, fuse)
    refused(single, "model.layers.1.mlp.experts.gate_up_proj holds the experts", "save_original_format = True")


def test_a_file_that_the_index_names_beside_others_is_not_the_whole(single):
    tensors = load_tensors(single)
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    change_tensors(single, lambda held: held.pop("lm_head.weight"))
    save_file(head, single / "head.safetensors")
    files = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(head, "head.safetensors")
    (single / INDEX).write_text(json.dumps({"weight_map": files}))
    assert len({info.file for info in opened(single).tensors.values()}) == 2


def test_weights_that_were_expanded_from_fp8_beside_their_old_config_json(single):
    """As DeepSeek's own converter to bfloat16 leaves them."""
    edit(single, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for device in ("cpu", "cuda"):
        assert opened(single, device=device).architecture.quant_block is None
    assert opened(single, weights="random").architecture.quant_block == (128, 128)


def test_a_tensor_is_unknown(single):
    change_tensors(single, lambda tensors: tensors.update({"model.layers.0.self_attn.q_a_proj.bias": torch.ones(24)}))
    refused(single, "model.layers.0.self_attn.q_a_proj.bias is in the checkpoint, but not part of the model")


@pytest.mark.parametrize("count", [0, 1, ...])
def test_more_layers_than_config_json_says(single, count):
    """The last one is no layer for predicting several tokens, although config.json counts one such layer by default."""
    edit(single, num_hidden_layers=2, num_nextn_predict_layers=0)
    edit(single, num_nextn_predict_layers=count)
    refused(single, "model.layers.2.", "more tensors are in the checkpoint")


def test_harmless_tensors_are_tolerated(single):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(single, lambda tensors: tensors.update(extra))
    assert extra.keys().isdisjoint(opened(single).tensors)


def test_a_head_beside_tied_embeddings_is_part_of_the_model(single):
    """It is loaded, so it counts in what memory the doctor finds, and its shape is checked."""
    untied = opened(single).architecture.num_params()
    edit(single, tie_word_embeddings=True)
    checkpoint = opened(single)
    assert "lm_head.weight" in checkpoint.tensors and checkpoint.architecture.num_params() == untied
    change_tensors(single, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"][:5].clone()}))
    refused(single, "lm_head.weight has shape [5, ")


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bool, torch.uint8])
def test_fp8_scales_of_another_type(fp8, dtype):
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    change_tensors(fp8, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(fp8, f"{name} is ", "not supported", "F32")


def test_fp8_needs_its_scales_and_its_block(fp8):
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    edit(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
    refused(fp8, "_scale_inv has shape [1, 1]", "weight_block_size")
    edit(fp8, quantization_config=...)
    refused(fp8, "is FP8", "quantization_config")
    edit(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    change_tensors(fp8, lambda tensors: tensors.pop(name))
    refused(fp8, name, "are not there")


def test_a_gpu_takes_an_fp8_checkpoint_that_is_quantised_throughout(fp8):
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert opened(fp8, device="cuda").tensors[name].dtype == "F8_E4M3"
    change_tensors(fp8, lambda tensors: tensors.update({name: tensors[name].bfloat16()}))
    refused(fp8, f"{name} is BF16", "all such weights in FP8 or none", "device = 'cpu'", device="cuda")
    assert opened(fp8).tensors[name].dtype == "BF16"


def test_an_end_that_is_no_token_of_the_model(single):
    for wrong in (512, -1, True, 1 << 70, [1, 512]):
        (single / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        refused(single, "generation_config.json", "eos_token_id = ")
    (single / "generation_config.json").unlink()
    edit(single, eos_token_id=512)
    refused(single, "config.json: eos_token_id = 512", "vocab_size is 512")
    edit(single, vocab_size=513)
    assert eos_ids(single, read_architecture(single)) == (512,)


def test_the_end_of_an_answer(single):
    architecture = read_architecture(single)
    assert eos_ids(single, architecture) == (1,)
    (single / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert eos_ids(single, architecture) == eos_ids(single / "config.json", architecture) == (5, 6)
    (single / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CheckpointError, match="eos_token_id = 'x'"):
        eos_ids(single, architecture)
    (single / "generation_config.json").unlink()
    edit(single, eos_token_id=[7, 8])
    assert eos_ids(single, read_architecture(single)) == (7, 8)


@pytest.mark.parametrize("target", ["../blobs/5f70bf18", "generation_config.json"])
def test_a_link_to_nothing_is_not_an_absent_file(single, target):
    """Hugging Face's cache holds links: without what they point to, the model would end its answers elsewhere."""
    (single / "generation_config.json").unlink()
    (single / "generation_config.json").symlink_to(target)
    refused(single, f"generation_config.json: is a link to {target}", "copy the file itself")
    (single / "generation_config.json").unlink()
    (single / "tokenizer.json").rename(single / "elsewhere")
    (single / "tokenizer.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link"):
        tokenizer_file(single)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00002-of-00003.safetensors", INDEX])
def test_what_is_no_regular_file_is_named(sharded, name):
    """A named pipe would be waited for without end, a device read without end."""
    (sharded / name).unlink()
    os.mkfifo(sharded / name)
    refused(sharded, f"{name}: is not a regular file but a named pipe; copy the file itself")
    (sharded / name).unlink()
    (sharded / name).mkdir()
    refused(sharded, f"{name}: is not a regular file but a folder")
    (sharded / name).rmdir()
    (sharded / name).symlink_to("/dev/null")
    refused(sharded, f"{name}: is not a regular file but a device")


@pytest.mark.timeout(20)
def test_the_single_file_and_the_tokenizer_are_regular_files(single):
    for name in ("model.safetensors", "tokenizer.json"):
        (single / name).unlink()
        os.mkfifo(single / name)
    refused(single, "model.safetensors: is not a regular file but a named pipe")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a regular file but a named pipe"):
        tokenizer_file(single)


@pytest.mark.parametrize(
    ("found", "word"),
    [("tiktoken.model", "tiktoken"), ("tokenizer.model", "sentencepiece"), ("vocab.json", "vocabulary")],
)
def test_a_tokenizer_of_another_kind(single, found, word):
    assert tokenizer_file(single) == single / "tokenizer.json"
    (single / "tokenizer.json").rename(single / found)
    with pytest.raises(CheckpointError) as caught:
        tokenizer_file(single)
    assert found in str(caught.value) and word in str(caught.value) and "save_pretrained" in str(caught.value)


def test_no_tokenizer(single):
    (single / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        tokenizer_file(single)
    (single / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        tokenizer_file(single)
