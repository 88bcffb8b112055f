"""Methods from text."""

import doctest

import jax
import pytest

import normjax as nj
from benchmarks import methods


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("BatchNorm", nj.BatchNorm()),
        ("BatchNorm()", nj.BatchNorm()),
        ("BatchNorm(momentum=0.9, use_bias=False)", nj.BatchNorm(momentum=0.9, use_bias=False)),
        ("BatchNorm(axis=(-2, -1))", nj.BatchNorm(axis=(-2, -1))),
        ("BatchNorm(axis=[-2, -1])", nj.BatchNorm(axis=(-2, -1))),
        ('BatchNorm(running_average="debiased")', nj.BatchNorm(running_average="debiased")),
        ("BatchNorm(axis_name=None, epsilon=+1e-3)", nj.BatchNorm(epsilon=1e-3)),
        ("BatchNorm(activation=relu)", nj.BatchNorm(activation=jax.nn.relu)),
        ("Affine(scale_init=zeros)", nj.Affine(scale_init=jax.nn.initializers.zeros)),
        ("GroupNorm(num_groups=4)", nj.GroupNorm(num_groups=4)),
        ("Ghost(BatchNorm(), groups=4)", nj.Ghost(method=nj.BatchNorm(), groups=4)),
        (
            "Ghost(KalmanNorm(gain=0.1, guard=100), groups=64, running='first')",
            nj.Ghost(nj.KalmanNorm(gain=0.1, guard=100), groups=64, running="first"),
        ),
        ("Ghost(method=BatchNorm, groups=4)", nj.Ghost(method=nj.BatchNorm(), groups=4)),
        ("chain(LayerNorm(), Affine)", nj.chain(nj.LayerNorm(), nj.Affine())),
        ("Chain(methods=(RMSNorm(), Affine()))", nj.chain(nj.RMSNorm(), nj.Affine())),
        (
            "Ghost(chain(RMSNorm, BatchNorm(momentum=0.5)), groups=2)",
            nj.Ghost(method=nj.chain(nj.RMSNorm(), nj.BatchNorm(momentum=0.5)), groups=2),
        ),
        (
            "BatchRenorm(r_max=Ramp(start=1.0, stop=3.0, begin=5, end=9))",
            nj.BatchRenorm(r_max=nj.Ramp(1.0, 3.0, 5, 9)),
        ),
    ],
)
def test_parse(text, method):
    assert methods.parse(text) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("BatchNrom()", "unknown method 'BatchNrom'; did you mean 'BatchNorm'?"),
        (
            "qwertz",
            "unknown method 'qwertz'; known are AdaptiveInstanceNorm, AdaptiveLayerNorm, Affine",
        ),
        ("BatchNorm(momentun=0.9)", "BatchNorm has no field 'momentun'; did you mean 'momentum'?"),
        ("chain(LayerNorm(), epsilon=1)", "chain has no field 'epsilon'; known are none"),
        ("BatchNorm(momentum=2.0)", r"BatchNorm: momentum=2.0 is not in \[0, 1\]"),
        ("BatchNorm(momentum='x')", "BatchNorm: momentum='x' is not in"),
        ("BatchNorm(momentum=BatchNorm)", "BatchNorm: momentum=BatchNorm.* is not in"),
        ("BatchNorm(momentum=0.9, momentum=0.8)", "'momentum' is given twice"),
        ("BatchNorm(0.9)", "BatchNorm: the value '0.9' needs the name of its field"),
        ("Ghost(BatchNorm(), 4)", "Ghost: the value '4' needs the name of its field"),
        ("Ghost(BatchNorm(), method=LayerNorm(), groups=4)", "needs the name of its field"),
        ("Ghost(BatchNorm(), groups=0)", "Ghost: groups=0 is not a positive integer"),
        ("Ghost(groups=4)", "method"),
        ("Ghost(4, groups=4)", "Ghost: method=4 is not a method"),
        ("chain()", "Chain: methods=\\(\\) needs at least one method"),
        ("chain(LayerNorm(), 3)", "Chain: method=3 is not a method"),
        ("BatchNorm(**{'momentum': 0.9})", "BatchNorm has no field"),
        ("BatchNorm(*(1, 2))", "is no method, number"),
        ("BatchNorm(momentum={1: 2})", "is no method, number"),
        ("BatchNorm(momentum=1 + 1)", "is no method, number"),
        ("BatchNorm(momentum=not True)", "is no method, number"),
        ("BatchNorm(activation=jax.nn.relu)", "'jax.nn.relu' is no method, number"),
        ("BatchNorm.__init__", "is no method, number"),
        ("nj.BatchNorm()", r"'nj.BatchNorm\(\)' is no method, number"),
        ("BatchNorm().apply(1)", "is no method, number"),
        ("(lambda: 0)()", "is no method, number"),
        ("BatchNorm if True else LayerNorm", "is no method, number"),
        ("__import__('os').system('true')", "is no method, number"),
        ("print('x')", "unknown method 'print'"),
        (
            "relu",
            "'relu' is not a method; methods are AdaptiveInstanceNorm, AdaptiveLayerNorm, Affine",
        ),
        ("relu(3)", "unknown method 'relu'"),
        ("Ramp(start=1.0, stop=3.0, begin=5, end=9)", "is not a method"),
        ("Running()", "unknown method 'Running'"),
        ("3", "'3' is not a method"),
        ("BatchNorm(", "is not an expression such as"),
        ("BatchNorm(); LayerNorm()", "is not an expression such as"),
        ("BatchNorm(momentum=0.9", "is not an expression such as"),
        ("", "is not an expression such as"),
        ("(" * 500 + "1", "is not an expression such as"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["BatchNorm LayerNorm"], ["BatchNorm", "LayerNorm"]),
        (
            ["BatchNorm( momentum = 0.9 )  RMSNorm", "chain(LayerNorm(),Affine())"],
            ["BatchNorm(momentum=0.9)", "RMSNorm", "chain(LayerNorm(), Affine())"],
        ),
        (["Ghost(BatchNorm(), groups=4) Affine"], ["Ghost(BatchNorm(), groups=4)", "Affine"]),
        ([" "], []),
    ],
)
def test_split(arguments, found):
    assert methods.split(arguments) == found


def test_split_names_the_unfinished_part():
    with pytest.raises(ValueError, match=r"^'GroupNorm\(num_groups=4 Affine' is not an expression"):
        methods.split(["LayerNorm GroupNorm(num_groups=4 Affine"])


def test_every_public_method_is_known():
    fronts = {"BatchNorm", "BatchRenorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"}
    assert {*fronts, "Affine", "DynamicTanh", "Ghost", "Chain", "chain"} <= set(methods.METHODS)
    assert {"Running", "Moments", "Ramp"}.isdisjoint(methods.METHODS)


def test_about_is_a_line_for_each_link():
    one, other = nj.LayerNorm(), nj.Ghost(nj.BatchNorm(), groups=2)
    both = methods.about(nj.chain(one, other))
    assert both == f"{methods.about(one)} Then: {methods.about(other)}"
    assert both.startswith("Layer normalization") and "equal parts of the batch" in both


def test_examples():
    assert doctest.testmod(methods) == (0, 3)
