"""The documents: code runs, links lead somewhere, excerpts and tables are those of the files."""

import doctest
import re
import tomllib

import jax
import pytest

import normjax.linen
from benchmarks import documents
from normjax.testing import CHECKS

ROOT = documents.ROOT
README = ROOT / "README.md"


def blocks(text, *languages):
    """(line of the first line of code, code) of each fenced block in one of the languages."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in languages:
            yield text.count("\n", 0, match.start(2)) + 1, match[2]


def run(line, code, names, path=README):
    """Runs one block in the given names; outputs after `>>>` are compared."""
    if ">>>" not in code:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, path.name, str(path), line - 1)
    report = []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        test, out=report.append, clear_globs=False
    )
    names.update(test.globs)
    assert not failed, "".join(report)


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_python_blocks_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CHECKS, "all devices", lambda subject: None)  # "devices" is its fast part
    names = {"__name__": "document"}
    with jax.numpy_rank_promotion("allow"):  # as readers have it
        for line, code in blocks((ROOT / name).read_text(), "python", "pycon"):
            run(line, code, names, ROOT / name)


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


def broken_links(text, folder):
    """Links of a document in `folder` to files or headings that do not exist."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        path = folder / file
        if not path.exists() or (heading and heading not in anchors(path.read_text())):
            yield link


def anchors(text):
    """Names by which links reach the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_links_lead_somewhere(name):
    path = ROOT / name
    assert list(broken_links(path.read_text(), path.parent)) == []


def test_a_broken_link_is_found():
    text = "[a](README.md) [b](nothing.md) [c](README.md#nothing) [d](README.md#which-norm)"
    assert list(broken_links(text, ROOT)) == ["nothing.md", "README.md#nothing"]


def missing_paths(text):
    """Paths and modules in the inline code of a document that the project does not have."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        module = re.match(r"python -m ([\w.]+)", code)
        words = [module[1].replace(".", "/") + ".py"] if module else code.split()
        for word in words:
            if re.fullmatch(r"[\w./-]*(/[\w./-]*|\.(py|md|toml))", word):
                if not (ROOT / word).exists():
                    yield word


def test_paths_of_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert list(missing_paths(text)) == []
    wrong = text.replace("core/method.py", "core/methods.py").replace("tests.stubs", "tests.stub")
    wrong = wrong.replace("pyproject.toml", "project.toml").replace("normjax/core/`", "normjax/c/`")
    found = set(missing_paths(wrong))
    assert found == {"normjax/core/methods.py", "tests/stub.py", "project.toml", "normjax/c/"}


def stale_excerpts(text):
    """Pieces of excerpts, between lines `# ...`, that do not stand in this order in their file."""
    for match in re.finditer(
        r"<!-- from: (\S+) -->\n```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        source = (ROOT / match[1]).read_text()
        for piece in match[2].split("# ...\n"):
            before, found, source = source.partition(piece)
            if not found:
                yield piece
                source = before


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_excerpts_are_of_their_files(name):
    text = (ROOT / name).read_text()
    assert len(list(blocks(text, "py"))) == len(
        re.findall(r"^<!-- from: .* -->$", text, re.MULTILINE)
    )
    assert list(stale_excerpts(text)) == []


def test_a_stale_excerpt_is_found():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (found,) = stale_excerpts(text.replace("        del train, key", "        del key"))
    assert "del key" in found


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    assert documents.filled(text) == text, "run: python -m benchmarks.documents"


def test_a_wrong_table_is_found_and_every_table_is_shown():
    texts = [(ROOT / name).read_text() for name in documents.DOCUMENTS]
    shown = [table for text in texts for table, *_ in documents.MARKED.findall(text)]
    assert sorted(shown) == sorted(documents.TABLES)
    wrong = README.read_text().replace("4.8e-07", "4.7e-07")
    assert documents.filled(wrong) == README.read_text() != wrong


def test_readme_is_short_and_names_every_method():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert [name for name in normjax.linen.MODULES if f"`{name}`" not in text] == []
