"""Prints in how many files each method's name stands, outside of documents and tests.

`python -m tests.places`; with names of methods, also which files.
"""

import pathlib
import re
import subprocess
import sys

import normjax as nj

ROOT = pathlib.Path(__file__).resolve().parents[1]


def names():
    """The public methods."""
    return [name for name in nj.__all__ if hasattr(getattr(nj, name), "traits")]


def places(name):
    """The files of the repository that name a method, outside of documents and tests."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [path for path in listed.stdout.split() if re.search(r"\.pyi?$", path)]
    word = re.compile(rf"\b{name}\b")
    own = [path for path in paths if not path.startswith("tests/")]
    return [path for path in own if word.search((ROOT / path).read_text())]


if __name__ == "__main__":
    for one in names():
        found = places(one)
        sys.stdout.write(f"{len(found):3} {one}\n")
        if one in sys.argv[1:]:
            sys.stdout.write("".join(f"      {path}\n" for path in found))
