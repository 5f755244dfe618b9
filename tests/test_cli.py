"""The command line as its users meet it: exit codes, two lines an error, stdout for results."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import canonical, write

from convert.cli import main as cli_module
from convert.cli import options, output
from convert.cli.main import cli
from zoo.checkpoint.label import Label
from zoo.containers.errors import printable
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.models.bert import MODEL

CONFIG = MODEL.tiny["encoder"]


class Ran(argparse.Namespace):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """zooconvert in this process, through the console script's own entry."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["zooconvert", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli_module.main()
        out, err = capfd.readouterr()
        return Ran(code=caught.value.code, out=out, err=err)

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with one good checkpoint."""
    (tmp_path / "config.json").write_text(Label(MODEL, CONFIG).to_config_json())
    write(SafetensorsWriter, tmp_path / "model.safetensors", canonical(MODEL, CONFIG))
    return tmp_path


# --- Bad input: the code, two lines, nothing left behind ---


def evil(folder: Path) -> Path:
    class Call:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {folder}/PWNED",)

    torch.save({"a": torch.zeros(2), "b": Call()}, folder / "evil.pt")
    return folder / "evil.pt"


def evil_pickle(folder: Path) -> Path:
    return _pickled(folder, 4)


def evil_old_pickle(folder: Path) -> Path:
    return _pickled(folder, 0)


def _pickled(folder: Path, protocol: int) -> Path:
    class Call:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {folder}/PWNED",)

    (folder / "evil.pkl").write_bytes(pickle.dumps(Call(), protocol))
    return folder / "evil.pkl"


def plain_pickle(folder: Path) -> Path:
    (folder / "plain.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    return folder / "plain.pkl"


def truncated(folder: Path) -> Path:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder / "cut.safetensors"


def truncated_pt(folder: Path) -> Path:
    torch.save({"a": torch.zeros(1000)}, folder / "cut.pt")
    os.truncate(folder / "cut.pt", 2000)
    return folder / "cut.pt"


def text(folder: Path) -> Path:
    (folder / "notes.pt").write_text("these are my notes\n")
    return folder / "notes.pt"


def nothing(folder: Path) -> Path:
    (folder / "docs").mkdir()
    (folder / "docs" / "a.txt").write_text("a")
    return folder / "docs"


def lfs(folder: Path) -> Path:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "lfs.bin").write_text(pointer)
    return folder / "lfs.bin"


def three(folder: Path) -> Path:
    arrays = canonical(MODEL, CONFIG)
    del arrays["encoder.layer.1.output.dense.bias"]
    arrays["surplus.weight"] = np.zeros((2, 2), np.float32)
    arrays["pooler.dense.weight"] = arrays["pooler.dense.weight"][:, :-1]
    return write(SafetensorsWriter, folder / "three.safetensors", arrays)


BAD = [
    (truncated, 5, "cut.safetensors", "again"),
    (truncated_pt, 5, "cut.pt", "again"),
    (text, 5, "notes.pt is a text file", "known are"),
    (nothing, 5, "docs holds no checkpoint", "known are"),
    (lfs, 5, "git-lfs pointer", "git lfs pull"),
    (evil, 4, "system", "nothing of it was run"),
    (evil_pickle, 4, "system", "nothing of it was run"),
    (evil_old_pickle, 4, "system", "nothing of it was run"),
    (plain_pickle, 5, "a pickle that torch.save did not write", "state_dict()"),
    (three, 1, "3 differ", "--model or --config"),
    (lambda folder: folder / "gone.pt", 2, "gone.pt does not exist", "give the path"),
]


@pytest.mark.parametrize(
    ("make", "code", "problem", "advice"), BAD, ids=[getattr(b[0], "__name__", "") for b in BAD]
)
@pytest.mark.parametrize("command", ["torch2flax", "inspect"])
def test_bad_input(
    command: str,
    make: Callable[[Path], Path],
    code: int,
    problem: str,
    advice: str,
    folder: Path,
    run: Callable[..., Ran],
) -> None:
    path = make(folder)
    before = sorted(folder.rglob("*"))
    ran = run(command, path)
    if command == "inspect" and make is three:
        assert ran.code == 0
        assert "unknown model" in ran.out
        return
    assert ran.code == code
    first, *details, last = ran.err.splitlines()
    assert first.startswith("error: ")
    assert problem in first
    assert last.startswith("try: ")
    assert advice in last
    assert not ran.out
    assert "Traceback" not in ran.err
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    if make is three:
        assert [d.split(":")[0].strip() for d in details] == ["missing", "surplus", "wrong shape"]
    else:
        assert not details


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--model", "nope"], 2, "no model is called 'nope'"),
        (["--config", "nope.json"], 2, "nope.json"),
        (["--no-verify", "--level", "outputs"], 2, "contradict"),
        (["--dtype", "bfloat16", "--level", "outputs"], 2, "which --dtype changes"),
        (["--max-shard-size", "inf"], 2, "not a size"),
        (["--dtype", "int3"], 2, "not a floating-point dtype"),
        (["--max-shard-size", "many"], 2, "not a size"),
        (["--to", "gguf"], 2, "gguf"),
        (["no/such/place/x.msgpack"], 2, "does not exist"),
        (["x.pt"], 2, "pt is not a container of Flax"),
        (["x.safetensors", "--to", "msgpack"], 2, "has the suffix of safetensors"),
    ],
)
def test_bad_options(
    arguments: list[str], code: int, problem: str, folder: Path, run: Callable[..., Ran]
) -> None:
    before = sorted(folder.rglob("*"))
    ran = run("torch2flax", folder / "model.safetensors", *arguments)
    assert ran.code == code
    assert problem in ran.err
    assert sorted(folder.rglob("*")) == before


def test_an_existing_target(folder: Path, run: Callable[..., Ran]) -> None:
    assert run("torch2flax", folder / "model.safetensors", "--to", "msgpack").code == 0
    again = run("torch2flax", folder / "model.safetensors", "--to", "msgpack")
    assert again.code == 2
    assert "exists already" in again.err
    assert "--force" in again.err
    forced = run("torch2flax", folder / "model.safetensors", "--to", "msgpack", "--force")
    assert forced.code == 0


def test_a_missing_extra(
    folder: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "torch" else find(n, *a)
    )
    assert run("torch2flax", folder / "model.safetensors", "--to", "msgpack").code == 0
    ran = run("flax2torch", folder / "model.flax.msgpack", "back.pt")
    assert ran.code == 6
    assert "pip install 'zooconvert[torch]'" in ran.err


def test_different_is_exit_code_3(folder: Path, run: Callable[..., Ran]) -> None:
    arrays = canonical(MODEL, CONFIG)
    arrays["pooler.dense.bias"] = arrays["pooler.dense.bias"] + 1
    other = write(SafetensorsWriter, folder / "other.safetensors", arrays)
    ran = run("verify", folder / "model.safetensors", other)
    assert ran.code == 3
    assert ran.out.startswith("different:")
    assert "pooler.dense.bias" in ran.out
    assert run("verify", folder / "model.safetensors", folder / "model.safetensors").code == 0


def test_interrupted_is_exit_code_130(folder: Path) -> None:
    slow = (  # where the tests run in the background, the shell has SIGINT ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import time, convert.engine.stream as r; real = r.hash_leaves\n"
        "r.hash_leaves = lambda *a: (print('at work', flush=True), time.sleep(0.2), real(*a))[2]\n"
        "from convert.cli.main import main; main()"
    )
    for signum in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", slow, "torch2flax", "model.safetensors", "m.msgpack"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "interrupted" in err
        kept, *others = sorted(p.name for p in folder.iterdir())
        assert kept in err
        assert others == ["config.json", "model.safetensors"]


def test_a_traceback_only_on_request(
    folder: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kw: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("convert.inspection.inspect", broken)
    ran = run("inspect", folder / "model.safetensors")
    assert ran.code == 1
    assert "RuntimeError: boom" in ran.err
    assert "bug" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in run("inspect", folder / "model.safetensors", "--debug").err


# --- Results ---


def test_json_is_all_that_stdout_holds(folder: Path, run: Callable[..., Ran]) -> None:
    src = folder / "model.safetensors"
    plan = json.loads(run("torch2flax", src, "--to", "msgpack", "--dry-run", "--json").out)
    assert plan["disk"] > plan["memory"] > 0
    assert not (folder / "model.flax.msgpack").exists()
    made = json.loads(run("torch2flax", src, "--to", "msgpack", "--json").out)
    assert made["verified"]["level"] == "bits"
    assert Path(made["certificate"]).is_file()
    assert Path(made["target"]).is_file()
    same = json.loads(run("verify", src, made["target"], "--json").out)
    assert same["verdict"] == "same"
    seen = json.loads(run("inspect", made["target"], "--json").out)
    assert seen["tensors"]["pooler.dense.kernel"]["shape"] == [32, 32]
    listed = json.loads(run("models", "minilm*", "--json").out)
    assert [m["name"] for m in listed] == ["minilm_l6"]
    assert listed[0]["parameters"] == 22_713_216


def test_a_dry_run_shows_every_step(folder: Path, run: Callable[..., Ran]) -> None:
    ran = run("torch2flax", folder / "model.safetensors", "--dry-run", "--dtype", "bfloat16")
    assert ran.code == 0
    assert "permute(1,0)" in ran.out
    assert "F32 -> BF16" in ran.out
    assert "not written (--dry-run)" in ran.out
    assert ran.out.count("kernel") == 13
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_quiet_prints_errors_only(folder: Path, run: Callable[..., Ran]) -> None:
    ran = run("torch2flax", folder / "model.safetensors", "--to", "msgpack", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    assert run("torch2flax", folder / "model.safetensors", "--to", "msgpack", "-q").err


def test_shards(folder: Path, run: Callable[..., Ran]) -> None:
    assert run("torch2flax", folder / "model.safetensors", folder / "flax").code == 0
    out = folder / "shards"
    assert run("flax2torch", folder / "flax", out, "--max-shard-size", "20KB").code == 0
    assert (out / "model.safetensors.index.json").is_file()
    assert (out / "config.json").is_file()
    assert (out / "certificate.json").is_file()
    assert run("verify", out, folder / "model.safetensors").code == 0


def test_names_from_files_are_escaped(folder: Path, run: Callable[..., Ran]) -> None:
    ugly = "w\x1b[31m\u202eevil\x00\n../x"
    path = write(SafetensorsWriter, folder / "ugly.safetensors", {ugly: np.zeros(1)})
    for arguments in (["inspect", path], ["torch2flax", path]):
        ran = run(*arguments)
        assert r"w\x1b[31m\u202eevil\x00\n../x" in ran.out + ran.err
        assert "\x1b[31m" not in ran.out + ran.err
        assert "\u202e" not in ran.out + ran.err


def test_printable_keeps_what_is_harmless() -> None:
    assert printable("encoder.größe.层 [0]") == "encoder.größe.层 [0]"
    assert printable("a\tb\u2066c\u200d") == r"a\tb\u2066c\u200d"


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (90_900_000, "90.9 MB"), (10**13, "10.0 TB")],
)
def test_sizes(nbytes: int, expected: str) -> None:
    assert output.size(nbytes) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5K", 1500), ("77", 77)]
)
def test_shard_sizes(text: str, expected: int) -> None:
    assert options.Size().convert(text, None, None) == expected


# --- Help ---


def commands() -> list[str]:
    return sorted(cli.commands)


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"zooconvert {name}" in result.output
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts} has no help"


def test_models_are_found_by_any_part_of_their_name(run: Callable[..., Ran]) -> None:
    assert "bert_large_cased" in run("models", "BERT").out
    assert "minilm_l6" in run("models", "bert").out, "by family"
    none = run("models", "nope")
    assert none.code == 2
    assert "no model matches 'nope'" in none.err


def test_inspect_says_what_differs(folder: Path, run: Callable[..., Ran]) -> None:
    ran = run("inspect", three(folder))
    assert "missing: encoder.layer.1.output.dense.bias" in ran.out
    (folder / "config.json").unlink()
    assert "not told: hidden_act" in run("inspect", folder / "model.safetensors").out


def test_names_are_not_broken_in_narrow_terminals(
    folder: Path, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("inspect", folder / "model.safetensors").out.splitlines()
    assert any(n.startswith("encoder.layer.0.attention.output.LayerNorm.weight ") for n in lines)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_ZOOCONVERT_COMPLETE" in result.output
    found = options.complete_model(None, None, "mini")
    assert found == ["minilm_l6"]


def test_windows_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as e:
        cli_module.main()
    assert e.value.code == 2
    problem, advice = capsys.readouterr().err.splitlines()
    assert problem == "error: zooconvert does not run on Windows"
    assert advice.startswith("try: use Linux")
