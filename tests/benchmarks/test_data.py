"""Data sets from files made here."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import data


def write(folder, part, name, count=2, size=(6, 4), suffix="png", value=0):
    """`count` images of one colour per class and part."""
    (folder / part / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((size[1], size[0], 3), value + i, np.uint8)
        Image.fromarray(pixels).save(folder / part / name / f"{i}.{suffix}")


@pytest.fixture
def tree(tmp_path):
    for part in ("train", "test"):
        write(tmp_path, part, "cat", value=10)
        write(tmp_path, part, "dog", count=3, value=20, suffix="PNG")
    return tmp_path


def record(label, value=0):
    return bytes([label]) + bytes([value]) * 1024 + bytes([value + 1]) * 1024 + bytes(1024)


@pytest.fixture
def binary(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}.bin").write_bytes(record(i, 7) + record(9))
    (tmp_path / "test_batch.bin").write_bytes(record(3))
    return tmp_path


def test_digits():
    digits = data.load("digits")
    assert digits.train_images.shape == (1257, 8, 8, 1)
    assert digits.test_images.shape == (540, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 16)
    share = np.bincount(digits.train_labels) / np.bincount(digits.test_labels)
    np.testing.assert_allclose(share, 7 / 3, atol=0.1)
    again = data.load("digits")
    assert all(np.array_equal(a, b) for a, b in zip(digits[:4], again[:4], strict=True))


def test_images(tree):
    found = data.load("images", str(tree))
    assert found.classes == ("cat", "dog")
    assert found.train_images.shape == (5, 4, 6, 3)
    np.testing.assert_array_equal(found.train_images[:, 0, 0, 0], [10, 11, 20, 21, 22])
    np.testing.assert_array_equal(found.test_labels, [0, 0, 1, 1, 1])
    assert (found.train_images.dtype, found.train_labels.dtype) == (np.uint8, np.int32)


def test_jpeg_and_gray_images(tmp_path):
    for part in ("train", "test"):
        write(tmp_path, part, "cat", suffix="jpg", value=100)
        (tmp_path / part / "dog").mkdir()
        Image.new("L", (6, 4), 50).save(tmp_path / part / "dog" / "gray.jpeg")
    found = data.load("images", str(tmp_path))
    assert found.train_images.shape == (3, 4, 6, 3)
    np.testing.assert_allclose(found.train_images[:, 1, 1, 2], [100, 101, 50], atol=2)


def test_other_files_are_ignored(tree):
    (tree / "train" / "cat" / "notes.txt").write_text("no image")
    (tree / "train" / "list.csv").write_text("no class")
    assert len(data.load("images", str(tree)).train_labels) == 5


def test_broken_folders(tree):
    def check(message):
        with pytest.raises(ValueError, match=message):
            data.load("images", str(tree))

    write(tree, "test", "fox")
    check("class 'fox' is in test/ alone; train and test need the same")
    write(tree, "train", "fox", size=(6, 5))
    check(r"train/fox/0.png has 6x5 pixels, the first image 6x4")
    write(tree, "train", "fox")
    assert len(data.load("images", str(tree)).classes) == 3
    file = tree / "train" / "dog" / "1.PNG"
    file.write_bytes(file.read_bytes()[:50])
    check("train/dog/1.PNG cannot be read as an image")
    file.write_text("no image")
    check("train/dog/1.PNG cannot be read as an image")
    (tree / "train" / "ape").mkdir()
    check("train/ape holds no image")
    (tree / "train").rename(tree / "training")
    check("train is missing; images are looked for in")


def test_one_class(tmp_path):
    for part in ("train", "test"):
        write(tmp_path, part, "cat")
    with pytest.raises(ValueError, match="train holds 1 class folders; at least 2 are needed"):
        data.load("images", str(tmp_path))


def test_cifar10(binary):
    found = data.load("cifar10-bin", str(binary))
    np.testing.assert_array_equal(found.train_labels, [1, 9, 2, 9, 3, 9, 4, 9, 5, 9])
    assert found.train_images.shape == (10, 32, 32, 3)
    np.testing.assert_array_equal(found.train_images[0, 31, 0], [7, 8, 0])
    np.testing.assert_array_equal(found.test_labels, [3])
    assert found.classes[3] == "cat"


def test_broken_cifar10(binary):
    def check(message):
        with pytest.raises(ValueError, match=message):
            data.load("cifar10-bin", str(binary))

    file = binary / "data_batch_2.bin"
    file.write_bytes(record(1)[:-1])
    check("data_batch_2.bin has 3072 bytes, no multiple of the 3073 of a record")
    file.write_bytes(b"")
    check("data_batch_2.bin has 0 bytes")
    file.write_bytes(record(1) + record(10))
    check("data_batch_2.bin: record 1 has the label 10, above 9")
    file.unlink()
    check("data_batch_2.bin is missing")


def test_broken_folder_option(tmp_path):
    with pytest.raises(ValueError, match="--data images needs --data-dir"):
        data.load("images")
    with pytest.raises(ValueError, match=r"--data-dir '.*none' is not a folder"):
        data.load("cifar10-bin", str(tmp_path / "none"))


def test_label_noise():
    clean, noisy = data.load("digits"), data.load("digits", label_noise=0.2)
    changed = clean.train_labels != noisy.train_labels
    assert changed.sum() == round(0.2 * 1257)
    assert set(noisy.train_labels) == set(range(10))
    np.testing.assert_array_equal(clean.test_labels, noisy.test_labels)
    again = data.load("digits", label_noise=0.2)
    np.testing.assert_array_equal(noisy.train_labels, again.train_labels)
    moved = (noisy.train_labels - clean.train_labels)[changed] % 10
    assert set(moved) == set(range(1, 10))


def test_train_size():
    some = data.load("digits", train_size=200)
    assert len(some.train_images) == len(some.train_labels) == 200
    assert set(np.bincount(some.train_labels)) <= {19, 20, 21}
    assert len(some.test_labels) == 540
    assert set(data.load("digits", train_size=10).train_labels) == set(range(10))
    almost, full = data.load("digits", train_size=1256), data.load("digits", train_size=1257)
    assert (len(almost.train_labels), len(full.train_labels)) == (1256, 1257)
    for size in (9, 1258):
        with pytest.raises(ValueError, match=f"--train-size {size} is not between 10.* and 1257"):
            data.load("digits", train_size=size)


def test_validation_images_are_kept_apart():
    digits = data.load("digits")
    found = data.load("digits", validation=0.2, label_noise=0.2)
    assert len(found.train_labels) == 1257 - 251
    assert found.validation_images.shape == (251, 8, 8, 1)

    def pixels(images):
        return sorted(image.tobytes() for image in images)

    both = np.concatenate([found.train_images, found.validation_images])
    assert pixels(both) == pixels(digits.train_images)
    share = np.bincount(found.validation_labels) / np.bincount(digits.train_labels)
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    right = {image.tobytes(): label for image, label in zip(*digits[:2], strict=True)}
    known = [right[image.tobytes()] for image in found.validation_images]
    np.testing.assert_array_equal(found.validation_labels, known)
    wrong = [right[i.tobytes()] != n for i, n in zip(*found[:2], strict=True)]
    assert sum(wrong) == 201
    np.testing.assert_array_equal(found.test_images, digits.test_images)
    assert digits.validation_images is None


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_validation_needs_every_class(fraction):
    with pytest.raises(ValueError, match=f"--validation {fraction} keeps .* of 1257 train images"):
        data.load("digits", validation=fraction)
