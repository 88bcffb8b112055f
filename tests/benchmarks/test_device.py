"""The benchmark for accelerators: a tiny run on the CPU, and what it says when something is off."""

import doctest
import json
import math
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from benchmarks import bandwidth, budget, device, methods, resnet, split, tables

RUN = ["--tiny", "--rounds", "2", "--batch", "2"]


def run(folder, *argv):
    """Exit code and results of the command."""
    code = device.main([*RUN, "--output", str(folder), *argv])
    return code, json.loads((folder / "device.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder, the results and the output of a run of all parts, with one network."""
    folder = tmp_path_factory.mktemp("runs") / "device"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        patch.setattr(resnet, "ARMS", resnet.ARMS[-1:])
        code, results = run(folder, "--methods", "Affine", "RMSNorm")
    assert code == 0
    return folder, results


def rows(results, part):
    return [row for row in results["rows"] if row["part"] == part]


def test_files(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} == {"device.json", "device.txt"}
    assert results["left_out"] == []
    assert not any("note" in row for row in results["rows"])
    assert results["machine"]["reduced"] and not results["machine"]["accelerator"]
    text = (folder / "device.txt").read_text()
    assert text == tables.text(results)
    assert "No accelerator was found" in text and "What failed" not in text
    for name in ("torch", "tokamax"):
        assert (results["versions"][name] is None) == (find_spec(name) is None)


def test_answers_are_within_tolerance(finished):
    found = rows(finished[1], "check")
    assert [(row["method"], row["dtype"]) for row in found] == [
        (method, dtype) for method in ("Affine", "RMSNorm") for dtype in ("bfloat16", "float32")
    ]
    for row in found:
        assert set(row["errors"]) == {"output", "state", "parameters", "input"}
        assert row["within"] and row["worst"] in row["errors"]
        assert all(row["errors"][k] <= row["tolerances"][k] for k in row["errors"])


def test_passes_are_timed_apart(finished):
    copy, *found = rows(finished[1], "bandwidth")
    assert copy["method"] == "copy" and copy["gb_s"] > 0
    assert [(row["method"], row["dtype"]) for row in found] == [
        ("RMSNorm", "bfloat16"),
        ("RMSNorm", "float32"),
    ]
    for row in found:
        assert row["passes"] == [2, 3] and {"normjax", "flax", "plain"} <= set(row["programs"])
        size = math.prod(row["shape"]) * jnp.dtype(row["dtype"]).itemsize
        for program in row["programs"].values():
            for direction, passes in zip(split.DIRECTIONS, row["passes"], strict=True):
                measured = program[direction]
                assert 0 < measured["ms_low"] <= measured["ms"] <= measured["ms_high"]
                speed = passes * size / measured["ms"] / 1e6
                assert measured["gb_s"] == pytest.approx(speed)
                assert measured["share"] == pytest.approx(speed / copy["gb_s"])
        for name in ("normjax", "flax", "plain"):
            assert row["programs"][name]["kept"] > 1
            assert all(row["programs"][name][d]["kernels"] >= 1 for d in split.DIRECTIONS)
            assert all(row["programs"][name][d]["bytes"] > 1 for d in split.DIRECTIONS)


def test_network_runs_in_its_own_process(finished):
    (row,) = rows(finished[1], "network")
    assert list(row["programs"]) == ["normjax, relu inside"] and row["batch"] == 2
    (found,) = row["programs"].values()
    assert 0 < found["ms_low"] <= found["ms"] <= found["ms_high"]
    assert found["temporary_bytes"] > 0 and found["compile_s"] > 0
    assert found["peak_bytes"] is None  # the CPU does not say


def test_no_time_leaves_everything_out(tmp_path, capsys):
    code, results = run(tmp_path, "--seconds", "0", "--methods", "RMSNorm", "--dtypes", "bfloat16")
    assert (code, results["rows"]) == (0, [])
    assert results["left_out"] == [
        "check: RMSNorm, rows",
        "bandwidth: copy",
        "bandwidth: RMSNorm 256x64 bfloat16",
        "network",
    ]
    printed = capsys.readouterr().out
    assert "Left out, for there was no time:\ncheck: RMSNorm, rows" in printed


def test_networks_that_come_too_late_are_named():
    time = budget.Budget(resnet.RESERVE / 2)
    assert resnet.measure(2, False, 1, time)["programs"] == {}
    assert time.left_out == [f"network: {arm}" for arm in resnet.ARMS]


def test_every_public_method_is_checked():
    parsed = {case: methods.parse(case) for case in device.CASES}
    kinds = {type(method).__name__ for method in parsed.values()}
    assert kinds == {*methods.OVER_ACTIVATIONS} - {"chain"}
    assert {name.partition("(")[0] for name in parsed} | {"Chain"} == {*methods.OVER_ACTIVATIONS}


@pytest.mark.slow
def test_every_case_is_within_tolerance():
    found = device.check(methods.OVER_ACTIVATIONS, device.DTYPES, True, budget.Budget(1e4))
    assert [row for row in found if not row["within"]] == []


class Wrong:
    """Scaled by `factor` in all precisions but float64."""

    def __init__(self, factor):
        self.factor = factor

    def init(self, key, features):
        return (), ()

    def apply(self, params, state, x, *, train):
        if self.factor is None:
            raise TypeError("no factor\nat all")
        return x if x.dtype == jnp.float64 else x * self.factor, state


@pytest.mark.parametrize(("factor", "error"), [(1.001, 1e-3), (jnp.nan, None), (1.0, 0)])
def test_wrong_answers_are_out_of_tolerance(factor, error):
    (row,) = device.compare("Wrong", Wrong(factor), "rows", ["float32"], True)
    assert row["within"] == (factor == 1.0)
    wanted = None if error is None else pytest.approx(error, rel=1e-3)
    assert row["errors"] == {"output": wanted, "input": wanted, "state": 0, "parameters": 0}


def test_one_rounding_is_no_error():
    exact = np.linspace(1, 2, 1000)
    for dtype, wanted in ((jnp.bfloat16, 0), (jnp.float16, 0)):
        assert device._error(exact.astype(dtype), exact) == wanted
    twice = (exact * (1 + 2**-7)).astype(jnp.bfloat16)
    assert 2**-9 < device._error(twice, exact) < 2**-7


def test_wrong_answers_and_failures_are_said(tmp_path, monkeypatch, capsys):
    wrong = [
        *device.compare("Wrong", Wrong(2.0), "rows", ["float32"], True),
        *device.compare("Broken", Wrong(None), "rows", ["float32"], True),
    ]
    monkeypatch.setattr(device, "check", lambda *_: iter(wrong))
    code, results = run(tmp_path, "--parts", "check")
    assert code == 1
    assert [row["within"] for row in results["rows"]] == [False, False]
    printed = capsys.readouterr().out
    assert "check Wrong rows float32: OUT OF TOLERANCE" in printed
    assert "input 1.0e+00  OUT" in printed and "2 answers, 2 out of tolerance" in printed
    assert "check Broken rows float32: OUT OF TOLERANCE: TypeError: no factor\n" in printed


def test_what_is_absent_or_fails_is_said():
    about = {"device": "card", "platform": "Linux", "accelerator": True, "reduced": False}
    programs = {
        "normjax": {"kept": 1.0, "forward": {}, "backward": {}},
        "tokamax": {"note": "NotImplementedError: no such kernel"},
    }
    row = {"part": "bandwidth", "method": "RMSNorm", "shape": [8, 4], "dtype": "float32"}
    text = tables.text(
        {
            "machine": about,
            "versions": {"jax": "1.0", "torch": None, "tokamax": None},
            "left_out": [],
            "rows": [
                {**row, "programs": programs},
                {**row, "note": "XlaRuntimeError: out of memory"},
                {"part": "network", "note": "OSError: gone"},
            ],
        }
    )
    assert text.startswith("card, Linux\njax 1.0\nabsent: torch, tokamax\n\n")
    assert "bandwidth RMSNorm 8x4 float32, tokamax: NotImplementedError: no such kernel" in text
    assert "bandwidth RMSNorm 8x4 float32: XlaRuntimeError: out of memory" in text
    assert "network: OSError: gone" in text


@pytest.mark.parametrize("method", [nj.BatchNorm(), nj.GroupNorm(32)])
def test_passes_give_what_one_program_gives(method):
    """Of everyone, for two inputs one after another."""
    shape = (4, 2, 2, 64)
    x, g = (
        tuple(jax.random.normal(jax.random.key(2 * i + j), shape) for i in range(2)) for j in (0, 1)
    )
    params, state = method.init(None, 64)

    @jax.jit
    def exactly(x, g):
        y, pullback = jax.vjp(lambda p, x: method.apply(p, state, x, train=True)[0], params, x)
        return y, *pullback(g)

    wanted = [exactly(*pair) for pair in zip(x, g, strict=True)]
    for name, arm in bandwidth._arms(type(method).__name__, shape):
        passes = split.Passes(*arm, x=x, g=g)
        compiled = {direction: low.compile() for direction, low in passes.lowered.items()}
        arguments = passes.arguments(compiled["forward"])
        forward, backward = (compiled[d](*arguments[d]) for d in split.DIRECTIONS)
        for (outputs, _), (dparams, dx), (y, exact, dx_exact) in zip(
            forward, backward, wanted, strict=True
        ):
            np.testing.assert_allclose(outputs[0], y, rtol=1e-5, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(dx, dx_exact, rtol=1e-5, atol=1e-5, err_msg=name)
            found = sorted(np.linalg.norm(a) for a in jax.tree.leaves(dparams))  # in any order
            norms = sorted(np.linalg.norm(a) for a in exact)
            np.testing.assert_allclose(found, norms, rtol=1e-4, err_msg=name)


HLO = """HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %exp = f32[8]{0} exponential(%p)
}

%buffer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %one = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %two = (f32[8]{0}, /*index=1*/s32[]) custom-call(%one), custom_call_target="x"
}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %reduce = f32[8]{0:T(8,128)} reduce(%p, %p), dimensions={0}, to_apply=%fused
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %view = f32[2,4]{1,0} bitcast(%x)
  %call = f32[8]{0} call(%x), to_apply=%buffer
  %copy-start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%call)
  %copy-done = f32[8]{0} copy-done(%copy-start)
  %loop = f32[8]{0} while(%copy-done), condition=%fused, body=%body
  ROOT %last = f32[8]{0} fusion(%loop), kind=kInput, calls=%fused
}
"""


def test_kernels_are_counted():
    assert split.kernels(HLO) == 2 + 1 + 1 + 1


def test_networks_have_the_same_parameters():
    images = jnp.zeros((1, 224, 224, 3), jnp.bfloat16)
    key = jax.random.key(0)

    def shapes(arm, **how):
        return jax.eval_shape(lambda: resnet.network(arm, **how).init(key, images, train=False))

    small = {"stages": (1,), "width": 4, "classes": 10}
    first, *others = (shapes(arm, **small) for arm in resnet.ARMS)
    assert others == [first, first]
    params = shapes("flax")["params"]
    assert sum(math.prod(a.shape) for a in jax.tree.leaves(params)) == 25_557_032


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "x"])
def test_refuses(seconds, capsys):
    with pytest.raises(SystemExit):
        device.main(["--seconds", seconds])
    assert f"--seconds: {seconds!r} is not a finite number >= 0" in capsys.readouterr().err


@pytest.mark.parametrize("module", [budget, split])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
