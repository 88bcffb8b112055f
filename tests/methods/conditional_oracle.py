"""Conditional norms in NumPy and float64, and the reference vectors of them."""

import numpy as np
import oracles
import vector_files

import normjax as nj


def conditioned(method, params, state, x, scale, bias, *, train=True, mask=None):
    """Output and state of `method`, then `scale` and `bias`, which broadcast to `x`."""
    y, state = oracles.apply(method, params, state, x, train=train, mask=mask)
    return y * scale + bias, state


def adaptive_instance(x, style, epsilon, scale=1.0, bias=0.0, ddof=1):
    """Of images: the statistics of `style` for those of `x`, with an affine map between."""
    (mean, std), (style_mean, style_std) = (
        (a.mean((1, 2), keepdims=True), np.sqrt(a.var((1, 2), keepdims=True, ddof=ddof) + epsilon))
        for a in (np.float64(x), np.float64(style))
    )
    return ((x - mean) / std * scale + bias) * style_std + style_mean


class Recorded:
    """A file of the vectors: method, parameters, further inputs, and gradients by their names."""

    def __init__(self, name):
        self.config, self.arrays = vector_files.load(name)
        self.kind = vector_files.INDEX[name]["method"]
        common = {"epsilon": self.config["eps"]}
        if "momentum" in self.config:
            common |= {"momentum": 1 - self.config["momentum"], "unbiased_running_var": True}
        self.method, self.input = self._method(common)

    def _method(self, common):
        config = self.config
        classes = config.get("num_classes")
        if self.kind.startswith("nas_"):
            classes = config["num_prev_ops"] ** config["num_prev_nodes"]
        match self.kind:
            case "conditional_batch_norm":
                return nj.ConditionalBatchNorm(num_classes=classes, **common), "labels"
            case "nas_conditional_batch_norm":
                return nj.ConditionalBatchNorm(num_classes=classes, **common), "prev_ops"
            case "sandwich_batch_norm":
                return nj.SandwichBatchNorm(classes, **common), "labels"
            case "aux_batch_norm":
                return nj.AuxBatchNorm(config["num_branches"], **common), "branch"
            case "sandwich_aux_batch_norm":
                return nj.SandwichAuxBatchNorm(config["num_branches"], **common), "branch"
            case "nas_sandwich_batch_norm" if self.shared_alone:
                return nj.MultiStats(nj.BatchNorm(**common), classes), "prev_ops"
            case "nas_sandwich_batch_norm":
                return nj.SandwichAuxBatchNorm(classes, **common), "prev_ops"
            case "adain":
                return nj.AdaptiveInstanceNorm(**common), "style"
            case "sandwich_adain":
                return nj.SandwichAdaptiveInstanceNorm(**common), "style"

    @property
    def shared_alone(self):
        """Whether the layer is one without rows of its own."""
        return bool(self.config.get("first_layer") and self.config.get("is_node_zero"))

    def params(self, prefix="param_"):
        """The arrays that begin with `prefix` as parameters of the method."""
        given = {k.removeprefix(prefix): a for k, a in self.arrays.items() if k.startswith(prefix)}
        shared = nj.AffineParams(given.get("scale"), given.get("bias"))
        if self.kind in ("adain", "sandwich_adain") or self.shared_alone:
            return shared
        if self.kind == "aux_batch_norm":
            branches = range(self.config["num_branches"])
            rows = [np.stack([given[f"{k}_{i}"] for i in branches]) for k in ("scale", "bias")]
            return nj.ConditionedParams(nj.AffineParams(), nj.AffineParams(*rows))
        rows = np.split(given["embed"], 2, -1)
        if self.kind == "sandwich_aux_batch_norm":
            shared = nj.AffineParams(*(a[-1] for a in rows))
            rows = [a[:-1] for a in rows]
        return nj.ConditionedParams(shared, nj.AffineParams(*rows))

    def inputs(self, step):
        """Further inputs of `apply`."""
        value = self.arrays[f"aux_{step}_{self.input}"]
        if self.input == "prev_ops":
            value = nj.operation_index(value, self.config["num_prev_ops"])
        branched = "branch" in self.method.traits.inputs
        names = {"labels": "condition", "prev_ops": "branch" if branched else "condition"}
        return {names.get(self.input, self.input): value}
