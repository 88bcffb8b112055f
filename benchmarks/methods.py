"""Methods from text such as `Ghost(BatchNorm(), groups=4)`, read without running it."""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Iterable
from typing import Any

import jax

import normjax as nj

CLASSES = {
    name: value
    for name, value in vars(nj).items()
    if isinstance(value, type) and dataclasses.is_dataclass(value)
}
FUNCTIONS = {
    name: getattr(jax.nn, name) for name in ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus")
} | {name: getattr(jax.nn.initializers, name) for name in ("zeros", "ones")}


def is_method(value: Any) -> bool:
    """Whether `value` has the two functions of a method."""
    return hasattr(value, "init") and hasattr(value, "apply")


def is_over_kernels(name: str) -> bool:
    """Whether the named method normalizes kernels, in place of activations."""
    traits = getattr(CLASSES.get(name), "traits", None)
    return isinstance(traits, nj.Traits) and traits.over == "kernel"


METHODS = sorted([name for name, cls in CLASSES.items() if is_method(cls)] + ["chain"])
OVER_ACTIVATIONS = [name for name in METHODS if not is_over_kernels(name)]


def split(arguments: Iterable[str]) -> list[str]:
    """The single methods in texts that hold one or several divided by spaces, spelt alike.

    Raises:
      ValueError: for text that is no expression.

    Example:
      >>> split(["Ghost( BatchNorm(),groups = 4) LayerNorm", "RMSNorm"])
      ['Ghost(BatchNorm(), groups=4)', 'LayerNorm', 'RMSNorm']
    """
    found = []
    for argument in arguments:
        pending = ""
        for word in argument.split():
            pending = f"{pending} {word}".strip()
            try:
                found.append(ast.unparse(_tree(pending)))
            except ValueError:
                continue
            pending = ""
        if pending:
            _tree(pending)
    return found


def parse(text: str) -> Any:
    """The method that `text` names: a public class of normjax with its fields, or `chain(...)`.

    Fields are given by name, and may be methods, numbers, strings, True, False, None, tuples, or
    one of `FUNCTIONS`; only the method inside a wrapper and the links of a chain go without a name.
    A method without parentheses has its defaults.

    Raises:
      ValueError: naming the text that is unknown or breaks a rule, with the name nearest to it.

    Example:
      >>> parse("chain(LayerNorm(use_bias=False), Affine)").methods[1].use_bias
      True
    """
    method = _value(_tree(text))
    if not is_method(method):
        raise ValueError(f"{text!r} is not a method; methods are {', '.join(METHODS)}")
    return method


def about(method: Any) -> str:
    """What `method` is, in a line.

    Example:
      >>> about(nj.BatchNorm())
      'Batch normalization: `(x - mean) / sqrt(var + epsilon) * scale + bias` over the batch.'
    """
    if isinstance(method, nj.Chain):
        return " Then: ".join(map(about, method.methods))
    return (inspect.getdoc(type(method)) or "").partition("\n")[0]


def _tree(text):
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError):
        raise ValueError(f"{text!r} is not an expression such as BatchNorm(momentum=0.9)") from None


def _value(node):
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return _call(name, node.args, node.keywords)
        case ast.Name(id=name) if name in FUNCTIONS:
            return FUNCTIONS[name]
        case ast.Name(id=name):
            return _call(name, [], [])
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(map(_value, parts))
        case ast.Constant() | ast.UnaryOp():
            try:
                return ast.literal_eval(node)
            except (ValueError, TypeError):
                pass
    raise ValueError(
        f"{ast.unparse(node)!r} is no method, number, string, True, False, None or tuple of these"
    )


def _call(name, args, keywords):
    if name not in CLASSES and name != "chain":
        raise ValueError(f"unknown method {name!r}{_nearest(name, [*METHODS, *FUNCTIONS])}")
    fields = {} if name == "chain" else {f.name for f in dataclasses.fields(CLASSES[name])}
    given = {}
    for keyword in keywords:
        if keyword.arg not in fields:
            wrong = keyword.arg or "**"
            raise ValueError(f"{name} has no field {wrong!r}{_nearest(wrong, sorted(fields))}")
        if keyword.arg in given:
            raise ValueError(f"{name}: the field {keyword.arg!r} is given twice")
        given[keyword.arg] = _value(keyword.value)
    values = [_value(arg) for arg in args]
    if values and name != "chain":
        if "method" not in fields or "method" in given or len(values) > 1:
            raise ValueError(
                f"{name}: the value {ast.unparse(args[-1])!r} needs the name of its field"
            )
        given["method"] = values.pop()
    try:
        return nj.chain(*values) if name == "chain" else CLASSES[name](**given)
    except (ValueError, TypeError) as error:
        raise ValueError(str(error)) from None


def _nearest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known) or 'none'}"
