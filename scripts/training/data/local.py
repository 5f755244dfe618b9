"""Data sets that a user has on disk: MNIST, CIFAR-10, folders of images, IMDB's reviews.

Nothing is downloaded, and nothing in a file is called: CIFAR-10's pickles are read by an unpickler
that knows NumPy's arrays and nothing else.
"""

from __future__ import annotations

import gzip
import pickle
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from training.description import Arrays, Batch, Data
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError
from zoo.model import Config

# --- MNIST: idx files, gzipped or not (https://yann.lecun.com/exdb/mnist/) ---

_MNIST = {"train": "train-{}-idx{}-ubyte", "test": "t10k-{}-idx{}-ubyte"}


def mnist(config: Config, folder: Path | None) -> Data:
    """The four files of MNIST, or of a data set in its form, such as Fashion-MNIST."""
    parts = []
    for name in _MNIST.values():
        images = read_idx(_find(folder, name.format("images", 3)))
        labels = read_idx(_find(folder, name.format("labels", 1)))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise CorruptInput(
                f"{images.shape} images and {labels.shape} labels do not belong together",
                "take the four files of one data set",
            )
        if images.shape[1:] != (config.image_size, config.image_size):
            raise UsageError(
                f"the images are {images.shape[1:]}, this model takes {config.image_size}",
                f"give --set image_size={images.shape[1]}",
            )
        parts.append({"x": images[:, None], "y": labels.astype(np.int64)})
    return Data(*parts, _bytes_as_pixels)


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise CorruptInput(f"{path} is not an idx file of bytes", "download it again")
            sizes = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            data = np.frombuffer(file.read(), np.uint8)
    except (OSError, EOFError, struct.error) as e:
        raise CorruptInput(f"{path} cannot be read: {e}", "download it again") from None
    if data.size != np.prod(sizes, dtype=object):
        raise CorruptInput(
            f"{path} has {data.size} bytes where its header says {sizes}", "download it again"
        )
    return data.reshape(sizes)


def _find(folder: Path | None, name: str) -> Path:
    assert folder is not None
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(f"{folder} has no {name}", "name the directory that holds it: --data DIR")


def _bytes_as_pixels(rows: Arrays, rng: np.random.Generator) -> Batch:
    """Bytes become numbers from 0 to 1 when they are used, not all of them before."""
    return Batch({"x": rows["x"] / 255.0}, {"target": rows["y"]})


# --- CIFAR-10: Python pickles (https://www.cs.toronto.edu/~kriz/cifar.html) ---


def cifar10(config: Config, folder: Path | None) -> Data:
    """`data_batch_1` to `data_batch_5` and `test_batch`, in the folder or in its
    cifar-10-batches-py."""
    assert folder is not None
    inner = folder / "cifar-10-batches-py"
    folder = inner if inner.is_dir() else folder
    train = [_cifar_file(_find(folder, f"data_batch_{i}")) for i in range(1, 6)]
    test = _cifar_file(_find(folder, "test_batch"))
    whole = {k: np.concatenate([part[k] for part in train]) for k in ("x", "y")}
    return Data(whole, test, _bytes_as_pixels)


def _cifar_file(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            found = ArrayUnpickler(file, encoding="bytes").load()
        images, labels = found[b"data"], np.array(found[b"labels"], np.int64)
        x = np.asarray(images, np.uint8).reshape(-1, 3, 32, 32)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError) as e:
        raise CorruptInput(f"{path} is not a batch of CIFAR-10: {e}", "download it again") from None
    if len(x) != len(labels) or (labels.size and not 0 <= labels.min() <= labels.max() <= 9):
        raise CorruptInput(f"{path}: labels and images do not fit", "download it again")
    return {"x": x, "y": labels}


class ArrayUnpickler(pickle.Unpickler):
    """Makes NumPy arrays and plain data; UnsafeInput for whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        """The few functions that an array's pickle names."""
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ):
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise UnsafeInput(
            f"a pickle asks for {module}.{name}, which no array needs", "do not trust this file"
        )


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _plain_dtype(code: Any, *flags: Any) -> np.dtype:
    dtype = np.dtype(code.decode() if isinstance(code, bytes) else str(code))
    if dtype.kind not in "biuf":
        raise UnsafeInput(f"a pickle holds an array of {dtype}", "do not trust this file")
    return dtype


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


# --- A folder for each class ---

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SIDE = 64


def image_folder(config: Config, folder: Path | None) -> Data:
    """train/CLASS/*.png and val/CLASS/*.png (or test/), as torchvision's ImageFolder has them:
    classes in the order of their names. Pictures are scaled to 64 pixels and cut square."""
    assert folder is not None
    held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), folder / "val")
    classes = [_subfolders(part) for part in (folder / "train", held_out)]
    if classes[0] != classes[1]:
        raise UsageError(
            f"train/ has the classes {', '.join(classes[0])}, {held_out.name}/ has "
            f"{', '.join(classes[1])}",
            "make them the same",
        )
    parts = [_pictures(part, classes[0]) for part in (folder / "train", held_out)]
    return Data(*parts, _bytes_as_pixels, {"num_classes": len(classes[0])})


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing", "make train/CLASS/*.png and val/CLASS/*.png")
    return sorted(p.name for p in folder.iterdir() if p.is_dir())


def _pictures(folder: Path, classes: list[str]) -> dict[str, np.ndarray]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in _PICTURES
    ]
    if not files:
        raise UsageError(
            f"{folder} holds no pictures",
            f"put {', '.join(sorted(_PICTURES))} into a folder a class",
        )
    return {
        "x": np.stack([_picture(path) for path, _ in files]),
        "y": np.array([label for _, label in files], np.int64),
    }


def _picture(path: Path) -> np.ndarray:
    """(3, SIDE, SIDE) bytes: the shorter side scaled to SIDE, the middle of the longer one."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UsageError("pictures need Pillow", "pip install pillow") from None
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE))
    except (OSError, ValueError) as e:
        raise CorruptInput(f"{path} is not a picture: {e}", "remove it") from None
    return np.moveaxis(np.asarray(square), -1, 0).copy()


# --- IMDB: one review a file (https://ai.stanford.edu/~amaas/data/sentiment/) ---

UNKNOWN, PAD, WORDS, LONGEST = 0, 1, 2, 256


def imdb(config: Config, folder: Path | None) -> Data:
    """train/pos/*.txt, train/neg, test/pos, test/neg, in the folder or in its aclImdb. The
    vocabulary is that of the training reviews, the commonest words first, as many as fit."""
    assert folder is not None
    inner = folder / "aclImdb"
    folder = inner if inner.is_dir() else folder
    train, test = (_reviews(folder / part) for part in ("train", "test"))
    counts = Counter(word for words, _ in train for word in words)
    common = sorted(counts, key=lambda w: (-counts[w], w))[: config.vocab_size - WORDS]
    ids = {word: i + WORDS for i, word in enumerate(common)}
    return Data(*(_as_ids(part, ids) for part in (train, test)), _reviews_batch)


def _reviews(folder: Path) -> list[tuple[list[str], int]]:
    found = [
        (words(path.read_text(encoding="utf-8", errors="replace")), int(kind == "pos"))
        for kind in ("neg", "pos")
        for path in sorted((folder / kind).glob("*.txt"))
    ]
    if {label for _, label in found} != {0, 1}:
        raise UsageError(
            f"{folder} holds no pos/*.txt and neg/*.txt", "name IMDB's directory: --data DIR"
        )
    return [review for review in found if review[0]]


def words(text: str) -> list[str]:
    """Lower-case words and single marks, without the line breaks of HTML."""
    return re.findall(r"[a-z0-9']+|[!?.,]", text.lower().replace("<br />", " "))[:LONGEST]


def _as_ids(reviews: list[tuple[list[str], int]], ids: dict[str, int]) -> dict[str, np.ndarray]:
    x = np.full((len(reviews), LONGEST), PAD, np.int64)
    lengths = np.array([len(text) for text, _ in reviews], np.int64)
    for row, (text, _) in zip(x, reviews, strict=True):
        row[: len(text)] = [ids.get(word, UNKNOWN) for word in text]
    y = np.array([[label] for _, label in reviews], np.float64)
    return {"x": x, "lengths": lengths, "y": y}


def _reviews_batch(rows: Arrays, rng: np.random.Generator) -> Batch:
    return Batch({"x": rows["x"], "lengths": rows["lengths"]}, {"target": rows["y"]})
