"""Prints in how many files each method's name stands, outside of documents and tests.

`python -m tests.places`; with names of methods, also which files.
"""

import pathlib
import re
import sys

import normjax as nj

ROOT = pathlib.Path(__file__).resolve().parents[1]


def names():
    """The public methods."""
    return [name for name in nj.__all__ if hasattr(getattr(nj, name), "traits")]


def places(name):
    """The files of the package and its benchmarks that name a method."""
    word = re.compile(rf"\b{name}\b")
    found = (p for folder in ("normjax", "benchmarks") for p in (ROOT / folder).rglob("*.py*"))
    paths = sorted(path for path in found if path.suffix in (".py", ".pyi"))
    return [str(path.relative_to(ROOT)) for path in paths if word.search(path.read_text())]


if __name__ == "__main__":
    for one in names():
        found = places(one)
        sys.stdout.write(f"{len(found):3} {one}\n")
        if one in sys.argv[1:]:
            sys.stdout.write("".join(f"      {path}\n" for path in found))
