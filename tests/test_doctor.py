"""The preflight checks: every row can fail, and says what to do when it does."""

import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import os
import pathlib
import resource
import runpy
import shlex
import shutil
import socket
import sys

import msgspec
import pytest
from rich.console import Console

from nmoe import __main__ as cli
from nmoe import doctor, gpus
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel, Server
from nmoe.errors import CheckpointError, LaunchError

DEMO = str(pathlib.Path(doctor.__file__).parent / "demo")
GIB = 1 << 30
CPU = Config(
    model=Model(path=DEMO),
    parallel=Parallel(world_size=1, device="cpu"),
    engine=Engine(num_pages=64, page_size=64, max_batch_size=1),
    server=Server(port=0, max_queue=16),
)
GPU = gpus.Gpu("H100", free=70 * GIB, total=80 * GIB, capability=(9, 0))
BLACKWELL = msgspec.structs.replace(GPU, capability=(10, 0))
EIGHT = gpus.Survey(driver="580.1", cuda=(13, 0), gpus=(GPU,) * 8)


def vary(config: Config, **sections: dict[str, object]) -> Config:
    """`config` with some keys changed."""
    changed = {name: msgspec.structs.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return msgspec.structs.replace(config, **changed)


def row(rows: list[doctor.Row], name: str) -> doctor.Row:
    (found,) = [row for row in rows if row.name == name]
    return found


@pytest.fixture
def node(monkeypatch, tmp_path):
    """A configuration for eight GPUs and the machine to go with it; tests take parts of it away."""
    monkeypatch.setattr(gpus, "survey", lambda visible, world_size: EIGHT)
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "13.0")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    engine = {"cache_dir": str(tmp_path / "not" / "yet" / "there"), "num_pages": 0}
    return vary(CPU, parallel={"world_size": 8, "device": "cuda"}, engine=engine)


def test_the_demo_passes_on_the_cpu():
    rows = doctor.checks(CPU)
    assert [row.status for row in rows] == ["ok"] * len(rows)
    names = [row.name for row in rows]
    assert names == ["model", "tokenizer", "memory", "KV capacity", "shared memory", "open files", "port"]


def test_a_node_of_gpus_passes(node):
    rows = doctor.checks(vary(node, model={"path": "configs/models/moonlight.json", "weights": "random"}))
    assert {row.status for row in rows} == {"ok"}
    names = {row.name for row in rows}
    assert {"GPUs", "kernels", "driver", "peer access", "allocator", "network interface", "kernel cache"} <= names


def test_a_model_that_the_kernels_cannot_run(node):
    found = row(doctor.checks(node), "kernels")  # the demo is too small for them
    assert found.status == "fail" and "num_attention_heads = 4: must be 16 or a multiple of 64" in found.detail


def test_every_row_that_is_not_ok_has_a_remedy(node, monkeypatch):
    monkeypatch.setattr(gpus, "survey", lambda visible, world_size: gpus.Survey(problem="no driver"))
    for config in (node, vary(node, model={"path": "/absent"}), vary(CPU, engine={"max_batch_size": 4096})):
        for row in doctor.checks(config):
            assert bool(row.remedy) == (row.status != "ok"), row


@pytest.mark.parametrize(
    ("keys", "detail", "remedy"),
    [
        ({"path": "/absent"}, "/absent: no such folder", "set [model] path"),
        ({"attention_type": "dsa"}, "sparse attention", "'auto' or 'mla'"),
        ({"max_seq_len": 1 << 30}, "max_position_embeddings", "lower it"),
    ],
)
def test_model(keys, detail, remedy):
    found = row(doctor.checks(vary(CPU, model=keys)), "model")
    assert found.status == "fail" and detail in found.detail and remedy in found.remedy


def test_a_missing_shard_fails_and_hides_the_sizes(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((pathlib.Path(DEMO) / name).read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')
    rows = doctor.checks(vary(CPU, model={"path": str(tmp_path)}))
    found = row(rows, "model")
    assert found.status == "fail" and "model-1-of-1.safetensors" in found.detail and "download" in found.remedy
    assert {"memory", "KV capacity"}.isdisjoint(row.name for row in rows)


def test_tokenizer(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(pathlib.Path(DEMO) / name)
    config = vary(CPU, model={"path": str(tmp_path)})
    assert row(doctor.checks(config), "tokenizer").status == "fail"
    (tmp_path / "tiktoken.model").touch()
    found = row(doctor.checks(config), "tokenizer")
    assert found.status == "fail" and found.detail.endswith("(a tiktoken vocabulary), but a tokenizer.json is needed")
    command = shlex.split(found.remedy.removeprefix("make one with "))
    assert command[:2] == ["python", "-c"] and len(command) == 3
    compile(command[2], "remedy", "exec")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", '{"model": {}}', "not a tokenizer of the tokenizers library"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "the chat template is not valid: line 1"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
    ],
)
def test_a_tokenizer_that_the_frontend_would_refuse(tmp_path, name, content, says):
    for each in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / each).symlink_to(pathlib.Path(DEMO) / each)
    config = vary(CPU, model={"path": str(tmp_path)})
    assert row(doctor.checks(config), "tokenizer").status == "ok"
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(content)
    found = row(doctor.checks(config), "tokenizer")
    assert found.status == "fail" and name in found.detail and says in found.detail and "again" in found.remedy


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_a_tokenizers_file_that_is_a_named_pipe(tmp_path, name):
    for each in {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} - {name}:
        (tmp_path / each).symlink_to(pathlib.Path(DEMO) / each)
    os.mkfifo(tmp_path / name)
    found = row(doctor.checks(vary(CPU, model={"path": str(tmp_path)})), "tokenizer")
    assert found.status == "fail" and f"{name}: is not a regular file" in found.detail and "copy" in found.remedy


@pytest.fixture
def forbid(monkeypatch):
    """Makes a folder one that may not be searched: those who run the tests may be allowed everything."""

    def forbid(folder):
        def refused(path, *arguments, **options):
            if folder in pathlib.Path(path).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *arguments, **options)

        real = os.stat
        monkeypatch.setattr(os, "stat", refused)
        for name, silent in (("exists", os.path.exists), ("is_file", os.path.isfile), ("is_dir", os.path.isdir)):
            monkeypatch.setattr(pathlib.Path, name, silent)  # as from Python 3.14 on

    return forbid


def test_a_checkpoint_in_a_folder_that_may_not_be_searched(tmp_path, forbid):
    path = tmp_path / "home" / "demo"
    shutil.copytree(DEMO, path)
    forbid(tmp_path / "home")
    rows = doctor.checks(vary(CPU, model={"path": str(path)}))
    assert [(found.name, found.status) for found in rows[:2]] == [("model", "fail"), ("shared memory", "ok")]
    assert str(path) in rows[0].detail and "Permission denied" in rows[0].detail and "permissions" in rows[0].remedy


def test_a_checkpoint_folder_that_may_not_be_searched(tmp_path, forbid):
    path = tmp_path / "demo"
    shutil.copytree(DEMO, path)
    forbid(path)
    rows = doctor.checks(vary(CPU, model={"path": str(path)}))
    for name in ("model", "tokenizer"):
        found = row(rows, name)
        assert found.status == "fail" and "Permission denied" in found.detail and "permissions" in found.remedy


def test_names_that_are_too_long(tmp_path):
    long = str(tmp_path / ("x" * 300))
    rows = doctor.checks(vary(CPU, model={"path": long}, trace={"record": long}))
    assert row(rows, "model").status == row(rows, "trace").status == "fail"


def test_a_trace_that_cannot_be_written(tmp_path):
    for record in (tmp_path, tmp_path / "no" / "trace.jsonl"):
        found = row(doctor.checks(vary(CPU, trace={"record": str(record)})), "trace")
        assert found.status == "fail" and str(record) in found.detail and "[trace] record" in found.remedy
    assert row(doctor.checks(vary(CPU, trace={"record": str(tmp_path / "trace.jsonl")})), "trace").status == "ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "config.json"])
def test_random_weights_need_no_tokenizer(tmp_path, path):
    (tmp_path / "config.json").symlink_to(pathlib.Path(DEMO) / "config.json")
    config = vary(CPU, model={"path": str(tmp_path / path), "weights": "random"})
    rows = doctor.checks(config)
    assert row(rows, "model").detail.endswith("random weights")
    assert "tokenizer" not in [row.name for row in rows]


def facts(config: Config, **changes: object) -> doctor.Facts:
    return dataclasses.replace(doctor.Facts(config, open_checkpoint(config), None, 8 * GIB), **changes)


def check(function: doctor.Check, given: doctor.Facts) -> doctor.Row:
    found = function(given)
    assert found is not None
    return found


def test_memory_that_cannot_hold_the_weights():
    found = check(doctor._memory, facts(CPU, ram_free=1 << 20))
    assert found.status == "fail" and "world_size" in found.remedy


def test_memory_that_cannot_hold_the_cache_says_how_many_pages_fit():
    config = vary(CPU, engine={"num_pages": 1 << 30})
    found = check(doctor._memory, facts(config))
    assert found.status == "fail"
    pages = int(found.remedy.split("at most ")[1].split(",")[0])
    assert check(doctor._memory, facts(vary(config, engine={"num_pages": pages}))).status == "ok"
    assert check(doctor._memory, facts(vary(config, engine={"num_pages": pages + 1}))).status == "fail"


def test_ranks_share_the_memory_of_the_cpu():
    config = vary(CPU, parallel={"world_size": 8})
    assert check(doctor._memory, facts(config, ram_free=8 * GIB)).status == "ok"
    assert check(doctor._memory, facts(config, ram_free=8 << 20)).status == "fail"


def test_the_smallest_gpu_decides(node):
    small = msgspec.structs.replace(GPU, free=8 * GIB)  # no more than gpu_memory_utilization leaves of 80 GiB
    survey = msgspec.structs.replace(EIGHT, gpus=(GPU,) * 7 + (small,))
    assert check(doctor._memory, facts(node, gpus=EIGHT)).status == "ok"
    assert check(doctor._memory, facts(node, gpus=survey)).status == "fail"


def test_fp8_weights_stay_small_on_a_gpu(node):
    models = pathlib.Path(__file__).parent.parent / "configs" / "models"
    config = vary(node, model={"path": str(models / "deepseek-v3.json"), "weights": "random"})
    given = facts(config, gpus=EIGHT)
    assert not isinstance(given.checkpoint, CheckpointError)
    fp8, bfloat16 = 95.9e9, 3.0e9  # parameters of DeepSeek-V3 per GPU of eight; embedding, head and kv_b are not FP8
    assert doctor._weight_bytes(given, given.checkpoint) == pytest.approx(fp8 + 2 * bfloat16, rel=1e-3)


def test_capacity_below_4096_tokens_a_request_warns_with_numbers_that_cure_it():
    config = vary(CPU, engine={"max_batch_size": 3})
    found = check(doctor._capacity, facts(config))
    assert found.status == "warn" and "max_batch_size to 1" in found.remedy and "num_pages to 192" in found.remedy
    assert check(doctor._capacity, facts(vary(config, engine={"num_pages": 192}))).status == "ok"


def test_capacity_below_one_request_warns_with_numbers_that_cure_it():
    config = vary(CPU, engine={"max_batch_size": 3, "num_pages": 5})
    found = check(doctor._capacity, facts(config))
    assert found.status == "warn" and "max_batch_size to 1 and [model] max_seq_len to 320," in found.remedy
    cured = vary(config, engine={"max_batch_size": 1}, model={"max_seq_len": 320})
    assert check(doctor._capacity, facts(cured)).status == "ok"


def test_capacity_asks_no_more_than_the_longest_sequence():
    config = vary(CPU, engine={"max_batch_size": 4}, model={"max_seq_len": 1024})
    assert check(doctor._capacity, facts(config)).status == "ok"


def test_capacity_of_a_cache_that_fills_the_memory():
    config = vary(CPU, engine={"num_pages": 0, "max_batch_size": 1024})
    assert check(doctor._capacity, facts(config, ram_free=16 * GIB)).status == "ok"
    found = check(doctor._capacity, facts(config, ram_free=64 << 20))
    assert found.status == "warn" and "num_pages" not in found.remedy


@pytest.mark.parametrize(
    ("changes", "name", "detail", "remedy"),
    [
        ({"problem": "Library Not Found"}, "GPUs", "Library Not Found", "or set [parallel] device = 'cpu'"),
        ({"gpus": (GPU, GPU)}, "GPUs", "2 for world_size = 8 (H100)", "at most 2"),
        ({"gpus": (GPU,) * 7 + (BLACKWELL,)}, "kernels", "compute capability 10.0: needs 9.0", "device = 'cpu'"),
        ({"cuda": (12, 8)}, "driver", "CUDA 12.8", "CUDA 13.0"),
        ({"unlinked": ((0, 5), (5, 0))}, "peer access", "2 pair(s): 0 -> 5, 5 -> 0", "nvidia-smi topo"),
    ],
)
def test_gpus(node, monkeypatch, changes, name, detail, remedy):
    monkeypatch.setattr(gpus, "survey", lambda visible, world_size: msgspec.structs.replace(EIGHT, **changes))
    found = row(doctor.checks(node), name)
    assert found.status == "fail" and detail in found.detail and remedy in found.remedy


def test_a_torch_without_cuda(node, monkeypatch):
    monkeypatch.setattr(gpus, "torch_cuda", lambda: None)
    found = row(doctor.checks(node), "driver")
    assert found.status == "fail" and "torch" in found.remedy


def test_an_allocator_setting_that_wins_over_ours_fails_and_one_that_loses_warns(node, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert row(doctor.checks(node), "allocator").status == "warn"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    found = row(doctor.checks(node), "allocator")
    assert found.status == "fail" and found.remedy == "unset PYTORCH_ALLOC_CONF"


def test_a_network_interface_that_is_not_there(node, monkeypatch):
    monkeypatch.setattr(doctor.envs, "for_children", lambda config: {"NCCL_SOCKET_IFNAME": "absent0"})
    found = check(doctor._interface, facts(node, gpus=EIGHT))
    assert found.status == "fail" and "absent0" in found.remedy


def test_a_kernel_cache_that_cannot_be_made(node, tmp_path):
    file = tmp_path / "file"
    file.touch()
    found = row(doctor.checks(vary(node, engine={"cache_dir": str(file / "cache")})), "kernel cache")
    assert found.status == "fail" and str(file) in found.detail and "cache_dir" in found.remedy


def test_a_full_disk_under_the_kernel_cache_warns(node, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 << 20}))
    found = check(doctor._kernel_cache, facts(node, gpus=EIGHT))
    assert found.status == "warn" and "10.0 MiB" in found.detail


def test_a_small_dev_shm_fails(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10 << 20}))
    found = check(doctor._shared_memory, facts(CPU))
    assert found.status == "fail" and "--shm-size" in found.remedy


@pytest.mark.parametrize(("limit", "status"), [(64, "fail"), (1024, "warn"), (8192, "ok"), (-1, "ok")])
def test_open_files(monkeypatch, limit, status):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    found = check(doctor._open_files, facts(vary(CPU, server={"max_queue": 4096})))
    assert found.status == status
    assert ("ulimit -n 4225" in found.remedy) == (status != "ok")


def test_a_port_in_use_fails():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = vary(CPU, server={"port": taken.getsockname()[1]})
        found = row(doctor.checks(config), "port")
    assert found.status == "fail" and str(config.server.port) in found.detail and "[server] port" in found.remedy
    assert row(doctor.checks(config), "port").status == "ok"


def test_a_host_that_is_not_ours_fails():
    found = row(doctor.checks(vary(CPU, server={"host": "192.0.2.1"})), "port")
    assert found.status == "fail" and "host" in found.remedy


def test_several_workers_pass_on_the_cpu():
    rows = doctor.checks(vary(CPU, parallel={"world_size": 8}))
    assert {row.status for row in rows} == {"ok"}


def test_memory_leaves_room_for_the_exchange_between_gpus(node):
    alone = row(doctor.checks(vary(node, parallel={"world_size": 1, "device": "cuda"})), "memory")
    assert "for exchange" not in alone.detail
    # 2 channels of 8 ranks' slots, there and back; the demo's rows are 512 bytes or less, so that megabytes are plenty
    assert "MiB of it for exchange apart" in row(doctor.checks(node), "memory").detail


def test_require_raises_with_every_failing_row_and_logs_the_warnings(node, caplog):
    config = vary(node, model={"path": "/absent"})
    with pytest.raises(LaunchError) as caught:
        doctor.require(config)
    message = str(caught.value)
    assert message.startswith("1 preflight check(s) failed")
    assert "/absent: no such folder" in message and "remedy: " in message
    doctor.require(vary(CPU, engine={"max_batch_size": 2}))
    assert "max_batch_size to 1" in caplog.text


def test_the_table_keeps_brackets_and_shows_the_remedy_below():
    console = Console(width=120, record=True, file=io.StringIO())
    doctor.report([doctor.Row("model", "fail", "no such folder", "set [model] path")], console)
    first, second = console.export_text().splitlines()[1:]
    assert first.split() == ["model", "fail", "no", "such", "folder"]
    assert second.strip() == "remedy: set [model] path"


def write(folder: pathlib.Path, model: str) -> str:
    file = folder / "config.toml"
    text = f'[model]\npath = "{model}"\n[parallel]\nworld_size = 2\ndevice = "cpu"\n[server]\nport = 0\n'
    file.write_text(text + "[engine]\nmax_batch_size = 8\n")
    return str(file)


@pytest.mark.parametrize("command", [["doctor"], ["serve", "--doctor"]])
@pytest.mark.parametrize(("model", "code"), [(DEMO, 0), ("/absent", 1)])
def test_the_command_line(tmp_path, capsys, command, model, code):
    assert cli.main([*command, "--config", write(tmp_path, model)]) == code
    assert ("remedy: set [model] path" in capsys.readouterr().out) == bool(code)


def test_the_command_line_in_json(tmp_path, capsys):
    assert cli.main(["doctor", "--json", "--config", write(tmp_path, "/absent")]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert all(row.keys() == {"name", "status", "detail", "remedy"} for row in rows)
    assert [row["name"] for row in rows if row["status"] == "fail"] == ["model"]


@pytest.mark.parametrize("as_json", [False, True])
def test_checks_that_cannot_be_printed(monkeypatch, as_json):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(LaunchError, match=r"standard output.*No space left"):
            doctor.run(CPU, as_json)
        sys.stdout.close()
        with contextlib.suppress(OSError):
            full.close()  # what it still holds cannot be written either


def test_a_path_that_no_encoding_has(monkeypatch):
    """A folder's name may have any bytes, and a terminal may take ASCII only."""
    for as_json, shown in ((False, r"/h\xf6hle\udcff"), (True, r"/h\u00f6hle\udcff")):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii", write_through=True))
        cli._open_standard_streams()
        assert doctor.run(vary(CPU, model={"path": "/höhle\udcff"}), as_json=as_json) == 1
        assert shown.encode() in printed.getvalue()


def test_json_without_the_checks_is_refused(capsys):
    assert cli.main(["serve", "--json"]) == 1
    assert "add --doctor" in capsys.readouterr().err


def test_a_broken_configuration_is_one_message_and_exit_code_1(tmp_path, capsys):
    file = tmp_path / "config.toml"
    file.write_text("[modle]\n")
    assert cli.main(["doctor", "--config", str(file)]) == 1
    assert "did you mean [model]?" in capsys.readouterr().err


def test_torchs_cuda_version_is_read_without_importing_it():
    (folder,) = importlib.util.find_spec("torch").submodule_search_locations
    assert gpus.torch_cuda() == runpy.run_path(f"{folder}/version.py")["cuda"]


class FakeNvml:
    """Two GPUs that reach each other in one direction only, as pynvml would describe them."""

    class NVMLError(Exception):
        pass

    NVML_P2P_STATUS_OK = 0
    NVML_P2P_CAPS_INDEX_READ, NVML_P2P_CAPS_INDEX_WRITE = (0,), 1  # as pynvml 13 has them

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return 13010

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        if index >= 2:
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, name):
        return ["GPU-a", "GPU-b"].index(name)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return type("Memory", (), {"free": 10 + handle, "total": 20})

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return 9, handle

    def nvmlDeviceGetName(self, handle):
        return f"GPU {handle}"

    def nvmlDeviceGetP2PStatus(self, one, other, ability):
        return int((one, other, ability) == (1, 0, self.NVML_P2P_CAPS_INDEX_WRITE))


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setattr(gpus, "pynvml", fake)
    yield fake
    assert fake.open == 0


def test_the_survey(nvml):
    found = gpus.survey(None, 2)
    assert (found.problem, found.driver, found.cuda) == ("", "580.1", (13, 1))
    assert found.gpus == (gpus.Gpu("GPU 0", 10, 20, (9, 0)), gpus.Gpu("GPU 1", 11, 20, (9, 1)))
    assert found.unlinked == ((1, 0),)


@pytest.mark.parametrize(("visible", "free"), [("1", [11]), ("GPU-b, 0", [11, 10]), ("", [])])
def test_the_survey_looks_at_visible_gpus_only(nvml, visible, free):
    assert [gpu.free for gpu in gpus.survey(visible, 2).gpus] == free


def test_the_survey_reports_what_nvml_refuses(nvml):
    assert gpus.survey("7", 1).problem == "Invalid Argument"
