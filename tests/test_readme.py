"""The README's code runs, shows what it says it shows, and its commands name extras that exist."""

import doctest
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def blocks(text, *languages):
    """(line of the first line of code, code) of each fenced block in one of the languages."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def run(line, code, names):
    """Runs one block in the given names; outputs after `>>>` are compared."""
    if ">>>" not in code:
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, "README", str(README), line - 1)
    report = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=report.append, clear_globs=False
    )
    names.update(test.globs)
    assert not failed, "".join(report)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for line, code in blocks(README.read_text(), "python", "pycon"):
        run(line, code, names)


@pytest.mark.parametrize("code", ["1 / 0\n", ">>> 1 + 1\n3\n"])
def test_a_wrong_block_is_found(code):
    ((line, code),) = blocks(f"Text.\n\n```python\n{code}```\n", "python")
    assert line == 4
    with pytest.raises((ZeroDivisionError, AssertionError)):
        run(line, code, {})


@pytest.mark.parametrize("marker", ["main-command", "test-command"])
def test_commands_install_extras_that_exist(marker):
    text = README.read_text()
    _, command = next(blocks(text[text.index(f"<!-- {marker} -->") :], "bash"))
    extras = re.search(r"pip install -e '\.\[([\w,]+)\]'", command)[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])
