"""scripts/train: one description, the same curve in both frameworks; data, checkpoints, errors."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import serialization
from test_house import circles, imports
from training_support import SCRIPTS

# isort: split

from training import checkpoints, curves, games, plots
from training.data import images, local, sequences, text
from training.description import Batch, Job, make_job, schedule
from training.run import run
from training.score import bootstrap, counted, mean, student
from training.tasks import TASKS, find

from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError, ZooError

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Short runs spend their time in the compiler, which need not try hard."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SMALL = {
    "mnist_cnn.digits": {},
    "resnet18.digits": {"width": 4, "layers": [1, 1, 1, 1]},
    "binary_mlp.cancer": {},
    "lstm_tagger.digits": {},
    "linear_regression.synthetic": {},
    "custom_layer.synthetic": {},
    "lstm_regressor.synthetic": {"hidden_size": 5},
    "transformer_tiny.brackets": {
        "d_model": 16,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dim_feedforward": 16,
    },
    "switch_tiny.sums": {
        "d_model": 16,
        "d_ff": 16,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_experts": 2,
    },
    "bert_tiny.topics": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "max_position_embeddings": 24,
    },
    "wavenet_small.tones": {
        "classes": 16,
        "layers": 2,
        "residual_channels": 4,
        "gate_channels": 4,
        "skip_channels": 4,
    },
    "translatotron_small.melodies": {
        "encoder_layers": 1,
        "encoder_size": 4,
        "decoder_layers": 1,
        "decoder_size": 4,
        "attention_size": 4,
        "frame_size": 9,
        "mel_channels": 8,
        "postnet_layers": 1,
        "postnet_size": 4,
        "source_layer": 1,
        "target_layer": 1,
        "auxiliary_layers": 1,
        "auxiliary_size": 4,
        "prenet_size": 4,
    },
}


def small(name: str, framework: str, **settings: Any) -> Job:
    return make_job(
        find(name),
        framework,
        overrides=SMALL.get(name, {}),
        **{"steps": 3, "batch_size": 8, "dtype": "float64", **settings},
    )


# --- One description ---


@pytest.mark.parametrize("name", SMALL)
def test_both_frameworks_have_the_same_curve(name: str) -> None:
    found = [np.array(run(small(name, f), score=False).losses) for f in ("torch", "flax")]
    assert found[0][0] != found[0][-1], "nothing was learnt"
    assert np.abs(found[0] - found[1]).max() <= 1e-10 * np.abs(found[0]).max()


@pytest.mark.parametrize("name", sorted(games.GAMES))
def test_both_agents_have_the_same_curve(name: str) -> None:
    overrides = {"pi": [8], "qf": [8]} if name.startswith("sac") else {"net_arch": [8]}
    settings: Any = {"steps": 12, "batch_size": 8, "sync": 4, "overrides": overrides}
    a, b = (curves.curve(name, [(f, 12)], **settings) for f in ("torch", "flax"))
    assert curves.judge64(a, b).same
    assert np.ptp(a, axis=0).min() > 0


def test_scores_are_the_same() -> None:
    scores = [run(small("switch_tiny.sums", f, steps=1)).score for f in ("torch", "flax")]
    assert scores[0] == scores[1]


def test_every_task_that_brings_its_data_makes_batches() -> None:
    for task in TASKS.values():
        if task.local:
            continue
        job = make_job(task, "torch")
        batch = job.batch(0)
        for term in task.terms:
            if term.kind != "value":
                assert batch.weight(term.target).sum() == pytest.approx(1)
        size = next(iter(batch.inputs.values())).shape[batch.axis]
        assert size == job.batch_size
        assert job.data.size("test") >= 60


def test_batches_depend_on_seed_and_step_alone() -> None:
    a, b = small("bert_tiny.topics", "torch"), small("bert_tiny.topics", "flax")
    for step in (0, 5, 3):
        for one, other in ((a.batch(step).inputs, b.batch(step).inputs),):
            assert all((one[k] == other[k]).all() for k in one)
    c = small("bert_tiny.topics", "torch", seed=1)
    assert (a.batch(0).inputs["input_ids"] != c.batch(0).inputs["input_ids"]).any()


def test_an_epoch_has_every_example_once() -> None:
    job = make_job(find("binary_mlp.cancer"), "torch", batch_size=8)
    rows = [r.tobytes() for s in range(job.steps_per_epoch) for r in job.batch(s).inputs["x"]]
    assert len(set(rows)) == len(rows) == job.steps_per_epoch * 8
    again = [r.tobytes() for r in job.batch(job.steps_per_epoch).inputs["x"]]
    assert again != rows[:8], "the second epoch has another order"


def test_parts_of_a_batch_add_up() -> None:
    batch = small("transformer_tiny.brackets", "torch").batch(0)
    parts = [batch.part(rank, 2) for rank in range(2)]
    assert sum(p.weight("target").sum() for p in parts) == pytest.approx(1)
    assert (np.concatenate([p.inputs["src"] for p in parts]) == batch.inputs["src"]).all()
    with pytest.raises(UsageError, match="cannot be divided among 3"):
        batch.part(0, 3)
    recurrent = small("lstm_regressor.synthetic", "torch").batch(0).part(1, 2)
    assert recurrent.inputs["x"].shape[1] == recurrent.targets["target"].shape[0] == 4


def test_held_out_examples_are_held_out() -> None:
    for name in ("mnist_cnn.digits", "transformer_tiny.sums", "switch_tiny.brackets"):
        data = make_job(find(name), "torch").data
        key = next(iter(data.train))
        train = {row.tobytes() for row in np.ascontiguousarray(data.train[key])}
        assert not any(row.tobytes() in train for row in np.ascontiguousarray(data.test[key]))


def test_schedules() -> None:
    assert [schedule("cosine", x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [schedule("linear", x) for x in (0, 0.25, 1)] == [1, 0.75, 0]
    assert schedule("constant", 0.7) == 1
    job = small("binary_mlp.cancer", "torch", rate=0.1, steps=10, schedule="linear")
    assert job.rate_at(5) == pytest.approx(0.05)


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_bfloat16_computes_in_it_and_keeps_float32_weights(framework: str) -> None:
    wide = run(small("mnist_cnn.digits", framework, dtype="float32"), score=False).losses
    job = small("mnist_cnn.digits", framework, dtype="bfloat16")
    result = run(job, score=False)
    gap = np.abs(np.array(result.losses) - np.array(wide)).max()
    assert 1e-6 < gap < 0.1


def test_it_learns() -> None:
    result = run(make_job(find("linear_regression.synthetic"), "torch", steps=120))
    assert result.score is not None
    assert result.score.value > 0.9
    assert result.losses[-1] < 0.2 * result.losses[0]


def test_a_loss_that_is_no_number_is_an_error() -> None:
    job = make_job(find("linear_regression.synthetic"), "torch", steps=900, rate=50.0)
    with pytest.raises(ZooError, match=r"the loss is .* at step"):
        run(job)


# --- Scores ---


def test_intervals() -> None:
    s = counted("accuracy", 95, 100)  # Brown, Cai and DasGupta's Wilson interval
    assert (s.low, s.high) == pytest.approx((0.88825, 0.97846), abs=1e-5)
    assert counted("a", 0, 10).low == 0
    assert counted("a", 10, 10).high == 1
    for freedom, value in ((1, 12.7062), (4, 2.7764), (9, 2.2622), (99, 1.9842)):
        assert student(freedom) == pytest.approx(value, abs=2e-3)
    m = mean("return", np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (m.low, m.high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=2e-3)
    b = bootstrap("mean", lambda x: float(x.mean()), np.arange(100.0))
    assert b.low < b.value < b.high
    assert b.high - b.low == pytest.approx(2 * 1.96 * 28.9 / 10, rel=0.1)


# --- Generated data are what they are said to be ---


def test_sums_are_right() -> None:
    source, target = sequences.additions(train=20, test=5)
    for s, t in zip(source, target, strict=True):
        digits = [int(d) - sequences.DIGITS for d in s]
        a, b = (int("".join(map(str, reversed(x)))) for x in (digits[:3], digits[4:]))
        total = int("".join(str(int(d) - sequences.DIGITS) for d in reversed(t[:3])))
        assert total == (a + b) % 1000
        assert t[3] == sequences.END


def test_brackets_close() -> None:
    source, target = sequences.brackets(train=50, test=0)
    signs = sequences.OPENING + ")]}>"
    for s, t in zip(source, target, strict=True):
        whole = "".join(signs[i - sequences.FIRST] for i in (*s, *t) if i >= sequences.FIRST)
        while any(pair in whole for pair in ("()", "[]", "{}", "<>")):
            for pair in ("()", "[]", "{}", "<>"):
                whole = whole.replace(pair, "")
        assert whole == ""


def test_enlarged_digits_keep_their_pixels() -> None:
    small_images = np.arange(128.0).reshape(2, 8, 8)
    large = images.enlarge(small_images, 28)
    assert large.shape == (2, 28, 28)
    assert (large[:, 2:26:3, 2:26:3] == small_images).all()
    assert large[:, :2].max() == 0
    with pytest.raises(UsageError, match="8 pixels wide"):
        images.enlarge(small_images, 7)


def test_masked_characters() -> None:
    tokens = text.windows("assert_stmt " * 2000, 96)
    batch = text.masked({"tokens": tokens}, np.random.default_rng(0))
    chosen = batch.weight("target") > 0
    given = batch.inputs["input_ids"]
    assert 0.13 < chosen.mean() < 0.17
    assert (given == tokens)[~chosen].all()
    assert 0.75 < (given[chosen] == text.MASK).mean() < 0.85
    assert text.topics(), "Python's documentation"
    assert text.encode("\n~é").tolist() == [text.FIRST, text.FIRST + 95, text.UNKNOWN]


# --- Checkpoints ---


@pytest.mark.parametrize("framework", ["torch", "flax"])
def test_what_a_run_leaves(framework: str, tmp_path: Path) -> None:
    job = small("mnist_cnn.digits", framework, steps=4, dtype="float32")
    result = run(job, out=tmp_path, every=2, log_dir=tmp_path / "logs")
    names = {p.name for p in tmp_path.iterdir()}
    suffix = {"torch": "pt", "flax": "msgpack"}[framework]
    assert names == {
        f"checkpoint.{suffix}",
        f"checkpoint.{suffix}.config.json",
        "model.safetensors",
        "curve.json",
        "logs",
    }
    assert json.loads((tmp_path / "curve.json").read_text())["losses"] == result.losses
    assert list((tmp_path / "logs").glob("events.out.tfevents.*"))
    held = _held(tmp_path / f"checkpoint.{suffix}")
    assert held["step"] == 4
    assert held["epoch"] == 0
    assert held["task"] == "mnist_cnn.digits"
    assert held["config"]["channels"] == [10, 20]
    if framework == "torch":
        assert held["optimizer"]["param_groups"][0]["param_names"][0] == "conv1.weight"


def _held(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return serialization.msgpack_restore(path.read_bytes())


def test_the_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    job = small("lstm_tagger.digits", "flax", dtype="float32")
    run(job, out=tmp_path, score=False)
    reader = small("lstm_tagger.digits", "torch", dtype="float32")
    a, b = (
        checkpoints.load(tmp_path / n, reader).state_dict()
        for n in ("model.safetensors", "checkpoint.msgpack")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small("binary_mlp.cancer", "torch", steps=1)
    run(job, out=tmp_path, score=False)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def broken(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        run(job, out=tmp_path, score=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"steps": 2}, "has done 2 steps of 2"),
        ({"name": "binary_mlp.cancer"}, "task is"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run(small("sigmoid_mlp.cancer", "torch", steps=2), out=tmp_path, score=False)
    settings = {"name": "sigmoid_mlp.cancer", "steps": 4, **change}
    with pytest.raises(UsageError) as caught:
        run(small(settings.pop("name"), "torch", **settings), resume=tmp_path / "checkpoint.pt")
    assert message in str(caught.value)


# --- Data of the user's ---


def idx(path: Path, array: np.ndarray, opened: Callable[..., Any] = open) -> None:
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with opened(path, "wb") as file:
        file.write(head + array.astype(np.uint8).tobytes())


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_mnist(tmp_path: Path, rng: np.random.Generator) -> None:
    for part, n in (("train", 16), ("t10k", 6)):
        idx(tmp_path / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n) % 10, gzip.open)
    job = make_job(find("mnist_cnn.mnist"), "torch", folder=tmp_path, steps=2, batch_size=8)
    assert job.data.size("train") == 16
    assert job.batch(0).inputs["x"].max() <= 1
    result = run(job)
    assert result.score is not None
    assert result.score.n == 6


def test_broken_idx_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    with pytest.raises(UsageError, match="has no train-images"):
        make_job(find("mnist_cnn.mnist"), "torch", folder=tmp_path)
    path.write_bytes(b"no idx at all")
    with pytest.raises(CorruptInput, match="not an idx file"):
        local.read_idx(path)
    path.write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 9) + b"123")
    with pytest.raises(CorruptInput, match="has 3 bytes"):
        local.read_idx(path)
    (tmp_path / "x.gz").write_bytes(b"not gzip")
    with pytest.raises(CorruptInput, match="cannot be read"):
        local.read_idx(tmp_path / "x.gz")


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar10(tmp_path: Path, rng: np.random.Generator, protocol: int) -> None:
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        held = {b"data": data, b"labels": [0, 3, 9, 1], b"batch_label": b"x"}
        (inner / name).write_bytes(pickle.dumps(held, protocol))
    job = make_job(find("cifar_net.cifar10"), "torch", folder=tmp_path, batch_size=4, steps=1)
    assert job.data.train["x"].shape == (20, 3, 32, 32)
    assert (job.data.test["x"].reshape(4, -1) == data).all()
    assert job.data.test["y"].tolist() == [0, 3, 9, 1]


class Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Harm()}))
    with pytest.raises(UnsafeInput, match=r"asks for .*system"):
        make_job(find("cifar_net.cifar10"), "torch", folder=tmp_path)
    assert not (tmp_path / "harmed").exists()
    for bad in (b"", b"garbage", pickle.dumps({b"data": 3}), pickle.dumps([1])):
        (tmp_path / "data_batch_1").write_bytes(bad)
        with pytest.raises(CorruptInput, match="not a batch of CIFAR-10"):
            make_job(find("cifar_net.cifar10"), "torch", folder=tmp_path)
    objects = np.array([None, "x"], dtype=object)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": objects}))
    with pytest.raises(UnsafeInput, match="array of object"):
        make_job(find("cifar_net.cifar10"), "torch", folder=tmp_path)


def test_a_folder_of_pictures(tmp_path: Path, rng: np.random.Generator) -> None:
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            pixels = np.full((80, 100, 3), 40 + 100 * i, np.uint8)
            image.fromarray(pixels).save(tmp_path / part / name / "a.png")
            image.fromarray(pixels[:, :, 0]).save(tmp_path / part / name / "grey.jpg")
    task, small_net = find("resnet18.folder"), {"width": 4, "layers": [1, 1, 1, 1]}
    job = make_job(task, "torch", folder=tmp_path, overrides=small_net, batch_size=2, steps=1)
    assert job.config.num_classes == 2
    assert job.data.train["x"].shape == (4, 3, 64, 64)
    assert job.data.train["x"][0].mean() == pytest.approx(40, abs=2)
    assert job.data.train["y"].tolist() == [0, 0, 1, 1]
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(UsageError, match="val/ has cat, cow, dog"):
        make_job(task, "torch", folder=tmp_path)
    with pytest.raises(UsageError, match="is missing"):
        make_job(task, "torch", folder=tmp_path / "nowhere")


def test_imdb(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind, word in (("pos", "good"), ("neg", "bad")):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(3):
                line = f"A {word} film.<br />Very {word}, no. {i}!"
                (tmp_path / part / kind / f"{i}_1.txt").write_text(line)
    assert local.words("It's <br />SO good!") == ["it's", "so", "good", "!"]
    job = make_job(
        find("imdb_rnn.imdb"), "torch", folder=tmp_path, batch_size=2, steps=1,
        overrides={"vocab_size": 8, "input_size": 4, "hidden_size": 4},
    )  # fmt: skip
    rows = job.data.train
    assert rows["lengths"].tolist() == [11] * 6
    assert rows["x"].max() == 7
    assert rows["y"][:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    result = run(job)
    assert result.score is not None
    assert result.score.n == 6
    with pytest.raises(UsageError, match="holds no pos"):
        make_job(find("imdb_rnn.imdb"), "torch", folder=tmp_path / "train")


# --- The command ---


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "train.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | QUICK | {"XLA_FLAGS": "", **environment},
    )


def test_the_command(tmp_path: Path) -> None:
    run_ = command(
        "binary_mlp.cancer", "--epochs", "1", "--out", str(tmp_path / "o"), "--plot", "--json",
        "--optimizer", "sgd", "--lr", "0.1", "--set", "activation=tanh",
    )  # fmt: skip
    assert run_.returncode == 0, run_.stderr
    told = json.loads(run_.stdout)
    assert len(told["losses"]) == 14
    assert told["score"]["metric"] == "accuracy"
    assert (tmp_path / "o" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not run_.stderr


def test_the_scripts_import_each_other_without_circles() -> None:
    paths = {
        ".".join(path.relative_to(SCRIPTS).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SCRIPTS.rglob("*.py")
    }
    assert not circles({module: imports(path, module, paths) for module, path in paths.items()})


def test_the_list() -> None:
    run_ = command("--list")
    assert all(name in run_.stdout for name in (*TASKS, *games.GAMES))


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        (["mnist_cnn.digit"], "no task 'mnist_cnn.digit'", "mnist_cnn.digits"),
        ([], "name a task", "--help"),
        (["binary_mlp.cancer", "--optimizer", "x"], "no optimizer 'x'", "there are SGD"),
        (["binary_mlp.cancer", "--lr", "0"], "learns nothing", "--lr above 0"),
        (["binary_mlp.cancer", "--steps", "0"], "at least 1", "larger"),
        (["binary_mlp.cancer", "--batch-size", "9999"], "do not fill a batch", "smaller"),
        (["binary_mlp.cancer", "--set", "x"], "sets nothing", "FIELD=VALUE"),
        (["binary_mlp.cancer", "--set", "x=1"], "has no field x", "sizes"),
        (["binary_mlp.cancer", "--resume", "nowhere.pt"], "does not exist", "a checkpoint"),
        (["binary_mlp.cancer", "--data", "."], "brings its own data", "leave out"),
        (["mnist_cnn.mnist"], "no data of its own", "--data DIR"),
        (["binary_mlp.cancer", "--devices", "2"], "--devices is of flax", "torchrun"),
        (["sac.pendulum", "--dtype", "bfloat16"], "float32 or float64", "--dtype"),
        (["sac.pendulum", "--epochs", "2"], "has no --epochs", "leave it out"),
    ],
)
def test_errors_say_what_and_what_to_do(
    arguments: list[str], problem: str, advice: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    assert train.main() == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("try: ")
    assert problem in lines[0]
    assert advice in lines[-1]


def test_plots(tmp_path: Path) -> None:
    lines = {"torch": (0, [3.0, 2.0, 1.0]), "switched": (1, [2.0, 1.5])}
    plots.curves(tmp_path / "a" / "x.svg", lines, "title", switch=1)
    drawn = (tmp_path / "a" / "x.svg").read_text()
    assert "<svg" in drawn


# --- Data-parallel ---


def losses_of(run_: subprocess.CompletedProcess[str]) -> np.ndarray:
    assert run_.returncode == 0, run_.stderr[-3000:]
    return np.array(json.loads(run_.stdout)["losses"])


PARALLEL = ("transformer_tiny.brackets", "--dtype", "float64", "--steps", "4", "--batch-size", "8",
            "--set", "d_model=16", "--set", "dim_feedforward=16", "--json")  # fmt: skip


def test_four_devices_have_the_curve_of_one(tmp_path: Path) -> None:
    out = ("--framework", "flax", "--out", str(tmp_path))
    four = losses_of(command(*PARALLEL, *out, "--devices", "4"))
    overrides = {"d_model": 16, "dim_feedforward": 16}
    job = make_job(
        find(PARALLEL[0]), "torch", overrides=overrides, steps=4, batch_size=8, dtype="float64"
    )
    one = np.array(run(job, score=False).losses)
    assert np.abs(four - one).max() <= 1e-12 * one.max()


def test_two_processes_have_the_curve_of_one(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run_ = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(SCRIPTS / "train.py"), *PARALLEL,
         "--framework", "torch", "--out", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | QUICK, timeout=120,
    )  # fmt: skip
    two = losses_of(run_)
    overrides = {"d_model": 16, "dim_feedforward": 16}
    job = make_job(
        find(PARALLEL[0]), "torch", overrides=overrides, steps=4, batch_size=8, dtype="float64"
    )
    one = np.array(run(job, score=False).losses)
    assert np.abs(two - one).max() <= 1e-12 * one.max()


def test_batches_that_cannot_be_divided() -> None:
    with pytest.raises(UsageError, match="JAX has 1"):
        run(small("binary_mlp.cancer", "flax", devices=8))
    assert Batch({"x": np.zeros((4, 1))}, {}).part(0, 4).inputs["x"].shape == (1, 1)


# --- Across the border (the whole of it: scripts/resume.py) ---


@pytest.mark.parametrize("first", ["torch", "flax"])
@pytest.mark.parametrize("name", ["binary_mlp.cancer", "lstm_tagger.digits", "sac.pendulum"])
def test_a_run_goes_on_in_the_other_framework(name: str, first: str) -> None:
    other = {"torch": "flax", "flax": "torch"}[first]
    settings: Any = {"steps": 8, "batch_size": 8, "schedule": "cosine"}
    if name in games.GAMES:
        settings["overrides"] = {"pi": [8], "qf": [8]}
    whole = curves.curve(name, [("torch", 8)], **settings)
    switched = curves.curve(name, [(first, 4), (other, 8)], **settings)
    assert whole.shape == switched.shape
    assert curves.judge64(whole, switched).same


def test_the_judges_can_find_a_difference(tmp_path: Path) -> None:
    """Without the optimizer's state, or at another step, the curve is another."""
    legs: Any = [("torch", 4), ("torch", 8)]
    settings: Any = {"steps": 8, "batch_size": 8, "dtype": "float32"}
    name = "lstm_tagger.digits"
    whole = curves.curve(name, legs, folder=tmp_path, **settings)
    exact = curves.curve(name, [("torch", 8)], **{**settings, "dtype": "float64"})
    assert curves.judge32(whole, curves.curve(name, legs, **settings), exact).same
    path = tmp_path / "0" / "checkpoint.pt"
    held = torch.load(path, weights_only=True)
    for state in held["optimizer"]["state"].values():
        state["exp_avg"].zero_()
    torch.save(held, path)
    job = make_job(find(name), "torch", **settings)
    late = np.array(run(job, resume=path, score=False).losses)[:, None]
    assert late[0] == whole[4]
    verdict = curves.judge32(whole, np.concatenate([whole[:4], late]), exact)
    assert not verdict.same
    assert not curves.judge64(whole, np.concatenate([whole[:4], late])).same


def test_the_measured_results_are_of_every_case() -> None:
    from training.border import CASES

    results = json.loads((SCRIPTS.parent / "docs" / "resume.json").read_text())
    assert list(results) == list(CASES)
    assert all(found["same"] for found in results.values())
    import resume

    assert (SCRIPTS.parent / "docs" / "resume.md").read_text() == resume.page(results)
