"""Image data sets from disk: scikit-learn's digits, folders of images, CIFAR-10 binary files."""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 0  # of the split, the subset and the label noise: the same data for every seed of a run
SUFFIXES = (".jpg", ".jpeg", ".png")
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
RECORD = 1 + 3 * 32 * 32


class Data(NamedTuple):
    """Images u8[N, H, W, C] and labels i32[N] of three parts, and the class names."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    validation_images: np.ndarray | None = None
    validation_labels: np.ndarray | None = None


def load(
    kind: str,
    folder: str | None = None,
    *,
    train_size: int | None = None,
    validation: float = 0.0,
    label_noise: float = 0.0,
) -> Data:
    """One of the data sets, with fewer train images and with wrong train labels if asked for.

    Args:
      kind: "digits", "images" or "cifar10-bin".
      folder: where the files of the last two are.
      train_size: how many train images to keep, in the proportions of the classes; None: all.
      validation: fraction of these to keep apart, in the proportions of the classes too.
      label_noise: fraction of the train labels that become another class.

    Raises:
      ValueError: naming the file or number, and the rule that it breaks.
    """
    if kind == "digits":
        if folder is not None:
            raise ValueError(f"--data-dir {folder!r} needs --data images or cifar10-bin")
        data = digits()
    elif folder is None:
        raise ValueError(f"--data {kind} needs --data-dir, the folder of the files")
    elif not Path(folder).is_dir():
        raise ValueError(f"--data-dir {folder!r} is not a folder")
    else:
        data = {"images": images, "cifar10-bin": cifar10}[kind](Path(folder))
    if train_size is not None:
        data = _subset(data, train_size)
    if validation:
        data = _keep_apart(data, validation)
    return data._replace(
        train_labels=flip_labels(data.train_labels, label_noise, len(data.classes))
    )


def describe(data: Data) -> dict[str, Any]:
    """What results say about the data, with a check sum of the images and labels."""
    return {
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "shape": list(data.train_images.shape[1:]),
        "classes": list(data.classes),
        "crc32": zlib.crc32(b"".join(part.tobytes() for part in data[:4])),
    }


def digits() -> Data:
    """8x8 handwritten digits with pixels 0..16: 1,257 to train, 540 to test, a stratified split."""
    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    images, labels = pixels.astype(np.uint8).reshape(-1, 8, 8, 1), labels.astype(np.int32)
    which = np.arange(len(labels))
    split = train_test_split(which, test_size=0.3, stratify=labels, random_state=SEED)
    train, test = map(np.asarray, split)
    names = tuple(map(str, range(10)))
    return Data(images[train], labels[train], images[test], labels[test], names)


def images(folder: Path) -> Data:
    """RGB images of one size, JPEG or PNG, in `train/<class>/` and `test/<class>/` of `folder`."""
    train, test = _classes(folder / "train"), _classes(folder / "test")
    if train.keys() != test.keys():
        odd = sorted(train.keys() ^ test.keys())[0]
        where = "train" if odd in train else "test"
        raise ValueError(
            f"{folder}: class {odd!r} is in {where}/ alone; train and test need the same"
        )
    shape = _read(next(iter(train.values()))[0]).shape
    return Data(*_stack(train, shape), *_stack(test, shape), tuple(train))


def cifar10(folder: Path) -> Data:
    """CIFAR-10 in its binary version: data_batch_1.bin to data_batch_5.bin and test_batch.bin."""
    train = [_records(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    test_images, test_labels = _records(folder / "test_batch.bin")
    return Data(images, labels, test_images, test_labels, tuple(CIFAR_CLASSES))


def flip_labels(labels: np.ndarray, fraction: float, classes: int) -> np.ndarray:
    """`labels` with `round(fraction * N)` of them moved to another class, each equally likely."""
    rng = np.random.default_rng(SEED)
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    flipped = labels.copy()
    flipped[chosen] = (labels[chosen] + rng.integers(1, classes, len(chosen))) % classes
    return flipped


def _subset(data, size):
    total, classes = len(data.train_labels), len(data.classes)
    if not classes <= size <= total:
        raise ValueError(
            f"--train-size {size} is not between {classes}, the number of classes, and {total}, "
            "the number of train images"
        )
    return _only(data, _mixed(data)[:size])


def _keep_apart(data, fraction):
    total, classes = len(data.train_labels), len(data.classes)
    size = total - round(fraction * total)
    if not classes <= size <= total - classes:
        raise ValueError(
            f"--validation {fraction} keeps {total - size} of {total} train images apart: these "
            f"and the others must be at least {classes}, the number of classes"
        )
    order = _mixed(data)
    apart = order[size:]
    return _only(data, order[:size])._replace(
        validation_images=data.train_images[apart], validation_labels=data.train_labels[apart]
    )


def _only(data, chosen):
    return data._replace(
        train_images=data.train_images[chosen], train_labels=data.train_labels[chosen]
    )


def _mixed(data):
    """Indices of the train images in random order, every part in the proportions of the classes."""
    total = len(data.train_labels)
    share = np.empty(total)
    order = np.random.default_rng(SEED).permutation(total)
    for label in range(len(data.classes)):
        members = order[data.train_labels[order] == label]
        share[members] = np.arange(len(members)) / len(members)
    return np.argsort(share, kind="stable")


def _classes(folder):
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; images are looked for in {folder}/<class>/")
    classes = {}
    for part in sorted(p for p in folder.iterdir() if p.is_dir()):
        classes[part.name] = sorted(p for p in part.iterdir() if p.suffix.lower() in SUFFIXES)
        if not classes[part.name]:
            raise ValueError(f"{part} holds no image ({', '.join(SUFFIXES)})")
    if len(classes) < 2:
        raise ValueError(f"{folder} holds {len(classes)} class folders; at least 2 are needed")
    return classes


def _stack(classes, shape):
    images, labels = [], []
    for label, files in enumerate(classes.values()):
        for file in files:
            images.append(_read(file))
            labels.append(label)
            if images[-1].shape != shape:
                found, first = (f"{s[1]}x{s[0]}" for s in (images[-1].shape, shape))
                raise ValueError(f"{file} has {found} pixels, the first image {first}: not alike")
    return np.stack(images), np.array(labels, np.int32)


def _read(file):
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"{file} cannot be read as an image") from None


def _records(file):
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    raw = np.fromfile(file, np.uint8)
    if not raw.size or raw.size % RECORD:
        raise ValueError(f"{file} has {raw.size} bytes, no multiple of the {RECORD} of a record")
    records = raw.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise ValueError(f"{file}: record {labels.argmax()} has the label {labels.max()}, above 9")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
