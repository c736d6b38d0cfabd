"""Runs the pages of docs/ that show commands and programs.

Fenced blocks, in the order of the page, in one empty folder per page:

  sh                   run by bash -euo pipefail; the output is kept
  python               run as a program of its own; the output is kept
  c file=F, cpp file=F, json file=F, python file=F, ...   written to F
  output               compared with what the block before printed; `...` stands for anything

Other blocks are for reading only.
"""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build"))
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
PAGES = ["tutorial.md", "transformers.md", "abi.md"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a user has after installing: tools on PATH, the package, pkg-config."""
    prefix = tmp_path_factory.mktemp("installed")
    subprocess.run(
        ["cmake", "--install", BUILD, "--prefix", prefix], check=True, capture_output=True
    )
    paths = {
        "PATH": f"{prefix / 'bin'}:{Path(sys.executable).parent}",
        "PYTHONPATH": str(BUILD / "python"),
        "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig"),
        "LD_LIBRARY_PATH": str(prefix / "lib"),
    }
    merged = dict(os.environ)
    for name, value in paths.items():
        merged[name] = f"{value}:{merged[name]}" if merged.get(name) else value
    return merged


def blocks(page):
    text = (ROOT / "docs" / page).read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield line, match.group(1).split(), match.group(2)


@pytest.mark.parametrize("page", PAGES)
def test_page(page, environment, tmp_path):
    printed = None
    ran = 0
    for line, info, body in blocks(page):
        where = f"docs/{page}:{line}"
        files = [word[len("file=") :] for word in info if word.startswith("file=")]
        if files:
            (tmp_path / files[0]).write_text(body)
        elif info[:1] in (["sh"], ["python"]):
            if info[0] == "sh":
                command = ["bash", "-euo", "pipefail", "-c", body]
            else:
                command = [sys.executable, "-c", body]
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"
            printed = done.stdout
            ran += 1
        elif info[:1] == ["output"]:
            assert printed is not None, f"{where}: expected a block that prints before this one"
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            equal = doctest.OutputChecker().check_output(body, printed, flags)
            assert equal, f"{where}: expected\n{body}\nbut got\n{printed}"
    assert ran > 0, f"docs/{page}: expected blocks to run, but got none"


def test_links():
    """Every relative link of every page leads to a file."""
    broken = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", BLOCK.sub("", page.read_text())):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, broken
