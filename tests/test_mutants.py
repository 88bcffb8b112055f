"""The fast tests find every fault of the table."""

import pathlib
import shutil
import subprocess
import sys

import pytest
from mutants import MUTANTS

ROOT = pathlib.Path(__file__).parents[1]
NEEDED = ("normjax", "tests", "benchmarks", "pyproject.toml", "README.md")


@pytest.mark.parametrize("name", MUTANTS)
def test_the_fault_fits_the_text(name):
    mutant = MUTANTS[name]
    assert mutant.new != mutant.old
    found = (ROOT / mutant.file).read_text().count(mutant.old)
    assert found == 1, f"{name}: {mutant.old!r} occurs {found} times in {mutant.file}"
    for test in mutant.tests:
        if test.startswith("tests/"):
            assert (ROOT / test.partition("::")[0]).is_file(), f"{name}: no file for {test}"


def copy(folder):
    """What tests need of the project, in `folder`; they stop unless its package is imported."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)
    with (folder / "tests" / "conftest.py").open("a") as file:
        print(f"import normjax\nassert {str(folder)!r} in normjax.__file__", file=file)


def run(folder, tests):
    """Return code of those of `tests` that are fast, in the copy, and what pytest says."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-m", "not slow"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_fast_tests_find_the_fault(name, tmp_path):
    mutant = MUTANTS[name]
    copy(tmp_path)
    path = tmp_path / mutant.file
    path.write_text(path.read_text().replace(mutant.old, mutant.new))
    code, text = run(tmp_path, mutant.tests)
    assert code != 0, f"the fault lives: {name}. A fast test is missing that finds it."
    assert code == 1, f"{name}: pytest ended with {code}, which is no failed test:\n{text}"


@pytest.mark.slow
def test_without_a_fault_the_tests_pass(tmp_path):
    """And nothing passes where the package is missing or another one is imported."""
    copy(tmp_path)
    tests = MUTANTS["transpose of the moments doubled"].tests
    code, text = run(tmp_path, tests)
    assert code == 0, text
    (tmp_path / "normjax").rename(tmp_path / "elsewhere")
    assert run(tmp_path, tests)[0] not in (0, 1)
