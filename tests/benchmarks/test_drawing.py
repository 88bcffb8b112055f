"""The benchmark of drawn ghosts, small."""

import json

import pytest

from benchmarks import drawing


def test_writes_both_times_and_the_choice(tmp_path, capsys):
    small = ["--batches", "16", "32", "--sizes", "4", "32", "--channels", "8", "--rounds", "2"]
    assert drawing.main([*small, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "drawing.json").read_text())
    assert [(r["batch"], r["size"], r["counts"]) for r in found["rows"]] == [
        (16, 4, False),
        (32, 4, False),
        (32, 32, True),
    ]
    for row in found["rows"]:
        ways = row["counting_ms"], row["gathering_ms"]
        assert row["regret"] == pytest.approx(ways[not row["counts"]] / min(ways))
    assert found["worst"] == max(r["regret"] for r in found["rows"]) >= 1
    assert "at most" in capsys.readouterr().out
