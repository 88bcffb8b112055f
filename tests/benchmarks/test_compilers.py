"""The compilers for absent devices: programs written by hand, tables, and stored figures.

The compilers are optional extras. The slow tests compile a few layers again where they are
installed, and skip where they are not.
"""

import doctest
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import speed
from benchmarks.compilers import __main__ as command
from benchmarks.compilers import hlo, layers, memory, networks, targets, traffic, weights, work

RESULTS = Path(command.__file__).parents[1] / "results" / "compilers"

# A GPU's program: a fusion that reads a slice twice, a library call, a loop that updates in place.
GPU = """HloModule jit_f, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

FileNames
1 "a(b).py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sampled (p0: bf16[8,4], p1: f32[4]) -> (f32[4], f32[4,2]) {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %view = bf16[4,8]{1,0} bitcast(%p0)
  %wide = f32[4,8]{1,0} convert(%view)
  %few = f32[4,2]{1,0} slice(%wide), slice={[0:4], [0:8:4]}
  %again = bf16[1,4]{1,0} slice(%p0), slice={[7:8], [0:4]}
  %zero = f32[] constant(0)
  %total = f32[4]{0} reduce(%few, %zero), dimensions={1}, to_apply=%add
  %less = f32[4]{0} subtract(%total, %p1)
  ROOT %both = (f32[4]{0}, f32[4,2]{1,0}) tuple(%less, %few)
}

%update (p0: f32[6,8], p1: f32[8], p2: s32[]) -> f32[6,8] {
  %p0 = f32[6,8]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%p1)
  %zero = s32[] constant(0)
  ROOT %new = f32[6,8]{1,0} dynamic-update-slice(%p0, %row, %p2, %zero)
}

%body (carry: (s32[], f32[6,8], f32[8])) -> (s32[], f32[6,8], f32[8]) {
  %carry = (s32[], f32[6,8]{1,0}, /*index=2*/f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[6,8]{1,0} get-tuple-element(%carry), index=1
  %row = f32[8]{0} get-tuple-element(%carry), index=2
  %stacked = f32[6,8]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%update
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[6,8]{1,0}, f32[8]{0}) tuple(%next, %stacked, %row)
}

%condition (carry: (s32[], f32[6,8], f32[8])) -> pred[] {
  %carry = (s32[], f32[6,8]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %most = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%buffer (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %negated = f32[8]{0} negate(%q)
}

ENTRY %main.1 (x: bf16[8,4], m: f32[4]) -> (f32[6,8], f32[4,4]) {
  %x = bf16[8,4]{1,0} parameter(0), metadata={op_name="x = (1)"}
  %m = f32[4]{0} parameter(1)
  %part = (f32[4]{0}, f32[4,2]{1,0}) fusion(%x, %m), kind=kInput, calls=%sampled
  %few = f32[4,2]{1,0} get-tuple-element(%part), index=1
  %row = f32[8]{0} bitcast(%few)
  %called = f32[8]{0} call(%row), to_apply=%buffer
  %product = (f32[4,4]{1,0}, s8[64]{0}) custom-call(%few, %few), custom_call_target="__cublas$gemm"
  %square = f32[4,4]{1,0} get-tuple-element(%product), index=0
  %zero = s32[] constant(0)
  %start = f32[6,8]{1,0} broadcast(%zero), dimensions={}
  %carry = (s32[], f32[6,8]{1,0}, f32[8]{0}) tuple(%zero, %start, %called)
  %loop = (s32[], f32[6,8]{1,0}, f32[8]{0}) while(%carry), condition=%condition, body=%body, NOTE
  %stack = f32[6,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %out = (f32[6,8]{1,0}, f32[4,4]{1,0}) tuple(%stack, %square)
}
""".replace("NOTE", 'backend_config={"known_trip_count":{"n":"6"}}')

# A TPU's program: prefetches to memory on the chip, padded layouts, operations between chips.
TPU = """HloModule jit_g, is_scheduled=true

%scaled (p0: f32[5,100], p1: f32[5,100]) -> f32[5,100] {
  %p0 = f32[5,100]{1,0:T(8,128)S(1)} parameter(0)
  %p1 = f32[5,100]{1,0:T(8,128)} parameter(1)
  ROOT %y = f32[5,100]{1,0:T(8,128)} multiply(%p0, %p1)
}

ENTRY %main (x: f32[5,100], b: f32[100]) -> (f32[5,100], f32[100]) {
  %x = f32[5,100]{1,0:T(8,128)} parameter(0)
  %b = f32[100]{0:T(128)} parameter(1)
  %fetch = (f32[5,100]{1,0:T(8,128)S(1)}, f32[5,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[5,100]{1,0:T(8,128)S(1)} copy-done(%fetch)
  %rows = ((f32[5,100]{1,0}), f32[1,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1]}
  %row = f32[1,100]{1,0:S(1)} slice-done(%rows)
  %y = f32[5,100]{1,0:T(8,128)} fusion(%near, %x), kind=kLoop, calls=%scaled
  %sums = (f32[100]{0:T(128)}, f32[5,100]{1,0:T(8,128)}) all-reduce-start(%b, %y)
  %done = (f32[100]{0:T(128)}, f32[5,100]{1,0:T(8,128)}) all-reduce-done(%sums)
  %b2 = f32[100]{0:T(128)} get-tuple-element(%done), index=0
  %gather = (f32[100]{0:T(128)}, f32[200]{0:T(256)}) all-gather-start(%b2), dimensions={0}
  %wide = f32[200]{0:T(256)} all-gather-done(%gather)
  %y2 = f32[5,100]{1,0:T(8,128)} get-tuple-element(%done), index=1
  ROOT %out = (f32[5,100]{1,0:T(8,128)}, f32[200]{0:T(256)}) tuple(%y2, %wide)
}
"""


def test_slices_updates_and_loops_of_a_gpu_are_counted():
    part, called, product, start, loop = (40, 48), (32, 32), (32, 64), (4, 192), (6 * 44, 6 * 36)
    read, written = map(sum, zip(part, called, product, start, loop, strict=True))
    kernels = 4 + 6 * 2
    wanted = traffic.Traffic(read, written, workspace=64, kernels=kernels, collectives={})
    assert traffic.count(GPU) == wanted


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        (("", ""), 6),
        (("direction=LT", "direction=LE"), 7),
        (("%one = s32[] constant(1)", "%one = s32[] constant(4)"), 2),
        (("%zero = s32[] constant(0)\n  %start", "%zero = s32[] constant(5)\n  %start"), 1),
    ],
)
def test_loops_without_a_note_are_counted_by_their_counter(change, runs):
    text = GPU.replace("known_trip_count", "other").replace(*change)
    loop = traffic.count(text).kernels - 4
    assert loop == 2 * runs


@pytest.mark.parametrize(
    "change",
    [
        ("%most = s32[] constant(6)", "%most = s32[] get-tuple-element(%carry), index=0"),
        ("direction=LT", "direction=NE"),
        ("%next = s32[] add", "%next = s32[] multiply"),
        ("tuple(%zero, %start, %called)", "custom-call(%zero, %start, %called)"),
    ],
)
def test_loops_that_run_nobody_knows_how_often_are_refused(change):
    text = GPU.replace("known_trip_count", "other").replace(*change)
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        traffic.count(text)


def test_a_slice_counts_in_full_if_the_rest_is_read_too():
    whole = GPU.replace("reduce(%few", "reduce(%wide")
    more = traffic.count(whole).read - traffic.count(GPU).read
    assert more == 2 * (32 - 12)


def test_an_update_that_is_not_returned_is_no_update_in_place():
    copied = GPU.replace("  ROOT %new", "  %new").replace(
        "dynamic-update-slice(%p0, %row, %p2, %zero)",
        "dynamic-update-slice(%p0, %row, %p2, %zero)\n  ROOT %minus = f32[6,8]{1,0} negate(%new)",
    )
    more = traffic.count(copied), traffic.count(GPU)
    assert more[0].read - more[1].read == 6 * 4 * 48
    assert more[0].written - more[1].written == 6 * 4 * (48 - 8)


def test_other_tiles_in_a_fusion_are_a_view():
    retile = """
%retile (p: f32[6,8]) -> f32[6,8] {
  %p = f32[6,8]{1,0} parameter(0)
  ROOT %tiles = f32[6,8]{1,0} copy(%p)
}

%body ("""
    tiles = "  %tiles = f32[6,8]{1,0} fusion(%p0), kind=kLoop, calls=%retile\n  ROOT %new"
    text = GPU.replace("\n%body (", retile).replace("  ROOT %new", tiles)
    text = text.replace("dynamic-update-slice(%p0", "dynamic-update-slice(%tiles")
    assert traffic.count(text) == traffic.count(GPU)
    more = traffic.count(text.replace("} copy(%p)", "} negate(%p)"))
    assert more.read - traffic.count(GPU).read == 6 * 4 * 48


def test_memory_on_the_chip_padding_and_collectives_of_a_tpu_are_counted():
    tiles, vector, wide = 4 * 8 * 128, 4 * 128, 4 * 256
    read = tiles + tiles // 5 + tiles + (vector + tiles) + vector
    written = 0 + 0 + tiles + (vector + tiles) + wide
    found = traffic.count(TPU)
    assert (found.read, found.written, found.kernels) == (read, written, 5)
    assert found.collectives == {
        "all-reduce": {"operations": 1, "operands": 2, "bytes": 4 * (100 + 500)},
        "all-gather": {"operations": 1, "operands": 1, "bytes": 400},
    }


def test_the_larger_branch_of_a_conditional_counts():
    text = """
%small (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

%large (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} negate(%p)
}

ENTRY %main (which: pred[], x: f32[8]) -> f32[8] {
  %which = pred[] parameter(0)
  %x = f32[8]{0} parameter(1)
  ROOT %y = f32[8]{0} conditional(%which, %x, %x), true_computation=%small, false_computation=%large
}
"""
    assert traffic.count(text) == traffic.Traffic(32, 32, 0, 1, {})
    listed = "branch_computations={%small, %large}"
    text = text.replace("true_computation=%small, false_computation=%large", listed)
    assert traffic.count(text) == traffic.Traffic(32, 32, 0, 1, {})


@pytest.mark.parametrize(
    ("text", "bits", "padded", "space"),
    [
        ("f32[]", 32, (), 0),
        ("pred[3]{0:T(512)}", 8, (512,), 0),
        ("bf16[2,3,5]{0,1,2:T(8,128)(2,1)S(1)}", 16, (5, 8, 128), 1),
        ("s32[7]{0:T(8,128)}", 32, (8, 128), 0),
        ("f8e4m3fn[<=4,2]{1,0}", 8, (4, 2), 0),
        ("c64[2]", 64, (2,), 0),
        ("token[]", 0, (), 0),
        ("f32[4,2]{0,1}", 32, (2, 4), 0),
    ],
)
def test_types(text, bits, padded, space):
    found = hlo.parse_shape(text)
    assert isinstance(found, hlo.Array)
    assert (found.bits, found.padded, found.space) == (bits, padded, space)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("HloModule empty", "no entry computation"),
        ("ENTRY %main (x: f32[]) -> f32[] {\n  what\n}", "no instruction of HLO: 'what'"),
        ("ENTRY %main (x: f32[]) -> f32[] {\n  %a = f32[] add(%x\n}", "is not closed"),
    ],
)
def test_text_that_is_no_program_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        hlo.parse(text)


@pytest.mark.parametrize("module", [hlo, traffic, layers, memory])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


def figures(scale, **more):
    """What a program might move."""
    numbers = ("read", "written", "kernels", "temporaries", "accessed")
    return {**{n: scale * (i + 1) for i, n in enumerate(numbers)}, "collectives": {}, **more}


def layer_row(**more):
    programs = {
        peer: {"kept": scale, **{name: figures(scale) for name in layers.PASSES}}
        for peer, scale in (("normjax", 8), ("flax", 16))
    }
    case = {"method": "LayerNorm", "shape": [2, 4], "dtype": "float32", "input": 8}
    return {**case, "bound": layers.bound("LayerNorm"), "programs": programs, **more}


SUM = {"all-reduce": {"operations": 2, "operands": 3, "bytes": 2048}}
ROWS = {
    "layers": [layer_row(), {"method": "RMSNorm", "shape": [2, 4], "note": "OSError: [gone]"}],
    "networks": [
        {"network": "net", "norms": "flax", **figures(10, seconds=2.0)},
        {"network": "net", "norms": "normjax", **figures(5, seconds=3.0)},
    ],
    "memory": [
        {"network": "net", "norms": "flax", **figures(8, kept=64, products=100)},
        {"network": "net", "norms": "normjax", **figures(8, kept=16, products=107)},
    ],
    "weights": [{"network": "net", "norms": "flax", **figures(10)}],
    "pods": [
        {
            "slice": "v5e:2x2",
            "chips": 4,
            "layout": "data",
            "norm": "BatchNorm",
            "programs": {"flax": figures(1), "normjax": figures(1, collectives=SUM)},
        }
    ],
}


@pytest.fixture
def compiled(monkeypatch):
    """A process that says `ROWS`, whatever it is asked for."""

    def messages(target, options):
        for section in options.only:
            yield "section", section, {"command": "c", "versions": {}}, len(ROWS[section])
            for row in ROWS[section]:
                yield "case", "words"
                yield "row", row

    monkeypatch.setattr(work, "messages", messages)
    monkeypatch.setattr(targets.Target, "missing", lambda self: None)


def test_files_tables_and_plot(compiled, tmp_path, capsys):
    run = ["--topology", "v5e", "v5e:16x16", "--output", str(tmp_path)]
    assert command.main(run) == 1  # for one did not compile
    assert {p.name for p in tmp_path.iterdir()} == {"v5e.json", "v5e-16x16.json", "layers.png"}
    printed = capsys.readouterr().out
    for words in (
        "3.0 (6.0, 2)",  # (read + written) / input, and the bound
        "24/24/24/24",
        "0.50",
        "1.50",
        "0.25",  # of what is kept
        "1.07",
        "2 / 3 / 2 (0)",
        "v5e:16x16: RMSNorm [2, 4]: OSError: [gone]",
    ):
        assert words in printed, words


def test_sections_that_are_not_compiled_stay(compiled, tmp_path):
    file = tmp_path / "v5e.json"
    file.write_text(json.dumps({"topology": "v5e", "pods": "kept", "networks": "replaced"}))
    run = ["--topology", "v5e", "--only", "networks", "--output", str(tmp_path)]
    assert command.main(run) == 0
    found = json.loads(file.read_text())
    assert found["pods"] == "kept" and found["networks"]["rows"] == ROWS["networks"]
    assert not (tmp_path / "layers.png").exists()


def test_what_is_not_installed_is_said(monkeypatch, tmp_path, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert command.main(["--topology", "v5e", "--output", str(tmp_path)]) == 2
    wanted = "v5e needs libtpu: pip install -e '.[benchmarks,compilers-tpu]'"
    assert wanted in capsys.readouterr().err
    assert command.main(["--output", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert all(f"left out: {name} needs" in printed for name in targets.DEFAULTS)
    assert "H100 needs jax-cuda12-plugin: pip install -e '.[benchmarks,compilers-cuda]'" in printed


def test_targets():
    kinds = {name: targets.Target(name).kind for name in ("v5e", "v6e:4x4", "H100")}
    assert kinds == {"v5e": "tpu", "v6e:4x4": "tpu", "H100": "cuda"}
    assert targets.Target("v5e").pods == ("v5e:2x2", "v5e:8x8", "v5e:16x16")
    assert targets.Target("v6e:4x4").pods == ("v6e:4x4",) and targets.Target("H100").pods == ()
    assert targets.Target("v6e:4x4").file == "v6e-4x4.json"


def test_every_layer_has_its_programs():
    assert set(layers.CASES) <= set(speed.CASES)
    for method, shapes in layers.CASES.items():
        small = (16, *shapes[0][1:-1], 32)
        x = jax.ShapeDtypeStruct(small, jnp.bfloat16)
        for params, rest, apply in layers.arms(method, small, "bfloat16").values():
            y, _ = jax.eval_shape(apply, params, rest, x)
            assert (y.shape, y.dtype) == (small, jnp.bfloat16)


SMALL = {
    "ResNet-50": {"batch": 2, "size": 32, "stages": (1,)},
    "U-Net, GroupNorm": {"shape": (2, 8, 8, 3), "widths": (32, 64)},
}


@pytest.mark.parametrize("name", [*SMALL, "transformer, LayerNorm, recomputed"])
def test_networks_differ_in_their_norms_alone(name):
    make, arms = networks.CASES[name]
    how = SMALL.get(name, {"shape": (2, 8, 32), "layers": 2, "heads": 2})
    first, *others = (jax.eval_shape(step, *args) for step, args in (make(a, **how) for a in arms))
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("arm", "learned", "kept"),
    [
        ("flax WeightNorm", 1, 0),
        ("normjax WeightNorm", 1, 0),
        ("flax SpectralNorm", 0, 2),
        ("normjax SpectralWeightNorm", 0, 1),
    ],
)
def test_wrapped_networks_have_something_for_each_kernel(arm, learned, kept):
    small = {"batch": 2, "size": 16, "stages": (1,), "width": 8}
    (step, arguments), (_, (plain, *_)) = (weights.residual(a, **small) for a in (arm, "flax"))
    old, new = arguments[0], jax.eval_shape(step, *arguments)[0]
    alike = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), old, new)
    assert all(jax.tree.leaves(alike))
    count = lambda tree: len(jax.tree.leaves(tree))
    more = [count(a) - count(b) for a, b in zip(old[:2], plain[:2], strict=True)]
    assert more == [6 * learned, 6 * kept]


FEW = {
    "16 scanned blocks": {"shape": (2, 4, 4, 32), "blocks": 2},
    "12 scanned layers": {"shape": (2, 8, 32), "layers": 2, "heads": 2},
    "ResNet-50 by blocks": {"batch": 2, "size": 32, "stages": (1,), "width": 8},
}


@pytest.mark.parametrize("name", FEW)
def test_policies_keep_less_and_repeat_more(name):
    make, arms = memory.CASES[name]
    found = {}
    for arm in ("flax", "normjax", "normjax, checkpoint_policy()"):
        loss, arguments = make(*arms[arm], **FEW[name])
        step = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*arguments)
        found[arm] = memory.kept(loss, *arguments), memory.products(step.jaxpr)
    plain, ours, policy = found.values()
    assert plain[0] > ours[0] > policy[0]
    assert plain[1] == ours[1] < policy[1] < 1.34 * ours[1]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "module"), [("v5e", "libtpu"), ("H100", "jax_cuda12_plugin")])
def test_stored_figures_are_those_of_the_compiler(topology, module, tmp_path):
    pytest.importorskip(module, reason="the compiler is an optional extra, and not installed")
    stored = json.loads((RESULTS / f"{topology}.json").read_text())["layers"]
    for package, version in stored["versions"].items():
        if importlib.metadata.version(package) != version:
            pytest.skip(f"the stored figures are those of {package} {version}")
    methods = ["BatchNorm", "LayerNorm"]
    run = [
        "--topology",
        topology,
        "--only",
        "layers",
        "--dtypes",
        "bfloat16",
        "--methods",
        *methods,
    ]
    assert command.main([*run, "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / f"{topology}.json").read_text())["layers"]["rows"]
    wanted = [
        row for row in stored["rows"] if row["method"] in methods and row["dtype"] == "bfloat16"
    ]
    assert rows == wanted


@pytest.mark.slow
def test_a_topology_that_the_compiler_does_not_know_is_refused(tmp_path, capsys):
    pytest.importorskip("libtpu", reason="the compiler is an optional extra, and not installed")
    assert command.main(["--topology", "v9:2x2", "--output", str(tmp_path)]) == 2
    assert "no topology 'v9:2x2'" in capsys.readouterr().err
