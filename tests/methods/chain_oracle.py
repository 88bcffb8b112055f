"""Oracle of chain."""

from oracles import GRADIENTS, ORACLES, apply, gradients


def named(method):
    """The methods of a chain by name."""
    return {f"{type(one).__name__}_{i}": one for i, one in enumerate(method.methods)}


@ORACLES("Chain")
def chain(method, params, state, x, mask, train):
    new = {}
    for name, one in named(method).items():
        x, new[name] = apply(one, params[name], state[name], x, train=train, mask=mask)
    return x, new


@GRADIENTS("Chain")
def chain_gradients(method, params, state, x, g, mask):
    inputs, dscale, dbias = {}, {}, {}
    for name, one in named(method).items():
        inputs[name] = one, x
        x, _ = apply(one, params[name], state[name], x, train=True, mask=mask)
    for name, (one, x) in reversed(inputs.items()):
        g, dscale[name], dbias[name] = gradients(one, params[name], state[name], x, g, mask=mask)
    return g, dscale, dbias
