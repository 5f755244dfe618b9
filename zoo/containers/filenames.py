"""What the files of a checkpoint are called. Stated here once.

A checkpoint is a directory, with its files inside, or one file, with those that belong to it beside
it under its own name: config.json in the directory, or FILE.config.json.
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.json"
CERTIFICATE = "certificate.json"
OPTIMIZER = "optimizer.safetensors"
SIDECARS = (CONFIG, CERTIFICATE, OPTIMIZER)  # of a checkpoint that is one file
WORKPLACE = ".zooconvert-"  # in the names of hidden directories beside a target
TRAINER_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # of transformers' Trainer

# What the weights are called in a directory that is the checkpoint as a whole.
INDEX = ".index.json"  # suffix of what says which tensor is in which shard
SAFETENSORS = "model.safetensors"
PYTORCH = "pytorch_model.bin"
MSGPACK = "flax_model.msgpack"
SAFETENSORS_INDEX = SAFETENSORS + INDEX
WHOLE = (SAFETENSORS, SAFETENSORS_INDEX, PYTORCH, PYTORCH + INDEX)

# Container -> suffix of the file that is written; Orbax's is a directory.
SUFFIXES = {"orbax": "", "msgpack": ".msgpack", "safetensors": ".safetensors", "pt": ".pt"}
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
ONNX = ".onnx"
_ONNX_DATA = re.compile(r"\.[0-9a-f]{16}\.data")  # after the name of the file that it belongs to
CHECKPOINT_SUFFIXES = (".safetensors", ".msgpack", ONNX, *TORCH_SUFFIXES)

# What a directory may call its one checkpoint, best first, by the side that wrote it.
TORCH_PATTERNS = (
    *(SAFETENSORS_INDEX, SAFETENSORS, PYTORCH + INDEX, PYTORCH),
    *(
        f"*.safetensors{INDEX}",
        "*.safetensors",
        f"*.bin{INDEX}",
        "*.pt",
        "*.pth",
        "*.bin",
        "*.ckpt",
        "*.onnx",
    ),
)
FLAX_PATTERNS = (
    *(MSGPACK + INDEX, MSGPACK, "*.msgpack", f"*.safetensors{INDEX}", "*.safetensors"),
)
HUB_PATTERNS = ("*.safetensors", f"*{INDEX}", CONFIG, "layout-*.json", "*.msgpack", "*.bin")

# Orbax's own files.
ORBAX_TREE = "_METADATA"
ORBAX_CHECKPOINT = "_CHECKPOINT_METADATA"
ORBAX_COMMITTED = "commit_success.txt"
ORBAX_MANIFEST = "manifest.ocdbt"
ORBAX_MARKER = "orbax.checkpoint"

_LAYOUT = re.compile(r"layout-[0-9a-f]{16}\.json")
# What a training run keeps beside its weights: ours, and that of transformers' Trainer.
_TRAINING = re.compile(
    r"(.+\.)?optimizer\.safetensors|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
    r"|training_args\.bin"
)
# What the directories that we write may hold.
_OURS = re.compile(
    "|".join(
        [
            *map(re.escape, (CONFIG, CERTIFICATE, OPTIMIZER, SAFETENSORS, SAFETENSORS_INDEX)),
            *(_LAYOUT.pattern, r"model-\d+-of-\d+\.safetensors"),
            *map(re.escape, (ORBAX_TREE, ORBAX_CHECKPOINT, ORBAX_COMMITTED, ORBAX_MANIFEST)),
            *(re.escape(ORBAX_MARKER), "_sharding", "d", r"ocdbt\.process_\d+"),
            *("array_metadatas", "pytree", "state"),
        ]
    )
)


def shard(number: int, of: int) -> str:
    """The name of a shard, counted from 1."""
    return f"model-{number:05d}-of-{of:05d}.safetensors"


def layout_file(sha256: str) -> str:
    """The name of a layout's file, by the hash of its content."""
    return f"layout-{sha256[:16]}.json"


def onnx_data(name: str, sha256: str) -> str:
    """The name of the file with an ONNX file's tensors, by the hash of its content."""
    return f"{name}.{sha256[:16]}.data"


def is_onnx_data(name: str, of: str) -> bool:
    """Whether a file holds, by its name, the tensors of the ONNX file called `of`."""
    return name.startswith(of) and _ONNX_DATA.fullmatch(name.removeprefix(of)) is not None


def is_layout(name: str) -> bool:
    """Whether a file may be a layout: what `layout_file` gives, and no path."""
    return _LAYOUT.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a directory that we wrote may hold a file of this name."""
    return _OURS.fullmatch(name) is not None


def is_training(name: str) -> bool:
    """Whether a file is what a training run keeps beside its weights."""
    return _TRAINING.fullmatch(name) is not None


def belongs(name: str, checkpoint: str) -> bool:
    """Whether a file is, by its name, one of those that a checkpoint of one file consists of."""
    beside = [f"{checkpoint}.{n}" for n in SIDECARS]
    return name == checkpoint or name in beside or is_onnx_data(name, checkpoint)


def is_named_by_content(name: str, checkpoint: str) -> bool:
    """Whether a file of a checkpoint has another name where it has another content."""
    return is_layout(name) or is_onnx_data(name, checkpoint)


def is_whole(file: Path) -> bool:
    """Whether a file has the name of the weights in a directory that is the checkpoint."""
    return file.name in WHOLE
