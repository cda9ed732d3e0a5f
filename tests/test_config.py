"""The TOML file: every problem is found at once and named; the set of keys is frozen; the shipped files load."""

import pathlib
import re

import msgspec
import pytest
import tomli

from nmoe.config import Benchmark, Config, Engine, Model, Parallel, Server, Trace, load_config
from nmoe.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "configs").glob("*.toml")), ROOT / "nmoe" / "demo" / "demo.toml"]

# A new key needs a reason, a test of what it does, and a line in README.md, configs/production.toml and here.
KNOBS = {
    "model": {"path", "name", "weights", "dtype", "max_seq_len", "attention_type"},
    "parallel": {"world_size", "device"},
    "engine": {
        "num_pages",
        "page_size",
        "max_batch_size",
        "max_prefill_tokens",
        "moe_expected_m",
        "enable_cuda_graph",
        "enable_overlap",
        "enable_prefix_cache",
        "gpu_memory_utilization",
        "cache_dir",
    },
    "server": {
        "host",
        "port",
        "processes",
        "api_keys",
        "max_queue",
        "max_body_mb",
        "request_timeout_s",
        "drain_timeout_s",
    },
    "trace": {"record"},
    "benchmark": {
        "mode",
        "decode_batch_size",
        "decode_ctx_len",
        "output_len",
        "prompt_len",
        "num_prompts",
        "seed",
    },
}


def load(folder: pathlib.Path, text: str) -> Config:
    file = folder / "config.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def problems(folder: pathlib.Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return caught.value.problems


def keys(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)}


def test_the_set_of_knobs_is_frozen():
    sections = {"model": Model, "parallel": Parallel, "engine": Engine, "server": Server, "trace": Trace}
    assert keys(Config) == set(KNOBS)
    assert {name: keys(kind) for name, kind in {**sections, "benchmark": Benchmark}.items()} == KNOBS


def test_defaults(tmp_path):
    config = load(tmp_path, '[model]\npath = "m"')
    assert config.model == Model(path=str(tmp_path / "m"))
    assert config.parallel == Parallel(world_size=8, device="cuda")
    engine = config.engine
    assert (engine.num_pages, engine.page_size, engine.max_batch_size, engine.max_prefill_tokens) == (0, 64, 256, 16384)
    assert (engine.enable_cuda_graph, engine.enable_overlap, engine.enable_prefix_cache) == (True, True, True)
    assert engine.cache_dir == str(pathlib.Path("~/.cache/nmoe").expanduser())
    assert config.server == Server()
    assert (config.server.host, config.server.port, config.server.api_keys) == ("127.0.0.1", 8000, ())
    assert config.trace.record == ""


def test_served_id_is_the_folders_unless_given(tmp_path):
    assert load(tmp_path, '[model]\npath = "some/DeepSeek-V2.5"').model_name == "DeepSeek-V2.5"
    assert load(tmp_path, '[model]\npath = "models/moonlight.json"').model_name == "moonlight"
    assert load(tmp_path, '[model]\npath = "m"\nname = "mine"').model_name == "mine"


def test_paths_are_relative_to_the_files_folder(tmp_path):
    config = load(tmp_path, '[model]\npath = "../m"\n[trace]\nrecord = "t.jsonl"\n[engine]\ncache_dir = "/c"')
    assert config.model.path == str(tmp_path.parent / "m")
    assert config.trace.record == str(tmp_path / "t.jsonl")
    assert config.engine.cache_dir == "/c"


def test_an_unknown_key_is_named_with_the_nearest_one(tmp_path):
    (problem,) = problems(tmp_path, '[model]\npath = "m"\n[engine]\nmax_batchsize = 4')
    assert problem.startswith("[engine] max_batchsize: unknown key") and "max_batch_size" in problem


def test_an_unknown_key_near_none_gets_the_list(tmp_path):
    (problem,) = problems(tmp_path, '[model]\npath = "m"\n[parallel]\nzzz = 4')
    assert "zzz" in problem and "world_size" in problem and "device" in problem


def test_an_unknown_section_is_named_with_the_nearest_one(tmp_path):
    (problem,) = problems(tmp_path, '[model]\npath = "m"\n[servers]\nport = 1')
    assert "[servers]: unknown section" in problem and "[server]" in problem


@pytest.mark.parametrize(
    ("key", "sections"),
    [("port", "[server]"), ("max_seq_len", "[model]"), ("zzz", "[model] or [parallel] or [engine]")],
)
def test_a_key_outside_of_any_section_is_told_where_it_belongs(tmp_path, key, sections):
    (problem,) = problems(tmp_path, f'{key} = 1\n[model]\npath = "m"')
    assert problem.startswith(f"{key}: a key outside of any section; put it under {sections}")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert load(tmp_path, '\ufeff[model]\npath = "m"').model.path


def test_all_problems_are_reported_at_once(tmp_path):
    text = """
    [model]
    path = 3
    weights = "none"
    [parallel]
    world_size = 3
    [engine]
    pagesize = 1
    gpu_memory_utilization = 1.5
    [sever]
    """
    found = problems(tmp_path, text)
    assert len(found) == 6
    for name in ("path", "weights", "world_size", "pagesize", "gpu_memory_utilization", "[sever]"):
        assert sum(name in problem.split(":")[0] for problem in found) == 1, name


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        ("parallel", "world_size = 3", "1, 2, 4, 8"),
        ("parallel", 'device = "gpu"', "'cpu', 'cuda'"),
        ("parallel", 'world_size = "8"', "int"),
        ("engine", "num_pages = -1", ">= 0"),
        ("engine", "page_size = 0", ">= 1"),
        ("engine", "page_size = 512", "<= 256"),
        ("engine", "page_size = 1.5", "int"),
        ("engine", "max_batch_size = 0", ">= 1"),
        ("engine", "num_pages = 2147483648", "<= 2147483647"),
        ("engine", "max_prefill_tokens = 9223372036854775807", "<= 2147483647"),
        ("server", "max_queue = 99999999999999999999", "int"),
        ("engine", "moe_expected_m = 24", "16"),
        ("engine", "enable_overlap = 1", "bool"),
        ("engine", "gpu_memory_utilization = 0.0", "> 0"),
        ("model", "max_seq_len = -5", ">= 0"),
        ("server", "port = 70000", "<= 65535"),
        ("server", "processes = 0", ">= 1"),
        ("server", 'api_keys = "secret"', "array"),
        ("server", "drain_timeout_s = -1.0", ">= 0"),
        ("server", "drain_timeout_s = inf", "<= 1000000000"),
        ("server", "request_timeout_s = nan", ">= 0"),
        ("benchmark", 'mode = "both"', "'decode', 'prefill'"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(tmp_path, section, line, says):
    model = "" if section == "model" else '[model]\npath = "m"\n'
    text = f"{model}[{section}]\n{line}\n" + ('path = "m"' if section == "model" else "")
    (problem,) = problems(tmp_path, text)
    key, value = line.split(" = ")
    assert problem.startswith(f"[{section}] {key} = ") and value.strip('"') in problem
    for word in says.split(", "):
        assert word in problem, problem


def test_a_whole_number_is_a_number_of_seconds(tmp_path):
    assert load(tmp_path, '[model]\npath = "m"\n[server]\ndrain_timeout_s = 5').server.drain_timeout_s == 5.0


@pytest.mark.parametrize("keys", ['[""]', '["secret", " padded"]', r'["a\nb"]'])
def test_a_key_that_no_client_can_send_is_refused(tmp_path, keys):
    (problem,) = problems(tmp_path, f'[model]\npath = "m"\n[server]\napi_keys = {keys}')
    assert problem.startswith("[server] api_keys") and "api_keys = []" in problem


@pytest.mark.parametrize("host", ["", "a..b", r"a\u0000b", "x" * 300])
def test_what_is_no_host_is_named(tmp_path, host):
    (problem,) = problems(tmp_path, f'[model]\npath = "m"\n[server]\nhost = "{host}"')
    assert problem.startswith("[server] host = ") and "cannot be a host's name" in problem


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "fe80::1%eth0", "localhost", "höst.example"])
def test_a_host_may_be_a_name_or_an_address(tmp_path, host):
    assert load(tmp_path, f'[model]\npath = "m"\n[server]\nhost = "{host}"').server.host == host


def test_what_is_no_path_is_named(tmp_path):
    found = problems(tmp_path, '[model]\npath = "~no-such-user/m"\n[trace]\nrecord = "a\\u0000b"')
    assert [problem.split(" = ")[0] for problem in found] == ["[model] path", "[trace] record"]


def test_a_section_must_be_a_table(tmp_path):
    (problem,) = problems(tmp_path, 'engine = 5\n[model]\npath = "m"')
    assert "[engine] must be a table" in problem


def test_the_model_path_is_required(tmp_path):
    (problem,) = problems(tmp_path, "")
    assert "[model] path" in problem and "set it" in problem


def test_every_rank_needs_a_prefill_token(tmp_path):
    (problem,) = problems(tmp_path, '[model]\npath = "m"\n[engine]\nmax_prefill_tokens = 4')
    assert "max_prefill_tokens = 4" in problem and "world_size = 8" in problem


@pytest.mark.parametrize("length", [0, 2])
def test_the_cache_holds_a_prompt_and_an_answer(tmp_path, length):
    text = f'[model]\npath = "m"\nmax_seq_len = {length}\n[engine]\nnum_pages = 1\npage_size = 1'
    (problem,) = problems(tmp_path, text)
    assert "[engine] num_pages" in problem and "raise" in problem


def test_broken_toml_and_absent_files_are_config_errors(tmp_path):
    (problem,) = problems(tmp_path, "[model\n")
    assert "not valid TOML" in problem and "line 1" in problem
    with pytest.raises(ConfigError, match=r"cannot be read: No such file .*; check the path after --config"):
        load_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_in_another_encoding_is_told_which_it_needs(tmp_path, encoding):
    (tmp_path / "config.toml").write_text('[model]\npath = "modèle"', encoding=encoding)
    with pytest.raises(ConfigError, match=r"is not UTF-8.*save it as UTF-8"):
        load_config(tmp_path / "config.toml")


def test_the_message_names_the_file_and_every_problem(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, '[model]\npath = "m"\na = 1\nb = 2')
    lines = str(caught.value).splitlines()
    assert str(tmp_path / "config.toml") in lines[0] and len(lines) == 3


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_load(file):
    assert load_config(file).model.path


@pytest.mark.parametrize("name", ["production", "benchmark_lmsys"])
def test_complete_files_have_every_key(name):

    document = tomli.loads((ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8"))
    assert {section: set(table) for section, table in document.items()} == KNOBS


def test_every_key_of_the_production_file_is_explained():
    lines = (ROOT / "configs" / "production.toml").read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if " = " in line and not line.startswith("#")]
    assert len(keys) == sum(map(len, KNOBS.values()))
    assert [line for line in keys if not re.search(r" # \S.+", line)] == []


def test_the_readme_documents_every_key():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [f"[{section}] {key}" for section, table in KNOBS.items() for key in table if f"`{key}`" not in readme]
    assert missing == []
