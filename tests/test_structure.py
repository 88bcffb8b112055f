"""The one-way order of imports, the documentation of every public name, and the wheel."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "normjax"

# A module may import only from the layers listed before its own; a folder stands for its files.
LAYERS = [
    ["core.structs", "core.compat"],
    ["core.checks", "core.sharding"],
    ["core.gpu", "core.groups"],
    ["core.cpu", "core.method", "core.statistics"],
    ["core.fields", "core.linear", "core.segments", "core.tracing"],
    ["core.variance", "core.roots"],
    ["core.passes", "core.running"],
    ["core.seam", "core.matrices"],
    ["core.__init__"],
    ["propagate.borders", "propagate.moments"],
    ["propagate"],
    ["propagate.__init__"],
    ["methods.spectral.transforms"],
    ["methods.spectral.spatial", "methods.spectral.bands"],
    ["methods.batch", "methods.layer", "methods.dynamic", "methods.weights"],
    ["methods.group"],
    ["methods.conditional"],
    ["methods", "methods.spectral"],
    ["methods.__init__"],
    ["__init__"],
    ["testing.measure", "testing.subject"],
    ["paths"],
    ["kernels"],
    ["linen", "nnx", "optim", "testing"],
    ["testing.__init__"],
    ["modules", "observers"],
    ["folding"],
    ["population", "folding.__init__", "interop"],
    ["training.placement", "training.memory", "training.models"],
    ["linen.carry"],
    ["training"],
    ["training.microbatches", "training.checkpoints"],
    ["training.__init__"],
    ["analysis.layers", "analysis.figures", "analysis.programs", "analysis.geometry.values"],
    ["analysis.geometry.rules", "analysis.geometry.cells", "analysis.geometry.planes"],
    ["analysis.geometry.program"],
    ["analysis.geometry.subdivision"],
    ["analysis.geometry.partition"],
    ["analysis.geometry.networks", "analysis.geometry.switches"],
    ["analysis.geometry.margins"],
    ["analysis.geometry"],
    ["analysis.geometry.pictures"],
    ["analysis.geometry.__init__"],
    ["analysis"],
    ["analysis.__init__"],
]
RANKS = {f"normjax.{name}": rank for rank, layer in enumerate(LAYERS) for name in layer}


def module_name(path, package):
    return ".".join(("normjax", *path.relative_to(package).with_suffix("").parts))


def rank(module):
    if module not in RANKS:
        module = module.rpartition(".")[0]
    return RANKS.get(module)


def imports(path, package):
    """The modules that a file imports, inside functions too; packages end in __init__."""
    here = module_name(path, package).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) + 1 - node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield resolve(name, package)


def resolve(name, package):
    """The module that holds a dotted name; of other packages, the package."""
    first, *rest = name.split(".")
    if first != "normjax":
        return first
    while rest:
        path = package.joinpath(*rest)
        if path.with_suffix(".py").exists():
            return ".".join((first, *rest))
        if path.is_dir():
            break
        rest.pop()
    return ".".join((first, *rest, "__init__"))


def violations(package):
    """What breaks the order of imports in a package folder, one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = module_name(path, package)
        if rank(name) is None:
            found.append(f"{name} has no place in the order")
            continue
        allowed = third_party(name)
        for other in imports(path, package):
            if not other.startswith("normjax."):
                if other not in allowed:
                    found.append(f"{name} imports {other}")
            elif (
                rank(other) is None
                or rank(other) >= rank(name)
                or is_testing(other) > is_testing(name)
            ):
                found.append(f"{name} imports {other}")
    return found


def is_testing(name):
    """Whether a module is of `normjax.testing`, which no other may import."""
    return name.startswith("normjax.testing")


def third_party(name):
    dependencies = project()["dependencies"]
    if rank(name) <= RANKS["normjax.__init__"]:
        dependencies = ["jax", "numpy"]
    elif is_testing(name):
        dependencies = ["jax", "numpy", "chex"]
    elif name == "normjax.interop":
        dependencies = [*dependencies, "safetensors"]
    elif name == "normjax.training.checkpoints":
        dependencies = [*dependencies, "orbax"]
    elif name.startswith("normjax.analysis."):
        dependencies = [*dependencies, "matplotlib"]
    return sys.stdlib_module_names | {re.match(r"[\w.-]+", text)[0] for text in dependencies}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_imports_run_one_way():
    assert len(list(PACKAGE.rglob("*.py"))) > 10
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/structs.py", "import flax"),
        ("core/structs.py", "def f():\n    import optax"),
        ("core/checks.py", "from normjax.core import passes"),
        ("core/groups.py", "from .passes import moments"),
        ("core/groups.py", "from . import running"),
        ("core/passes.py", "import normjax.methods.batch"),
        ("core/passes.py", "import normjax"),
        ("core/unheard.py", ""),
        ("methods/batch.py", "from normjax.methods.row import LayerNorm"),
        ("methods/batch.py", "import normjax as nj"),
        ("methods/row.py", "from chex import assert_shape"),
        ("__init__.py", "from normjax import linen"),
        ("linen.py", "from normjax import nnx"),
        ("linen.py", "import torch"),
        ("nnx.py", "from .training import step"),
        ("training.py", "from normjax.testing import check"),
        ("testing.py", "import flax.linen"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line):
    layers = """core/structs core/checks core/passes core/groups core/running core/__init__
        methods/batch methods/row methods/__init__ __init__ linen nnx training testing"""
    for name in layers.split():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert len(violations(tmp_path)) == 1


def test_import_normjax_brings_no_framework():
    code = "import sys, normjax; print(sorted({'flax', 'optax', 'chex'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def public_modules():
    """The package, its front ends and tools; of `propagate` and the like the package alone."""
    names = [module_name(path, PACKAGE).removesuffix(".__init__") for path in PACKAGE.rglob("*.py")]
    hidden = re.compile(
        r"normjax\.(core|methods|paths|kernels"
        r"|(folding|propagate|testing|training|analysis\.geometry)\.)"
    )
    return sorted(name for name in names if not hidden.match(name))


def public_objects():
    """Every public name but submodules."""
    for module in map(importlib.import_module, public_modules()):
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("module", public_modules())
def test_public_module_says_what_it_is(module):
    module = importlib.import_module(module)
    assert len(module.__doc__ or "") >= 40
    assert len(set(module.__all__)) == len(module.__all__)
    defined = {
        name
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    assert defined <= set(module.__all__)


def example_of(thing):
    names = dict(vars(inspect.getmodule(thing)))
    return doctest.DocTestParser().get_doctest(thing.__doc__, names, thing.__name__, None, 0)


@pytest.mark.parametrize("thing", list(public_objects()))
def test_public_name_has_documentation_with_an_example(thing):
    text = thing.__doc__ or ""
    assert len(text) >= 40
    assert not text.startswith(f"{thing.__name__}("), "the docstring that dataclasses generate"
    assert example_of(thing).examples, "no example"


def different_examples():
    """Public names; of those with the same example, such as a method and its modules, the first."""
    found = {}
    for param in public_objects():
        source = [e.source for e in example_of(param.values[0]).examples]
        found.setdefault("".join(source), param)
    return list(found.values())


@pytest.mark.parametrize("thing", different_examples())
def test_examples_run(thing):
    example, report = example_of(thing), []
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(
        example, out=report.append
    )
    assert not failed, "".join(report)


def methods():
    import normjax

    things = [getattr(normjax, name) for name in normjax.__all__]
    return [
        thing for thing in things if dataclasses.is_dataclass(thing) and hasattr(thing, "apply")
    ]


@pytest.mark.parametrize("method", methods())
def test_method_names_its_paper_and_its_fields(method):
    assert re.search(r"https?://\S+", method.__doc__)
    undocumented = [
        field.name
        for field in dataclasses.fields(method)
        if not re.search(rf"(?m)^\s+(\w+,\s+)*{field.name}(,\s+\w+)*:", method.__doc__)
    ]
    assert undocumented == []


@pytest.mark.parametrize("method", methods())
def test_every_field_has_a_rule(method):
    assert [
        field.name for field in dataclasses.fields(method) if "rule" not in field.metadata
    ] == []


def test_functions_fit_a_screen():
    long = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def test_package_is_finished_and_safe():
    banned = re.compile(r"\b(TO|FIX)(DO|ME)\b|\bpickle\b|(?<![\w.])(eval|exec)\(")
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if banned.search(line)
    ]
    assert lines == []


def test_wheel_holds_the_package_alone(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = ("*.py", "*.pyi", "py.typed")
    expected = {str(p.relative_to(ROOT)) for kind in kinds for p in PACKAGE.rglob(kind)}
    assert files == expected
    assert {"normjax/py.typed", "normjax/linen/__init__.pyi", "normjax/nnx.pyi"} <= files


def test_a_new_method_stands_in_six_files():
    from tests.places import places

    assert len(places("Derf")) <= 6
