"""How the house is laid out: who may import whom, and how long a file may be."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"sample", "sample_ddp", "train", "calibrate"}
FOLDERS = [f for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "." and f.name not in ("tests", "build")]
FOLDERS = [f for f in FOLDERS if not (f / "pyvenv.cfg").exists()]
FILES = sorted([*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in folder.rglob("*.py"))])
OURS = {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in FILES}
PACKAGE = [f for f in FILES if f.is_relative_to(ROOT / "adacorr")]


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


def test_imports():
    for file in FILES:
        names = set(imported(file))
        roots = {name.partition(".")[0] for name in names}
        assert not roots & SCRIPTS, f"{file}: a script is imported by no module"
        if file in PACKAGE:
            kind = file.relative_to(ROOT / "adacorr" / "integrations").parts[0] if "integrations" in file.parts else ""
            others = roots - {"torch", "numpy", "safetensors", "adacorr", kind, *sys.stdlib_module_names}
            assert not others, file
        if file.parent == ROOT / "adacorr" / "policies":
            assert {name for name in names if name.startswith("adacorr.policies.")} <= {"adacorr.policies.register"}
        if file == ROOT / "diffusion.py":
            ours = [name for name in names if name.partition(".")[0] in OURS]
            allowed = "adacorr.linear_steps.", "adacorr.spec.", "adacorr.transfer.", "schedulers."
            assert all(name.startswith(allowed) for name in ours)


def test_no_file_is_long():
    for file in FILES:
        limit = 160 if file.parent == ROOT / "adacorr" / "policies" else 450
        assert file.read_text().count("\n") <= limit, file


def test_the_package_prints_nothing():
    for file in PACKAGE:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file


def test_the_package_says_where_to_look():
    """Its docstring names every module."""
    words = set(re.findall(r"\w+", ast.get_docstring(ast.parse((ROOT / "adacorr" / "__init__.py").read_text()))))
    assert {f.stem for f in (ROOT / "adacorr").glob("[!_]*.py")} <= words
