"""Types are a promise: what must type-check does, and what must not does not."""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "typing"


def errors():
    """Lines with an error in each file, as pyright sees them."""
    command = [sys.executable, "-m", "pyright", "--outputjson", *map(str, FOLDER.glob("*.py"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1])
    found = {path.name: [] for path in FOLDER.glob("*.py")}
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        if one["severity"] == "error":
            line = one["range"]["start"]["line"] + 1
            found[pathlib.Path(one["file"]).name].append((line, one["message"]))
    return found


def test_uses_type_check_and_misuses_do_not():
    pytest.importorskip("pyright")  # which the extra `test` does without
    found = errors()
    assert found["uses.py"] == []
    lines = (FOLDER / "misuses.py").read_text().splitlines()
    wanted = [number for number, line in enumerate(lines, 1) if "# error" in line]
    assert len(wanted) == 22
    assert [line for line, _ in found["misuses.py"]] == wanted, found["misuses.py"]
