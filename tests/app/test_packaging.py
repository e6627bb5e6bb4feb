"""Rules of the repository that no other tool checks."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = [
    path for room in ("deltafx", "passes", "models_zoo") for path in ROOT.glob(f"{room}/**/*.py")
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_imported_by_their_installed_names(path: Path) -> None:
    """`import passes` works only in the root of a checkout."""
    assert not {name.split(".")[0] for name in imported_modules(path)} & {"passes", "models_zoo"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_library_modules_say_what_they_are_and_do_not_print(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module opens with what enters, what leaves and why"
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}


def test_every_package_is_declared_and_every_declared_one_exists() -> None:
    tool = PYPROJECT["tool"]["setuptools"]
    folders = {name: name.replace(".", "/") for name in tool["packages"]} | tool["package-dir"]
    assert set(folders) == set(tool["packages"])
    for folder in folders.values():
        assert (ROOT / folder / "__init__.py").is_file(), folder
    with_code = {path.parent.relative_to(ROOT).as_posix() for path in LIBRARY}
    assert with_code == set(folders.values())


def test_third_party_imports_are_declared_dependencies() -> None:
    declared = {re.split(r"[><=]", name)[0] for name in PYPROJECT["project"]["dependencies"]}
    imported = {name.split(".")[0] for path in LIBRARY for name in imported_modules(path)}
    third_party = {"pillow" if name == "PIL" else name for name in imported} - {"deltafx"}
    assert third_party - set(__import__("sys").stdlib_module_names) <= declared


def test_pinned_packages_satisfy_the_declared_dependencies() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "requirements-dev.txt").read_text().splitlines()
        if "==" in line
    )
    for requirement in PYPROJECT["project"]["dependencies"]:
        name, least = requirement.split(">=")
        pinned = [int(part) for part in pins[name].split(".")]
        assert pinned >= [int(part) for part in least.split(".")], name


def test_the_extension_has_the_sources_and_no_python_in_it() -> None:
    library = ROOT / "deltafx" / "_C.abi3.so"
    assert library.is_file(), "build it with `make build`"
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "libtorch_python" not in needed
    assert "libpython" not in needed


def test_the_license_is_complete() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PYPROJECT["project"]["license"]["text"] == "Apache-2.0"
