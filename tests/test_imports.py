"""What each import loads, which way the layers point, and what the wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from wheels import FOLDERS, build_wheel

import headrace

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "data" / "stories260K.gguf"
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

HEAVY = {"numba", "llvmlite", "rich", "typer", "jinja2", "tokenizers", "huggingface_hub", "gguf"}
# What may be loaded besides `headrace` itself, by module and whatever is below it.
LOADS = {
    "headrace": (),
    "headrace.errors": ("headrace.errors",),
    "headrace.cli": (
        "headrace.cli",
        "headrace.cli_commands",
        "headrace.cli_compress",
        "headrace.cli_learning",
        "headrace.cli_options",
        "headrace.cli_output",
        "headrace.cli_text",
        "headrace.cli_routing",
        "headrace.cli_sampling",
        "headrace.cli_targets",
        "headrace.errors",
        "headrace.peak",
        "headrace.sizes",
    ),
    "headrace.families": ("headrace.families",),
    "headrace.kernels": ("headrace.kernels",),
    "headrace.loaders": ("headrace.loaders",),
    "headrace.loaders.gguf": ("headrace.loaders", "headrace.errors", "numpy"),
    "headrace.loaders.pull": ("headrace.loaders", "headrace.errors", "headrace.folders"),
    "headrace.loaders.sources": ("headrace.loaders", "headrace.errors", "headrace.folders"),
    "headrace.offload": ("headrace.offload",),
    "headrace.sparse": ("headrace.sparse",),
    "headrace.sparse.linear": ("headrace.sparse", "headrace.targets", "headrace.errors", "numpy"),
    "headrace.sparse.registry": ("headrace.sparse", "headrace.targets", "headrace.errors", "numpy"),
    "headrace.targets": ("headrace.targets",),
    "headrace.targets.host": ("headrace.targets", "headrace.errors"),
    "headrace.targets.simd": ("headrace.targets",),
}
# What a part may import; all that is in runtime/ and not named here is the top and may do anything.
LAYERS = {
    "errors": set(),
    "atomic_file": set(),
    "folders": set(),
    "targets": {"errors", "atomic_file", "folders", "targets"},
    "loaders": {"errors", "atomic_file", "folders", "loaders"},
    "sparse": {"errors", "targets", "sparse"},
    "kernels": {"errors", "targets", "sparse", "offload", "kernels"},
    "available": {"cgroups"},
    "cgroups": set(),
    "sizes": {"available"},
    "interruptible": set(),
    "memory": {"errors", "sizes"},
    "offload": {
        "atomic_file",
        "errors",
        "sizes",
        "interruptible",
        "memory",
        "targets",
        "sparse",
        "loaders",
        "offload",
    },
    "families": {"errors", "loaders", "families"},
}


def below(module: str, parents: tuple[str, ...]) -> bool:
    """Whether a module is one of these, or inside one of them."""
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def loaded_by(code: str, **env: str) -> set[str]:
    """The modules that a new interpreter has loaded after `code`, without those of its start."""
    script = (
        "import sys; start = set(sys.modules)\n"
        f"{code}\n"
        "print('loaded:', *(set(sys.modules) - start))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=110, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("module", LOADS)
def test_an_import_loads_its_own_part_only(module: str) -> None:
    modules = loaded_by(f"import {module}")
    assert not HEAVY & modules
    ours = {name for name in modules if below(name, ("headrace", "numpy"))}
    allowed = LOADS[module]
    assert {name for name in ours if name != "headrace" and not below(name, allowed)} == set()


def test_a_warm_run_is_light(tmp_path: Path) -> None:
    code = (
        "from headrace.cli import main\n"
        f"assert main(['run', {str(TINY)!r}, 'Once upon', '-n', '4', '--raw']) == 0"
    )
    # The first run compiles, elsewhere.
    assert not HEAVY & loaded_by(code, HEADRACE_CACHE=str(tmp_path)) - {"llvmlite"}
    assert list(tmp_path.glob("kernels/*/*.o"))
    modules = loaded_by(code, HEADRACE_CACHE=str(tmp_path))
    assert "headrace.model" in modules
    assert HEAVY & modules <= {"llvmlite"}


# ---- layers ---------------------------------------------------------------------------------


def packages() -> dict[str, Path]:
    """The packages that pyproject declares, with their folders."""
    folders = SETUP["tool"]["setuptools"]["package-dir"]
    found = {}
    for name in SETUP["tool"]["setuptools"]["packages"]:
        parent, _, last = name.rpartition(".")
        found[name] = ROOT / folders[name] if name in folders else found[parent] / last
    return found


def modules() -> dict[str, Path]:
    """Every module of the package, with its file."""
    return {
        package if path.stem == "__init__" else f"{package}.{path.stem}": path
        for package, folder in packages().items()
        for path in sorted(folder.glob("*.py"))
    }


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import at any depth, but not those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other)
        else:
            yield from imports(node)


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports: modules, or names in them."""
    for node in imports(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", modules())
def test_layers_point_one_way(module: str) -> None:
    parts = module.split(".")
    allowed = LAYERS.get(parts[1]) if len(parts) > 1 else set()
    for name in imported(modules()[module]):
        if not below(name, ("headrace",)):
            continue
        if module != "headrace.__main__":
            assert not below(name, ("headrace.cli",)), f"{module} imports the command line"
        part = name.split(".")[1]
        # `from headrace import sparse` is the part sparse; `__version__` stands in headrace itself.
        if allowed is not None and part != "__version__":
            assert part in allowed, f"{module} imports {name}"


def test_few_modules_import_numba() -> None:
    users = {
        module
        for module, path in modules().items()
        if any(below(name, ("numba",)) for name in imported(path))
    }
    parts = ("", "_bytes", "_int32", "_matrix", "_planes", "_products", "_sums")
    lowering = {f"headrace.targets.lowering{part}" for part in parts}
    more = {f"headrace.targets.{name}" for name in ("scalars", "translation", "walk")}
    assert users == {*more, *lowering}


# ---- packaging ------------------------------------------------------------------------------


def test_every_folder_is_a_package() -> None:
    found = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert found == set(packages().values())


def test_the_version_stands_in_two_places() -> None:
    assert SETUP["project"]["version"] == headrace.__version__


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    pytest.importorskip("build")
    wheel = build_wheel(tmp_path)
    assert wheel.name.startswith(f"headrace-{headrace.__version__}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in packages().items()
        for path in folder.glob("*.py")
    }
    assert found == expected | {"headrace/py.typed", "headrace/targets/emulation/count.c"}


def test_lists_without_a_compiler() -> None:
    code = (
        "import sys; sys.modules['llvmlite'] = sys.modules['numba'] = None;"
        "from headrace.cli import main; sys.exit(main(['targets', 'list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "aarch64-dotprod" in done.stdout
