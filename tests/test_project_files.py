"""The files around the code agree with it: version, citation, workflows, hooks, templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from million_cli import __version__
from million_cli.results import version

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "million_cli/_version.py"
    assert version("million") == __version__


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["title"].startswith("MILLION: ")
    assert paper["authors"][0]["family-names"] == "Wang"


def test_the_changelog_has_an_unreleased_section():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_the_changelog_tells_where_modules_went():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    moves = [line.split("|")[1:3] for line in lines if line.startswith("| `million_cli/")]
    assert moves
    for before, now in moves:
        old, new = (re.findall(r"`([\w./]+)`", cell) for cell in (before, now))
        folder = new[0].rpartition("/")[0]
        for name in new:  # a bare name lies beside the first one
            assert (ROOT / name if "/" in name else ROOT / folder / name).exists(), name
        modules = [name for name in old if "/" not in name]  # of the folder named first
        gone = [f"{old[0]}{name}.py" for name in modules] if modules else old
        if ": tables" not in before:
            assert not any((ROOT / name).exists() for name in gone), gone
        for name in modules:
            assert (ROOT / folder / f"{name}.py").exists(), name


def test_workflows_run_commands_that_exist():
    ran = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands = job.get("strategy", {}).get("matrix", {}).get("command", [])
            for step in job["steps"]:
                if "run" in step:
                    ran |= {step["run"].replace("${{ matrix.command }}", name) for name in commands or [""]}
    assert ran == {"make test", "make demo", "make lint", ".ci/run"}
    script = (ROOT / ".ci" / "run").read_text()
    for target in re.findall(r"^ *make ([\w-]+)", "\n".join([*ran, script]), re.MULTILINE):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_hooks_run_the_installed_ruff():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    entries = [hook["entry"].split()[0] for hook in local["hooks"]]
    assert entries == [".venv/bin/ruff", ".venv/bin/ruff", "make"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=str)
def test_issue_templates_have_what_github_asks_for(path):
    template = yaml.safe_load(path.read_text())
    assert template["name"]
    assert template["description"]
    for field in template["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]
