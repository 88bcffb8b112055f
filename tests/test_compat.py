"""Without an internal of JAX everything is right, and one warning says which is missing."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import without
from cases import CASES
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from test_contract import LONG

import normjax as nj
from normjax.core import compat
from normjax.testing import CHECKS

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "normjax"

REMOVE = "import jax.experimental.layout, jax.extend.core\ndel {}"
REFUSE = "import jax.extend.core\ndef refuse(*_): raise TypeError('refused: {0}')\n{0} = refuse"
# An attribute that JAX needs is hidden from the package alone.
HIDE = """
def look(self, name, get={0}.__getattribute__):
    if name == "{1}" and sys._getframe(1).f_globals["__name__"] == "normjax.core.compat":
        raise AttributeError(name)
    return get(self, name)
import jax.interpreters.mlir
{0}.__getattribute__ = look
"""
AVAL, MODULE, SHARDING = (
    "type(jax.typeof(0.0))",
    "jax.interpreters.mlir.ModuleContext",
    "jax.interpreters.mlir.ShardingContext",
)
CPU, COPIES = "sums and transforms take longer on CPUs", "transforms copy arrays once more on CPUs"
INTERNALS = {  # name: code that takes it away, and what the warning says that it costs
    **{
        f"jax.{name}": (REMOVE.format(f"jax.{name}"), compat.AUTODIFF)
        for name in (
            "extend.core.Primitive",
            "interpreters.ad.Zero",
            "interpreters.ad.instantiate_zeros",
            "interpreters.ad.is_undefined_primal",
            "interpreters.ad.primitive_jvps",
            "interpreters.ad.primitive_transposes",
            "interpreters.batching.bdim_at_front",
            "interpreters.batching.primitive_batchers",
            "interpreters.mlir.lower_fun",
            "interpreters.mlir.register_lowering",
        )
    },
    "def_impl": (REFUSE.format("jax.extend.core.Primitive.def_impl"), compat.AUTODIFF),
    "manual_axis_type": (HIDE.format(AVAL, "manual_axis_type"), compat.AUTODIFF),
    "axis_context": (HIDE.format(MODULE, "axis_context"), CPU),
    "num_devices": (HIDE.format(SHARDING, "num_devices"), CPU),
    "lowering_parameters": (HIDE.format(MODULE, "lowering_parameters"), CPU),
    "Layout": (REMOVE.format("jax.experimental.layout.Layout"), COPIES),
    "with_layout_constraint": (
        REMOVE.format("jax.experimental.layout.with_layout_constraint"),
        COPIES,
    ),
    "Tracer": (REMOVE.format("jax.core.Tracer"), "errors about traced fields are JAX's own"),
}
FAST = ("jax.interpreters.ad.Zero", "def_impl", "manual_axis_type", "num_devices", "Layout")


def run(code, **environment):
    """The warnings and the results of a process that runs `code` before it imports the package."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "without.py"), code],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found, ruled):
    """Outputs and gradients are those of the equations, with rules of the passes or without."""
    for name, (method, shape, mask, _) in without.methods(nj).items():
        params, state, x, g, mask = without.point(method, shape, mask)
        y, _ = oracles.apply(method, params, state, x, train=True, mask=mask)
        dx, *rest = oracles.gradients(method, params, state, x, g, mask=mask)
        expected = [y, *rest, dx]
        assert found[name][0] == ruled, name
        for ours, theirs in zip(found[name][1], expected, strict=True):
            chex.assert_trees_all_close(np.array(ours), theirs, rtol=2e-5, atol=2e-5)


def each_internal():
    for name in INTERNALS:
        yield pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(each_internal()))
def test_without_an_internal(name):
    code, cost = INTERNALS[name]
    told, found = run(code)
    assert len(told) == 1, told
    assert name.rpartition(".")[2] in told[0]
    assert cost in told[0]
    check(found, ruled=cost != compat.AUTODIFF)


def test_with_all_of_them_and_with_the_switch():
    check(without.results(nj), ruled=True)
    told, found = run("", NORMJAX_PLAIN="1")
    assert told == []
    check(found, ruled=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, switch", (("", "1"), (INTERNALS["jax.extend.core.Primitive"][0], "0"))
)
def test_the_contract_holds_without_rules(code, switch):
    """Every head of the table, in all that is fast; test_contract.py says what cannot hold."""
    heads = [name for name, case in CASES.items() if case.tier == 1]
    tests = [
        f"tests/test_contract.py::test_contract[{name}-{promise}]"
        for name in heads
        for promise in CHECKS
        if promise not in LONG
    ]
    options = ["-n0", "-q", "-W", "ignore:normjax finds", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport pytest\nraise SystemExit(pytest.main({options}))"],
        cwd=TESTS.parent,
        env={**os.environ, "NORMJAX_PLAIN": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    skipped = int(re.search(r"(\d+) skipped", done.stdout)[1])
    assert skipped == len(heads), done.stdout


@pytest.mark.parametrize("checked", (True, False))
def test_sums_are_known_by_their_names(checked):
    """Those that a policy of `jax.checkpoint` keeps."""
    norm = nj.BatchNorm(axis_name="d")
    run = lambda x: jnp.sum(norm.apply(*norm.init(None, 4), x, train=True)[0])
    step = jax.shard_map(
        lambda x: lax.psum(jax.value_and_grad(run)(x)[0], "d"),
        mesh=AbstractMesh((2,), ("d",), axis_types=(AxisType.Auto,)),
        in_specs=PartitionSpec("d"),
        out_specs=PartitionSpec(),
        check_vma=checked,
    )
    program = str(jax.make_jaxpr(step)(jnp.ones((4, 4))))
    sums = set(re.findall(r"\b(\w*sums?\w*)\[", program))
    assert sums == {"reduce_sum", "normjax_sums", "psum_invariant" if checked else "psum"}
    primitive = lambda name: types.SimpleNamespace(name=name)
    assert all(compat.is_sum(primitive(name)) for name in sums)
    assert not compat.is_sum(primitive("mul"))


def test_what_is_dear_to_make_again_is_known(monkeypatch):
    """Names and descriptions of primitives, for `training.checkpoint_policy`."""

    def run(a, image, kernel):
        matrix = jnp.einsum("bij,kij->bk", a, a) + jnp.linalg.cholesky(a[0])
        return matrix, jnp.linalg.eigh(a[1]), lax.conv(image, kernel, (1, 1), "SAME")

    image, kernel = jnp.ones((2, 6, 4, 4)), jnp.ones((5, 6, 3, 3))
    equations = list(every(jax.make_jaxpr(run)(jnp.ones((3, 3, 3)), image, kernel).jaxpr))
    found = [
        compat.factors(e.primitive, *(v.aval for v in e.invars), **e.params) for e in equations
    ]
    assert sorted(n for n in found if n) == [9, 54]
    costly = {e.primitive.name for e in equations if compat.is_costly(e.primitive)}
    assert costly == {"eigh", "cholesky"}
    monkeypatch.setattr(compat, "_told", set())
    product = types.SimpleNamespace(name="dot_general")
    with pytest.warns(RuntimeWarning, match="checkpoint_policy keeps no products"):
        assert compat.factors(product, image, image, dimension_numbers=None) == 0


def every(jaxpr):
    """The equations of a jaxpr, inside of others too."""
    for equation in jaxpr.eqns:
        yield equation
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            yield from every(inner) if hasattr(inner, "eqns") else ()


# What JAX says may change, by dotted name, and attributes of its objects.
INTERNAL = re.compile(r"(jax\.(interpreters|extend|experimental|core|_src)|jaxlib|flax\.nnx\.nn)\b")
ATTRIBUTES = ("manual_axis_type", "vma", "module_context", "axis_context", "num_devices", "_trace")
ELSEWHERE = {"testing/derivatives.py": "jax.extend.core"}  # programs as data: no fall-back


def touched(text):
    """Internals that a file names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in ATTRIBUTES:
                yield node.attr
        else:
            continue
        yield from filter(INTERNAL.match, names)


def test_no_other_file_touches_internals():
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in touched(path.read_text())
    }
    assert {name for file, name in found if file == "core/compat.py"}
    others = {(file, name) for file, name in found if file != "core/compat.py"}
    assert all(name.startswith(ELSEWHERE.get(file, "-")) for file, name in others), others


@pytest.mark.parametrize(
    "line",
    (
        "from jax.interpreters import ad",
        "from jax import core",
        "import jax._src.core as c",
        "def f():\n    from jax.experimental.pallas import tpu",
        "x = jax.extend.core.Primitive('x')",
        "from flax.nnx.nn import dtypes",
        "y = jax.typeof(x).manual_axis_type",
    ),
)
def test_a_touched_internal_is_found(line):
    assert list(touched(line))
    assert not list(touched("from jax import lax\nfrom flax import nnx\ny = jax.numpy.core"))
