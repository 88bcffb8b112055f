"""Oracle of KalmanNorm, and the layers that its vectors were recorded from.

A prior is a pair or a `Moments`, of which the last two are mean and variance, [features].
"""

import numpy as np
import scipy.special
from oracles import ORACLES, f64, finish, layout, moments, momentum_at, update
from vector_files import LAYERS

import normjax as nj


@ORACLES("KalmanNorm")
def kalman_norm(method, params, state, x, mask, train, prior=None):
    leaf = layout(x.shape, method.axis).leaf
    mean, var = f64(state.mean, leaf), f64(state.var, leaf)
    if train:
        count, mean, var, errors = fuse(method, params, state, x, mask, prior)
        errors = {} if state.mean_error is None else errors
        kept = moved_errors(method, state, count, **errors)
        state = update(method, state, count, count, mean=mean, var=var)._replace(**kept)
    y = (np.where(mask, x, 0) - mean) / np.sqrt(var + method.epsilon)
    return finish(method, params, y, leaf), state


def fused(method, params, state, x, mask, prior=None):
    """Mean and variance, [features], that training normalizes by."""
    x, mask = f64(x), np.broadcast_to(True if mask is None else mask, x.shape)
    _, mean, var, _ = fuse(method, params, state, x, mask, prior)
    return tuple(a.reshape(np.shape(state.mean)) for a in (mean, var))


def posterior(params, features):
    """Mean and variance of the output, without an activation."""
    bias = np.zeros(features) if params.bias is None else f64(params.bias)
    return bias, np.ones(features) if params.scale is None else f64(params.scale) ** 2


def fuse(method, params, state, x, mask, prior):
    """Count, fused mean and variance, and the errors of the prediction by name."""
    _, axes, leaf = layout(x.shape, method.axis)
    count, mean, var = moments(x, mask, axes)
    if prior is None:
        return count, mean, var, {}
    given = predicted(method, params, prior, leaf)
    if method.guard is not None and not np.mean(given[1] / var) < method.guard:
        return count, mean, var, {}
    (q, p), gap = gains(method, params, state, count, leaf), mean - given[0]
    q, p = np.where(count > 0, q, 0), np.where(count > 0, p, 0)
    level = given[1] + method.epsilon
    wrong = np.log((var + method.epsilon) / level)
    errors = {"mean_error": gap**2 / level, "var_error": wrong**2}
    # Mean and variance of the mixture, if both gains are alike.
    mean = (1 - q) * given[0] + q * mean
    return count, mean, (1 - p) * given[1] + p * var + q * (1 - q) * gap**2, errors


def moved_errors(method, state, count, **errors):
    m, shape = momentum_at(method, state.count), np.shape(state.mean)
    moved = {}
    for name, error in errors.items():
        old = f64(getattr(state, name))
        new = m * old + (1 - m) * error.reshape(shape)
        moved[name] = np.where(count.reshape(shape) > 0, new, old)
    return moved


def predicted(method, params, prior, leaf):
    """Mean and variance of the shape of the batch's."""
    mean, var = map(f64, prior[-2:])
    if method.transition is not None:
        matrix = f64(params.transition_matrix)
        mean, var = mean @ matrix, var @ matrix**2 + np.exp(f64(params.transition_log_noise))
    return mean.reshape(leaf), var.reshape(leaf)


def gains(method, params, state, count, leaf):
    """Weights of the batch's mean and variance."""
    if method.gain == "learned":
        gain = 1 / (1 + np.exp(-f64(params.gain_logit)))
        return (gain.reshape(leaf) if gain.ndim else gain,) * 2
    if method.gain != "computed":
        return method.gain, method.gain
    n = np.maximum(method.effective_size or count, 1)
    freedom = np.maximum(n - 1, 1)  # of n values with a common mean
    offset = scipy.special.digamma(freedom / 2) - np.log(n / 2)
    noises = 1 / n, scipy.special.polygamma(1, freedom / 2) + offset**2
    found = []
    for error, noise in zip((state.mean_error, state.var_error), noises, strict=True):
        error = f64(error, leaf) if method.gain_per == "channel" else np.mean(f64(error))
        tau = np.maximum(error - noise, 0)
        found.append(tau / (tau + noise))
    return found


@LAYERS("kalman_norm")
def recorded_kalman_norm(config, arrays, common, running):
    own = {"gain": 1 - config["p_rate"], "guard": 100}
    own["unbiased_running_var"] = not config["has_prior"]
    method = nj.KalmanNorm(**common, **running, **own)
    parts = config["split"]
    return method if parts == 1 else nj.Ghost(method, parts, running="first")


def recorded_priors(config, arrays, step):
    """The recorded prediction of a step: moments of each part, [parts, features]; or None."""
    if not config["has_prior"]:
        return None
    shape = config["split"], arrays["x_1"].shape[-1]
    mean, var = (arrays[f"aux_{step}_prior_{part}"].reshape(shape) for part in ("mean", "var"))
    return nj.Moments(np.zeros(shape), mean, var)


def as_input(priors, method):
    """Moments of each part as the `prior` of a method: `EachPart` for a `Ghost`."""
    if priors is None:
        return None
    ghost = isinstance(method, nj.Ghost)
    return nj.EachPart(priors) if ghost else nj.Moments(*(a[0] for a in priors))
