"""Scaling: what a step sends, and the model of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling

TINY = {"size": 8, "width": 4, "stages": (1,), "classes": 4, "batch": 16}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(scaling, "SMALL", TINY)
    monkeypatch.setitem(scaling.NORMS, "devices", scaling.norms_of(TINY["stages"]))
    monkeypatch.setattr(scaling, "DEVICES", (8,))
    scaling.run_small.cache_clear()
    yield
    scaling.run_small.cache_clear()


def test_norms_send_one_message_each_way_by_name(tiny):
    plain, ours = (scaling.trained("shard_map, data", arm, 8) for arm in ("no norm", "normjax"))
    norms = scaling.NORMS["devices"]
    more = scaling.totals(ours)[0] - scaling.totals(plain)[0]
    assert norms <= more <= 2 * norms
    assert ours["difference"] < 1e-5


def test_networks_have_the_norms_that_are_counted():
    model = scaling.network("normjax", None, scaling.FULL, jnp.bfloat16)
    image = np.zeros((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    found = len(jax.tree.leaves(shapes["batch_stats"])) // 2
    assert found == scaling.NORMS["pods"] == 53


def row(arm, layout, chips, channels):
    sizes = {"channels": channels, "whole": 1000, "split": 500}
    return {"arm": arm, "layout": layout, "chips": chips, "collectives": {}} | sizes


def test_the_model_counts_messages_and_bytes():
    small, large = [64], [4096]
    assert scaling.cost(row("flax", "jit, fsdp", 64, small)).messages == 2
    assert scaling.cost(row("normjax", "jit, fsdp", 64, small)).messages == 3
    ours = scaling.cost(row("normjax", "shard_map, fsdp", 64, small))
    assert ours.messages == 2
    assert ours.bytes == 1000 + 2 * 500 + 8 + 3 * 4 * 64 * 64 + 2 * 4 * 64
    assert ours.seconds == pytest.approx(2 * 28e-6 + 2 * (3 * 4 * 64 * 64 + 512) / 200e9)
    assert scaling.cost(row("normjax", "shard_map, fsdp", 64, large)).messages == 3
    assert scaling.cost(row("no norm", "shard_map, fsdp", 64, [])).seconds == 0


def test_a_run_writes_what_it_shows(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "LAYOUTS", {"jit, data": ("jit", None)})
    monkeypatch.setattr(scaling, "ARMS", ("normjax", "no norm"))
    assert scaling.main(["--parts", "devices", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "devices.json").read_text())
    assert [r["arm"] for r in found["rows"]] == ["normjax", "no norm"]
    head, ours, plain = scaling.cells("devices", found)
    assert ours[:3] == ("8", "jit, data", "normjax") and plain[4] == ""
    assert "jit, data" in capsys.readouterr().out
    calls = []
    monkeypatch.setattr(scaling, "trained", lambda **case: calls.append(case))
    scaling.main(["--parts", "devices", "--output", str(tmp_path)])
    assert calls == [] and len(head) == len(ours)
