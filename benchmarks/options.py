"""Command line of `benchmarks.compare`, and what others share with it."""

import argparse
import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks import methods, models, recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """What decides the results of a comparison; the defaults are those of the command line."""

    methods: tuple[str, ...] = (
        "BatchNorm",
        "LayerNorm",
        "GroupNorm(num_groups=4)",
        "chain(BatchNorm, SpectralBatchNorm)",
        "GhostNoiseBatchNorm(ghost_batch_size=16)",
        "KalmanNorm(gain=0.5)",
        "BatchRenorm(r_max=3.0, d_max=5.0)",
    )
    model: tuple[str, ...] = models.MODELS
    placement: str = "all"
    seeds: int = 5
    epochs: int = 15
    batch_size: int = 32
    statistics_batch: int | None = None
    label_noise: float = 0.0
    validation: float = 0.0
    both_modes: bool = False
    train_size: int | None = None
    learning_rate: float = 0.1
    data: str = "digits"
    data_dir: str | None = None
    augment: bool = True
    width: int = 16
    depth: int = 1
    posterior: models.Posterior = "output"
    recipe: tuple[str, ...] = ()


def read(argv: Sequence[str]) -> dict[str, Any]:
    """The options that `argv` gives, under the names of `Config`, and `output` and `resume`.

    Raises:
      ValueError: naming the option, its value and the rule that it breaks.
    """
    given = vars(_parser().parse_args(argv))
    if "methods" in given:
        try:
            given["methods"] = methods.split(given["methods"])
            for text in given["methods"]:
                methods.parse(text)
        except ValueError as error:
            raise ValueError(f"--methods: {error}") from None
    if "recipe" in given:
        given["recipe"] = [" ".join(arm.split()) for arm in given["recipe"]] or recipe.ARMS
        try:
            for arm in given["recipe"]:
                recipe.parse(arm)
        except ValueError as error:
            raise ValueError(f"--recipe: {error}") from None
        given.setdefault("methods", recipe.METHODS)
    for name in given.keys() & {"methods", "model", "recipe"}:
        values = given[name] = tuple(given[name])
        if not values:
            raise ValueError(f"--{name} names none")
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"--{name} names {value} more than once")
    return given


class Studies(argparse.ArgumentParser):
    """The command line of a benchmark that is made of studies, with `studies` and `output`."""

    def __init__(self, benchmark: str, description: str | None, studies: Collection[str]):
        super().__init__(
            prog=f"python -m benchmarks.{benchmark}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.names = studies
        text = f"some of: {', '.join(studies)} (default: all)"
        self.add_argument("studies", nargs="*", metavar="STUDY", help=text)
        self.add_argument("--output", type=Path, default=Path("runs") / benchmark)

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, with each study once; ends the program for a name that is none."""
        options = self.parse_args(argv)
        unknown = [name for name in options.studies if name not in self.names]
        if unknown:
            self.error(f"{unknown[0]!r} is no study; there are {', '.join(self.names)}")
        options.studies = list(dict.fromkeys(options.studies)) or list(self.names)
        return options


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _parser():
    parser = _Parser(
        prog="python -m benchmarks.compare",
        description="Trains small networks with several normalization methods and compares them.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def option(name, text, **how):
        value = getattr(Config, name.replace("-", "_"), None)
        if value not in (None, ()):
            text += f" (default: {' '.join(value) if isinstance(value, tuple) else value})"
        parser.add_argument(f"--{name}", help=text, **how)

    text = "methods with their fields, such as 'Ghost(BatchNorm(), groups=4)'"
    option("methods", text, nargs="+", metavar="METHOD")
    option("model", "networks", nargs="+", choices=models.MODELS)
    text = "where the methods stand: in all layers, or in the last stage behind BatchNorm ones"
    option("placement", text, choices=models.PLACEMENTS)
    option("seeds", "number of seeds", type=whole)
    option("epochs", "number of epochs", type=whole)
    option("batch-size", "images per gradient step", type=whole)
    option("statistics-batch", "images per statistics, a divisor of --batch-size", type=whole)
    option("label-noise", "fraction of train labels made wrong", type=fraction)
    option("train-size", "number of train images to keep", type=whole)
    text = "fraction of the train images, with right labels, that are not trained on; the accuracy "
    text += "on them goes to results.json"
    option("validation", text, type=fraction)
    text = "note the accuracy on train images in training mode and in evaluation, in results.json"
    option("both-modes", text, action="store_true")
    option("learning-rate", "highest learning rate of the schedule", type=rate)
    option("data", "data set", choices=("digits", "images", "cifar10-bin"))
    option("data-dir", "folder of train/<class>/*.jpg and test/..., or of CIFAR-10 binary files")
    text = "crop train images at random, and flip those that are no digits"
    option("augment", text, action=argparse.BooleanOptionalAction)
    option("width", "channels of the first stage of the residual network", type=whole)
    option("depth", "blocks per stage of the residual network", type=whole)
    text = "moments that Kalman norms hand on: of the output, or those that normalized the input"
    option("posterior", text, choices=get_args(models.Posterior))
    text = "train each method with small, slow norm scales too: words g0=, c=, temperature=, last, "
    text += f"input_norm such as 'g0=0.1 c=100' (without arms: {'; '.join(recipe.ARMS)})"
    option("recipe", text, nargs="*", metavar="ARM")
    option("output", "folder for the results (default: the next free runs/<data>-<number>)")
    text = "continue the interrupted run in --output, by default the last under runs/"
    option("resume", text, action="store_true")
    return parser


def whole(text: str) -> int:
    """The positive integer that an option of any benchmark says."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def fraction(text: str) -> float:
    """The number from 0 to below 1 that an option of any benchmark says."""
    return _number(text, "a fraction in [0, 1)", lambda value: 0 <= value < 1)


def rate(text: str) -> float:
    """The positive number that an option of any benchmark says."""
    return _number(text, "a finite number > 0", lambda value: 0 < value < math.inf)


def _number(text, rule, holds):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not holds(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {rule}")
    return value
