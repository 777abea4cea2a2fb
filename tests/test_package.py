"""What README.md and error messages promise of the installed package: extras, folders, files that are linked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / name for name in ("shm", "runtime", "workers")]
TEXTS = [ROOT / "README.md", *(path for package in PACKAGES for path in package.rglob("*.py"))]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_extra_that_users_are_told_to_install_exists(project: dict[str, Any]) -> None:
    named = {extra for text in TEXTS for extra in re.findall(r"hotset\[(\w+)\]|extra `\[(\w+)\]`", text.read_text())}
    extras = {name for pair in named for name in pair if name}
    assert {"gguf", "server"} <= extras <= set(project["project"]["optional-dependencies"])


def test_every_folder_with_modules_is_a_package_that_gets_installed(project: dict[str, Any]) -> None:
    folders = [init.parent.relative_to(ROOT) for package in PACKAGES for init in package.rglob("__init__.py")]
    assert {"hotset." + ".".join(folder.parts) for folder in folders} == set(project["tool"]["setuptools"]["packages"])


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if "://" not in link and not (ROOT / link).exists()]
