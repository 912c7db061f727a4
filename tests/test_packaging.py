"""What is shipped: modules that build on each other in one direction, complete names, strict types, one small wheel."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest
from conftest import lacking

import pagemapcompat
from pagemapcompat import DirtyTracker, KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pagemapcompat"

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="no source tree around the tests; remedy: run them in a checkout"
)

LAYERS = (
    {"errors", "abi"},
    {"_kernel"},
    {"memory"},
    {"mappings"},
    {"own_memory", "refusals", "results"},
    {"userfaultfd"},
    {"laboratory", "limits"},
    {"trials_kinds", "trials_pagemap", "trials_uffd"},
    {"trials"},
    {"probe", "registrations"},
    {"pagemap"},
    {"backends"},
    {"paranoid"},
    {"snapshot_files"},
    {"cursors", "selection", "snapshots"},
    {"tracker"},
    {"unicorn", "writewatch"},
    {"qiling"},
    {"__init__"},
    {"cli_formats", "cli_streams"},
    {"cli_scan", "cli_selftest"},
    {"cli_probe"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
BUILD_ONLY = "_native_build"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))

PUBLIC = (
    "DirtyTracker",
    "TrackedRange",
    "Cursor",
    "ScanResult",
    "PageRegion",
    "AddressRange",
    "PageCategory",
    "ScanQuery",
    "Pagemap",
    "Guarantee",
    "Selection",
    "probe",
    "Feature",
    "ProbeResult",
    "FeatureReport",
    "PagemapEntry",
    "EntryFlag",
    "page_size",
    "PagemapCompatError",
    "KernelError",
    "AccessError",
    "UnsupportedError",
    "AlreadyRegisteredError",
    "NotTrackableError",
    "NotTrackedError",
    "TargetGoneError",
    "AlignmentError",
    "ClosedError",
    "FaultThreadError",
)


def need_tool(module: str) -> None:
    """Skip when a tool of the optional dependencies `test` is not installed."""
    if importlib.util.find_spec(module) is None:
        lacking(module, "not installed (ModuleNotFoundError)", "pip install -e '.[test]'")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a tool; what it printed. Fails with that when it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}"
    return done.stdout


# -- The modules -----------------------------------------------------------------------------------------------


class Imports(ast.NodeVisitor):
    """The modules of this package that a module imports at run time, by bare name."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        """Leave out what only the type checker reads."""
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """Note `import pagemapcompat.x`."""
        for alias in node.names:
            self._note(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Note `from pagemapcompat.x import y`, and `from pagemapcompat import x`, which may be a module or a name."""
        origin = "pagemapcompat" + (f".{node.module}" if node.module else "") if node.level else node.module or ""
        for alias in node.names:
            self._note(f"{origin}.{alias.name}" if origin == "pagemapcompat" and is_module(alias.name) else origin)

    def _note(self, dotted: str) -> None:
        top, _, rest = dotted.partition(".")
        if top == "pagemapcompat":
            self.found.add(rest.partition(".")[0] or "__init__")


def is_module(name: str) -> bool:
    """Whether the package has a module of this name."""
    return name == "_native" or (PACKAGE / f"{name}.py").exists()


def imports(source: str) -> set[str]:
    """What a module's source imports from this package."""
    visitor = Imports()
    visitor.visit(ast.parse(source))
    return visitor.found


def tree(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def test_the_import_walk_sees_every_spelling() -> None:
    """So that the next test can fail."""
    assert imports("import pagemapcompat.tracker as t") == {"tracker"}
    assert imports("from pagemapcompat.tracker import DirtyTracker") == {"tracker"}
    assert imports("from pagemapcompat import tracker") == {"tracker"}
    assert imports("from pagemapcompat import DirtyTracker") == {"__init__"}
    assert imports("def f():\n    from . import tracker") == {"tracker"}
    assert imports("from .tracker import DirtyTracker") == {"tracker"}
    assert imports("if TYPE_CHECKING:\n    from pagemapcompat import tracker") == set()
    assert imports("import pagemapcompatible, os") == set()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module: str) -> None:
    """No module imports one of its own layer or above, and _kernel alone imports the compiled core."""
    found = imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    if module == BUILD_ONLY:
        assert found == set()
        return
    assert module in LEVEL, "a new module needs a layer"
    assert ("_native" in found) == (module == "_kernel")
    upward = {name for name in found - {"_native"} if LEVEL.get(name, len(LAYERS)) >= LEVEL[module]}
    assert upward == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"_kernel", BUILD_ONLY}))
def test_only_kernel_speaks_cffi(module: str) -> None:
    """No other module names cffi, ffi or lib."""
    names = {node.id for node in ast.walk(tree(module)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute)}
    assert names & {"ffi", "lib", "cffi"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_no_module_asks_for_the_kernel_version(module: str) -> None:
    """Nor assumes a page size."""
    asks = {"uname", "platform", "utsname"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not {alias.name for alias in node.names} & asks
            assert getattr(node, "module", None) not in asks
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("os", "uname")
            assert node.value.id != "platform"
        elif isinstance(node, ast.Constant):
            assert node.value not in (1 << 12, "/proc/version", "/proc/sys/kernel/osrelease")


def test_no_c_file_asks_for_the_kernel_version() -> None:
    """Nor assumes a page size, nor knows of Python."""
    files = sorted((PACKAGE / "native").glob("*.[ch]"))
    assert files
    forbidden = (
        r"\buname\s*\(|utsname|LINUX_VERSION_CODE|KERNEL_VERSION|linux/version\.h|osrelease"
        r"|\b4096\b|Python\.h|\bPy[A-Z_]\w+"
    )
    for file in files:
        assert re.findall(forbidden, file.read_text(encoding="utf-8")) == [], file.name


# -- Names and types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(name: str) -> None:
    """Other people's programs import it from the package."""
    assert name in pagemapcompat.__all__
    assert getattr(pagemapcompat, name).__doc__


def test_all_is_complete_and_sorted() -> None:
    """__all__ is everything that __init__ imports, and every error there is."""
    imported = {
        alias.asname for node in tree("__init__").body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(pagemapcompat.__all__) == list(pagemapcompat.__all__)
    assert set(pagemapcompat.__all__) == imported
    errors = importlib.import_module("pagemapcompat.errors")
    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert classes <= set(pagemapcompat.__all__)
    for name in classes:
        assert issubclass(getattr(pagemapcompat, name), pagemapcompat.PagemapCompatError)


def test_typing_test_uses_every_public_name() -> None:
    """So that none escapes the type checker."""
    source = (Path(__file__).parent / "typing_api.py").read_text(encoding="utf-8")
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert set(pagemapcompat.__all__) - used == set()


def test_strict_types(tmp_path: Path) -> None:
    """Mypy passes on the package and on a program that uses its public names, strictly."""
    need_tool("mypy")
    run(
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        tmp_path,
        "pagemapcompat",
        "tests/typing_api.py",
        cwd=ROOT,
    )


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command: tuple[str, ...]) -> None:
    """Every rule but those that pyproject.toml explains away; and the formatter has nothing to change."""
    need_tool("ruff")
    folders = [name for name in ("pagemapcompat", "tests", "scripts") if (ROOT / name).exists()]
    run(sys.executable, "-m", "ruff", *command, "--no-cache", *folders, cwd=ROOT)


# -- sdist, wheel, installed -----------------------------------------------------------------------------------


@attrs.frozen
class Built:
    """What `python -m build` made of a copy of this tree."""

    sdist: Path
    wheel: Path
    log: str

    def in_wheel(self) -> list[str]:
        """The names of its files."""
        with zipfile.ZipFile(self.wheel) as archive:
            return archive.namelist()

    def metadata(self, name: str) -> dict[str, list[str]]:
        """A file of its dist-info, as headers."""
        with zipfile.ZipFile(self.wheel) as archive:
            (path,) = (entry for entry in archive.namelist() if entry.endswith(f".dist-info/{name}"))
            message = message_from_bytes(archive.read(path))
        return {key: message.get_all(key, []) for key in message}


def project() -> dict[str, object]:
    """The table [project] of pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, object] = tomllib.load(file)["project"]
    return table


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist, and the wheel made from that sdist, without the network."""
    for tool in ("build", "setuptools", "cffi"):
        need_tool(tool)
    if shutil.which(os.environ.get("CC", "cc")) is None:
        lacking("cc", "no C compiler (ENOENT)", "apt-get install gcc python3-dev")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", "*.o")
    shutil.copytree(PACKAGE, source / "pagemapcompat", ignore=unwanted)
    out = tmp_path_factory.mktemp("dist")
    log = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel, log)


def test_no_setup_py() -> None:
    """pyproject.toml alone builds it."""
    assert not (ROOT / "setup.py").exists()


def test_the_c_core_compiles_without_a_warning(built: Built) -> None:
    """With -Wall -Wextra."""
    assert "-Wall" in built.log
    assert [line for line in built.log.splitlines() if re.search(r"\.[ch]:\d+.*(warning|error):", line)] == []


def test_wheel_is_one_for_every_python(built: Built) -> None:
    """CPython 3.11 and newer, by the limited API."""
    (tag,) = built.metadata("WHEEL")["Tag"]
    assert tag.startswith("cp311-abi3-linux_")
    compiled = [name for name in built.in_wheel() if name.endswith(".so")]
    assert compiled == ["pagemapcompat/_native.abi3.so"]


def test_wheel_holds_what_runs_and_nothing_else(built: Built) -> None:
    """py.typed, but no C, no folder `native`, no tests."""
    names = built.in_wheel()
    assert "pagemapcompat/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "pagemapcompat",
        f"pagemapcompat-{project()['version']}.dist-info",
    }
    assert [name for name in names if name.endswith((".c", ".h", ".o")) or "/native/" in name] == []
    assert {f"pagemapcompat/{module}.py" for module in MODULES} <= set(names)


def test_runtime_requirements(built: Built) -> None:
    """attrs and cffi, nothing else."""
    requirements = [line for line in built.metadata("METADATA")["Requires-Dist"] if "extra ==" not in line]
    assert sorted(re.match(r"[\w-]+", line).group() for line in requirements) == ["attrs", "cffi"]  # type: ignore[union-attr]


def test_sdist_holds_the_c_files(built: Built) -> None:
    """All of them, and no compiled one."""
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"pagemapcompat/native/{path.name}" for path in (PACKAGE / "native").glob("*.[ch]")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert [name for name in names if name.endswith((".so", ".o"))] == []


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The interpreter of a fresh environment that holds the wheel, its two requirements, and nothing else."""
    need_tool("pip")
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", built.wheel, cwd=home)
    needed = tmp_path_factory.mktemp("needed")
    for name in ("attr", "attrs", "cffi", "_cffi_backend", "pycparser"):  # cffi imports its parser only at build time
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            origin = origin.parent if spec.submodule_search_locations else origin
            (needed / origin.name).symlink_to(origin)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{needed}\n", encoding="utf-8")
    yield python
    shutil.rmtree(home)


def test_installed_wheel_runs_the_first_example(installed: Path, tmp_path: Path) -> None:
    """The docstring of the package, in an empty folder, in an environment that holds nothing else."""
    try:
        DirtyTracker().close()
    except KernelError as error:
        lacking("DirtyTracker", f"no backend works here: {error}", error.hint or "none")
    program = (
        "import doctest, sys, pagemapcompat; assert pagemapcompat.__file__.startswith(sys.prefix), pagemapcompat; "
        "failed, tried = doctest.testmod(pagemapcompat); assert tried >= 4, tried; sys.exit(failed)"
    )
    run(installed, "-I", "-W", "error", "-c", program, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_installed_wheel_needs_no_tool_to_import(installed: Path, tmp_path: Path) -> None:
    """Every module but the one that builds imports without numpy, setuptools, or typing_extensions."""
    modules = ", ".join(f"pagemapcompat.{name}" for name in MODULES if name not in ("__init__", "__main__", BUILD_ONLY))
    loaded = run(
        installed, "-I", "-W", "error", "-c", f"import sys, {modules}; print(*sys.modules, sep='\\n')", cwd=tmp_path
    ).split()
    assert not {"numpy", "setuptools", "typing_extensions", "pycparser"} & {name.partition(".")[0] for name in loaded}


def test_changelog_has_this_version() -> None:
    """A heading names the version of pyproject.toml."""
    version = re.escape(str(project()["version"]))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?v?{version}\b", changelog, re.MULTILINE)
