"""The top-level folders are installed as `parallax.*`, whole, and as nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("control_plane", "protos", "runtime", "sdk", "security")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Imports the modules that its first argument names; prints what came in under one of the names in its second.
IMPORT = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print(*(name for name in sys.modules if name.partition(".")[0] in sys.argv[2].split()))
"""


def modules() -> Iterator[Path]:
    """Our Python files, relative to the root."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT)


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_module_is_imported_without_its_parallax_prefix() -> None:
    """`security.identity.Identity` would be another class than `parallax.security.identity.Identity`."""
    names = ["parallax." + ".".join(path.with_suffix("").parts) for path in modules()]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, " ".join(names), " ".join(FOLDERS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_this_test_run_imports_none_either() -> None:
    assert [name for name in sys.modules if name.partition(".")[0] in FOLDERS] == []


def test_every_package_is_listed_and_mapped() -> None:
    found = {f"parallax.{'.'.join(path.parent.parts)}" for path in modules() if path.name == "__init__.py"}
    settings = PROJECT["tool"]["setuptools"]
    assert set(settings["packages"]) == found
    assert settings["package-dir"] == {f"parallax.{folder}": folder for folder in FOLDERS}


def test_every_folder_with_modules_is_a_package() -> None:
    assert {path.parent for path in modules() if not (ROOT / path.parent / "__init__.py").exists()} == set()


def test_parallax_itself_stays_a_namespace() -> None:
    """Another distribution called parallax exists; the two can be installed side by side."""
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_package_is_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()


def test_imported_distributions_are_the_declared_ones() -> None:
    """Both ways: one that is missing breaks users, one too many costs them."""
    imported: set[str] = set()
    for path in modules():
        for node in ast.walk(ast.parse((ROOT / path).read_bytes())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    declared, extra = (
        {canonical(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in texts}
        for texts in (
            PROJECT["project"]["dependencies"],
            PROJECT["project"]["optional-dependencies"]["testing"],
        )
    )
    owners = packages_distributions()
    used = {
        root: {canonical(name) for name in owners.get(root, [])} or {root}
        for root in imported - sys.stdlib_module_names - {"parallax"}
    }
    assert {root: names for root, names in used.items() if not names & (declared | extra)} == {}
    assert (declared | extra) - set().union(*used.values()) == set()
    assert {root for root, names in used.items() if names & extra} == {"pytest", "pytest_asyncio"}


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-runtime.lock"])
def test_lock_holds_versions_and_hashes_only(lock: str) -> None:
    """No address in it: whoever installs decides where packages come from."""
    pin = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-z0-9_'\"=!<>. ()]+)? \\", re.IGNORECASE)
    digest = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
    comment = re.compile(r" +# +(via|-c|-r|[a-z])[\w .,()\[\]:-]*", re.IGNORECASE)
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    unknown = [x for x in lines if not (pin.fullmatch(x) or digest.fullmatch(x) or comment.fullmatch(x))]
    assert unknown == []


def test_runtime_lock_pins_a_part_of_the_whole() -> None:
    whole, runtime = (
        set(re.findall(r"^\S+==\S+", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("requirements.lock", "requirements-runtime.lock")
    )
    assert runtime < whole


def test_lock_covers_what_is_declared() -> None:
    pinned = set(re.findall(r"^([^\s=]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    assert {canonical(re.split(r"[^\w.-]", text, maxsplit=1)[0]) for text in texts} <= pinned


def test_no_committed_file_names_a_path_of_one_machine(require_tool: Callable[[str], str]) -> None:
    git = require_tool("git")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    listing = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    path_of_a_machine = re.compile(rb"(?<![\w.~/-])/(?:home|root|Users)/\w+")
    here = str(ROOT).encode()
    found = []
    for name in filter(None, listing.split(b"\0")):
        file = ROOT / name.decode()
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        match = path_of_a_machine.search(content)
        if match or (len(ROOT.parts) > 2 and here in content):
            found.append(f"{file.relative_to(ROOT)}: {(match[0] if match else here).decode()}")
    assert found == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in a wheel built now, from a copy of the tree."""
    source = tmp_path_factory.mktemp("source")
    for folder in (*FOLDERS, "tests", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source],
        check=True,
        capture_output=True,
    )
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_holds_every_module_and_nothing_beside_parallax(wheel: list[str]) -> None:
    code = {name for name in wheel if ".dist-info/" not in name}
    expected = {f"parallax/{path.as_posix()}" for path in modules()}
    assert {name for name in code if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in code} == {"parallax"}


def test_wheel_holds_type_markers_schema_and_licence(wheel: list[str]) -> None:
    assert {f"parallax/{folder}/py.typed" for folder in FOLDERS} <= set(wheel)
    assert {f"parallax/protos/{path.name}" for path in (ROOT / "protos").glob("*.proto")} <= set(wheel)
    assert {f"parallax/protos/{path.name}" for path in (ROOT / "protos").glob("*.pyi")} <= set(wheel)
    assert [name for name in wheel if name.endswith("/licenses/LICENSE")]
