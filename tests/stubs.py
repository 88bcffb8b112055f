"""Writes the type stubs of the two front ends from the methods' fields: `python -m tests.stubs`."""

import dataclasses
import inspect
import pathlib
import sys
import typing

import normjax
from normjax import linen, nnx

PACKAGE = pathlib.Path(normjax.__file__).parent
HEAD = '''"""{title}; written by `python -m tests.stubs`."""

from collections.abc import {abstract}
from typing import Any, Literal

import jax
from flax import {front} as flax_{front}

'''
WRAPPER = {
    "linen": """class NormalizedKernels(flax_linen.Module):
    module: flax_linen.Module
    method: Any
    patterns: tuple[str, ...] | None = ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def step(self, variables: Any) -> dict[str, Any]: ...
    def wrap(self, variables: Any, key: Any = None) -> dict[str, Any]: ...
    def unwrap(self, variables: Any) -> dict[str, Any]: ...
""",
    "nnx": """class NormalizedKernels(flax_nnx.Module):
    module: flax_nnx.Module
    patterns: tuple[str, ...] | None
    kernels: Any
    kernel_stats: Any
    def __init__(
        self,
        module: flax_nnx.Module,
        method: Any,
        patterns: tuple[str, ...] | None = None,
        *,
        rngs: flax_nnx.Rngs | None = None,
    ) -> None: ...
    @property
    def method(self) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def step(self) -> None: ...
    def unwrap(self) -> Any: ...
""",
}
FRONT = """    def method_of(self) -> Any: ...
    def unpack(self, x: Any) -> tuple[Any, Any]: ...
    def evaluates(self, use_running_average: bool | None) -> bool: ...
"""
CALL = """    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        **inputs: Any,
    ) -> jax.Array: ...
"""


def kind(field):
    """The annotation of a field as source text."""
    parts = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Union else ()
    texts = [inspect.formatannotation(part) for part in parts or (field.type,)]
    text = field.type if isinstance(field.type, str) else " | ".join(texts)
    for name in ("collections.abc.", "typing.", "jax._src.basearray.", "jaxlib._jax."):
        text = text.replace(name, "")
    text = text.replace("jax.Array", "Array").replace("Array", "jax.Array")
    return text.replace("NoneType", "None").replace("'", '"')


def default(field):
    """`= ...`, or nothing for a field that must be given."""
    return "" if field.default is dataclasses.MISSING else " = ..."


def linen_class(name, cls):
    """Source text of one Linen module class."""
    own = [f for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]
    if cls is linen.Front:
        return f"class Front(flax_linen.Module):\n{FRONT}{CALL}"
    lines = [f"    {f.name}: {kind(f)}{default(f)}" for f in own]
    return "\n".join([f"class {name}(Front):", *lines]) + "\n"


def nnx_class(name, cls):
    """Source text of one NNX module class."""
    if issubclass(cls, nnx.nnx.Variable):
        return f"class {name}(flax_nnx.Intermediate[Any]): ...\n"
    if name == "Norm":
        head = ["method: Any", "num_features: int | tuple[int, ...]", "*"]
        tail = ["metadata: Mapping[str, Mapping[str, Any]] | None = None"]
        fields, readable = [], ["method: Any"]
    else:
        method = getattr(normjax, name)
        every = dataclasses.fields(method)
        head = ["num_features: int | tuple[int, ...]"]
        head += [f"{f.name}: {kind(f)}{default(f)}" for f in every if not f.kw_only] + ["*"]
        fields = [f"{f.name}: {kind(f)}{default(f)}" for f in every if f.kw_only]
        tail = [f"{part}_metadata: Mapping[str, Any] = ..." for part in ("scale", "bias")]
        if hasattr(nnx.nnx, name):
            tail += ["use_fast_variance: bool = ...", "promote_dtype: Any = ..."]
        readable = [f"{f.name}: {kind(f)}" for f in every]
    arguments = [*head, "use_running_average: bool = False", "rngs: flax_nnx.Rngs", *fields, *tail]
    lines = [f"class {name}(Norm):" if name != "Norm" else "class Norm(flax_nnx.Module):"]
    lines += [f"    {field}" for field in readable]
    if name == "Norm":
        lines += ["    num_features: int | tuple[int, ...]", "    use_running_average: bool"]
    lines += ["    def __init__(", "        self,"] + [f"        {a}," for a in arguments]
    lines += ["    ) -> None: ..."]
    if name == "Norm":
        lines += [CALL.rstrip()]
        lines += ["    def unpack(self) -> tuple[Any, Any]: ..."]
        lines += ["    def pack(self, state: Any) -> None: ..."]
        lines += ["    def set_view(self, use_running_average: bool | None = None) -> None: ..."]
        lines += ["    def __getattr__(self, name: str) -> Any: ..."]
    return "\n".join(lines) + "\n"


def stubs():
    """Source text of both stub files by path."""
    fronts = {"linen": (linen, linen_class), "nnx": (nnx, nnx_class)}
    files = {}
    for front, (module, write) in fronts.items():
        title = f"Every method as a Flax {'NNX' if front == 'nnx' else 'Linen'} module"
        abstract = "Callable, Mapping" if front == "nnx" else "Callable"
        names = sorted(module.__all__, key=lambda name: (name not in ("Front", "Norm"), name))
        parts = [
            WRAPPER[front] if n == "NormalizedKernels" else write(n, getattr(module, n))
            for n in names
        ]
        exported = "".join(f'    "{name}",\n' for name in module.__all__)
        text = HEAD.format(title=title, front=front, abstract=abstract) + "\n".join(parts)
        path = pathlib.Path(module.__file__).with_suffix(".pyi")
        files[path] = text + f"\n__all__ = [\n{exported}]\n"
    return files


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text)
        sys.stdout.write(f"{path.name}\n")
