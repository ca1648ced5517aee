"""How the house is laid out: who may import whom, and how long a file may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sample", "sample_ddp", "train", "calibrate"}
FOLDERS = [f for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "." and f.name not in ("tests", "build")]
FOLDERS = [f for f in FOLDERS if not (f / "pyvenv.cfg").exists()]
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))])
OURS = {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in FILES}
PACKAGE = [f for f in FILES if f.is_relative_to(ROOT / "adacorr")]
sources = pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])


def imported(file):
    """Full names of the modules that a file imports, wherever in it, and of what it takes from them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_files_are_found():
    assert {"adacorr", "models", "diffusion", *SCRIPTS} <= OURS
    assert len(PACKAGE) > 20


@sources
def test_imports(file):
    names = set(imported(file))
    roots = {name.partition(".")[0] for name in names}
    assert not roots & SCRIPTS, "a script is imported by no module"
    if file in PACKAGE:
        others = (
            {file.relative_to(ROOT / "adacorr" / "integrations").parts[0]} if "integrations" in file.parts else set()
        )
        assert roots <= {"torch", "numpy", "safetensors", "adacorr", *others, *sys.stdlib_module_names}
    if file == ROOT / "diffusion.py":
        ours = [name for name in names if name.partition(".")[0] in OURS]
        assert all(name.startswith(("adacorr.spec.", "schedulers.")) for name in ours)


@sources
def test_no_file_is_long(file):
    limit = 160 if file.parent == ROOT / "adacorr" / "policies" else 450
    length = file.read_text().count("\n")
    assert length <= limit


@pytest.mark.parametrize("file", PACKAGE, ids=[str(f.relative_to(ROOT)) for f in PACKAGE])
def test_the_package_prints_nothing(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls)
