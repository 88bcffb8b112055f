"""Moments pushed through the layers of a network: what the statistics behind a layer should be.

Wang, Peng, Luo, Wang & Lin, *Kalman Normalization*, 2018, https://arxiv.org/abs/1802.03133, predict
the statistics of a layer from those of the one before. The functions here take the mean and the
variance of every channel, of shape [..., C] with any leading axes (groups of a batch, say), and
return those of the output of one layer, with a count of zero: they were not taken from samples.
What is no `Moments` is a TypeError, arrays that do not fit are a ValueError. Besides the products
with a kernel the work is O(C): no map is made.

The assumptions: channels are independent of one another and normally distributed, positions of a
map are independent and alike, and the output of every layer is taken to be so again. Under them all
is exact but what the docstrings call approximate. Derivatives are finite also where a variance is
zero.
"""

from normjax.propagate.activations import activation, relu
from normjax.propagate.layers import (
    add,
    affine,
    average_pool,
    concatenate,
    conv,
    dense,
    max_pool,
)
from normjax.propagate.moments import prediction

__all__ = [
    "activation",
    "add",
    "affine",
    "average_pool",
    "concatenate",
    "conv",
    "dense",
    "max_pool",
    "prediction",
    "relu",
]
