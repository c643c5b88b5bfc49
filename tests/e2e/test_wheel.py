"""The wheel holds what a user needs and nothing else, and works where no source tree is near.

To stay quick and offline, the new environment borrows the dependencies of the running one; `make wheel-check` installs
them all anew.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from paligemma.cli.pictures import EXAMPLE_LABELS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{command} answered {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree, built from a copy so that nothing is left behind here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "paligemma", source / "paligemma", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("paligemma-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of an environment that holds the wheel."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    # Behind the environment's own packages on the path; .pth files in there (an editable install, say) stay unread.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return home / "bin"


def test_the_wheel_holds_the_model_the_fonts_and_the_licences(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "paligemma/py.typed",
        "paligemma/assets/example/shapes.png",
        "paligemma/assets/label-font/DejaVuSans.ttf",
        "paligemma/assets/label-font/LICENSE.txt",
    ):
        assert needed in names
    assert any(name.startswith("paligemma/assets/tiny/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/NOTICE") for name in names)


def test_the_wheel_holds_nothing_but_the_package(wheel: Path):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"paligemma"}
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name or "/tests/" in name]


def test_the_embedded_model_stays_within_twelve_megabytes(wheel: Path):
    tiny = [f for f in zipfile.ZipFile(wheel).infolist() if f.filename.startswith("paligemma/assets/tiny/")]
    assert 0 < sum(f.file_size for f in tiny) <= 12_000_000


def test_the_installed_package_detects_from_another_folder(installed: Path, tmp_path: Path):
    home = run(installed / "python", "-c", "import paligemma; print(paligemma.__file__)", cwd=tmp_path)
    assert Path(home.strip()).is_relative_to(installed.parent)
    answer = json.loads(
        run(installed / "paligemma", "detect", "--model", "tiny", "--json", "--save", "out", cwd=tmp_path)
    )
    assert answer["raw"] or not answer["detections"]
    assert {found["label"] for found in answer["detections"]} <= set(EXAMPLE_LABELS)
    assert list((tmp_path / "out").glob("*.png"))
