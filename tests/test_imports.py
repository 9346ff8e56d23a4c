"""Heavy packages stay out of the runtime, and folders import each other in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnx", "onnxscript", "warp", "tensorrt", "cuda", "anny", "diffusers")
# Which folders may import which.
ALLOWED = {
    "factorportrait": set(),
    "engines": set(),
    "runtime": {"engines"},
    "export": {"engines", "runtime"},
    "benchmarks": {"runtime", "engines", "export"},
}
# PyTorch runs the modules that the graphs were exported from; nothing imports it but `choose`, and late.
# The one place that reaches for the demo's world lies in benchmarks; export borrows it, late, to calibrate and to judge.
ALLOWED_FILES = {"engines/pytorch.py": {"export"}, "export/quantize/clips.py": {"benchmarks"}}
# Modules that are written in a heavy package's own language: imported inside functions only.
KERNELS = {"factorportrait.runtime.media.normal_kernels"}
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, sys.argv[1] + ".")]
for name in names:
    if not name.endswith("__main__") and name not in sys.argv[3].split(","):
        importlib.import_module(name)
print(" ".join(name for name in sys.argv[2].split(",") if name in sys.modules))
"""


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of everything that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # Relative imports are within one folder as long as they do not climb; nobody needs more.
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ["runtime", "engines"])
def test_no_heavy_package(package):
    command = [sys.executable, "-c", IMPORT_ALL, f"factorportrait.{package}", ",".join(HEAVY), ",".join(KERNELS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_kernels_are_imported_late():
    for file in (ROOT / "runtime").rglob("*.py"):
        names = imports(file, top_level_only=True)
        # `from package import module` and `import package.module` alike.
        assert not [name for name in names if any(name == kernel or name.startswith(f"{kernel}.") for kernel in KERNELS)]


def test_the_contract_and_the_export_command_need_no_torch():
    names = [f"factorportrait.{file.stem}" for file in (ROOT / "factorportrait").glob("*.py") if file.stem != "__init__"]
    code = f"import sys, {', '.join(names)}, factorportrait.export.cli\nprint(*(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT / "tests")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_export_looks_at_what_runs_its_graphs_late():
    """Calibration, gates and plans run graphs; writing a graph needs no engine."""
    for file in (ROOT / "export").rglob("*.py"):
        names = imports(file, top_level_only=True)
        assert not [name for name in names if name.startswith(("factorportrait.engines", "factorportrait.runtime"))], file


@pytest.mark.parametrize("folder", ALLOWED)
def test_one_way(folder):
    bad = []
    for file in (ROOT / folder).rglob("*.py"):
        allowed = ALLOWED[folder] | ALLOWED_FILES.get(str(file.relative_to(ROOT)), set())
        others = set(ALLOWED) - {"factorportrait", folder} - allowed
        for name in imports(file):
            if name.startswith("..") or name.split(".")[0] in {*set(ALLOWED) - {"factorportrait"}, "demo", "tests"}:
                bad.append(f"{file.relative_to(ROOT)}: {name}")
            parts = name.split(".")
            if parts[0] == "factorportrait" and len(parts) > 1 and parts[1] in {*others, "demo"}:
                bad.append(f"{file.relative_to(ROOT)}: {name}")
    assert not bad
