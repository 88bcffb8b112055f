"""Training of Flax models with norms, on one device or many: steps, placement, memory."""

from normjax.training.checkpoints import restore as restore
from normjax.training.checkpoints import save as save
from normjax.training.memory import checkpoint_policy as checkpoint_policy
from normjax.training.microbatches import accumulate as accumulate
from normjax.training.microbatches import statistics_accumulator as statistics_accumulator
from normjax.training.placement import pad_batch as pad_batch
from normjax.training.placement import place as place
from normjax.training.placement import placement as placement
from normjax.training.placement import shard_batch as shard_batch
from normjax.training.steps import Loss as Loss
from normjax.training.steps import Metrics as Metrics
from normjax.training.steps import Step as Step
from normjax.training.steps import TrainState as TrainState
from normjax.training.steps import create_train_state as create_train_state
from normjax.training.steps import make_eval_step as make_eval_step
from normjax.training.steps import make_train_step as make_train_step
from normjax.training.steps import measure as measure
from normjax.training.steps import replicate as replicate

__all__ = [
    "Loss",
    "Metrics",
    "Step",
    "TrainState",
    "accumulate",
    "checkpoint_policy",
    "create_train_state",
    "make_eval_step",
    "make_train_step",
    "measure",
    "pad_batch",
    "place",
    "placement",
    "replicate",
    "restore",
    "save",
    "shard_batch",
    "statistics_accumulator",
]
