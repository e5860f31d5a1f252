"""Imports point one way, heavy packages wait until they are needed, and the lists kept in two languages agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fastenc.activation import ACTIVATIONS
from fastenc.backends import cuda, rule

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastenc"

# From the top: a module may import from its own layer and from those below. A module of `fastenc/` that is not here is
# an error, so that it gets its place.
LAYERS = (
    {
        "__main__",
        "attribution",
        "chunked",
        "cli",
        "collected",
        "evaluation",
        "info",
        "integrations",
        "labelled",
        "measured",
        "pipeline",
        "plots",
        "private",
        "record",
        "report",
        "serving",
        "sklearn",
        "vectors",
    },
    {"finetuning", "frontends", "loading", "multitask", "personal"},
    {"training"},
    {"convert", "encoder", "explain", "files", "lora", "plain", "pretrained", "tune"},
    {"modules"},
    {"dynamo", "functional"},
    {"operators"},
    {"ops"},
    {"backends"},
    {"activation", "kernels", "_C", "_C_cuda"},
)
EXTENSIONS = {"_C", "_C_cuda"}
# Knows nothing of fastenc; only these layers know it.
DATA, ABOVE_DATA = "data", LAYERS[0] | LAYERS[1] | LAYERS[2]

# Each import of them costs a noticeable part of a second, and only the extras `app`, `track` and `tools` bring them.
HEAVY = {
    "Bio",
    "PIL",
    "accelerate",
    "captum",
    "fastapi",
    "lightning",
    "matplotlib",
    "mlflow",
    "opacus",
    "pandas",
    "peft",
    "prometheus_client",
    "pyarrow",
    "scipy",
    "sklearn",
    "skorch",
    "soundfile",
    "tensorboard",
    "tokenizers",
    "torchao",
    "torchinfo",
    "tqdm",
    "transformers",
    "triton",
    "typer",
    "uvicorn",
    "wandb",
}


def level(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if module in layer)


def sources() -> Iterator[tuple[str, Path]]:
    """The module or subpackage of fastenc (its first name), and each of its files."""
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        yield first.removesuffix(".py"), path
    for path in sorted((ROOT / "kernels" / "triton").rglob("*.py")):
        yield "kernels", path


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of all that is imported, relative names resolved in `package`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                yield ".".join([*base, *filter(None, [node.module]), alias.name]), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from ((name.value, node.lineno) for name in node.args if isinstance(name, ast.Constant))


def package_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return ".".join(["fastenc", *path.relative_to(PACKAGE).parts[:-1]])
    return ".".join(["fastenc.kernels", *path.relative_to(ROOT / "kernels" / "triton").parts[:-1]])


def inside(path: Path) -> Iterator[tuple[str, int]]:
    """(first name below fastenc, line) of what a file imports from fastenc; "" is fastenc itself."""
    known = {name for name, _ in sources()} | EXTENSIONS
    for name, line in imports(ast.parse(path.read_text()), package_of(path)):
        parts = name.split(".")
        if parts[0] == "fastenc":
            yield (parts[1] if len(parts) > 1 and parts[1] in known else ""), line


def at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from at_module_level(node.body)
            yield from at_module_level(node.orelse)
        elif isinstance(node, ast.Try):
            yield from at_module_level([*node.body, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef):
            yield from at_module_level(node.body)
        elif not isinstance(node, ast.FunctionDef):
            yield node


def test_every_module_has_its_layer():
    found = {name for name, _ in sources()} - {"__init__"}
    assert found <= set().union(*LAYERS) | {DATA}, "give the new modules their place in LAYERS"
    assert set().union(*LAYERS) - found == EXTENSIONS, "LAYERS names what is no longer there"


def test_imports_point_one_way():
    wrong, edges = [], set()
    for module, path in sources():
        if module in ("__init__", DATA):
            continue
        for target, line in inside(path):
            edges.add((module, target))
            if target == "":
                allowed = module in LAYERS[0]  # fastenc itself imports nearly everything below
            elif target == DATA:
                allowed = module in ABOVE_DATA
            else:
                allowed = level(target) >= level(module)
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target or 'fastenc'}")
    assert not wrong
    # The walk sees relative, absolute and lazy imports.
    assert {
        ("cli", "training"),
        ("training", "data"),
        ("loading", "encoder"),
        ("backends", "_C"),
        ("backends", "_C_cuda"),
        ("backends", "kernels"),
    } <= edges


def test_data_knows_nothing_of_fastenc():
    files = [path for module, path in sources() if module == DATA]
    assert {target for path in files for target, _ in inside(path)} == {DATA}


def test_modules_know_no_backend():
    known = {target for target, _ in inside(PACKAGE / "modules.py")}
    assert known == {"activation", "functional"}


def test_heavy_packages_wait_until_needed():
    found = set()
    for module, path in sources():
        for statement in at_module_level(ast.parse(path.read_text()).body):
            for name, _ in imports(statement, package_of(path)):
                if name.split(".")[0] in HEAVY:
                    found.add((module, name.split(".")[0]))
    # The command line's commands are declared when it is imported, the estimators are scikit-learn's subclasses, and
    # integrations are of a package; all of them, as the kernels, are imported when they are asked for.
    integrations = {("integrations", "opacus"), ("integrations", "peft")}
    assert found == {("cli", "typer"), ("kernels", "triton"), ("sklearn", "sklearn"), *integrations}


def test_integrations_are_imported_by_name_alone():
    importers = {module for module, path in sources() for target, _ in inside(path) if target == "integrations"}
    assert importers == {"private"}  # which asks for opacus' when it trains


def test_the_kernels_wait_until_needed():
    importers = set()
    for module, path in sources():
        for statement in at_module_level(ast.parse(path.read_text()).body):
            if any(name.startswith("fastenc.kernels") for name, _ in imports(statement, package_of(path))):
                importers.add(module)
    assert importers == {"kernels"}


def test_kernels_know_torch_and_triton_and_no_autograd():
    for path in sorted((ROOT / "kernels" / "triton").rglob("*.py")):
        tree = ast.parse(path.read_text())
        names = [name for name, _ in imports(tree, package_of(path))]
        assert all(name.startswith("fastenc.kernels.") for name in names if name.startswith("fastenc")), path.name
        packages = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert packages <= {"fastenc", "torch", "triton"}, path.name
        assert not any("autograd" in ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        assert not any("autograd" in name for name in names), path.name


def test_import_fastenc_is_light():
    program = (
        "import sys, torch; before = set(sys.modules); import fastenc; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "fastenc" in loaded
    assert not loaded & HEAVY


def test_torch_library_is_used_in_operators_only():
    users = set()
    for module, path in sources():
        tree = ast.parse(path.read_text())
        uses = [name for name, _ in imports(tree, package_of(path)) if name.startswith("torch.library")]
        uses += [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_torch_library(node)]
        if uses:
            users.add(module)
    assert users == {"operators"}


def is_torch_library(node: ast.Attribute) -> bool:
    return node.attr == "library" and isinstance(node.value, ast.Name) and node.value.id == "torch"


def test_cpu_kernels_know_no_torch():
    knowing = set()
    for path in (ROOT / "csrc" / "cpu").iterdir():
        code = re.sub(r"//.*", "", path.read_text())
        if re.search(r"#include <(torch|ATen|c10)/|\b(torch|at|c10)::", code):
            knowing.add(path.name)
    assert knowing == {"runtime.cpp"}


def test_cuda_kernels_know_no_torch():
    """All of it that does is the binding, and what it is given for tests."""
    knowing = set()
    for path in [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "simt").iterdir()]:
        code = re.sub(r"//.*", "", path.read_text())
        if re.search(r"#include <(torch|ATen|c10)/|\b(torch|at|c10)::", code):
            knowing.add(path.name)
    assert knowing == {"ops.cu", "bind.h", "operators.h", "operators.cpp"}


def test_limits_of_a_narrow_stack_are_the_same_in_both_languages():
    header = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    limits = {name: int(re.search(rf"int64_t k{name} = (\d+);", header)[1]) for name in ("Deepest", "Widest")}
    assert limits == {"Deepest": cuda.DEEPEST, "Widest": cuda.WIDEST} == {"Deepest": 8, "Widest": rule.CUDA.widest}


def test_activations_are_in_the_same_order_in_both_languages():
    header = (ROOT / "csrc" / "activation.h").read_text()
    kinds = re.search(r"enum class ActivationKind[^{]*\{([^}]*)\}", header)[1]
    kinds = [kind for kind in re.split(r"[\s,]+", kinds) if kind]
    names = [re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removeprefix("k")).lower() for kind in kinds]
    assert names == [*ACTIVATIONS, "count"]
