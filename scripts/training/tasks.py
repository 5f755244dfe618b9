"""All tasks that `scripts/train` knows, but for those that play a game (see `games`)."""

from __future__ import annotations

from difflib import get_close_matches

from training import metrics
from training.data import audio, images, local, sequences, tables, text
from training.description import Task, Term
from zoo.containers.errors import UsageError

MSE, BCE = (Term("mse"),), (Term("bce"),)
CROSS_ENTROPY = (Term("cross_entropy"),)
SWITCH = (
    Term("cross_entropy", "logits"),
    *(Term("value", f"{side}_{kind}_loss", scale=0.001) for side in ("encoder", "decoder")
      for kind in ("z", "aux")),
)  # fmt: skip
UTTERANCE = (
    Term("mse", "frames", "frames"),
    Term("mse", "frames_before", "frames"),
    Term("bce_logits", "stop", "stop", 0.1),
    Term("cross_entropy", "source_logits", "source_phonemes", 0.1),
    Term("cross_entropy", "target_logits", "target_phonemes", 0.1),
)
SILENT = dict.fromkeys(
    ("dropout_prob", "prenet_dropout", "attention_dropout", "postnet_dropout", "zoneout"), 0.0
)

DIGITS = "scikit-learn's digits (UCI, CC BY 4.0)"
MADE = "generated, no rights"

_ALL: list[Task] = [
    # Images.
    *(
        Task(
            f"{preset}.digits",
            "digits as images",
            images.digits(),
            CROSS_ENTROPY,
            metrics.accuracy,
            DIGITS,
            optimizer="Adam",
            rate=3e-3,
            schedule="cosine",
            batch_size=64,
            steps=steps,
        )
        for preset, steps in (
            ("mnist_cnn", 900),
            ("mnist_cnn_wide", 300),
            ("jax_cnn", 200),
            ("cifar_net", 600),
            ("image_cnn", 200),
        )
    ),
    Task(
        "resnet18.digits",
        "digits as images of 32 pixels, in a ResNet-18 an eighth as wide",
        images.digits(32, 3),
        CROSS_ENTROPY,
        metrics.accuracy,
        DIGITS,
        overrides={"width": 8, "num_classes": 10},
        rate=3e-3,
        schedule="cosine",
        batch_size=64,
        steps=200,
    ),
    Task(
        "alexnet.digits",
        "digits as images of 64 pixels, in an AlexNet an eighth as wide, without dropout",
        images.digits(64, 3),
        CROSS_ENTROPY,
        metrics.accuracy,
        DIGITS,
        overrides={
            "channels": (8, 24, 48, 32, 32),
            "hidden_size": 128,
            "num_classes": 10,
            "dropout": 0.0,
        },
        schedule="cosine",
        batch_size=64,
        steps=300,
    ),
    # Tables and synthetic regression.
    *(
        Task(
            f"{preset}.cancer",
            "breast tumours: benign or not",
            tables.cancer,
            BCE,
            metrics.binary_accuracy,
            "Breast Cancer Wisconsin (UCI, CC BY 4.0), as scikit-learn has it",
            optimizer="AdamW",
            rate=3e-3,
            schedule="cosine",
            steps=400,
        )
        for preset in ("binary_mlp", "sigmoid_mlp")
    ),
    Task(
        "mlp_10_20_10_1.diabetes",
        "progression of diabetes after a year",
        tables.diabetes,
        MSE,
        metrics.explained,
        "Efron 2004, as scikit-learn (BSD-3-Clause) has it",
        optimizer="AdamW",
        rate=3e-3,
        schedule="cosine",
        steps=200,
    ),
    *(
        Task(
            f"{preset}.synthetic",
            f"regression: {what}",
            data,
            MSE,
            metrics.explained,
            MADE,
            optimizer=optimizer,
            rate=rate,
            steps=steps,
        )
        for preset, what, data, optimizer, rate, steps in (
            ("linear_regression", "a line", tables.linear, "SGD", 0.05, 200),
            ("linear_3x3", "a matrix", tables.linear, "SGD", 0.05, 300),
            ("custom_layer", "a matrix and a ReLU", tables.linear, "RMSprop", 3e-3, 500),
            ("mlp_2_3_1", "a smooth function", tables.smooth, "Adam", 0.01, 1000),
            ("mlp_10_20_10", "a smooth function", tables.smooth, "Adam", 3e-3, 1500),
            ("mlp_10_20_10_1", "a smooth function", tables.smooth, "Adam", 3e-3, 1500),
            ("recommendation", "a smooth function", tables.smooth, "Adam", 3e-3, 1500),
            ("robot", "a smooth function", tables.smooth, "Adam", 3e-3, 1500),
            ("rnn_regressor", "a fading sum over a sequence", tables.memory, "Adam", 3e-3, 1000),
            ("lstm_regressor", "a fading sum over a sequence", tables.memory, "Adam", 3e-3, 1000),
        )
    ),
    # Sequences.
    Task(
        "lstm_tagger.digits",
        "digits row by row; judged after the last row",
        images.digit_rows,
        CROSS_ENTROPY,
        metrics.accuracy,
        DIGITS,
        rate=0.01,
        schedule="cosine",
        batch_size=64,
        steps=1500,
    ),
    Task(
        "transformer_tiny.sums",
        "a + b modulo 1000, digit by digit, units first",
        sequences.pairs_for(sequences.additions, "transformer"),
        CROSS_ENTROPY,
        metrics.whole_sequences,
        MADE,
        rate=2e-3,
        schedule="cosine",
        batch_size=128,
        steps=1200,
    ),
    Task(
        "transformer_tiny.brackets",
        "what closes a row of brackets",
        sequences.pairs_for(sequences.brackets, "transformer"),
        CROSS_ENTROPY,
        metrics.whole_sequences,
        MADE,
        rate=2e-3,
        schedule="cosine",
        batch_size=128,
        steps=1500,
    ),
    Task(
        "switch_tiny.brackets",
        "what closes a row of brackets",
        sequences.pairs_for(sequences.brackets, "switch"),
        SWITCH,
        metrics.whole_sequences,
        MADE,
        overrides={"router_jitter_noise": 0.0},
        rate=3e-3,
        schedule="cosine",
        batch_size=128,
        steps=1500,
    ),
    Task(
        "switch_tiny.sums",
        "a + b modulo 1000, digit by digit, units first",
        sequences.pairs_for(sequences.additions, "switch"),
        SWITCH,
        metrics.whole_sequences,
        MADE,
        overrides={"router_jitter_noise": 0.0},
        rate=3e-3,
        schedule="cosine",
        batch_size=128,
        steps=2000,
    ),
    Task(
        "bert_tiny.topics",
        "masked characters of Python's documentation",
        text.masked_topics,
        CROSS_ENTROPY,
        metrics.accuracy,
        "the topics of Python's help() (PSF License 2)",
        optimizer="AdamW",
        rate=3e-3,
        schedule="warmup",
        batch_size=64,
        steps=2000,
        notes="the settings are the best of four tried on this text",
    ),
    Task(
        "wavenet_small.tones",
        "the next sample of two tones",
        audio.tones,
        CROSS_ENTROPY,
        metrics.bits_per_sample,
        MADE,
        rate=4e-3,
        schedule="cosine",
        batch_size=8,
        steps=1000,
    ),
    Task(
        "translatotron_small.melodies",
        "spectrograms of melodies into others, an octave richer",
        audio.melodies,
        UTTERANCE,
        metrics.frame_error,
        MADE,
        overrides=SILENT,
        rate=2e-3,
        batch_size=16,
        steps=300,
    ),
    # The user's own.
    *(
        Task(
            f"{preset}.mnist",
            "MNIST's four idx files",
            local.mnist,
            CROSS_ENTROPY,
            metrics.accuracy,
            "train-images-idx3-ubyte and its three companions, gzipped or not",
            rate=2e-3,
            schedule="cosine",
            batch_size=64,
            steps=3000,
            local=True,
        )
        for preset in ("mnist_cnn", "mnist_cnn_wide", "jax_cnn")
    ),
    *(
        Task(
            f"{preset}.cifar10",
            "CIFAR-10's Python batches",
            local.cifar10,
            CROSS_ENTROPY,
            metrics.accuracy,
            "data_batch_1 to 5 and test_batch, as cifar-10-batches-py has them",
            rate=1e-3,
            schedule="cosine",
            batch_size=64,
            steps=5000,
            local=True,
        )
        for preset in ("cifar_net", "image_cnn", "flax_cnn")
    ),
    Task(
        "resnet18.folder",
        "pictures in a folder a class",
        local.image_folder,
        CROSS_ENTROPY,
        metrics.accuracy,
        "train/CLASS/*.png and val/CLASS/*.png",
        schedule="cosine",
        steps=2000,
        local=True,
    ),
    Task(
        "imdb_rnn.imdb",
        "sentiment of IMDB's reviews",
        local.imdb,
        (Term("bce_logits"),),
        metrics.logit_accuracy,
        "train/pos, train/neg, test/pos and test/neg, as aclImdb has them",
        schedule="cosine",
        steps=3000,
        local=True,
    ),
]

TASKS = {task.name: task for task in _ALL}


def find(name: str) -> Task:
    """The task of this name. UsageError for one that there is not."""
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name, TASKS, 3, 0.4)
    raise UsageError(
        f"there is no task {name!r}",
        f"did you mean {' or '.join(near)}?" if near else "`scripts/train --list` lists them",
    )
