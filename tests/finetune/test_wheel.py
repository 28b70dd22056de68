"""The wheel works away from the repository, brings one name, and the core imports with torch and transformers alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_BUILT_FROM = ("meft_bench", "baselines", "tasks", "pyproject.toml", "README.md", "LICENSE")
_PEERS = (
    "peft",
    "lm_eval",
    "datasets",
    "pandas",
    "scipy",
    "matplotlib",
    "accelerate",
    "psutil",
    "pynvml",
    "yaml",
    "tqdm",
)


def _python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_importing_the_package_imports_no_torch():
    done = _python(
        "import sys, meft_bench, meft_bench.finetune, meft_bench.finetune.cli; print('torch' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_core_needs_torch_and_transformers_only():
    # What transformers itself imports when it is there (accelerate, peft, ...) must not be missed either.
    code = f"import sys; sys.modules.update(dict.fromkeys({_PEERS[:-1]!r}))\nimport meft_bench.meft.model, meft_bench"
    done = _python(code)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Python of an empty environment that holds the built wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in _BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / "source" / name) if copy is shutil.copytree else _copy_file(name, folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), "./source"]
    if _setuptools_major() >= 77:
        build.append("--no-build-isolation")
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True)
    if done.returncode and _setuptools_major() < 77:
        pytest.skip("building needs setuptools of at least 77 here, or the network to fetch it")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    _check_names(names)
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env"), "platbase": str(folder / "env")}))
    assert {p.name.split("-")[0] for p in site.iterdir()} == {"meft_bench"}
    # Found after the wheel's own folder; a .pth file inside them is not followed, so no editable install comes along.
    others = [p for p in sys.path if p.endswith("site-packages") and Path(p).is_dir()]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    return python


def _copy_file(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, folder / name)


def _setuptools_major() -> int:
    if importlib.util.find_spec("setuptools") is None:
        return 0
    from importlib import metadata

    return int(metadata.version("setuptools").split(".")[0])


def _check_names(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"meft_bench"}
    for needed in (
        "py.typed",
        "finetune/example.jsonl",
        "embedded/model.safetensors",
        "meft/engine/products.c",
        "tasks/facts.yaml",
        "baselines/lora.py",
    ):
        assert f"meft_bench/{needed}" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("meft_bench/tests")]


@pytest.mark.slow
def test_doctor_train_and_generate_run_in_an_empty_folder(installed, tmp_path):
    def bench(*arguments: str) -> str:
        offline = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | offline
        command = [str(installed.parent / "meft-bench"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import meft_bench; print(meft_bench.__file__)"
    found = subprocess.run([installed, "-c", where], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert Path(found).is_relative_to(installed.parents[1])
    assert "all whole" in bench("doctor")
    said = bench(
        "train", "--data", "example", "--output", "mine", "--steps", "3", "--device", "cpu", "--eval-rows", "20"
    )
    assert "adapter in mine; next: meft-bench generate --adapter mine --prompt TEXT" in said
    prompt = "in what town did Veikrouna Bretaidal grow up ?"
    assert len(bench("generate", "--adapter", "mine", "--prompt", prompt, "--device", "cpu").split()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
