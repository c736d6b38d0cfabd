#!/usr/bin/env python3
"""Runs every suite and prints the sum, "N passed, N failed, N skipped", as the last line.

Suites:
  checks   formatting of C, C++ and Python, lint, drift of the generated pages
  lit      test/**/*.mlir and *.test with FileCheck
  ctest    C and C++ programs against the runtime
  pytest   test/python: compiled layers against transformers and float64 NumPy
  docs     the commands and programs on the pages of docs/
  package  cmake --install and pip install ., each used by a project of its own

The exit code is 0 only when nothing failed and every suite asked for could run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("checks", "lit", "ctest", "pytest", "docs", "package")


@dataclass
class Result:
    """What one suite did."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    problems: list = field(default_factory=list)

    def add(self, name, ok):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
            self.problems.append(name)

    def broken(self, reason):
        """The suite itself failed: counts as one failure."""
        self.failed += 1
        self.problems.append(reason)


def run(command, **options):
    print("$", " ".join(str(part) for part in command), flush=True)
    return subprocess.run(command, cwd=options.pop("cwd", ROOT), **options)


def read_junit(path, exit_code, result):
    """Adds the cases of a JUnit file; a bad exit without a failed case is a failure too."""
    if not path.exists():
        result.broken(f"no result file {path.name} (exit code {exit_code})")
        return
    before = result.failed
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        status = case.get("status")
        if case.find("failure") is not None or case.find("error") is not None:
            result.add(name, False)
        elif case.find("skipped") is not None or status in ("disabled", "notrun"):
            result.skipped += 1
        else:
            result.add(name, status != "fail")
    if exit_code != 0 and result.failed == before:
        result.broken(f"exit code {exit_code} without a failed case")


def tracked(*suffixes):
    """Files that git knows and that still exist, by suffix."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    names = [name for name in listing.split("\0") if name.endswith(suffixes)]
    return [name for name in names if (ROOT / name).exists()]


def suite_checks(build, result, _):
    vendored = {"include/moec/dlpack.h"}
    sources = [name for name in tracked(".c", ".cpp", ".h") if name not in vendored]
    done = run(["clang-format-22", "--dry-run", "-Werror", *sources], capture_output=True)
    sys.stdout.write(done.stderr.decode()[-4000:])
    result.add("clang-format", done.returncode == 0)
    ruff = [sys.executable, "-m", "ruff"]
    result.add("ruff check", run([*ruff, "check", "."]).returncode == 0)
    result.add("ruff format", run([*ruff, "format", "--check", "."]).returncode == 0)
    docs = [sys.executable, "scripts/docs.py", "--check", "--build", str(build)]
    result.add("generated pages", run(docs).returncode == 0)


def suite_lit(build, result, reports):
    report = reports / "lit.xml"
    lit = shutil.which("lit", path="/usr/lib/llvm-22/bin") or "lit"
    environment = dict(os.environ, MOE_PYTHON=sys.executable)
    command = [lit, "-sv", f"--xunit-xml-output={report}", str(build / "test")]
    done = run(command, env=environment)
    read_junit(report, done.returncode, result)


def suite_ctest(build, result, reports):
    report = reports / "ctest.xml"
    command = ["ctest", "--test-dir", str(build / "test"), "--output-on-failure"]
    done = run([*command, "--no-tests=ignore", "--output-junit", str(report)])
    read_junit(report, done.returncode, result)


def run_pytest(build, result, report, arguments):
    paths = [str(build / "python"), os.environ.get("PYTHONPATH", "")]
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(path for path in paths if path),
        MOE_BUILD_DIR=str(build),
    )
    command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *arguments]
    done = run(command, env=environment)
    # Exit code 5: no test was collected, which is for the sum to show.
    read_junit(report, 0 if done.returncode == 5 else done.returncode, result)


def suite_pytest(build, result, reports):
    if (ROOT / "test/python").exists():
        # A process a core, a whole file to one of them: what a file compiles once serves its tests.
        workers = ["-n", str(len(os.sched_getaffinity(0))), "--dist", "loadfile"]
        run_pytest(build, result, reports / "pytest.xml", [*workers, "test/python"])
    else:
        result.broken("expected test/python, but got no such folder")


def suite_docs(build, result, reports):
    run_pytest(build, result, reports / "docs.xml", ["test/docs"])


def suite_package(build, result, reports):
    run_pytest(build, result, reports / "package.xml", ["test/package"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="build folder")
    parser.add_argument(
        "--suites", default=",".join(SUITES), help="comma-separated, of: " + ", ".join(SUITES)
    )
    arguments = parser.parse_args()
    names = [name for name in arguments.suites.split(",") if name]
    for name in names:
        if name not in SUITES:
            parser.error(f"expected suites of {', '.join(SUITES)}, but got {name}")
    build = arguments.build.resolve()
    if not (build / "build.ninja").exists():
        parser.error(f"expected a build in {build}, but got none; run bash scripts/setup.sh")
    reports = build / "test-results"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)

    total = Result()
    for name in names:
        print(f"== {name}", flush=True)
        result, start = Result(), time.monotonic()
        globals()[f"suite_{name}"](build, result, reports)
        seconds = time.monotonic() - start
        counts = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
        print(f"== {name}: {counts} in {seconds:.0f} s", flush=True)
        total.passed += result.passed
        total.failed += result.failed
        total.skipped += result.skipped
        total.problems += [f"{name}: {problem}" for problem in result.problems]
    for problem in total.problems:
        print("FAILED", problem)
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
