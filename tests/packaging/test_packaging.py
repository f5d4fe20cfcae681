"""What is installed is what lies in the tree, and the folder `kernels/` never stands in Hugging Face's way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("setup.py", "pyproject.toml", "LICENSE", "engine", "kernels")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of `command`, which must succeed; PYTHONPATH is what `env` says and nothing else."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean | env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kernel_modules() -> list[str]:
    """Modules of kernels/, without the folder's helpers for one's own use (a leading underscore)."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("[a-z]*.py"))


@pytest.fixture
def some_kernel() -> str:
    """A module of kernels/ that needs nothing but torch."""
    names = kernel_modules()
    if not names:
        pytest.skip("kernels/ has no module yet")
    return "reference" if "reference" in names else names[0]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tree so that no build folder is left in it."""
    source = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out,
        source, cwd=source)
    [built] = out.glob("triax-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment with the wheel in it; it borrows this one's torch and sees no source tree."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    site = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # A folder named in a .pth is put on sys.path, but the .pth files in it (the editable install's too) are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel,
        cwd=home.parent)
    return python


def test_the_wheel_holds_every_module_of_engine_and_kernels_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "engine").rglob("*.py")}
    ours |= {f"engine/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert packed == ours  # a folder of engine without __init__.py, or a new folder in kernels/, would be missing


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        [name] = [name for name in packed.namelist() if name.endswith("METADATA")]
        text = packed.read(name).decode()
        assert any(name.endswith("LICENSE") for name in packed.namelist())
    said = re.search(r'__version__ = "(.+)"', (ROOT / "engine" / "__init__.py").read_text())
    assert said and f"\nVersion: {said.group(1)}\n" in text
    assert "\nRequires-Python: >=3.11\n" in text and "\nLicense-Expression: Apache-2.0\n" in text
    extras = set(re.findall(r"^Provides-Extra: (.+)$", text, re.MULTILINE))
    assert {"hf", "mpi", "gpu", "data", "plot", "test", "lint"} <= extras
    assert "Requires-Dist: apex" not in text  # PyPI's apex is another project


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would take it for Hugging Face's"


WHERE = """
import importlib, importlib.util, sys
import engine, engine.kernels
print(engine.__file__, engine.kernels.__file__, list(engine.kernels.__path__), sep="\\n")
if sys.argv[1:]:
    print(importlib.import_module("engine.kernels." + sys.argv[1]).__file__)
"""


def test_the_source_tree_finds_kernels_through_the_shim(some_kernel: str, tmp_path: Path) -> None:
    lines = run(sys.executable, "-c", WHERE, some_kernel, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()
    assert lines == [f"{ROOT}/engine/__init__.py", f"{ROOT}/engine/kernels.py", f"['{ROOT}/kernels']",
                     f"{ROOT}/kernels/{some_kernel}.py"]


def test_an_installed_copy_finds_kernels_through_the_shim(installed: Path, some_kernel: str, tmp_path: Path) -> None:
    # engine/kernels.py and engine/kernels/ lie side by side here: a module wins over a folder without __init__.py.
    lines = run(installed, "-c", WHERE, some_kernel, cwd=tmp_path).splitlines()
    engine = Path(lines[0]).parent
    assert installed.parents[1] in engine.parents
    assert lines[1:] == [f"{engine}/kernels.py", f"['{engine}/kernels']", f"{engine}/kernels/{some_kernel}.py"]


def test_an_installed_copy_has_no_top_level_kernels(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    assert run(installed, "-c", code, cwd=tmp_path) == "None\n"


def test_the_engine_imports_from_outside_its_tree_without_transformers(installed: Path, tmp_path: Path) -> None:
    code = "import sys, engine, engine.errors; print(engine.__version__, 'transformers' in sys.modules)"
    assert run(installed, "-c", code, cwd=tmp_path).endswith(" False\n")


LLAMA = """
import importlib.util, sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM
import engine.kernels
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, f"a regular package kernels at {spec.origin}"
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, max_position_embeddings=16)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(8)[None]
model.save_pretrained(sys.argv[1])
loaded = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
assert torch.equal(model(ids).logits, loaded(ids).logits)
print("loaded", transformers.__version__)
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_path", [True, False], ids=["tree-on-path", "started-in-the-tree"])
def test_transformers_builds_and_loads_a_llama_with_our_folder_on_its_path(on_path: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = {"PYTHONPATH": str(ROOT)} if on_path else {}  # `python -c` has the folder it is started in on its path
    out = run(sys.executable, "-c", LLAMA, tmp_path, cwd=tmp_path if on_path else ROOT, HF_HUB_OFFLINE="1", **path)
    assert out.startswith("loaded")
