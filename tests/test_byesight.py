"""The public face: its names, and that serving pulls in nothing heavy."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tomllib

import pytest

import byesight

ROOT = pathlib.Path(byesight.__file__).parent
HEAVY = ("prefect", "ray", "pyarrow", "sklearn")


@pytest.mark.parametrize(
    "code",
    [
        "from byesight import ModelError, load_guarded, restore, sanitize, verify_delivery",
        "import stages.guard.load",
        "import pipeline.attention",
    ],
)
def test_serving_imports_nothing_heavy(code: str) -> None:
    check = f"{code}\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_names() -> None:
    assert all(hasattr(byesight, name) for name in byesight.__all__)
    for name in byesight.__all__:
        value = getattr(byesight, name)
        assert value.__doc__
        if isinstance(value, type):
            assert issubclass(value, byesight.ByeSightError)


def test_version_is_that_of_the_package() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == byesight.__version__


def test_errors_reach_the_caller(tmp_path: pathlib.Path) -> None:
    with pytest.raises(byesight.IntegrityError, match=r"manifest\.json"):
        byesight.verify_delivery(tmp_path)
    with pytest.raises(byesight.IntegrityError, match=r"manifest\.json"):
        byesight.restore(tmp_path, tmp_path / "out", rows=[1])
    with pytest.raises(byesight.ModelError, match="neither a delivery nor an adapter"):
        byesight.load_guarded(tmp_path)
    with pytest.raises(byesight.ByeSightError):
        byesight.sanitize(tmp_path / "nothing", tmp_path / "out", base=tmp_path)
