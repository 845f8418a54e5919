"""What is released: one version everywhere, an sdist that makes the same wheel, and forms that can be read."""

import email
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import egpo_kernels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    from hatchling.builders.sdist import SdistBuilder  # here: a machine with a GPU may have none

    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("sdist")))
    return Path(path)


def wheel_of(root, folder):
    """Name and bytes of every file of the wheel that is made from a tree."""
    from hatchling.builders.wheel import WheelBuilder

    (path,) = WheelBuilder(str(root)).build(directory=str(folder))
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def read_yaml(name):
    import yaml  # here, for the same reason

    return yaml.safe_load((ROOT / name).read_text())


# The files that are built.


def test_the_sdist_makes_the_wheel_of_the_repository(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    again = wheel_of(tree, tmp_path / "again")
    assert "egpo_kernels/__init__.py" in again
    assert again == wheel_of(ROOT, tmp_path / "wheel")


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a checkout")
def test_the_sdist_holds_the_repository_and_nothing_that_git_ignores(sdist):
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-from=.gitignore"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    known = {name for name in listed.split("\0") if (ROOT / name).is_file()}
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert "tests/test_release.py" in held
    assert held == known | {"PKG-INFO"}


def test_the_sdist_is_small(sdist):
    assert sdist.stat().st_size < 5 * 2**20


def test_metadata_is_complete(tmp_path):
    wheel = wheel_of(ROOT, tmp_path)
    (text,) = (held for name, held in wheel.items() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(text)
    wanted = {"Name", "Version", "Summary", "Author", "Keywords", "Requires-Python", "Description-Content-Type"}
    wanted |= {"License-Expression", "License-File", "Project-URL", "Classifier", "Provides-Extra", "Requires-Dist"}
    assert not wanted - set(metadata.keys())
    assert metadata["Version"] == egpo_kernels.__version__
    classifiers = metadata.get_all("Classifier")
    pythons = [each for each in classifiers if re.search(r":: 3\.\d+$", each)]
    assert metadata["Requires-Python"] == ">=" + pythons[0].rsplit(" ", 1)[1]
    assert not [each for each in classifiers if each.startswith("License ::")]  # the expression says it


# One version.


def test_extras_pin_the_same_versions():
    import tomllib  # here: Python 3.10 has none, and the extras are not for it

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = [re.match(r"([\w.-]+)==([\w.]+)(?!\S*\*)", line) for lines in extras.values() for line in lines]
    versions = {}
    for name, version in (pin.groups() for pin in pins if pin):
        versions.setdefault(name, set()).add(version)
    assert len(versions) > 20
    assert not {name: found for name, found in versions.items() if len(found) > 1}


def test_changelog_and_citation_know_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## (.*)$", changelog, re.M)
    assert headings[0] == "[Unreleased]"
    version, date = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", headings[1]).groups()
    citation = read_yaml("CITATION.cff")
    assert version == egpo_kernels.__version__ == citation["version"]
    assert date == citation["date-released"]


# What a contributor and a reporter meet.


def test_a_commit_runs_make_lint():
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [(hook["language"], hook["entry"]) for hook in hooks] == [("system", "make lint")]
    assert re.search(r"^lint:", (ROOT / "Makefile").read_text(), re.M)


def test_a_bug_report_starts_with_what_the_commands_print():
    form = read_yaml(".github/ISSUE_TEMPLATE/bug.yml")
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    first = fields[0]["attributes"]["label"]
    assert "`egpo-kernels info`" in first and "`egpo-kernels check`" in first
    assert len({field["id"] for field in fields}) == len(fields) == 4
    assert all(field["validations"]["required"] for field in fields)


def test_what_fits_no_form_can_be_filed():
    assert read_yaml(".github/ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": True}
