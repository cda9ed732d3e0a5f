"""The architecture as tests: folders are process boundaries, torch stays in workers, the environment in one file."""

import ast
import json
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nmoe.metrics import SPECS

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "nmoe"
SIBLINGS = ("frontend", "scheduler", "worker")
MAX_LINES = 500
BATCHES = (1, 16, 64, 128, 256)  # in the README's table
COMMAND_LINE_SECONDS = 1.5  # to import it; measured 0.2 s on an idle machine, so this bound is about weight, not luck

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
TEST_MODULES = sorted((ROOT / "tests").glob("test_*.py"))


def dotted(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: pathlib.Path) -> Iterator[str]:
    """Every module that the file names in an import, at any depth of it."""
    package = dotted(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def folder(path: pathlib.Path) -> str:
    """The process that the module belongs to; "" for the root's."""
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in SIBLINGS else ""


def is_script(path: pathlib.Path) -> bool:
    """The demo's makers run by themselves: no process imports them, so they may use what they like."""
    return path.parent == PACKAGE / "demo"


def test_there_is_something_to_check():
    assert len(MODULES) > 20 and {folder(path) for path in MODULES} == {"", *SIBLINGS}


def test_only_workers_name_torch():
    named = {
        str(path.relative_to(ROOT)): name
        for path in MODULES
        for name in imports(path)
        if name.split(".")[0] in ("torch", "triton") and folder(path) != "worker" and not is_script(path)
    }
    assert named == {}


def test_nothing_imports_the_demos_scripts():
    named = [(dotted(path), name) for path in MODULES if not is_script(path) for name in imports(path)]
    assert [importer for importer, name in named if name.startswith("nmoe.demo")] == []


def test_siblings_do_not_import_each_other():
    crossings = [
        (dotted(path), name)
        for path in MODULES
        for name in imports(path)
        for other in SIBLINGS
        if folder(path) not in ("", other) and (name + ".").startswith(f"nmoe.{other}.")
    ]
    assert crossings == []


def test_the_root_does_not_import_a_process():
    """The launcher names each process's module as a string, and imports it in the child alone."""
    inward = [
        (dotted(path), name)
        for path in MODULES
        for name in imports(path)
        if not folder(path) and name.startswith(tuple(f"nmoe.{sibling}" for sibling in SIBLINGS))
    ]
    assert inward == []


def import_alone(modules: list[str]) -> dict[str, object]:
    """What a fresh interpreter has loaded after importing `modules`, and how long that took."""
    code = (
        "import importlib, json, sys, time; start = time.perf_counter();"
        f"[importlib.import_module(name) for name in {modules!r}];"
        "print(json.dumps({'seconds': time.perf_counter() - start, 'loaded': list(sys.modules)}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_everything_outside_the_workers_runs_without_torch():
    modules = [dotted(path) for path in MODULES if folder(path) != "worker" and not is_script(path)]
    loaded = import_alone(modules)["loaded"]
    assert set(modules) <= set(loaded)
    assert {"torch", "triton"}.isdisjoint(loaded)


def test_the_command_line_starts_fast_and_light():
    """It forks the processes: what it has imported they all have, so it imports nothing heavy."""
    found = import_alone(["nmoe.__main__"])
    assert {"torch", "numpy", "aiohttp", "tokenizers", "transformers"}.isdisjoint(found["loaded"])
    assert found["seconds"] < COMMAND_LINE_SECONDS


def test_the_environment_is_touched_in_one_file():
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    touched = {
        str(path.relative_to(ROOT))
        for path in MODULES
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and names & {alias.name for alias in node.names})
    }
    assert touched == {"nmoe/envs.py"}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_says_what_it_is_and_fits_in_a_head(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    if text.strip():
        assert ast.get_docstring(parse(path)), "no docstring"
    else:
        assert path.name == "__init__.py"


@pytest.mark.parametrize("path", TEST_MODULES, ids=lambda path: path.stem)
def test_a_test_module_has_tests_and_skips_none(path):
    tree = parse(path)
    tests = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    # A hypothesis state machine is a test too: `TestX = Machine.TestCase`.
    machines = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".TestCase")
    ]
    assert tests or machines
    skips = {"skip", "skipif", "xfail", "importorskip"}
    assert not [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in skips]


def test_the_structure_page_names_every_module_and_no_other():
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE))
    documented = {str(path.relative_to(PACKAGE)) for path in MODULES if path.read_text(encoding="utf-8").strip()}
    assert documented - listed == set()
    assert listed - documented == set()


def test_the_operators_page_names_every_metric_check_and_error_code():
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    metrics = {spec.name + ("_total" if spec.kind == "counter" else "") for spec in SPECS if spec.exposed}
    sources = {path: path.read_text(encoding="utf-8") for path in MODULES}
    codes = {code for path, source in sources.items() if folder(path) for code in re.findall(r'code="(\w+)"', source)}
    checks = set(re.findall(r'Row\(\s*"([\w ]+)"', sources[PACKAGE / "doctor.py"]))
    assert len(metrics) > 20 and len(codes) > 10 and len(checks) > 10
    assert set(re.findall(r"`(nmoe:\w+)`", page)) == metrics
    assert [code for code in sorted(codes) if f"`{code}`" not in page] == []
    assert [name for name in sorted(checks) if f"\n| {name} |" not in page] == []


def test_the_readmes_figures_are_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "h100-moonlight-decode.json").read_text(encoding="utf-8"))
    for name, key, layout in (("nmoe", "step_ms", ".2f"), ("of which reading", "of_floor", ".0%")):
        measured = {batch: [each[key] for each in results["results"] if each["batch"] == batch] for batch in BATCHES}
        cells = " | ".join(format(statistics.mean(figures), layout) for figures in measured.values())
        assert f"| {name} | {cells} |" in readme


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_the_pages_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
