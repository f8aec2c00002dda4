"""What is said twice about the project is said alike."""

import re
from pathlib import Path

import pytest
import yaml

import ff_lightning

ROOT = Path(__file__).parents[1]


def test_one_version():
    version = ff_lightning.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_oldest_versions_are_the_lower_bounds():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = ("dev", "docs")  # ruff of other versions formats otherwise
    extras = [each for name, own in project["optional-dependencies"].items() if name not in tools for each in own]
    wanted = [*project["dependencies"], *extras]
    bounds = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", each).groups() for each in wanted)
    held = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".github/oldest.txt").read_text(), re.MULTILINE))
    full = {name: version if version.count(".") == 2 else f"{version}.0" for name, version in bounds.items()}
    assert held == full


@pytest.mark.parametrize("path", [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")], ids=str)
def test_files_of_the_forge_are_yaml(path):
    assert yaml.safe_load(path.read_text())


def test_the_workflow_calls_the_same_script():
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").is_file()
