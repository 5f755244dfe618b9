"""Training checkpoints as people have them: what is not weights is found, moved and kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import Arrays, bits, canonical, every_tiny, write
from torch import nn

import convert
import zoo
from convert.api import plan
from convert.cli.main import cli
from convert.training_state import storage
from convert.training_state.besides import read_training
from convert.training_state.ownership import Parameters
from convert.training_state.state import Group, OptimizerState, TrainingState
from zoo.containers.errors import CorruptInput, UsageError, ZooError
from zoo.containers.safetensors_file import SafetensorsWriter
from zoo.loading import build
from zoo.model import Config, Model
from zoo.registry import families

MLP = families()["mlp"]
SMALL = next(iter(MLP.tiny.values()))
BERT = families()["bert"]
CLASSIFIER = BERT.tiny["sequence_classification"]
SAC = families()["sac"]

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "sgd_nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95)}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.2}),
    "amsgrad": ("AdamW", {"lr": 0.01, "amsgrad": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.2}),
    "rmsprop": ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "adadelta": ("Adadelta", {"rho": 0.8}),
    "nadam": ("NAdam", {"lr": 0.01}),
    "radam": ("RAdam", {"lr": 0.01}),
}


def module(model: Model = MLP, config: Config = SMALL) -> nn.Module:
    made = build(model, config, "torch", canonical(model, config))
    assert isinstance(made, nn.Module)
    return made.train()


def steps(
    net: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    count: int = 3,
    of: tuple[Model, Config] = (MLP, SMALL),
) -> None:
    """Real updates on the model's sample inputs."""
    inputs = {
        k: torch.from_numpy(v.astype(np.float32) if v.dtype.kind == "f" else v)
        for k, v in of[0].inputs(of[1]).items()
    }
    for _ in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = net(**inputs)
        loss = sum((t.float() ** 2).mean() for t in leaves(output))
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def leaves(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, tuple):
        for part in output:
            yield from leaves(part)


def adamw(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01, **options)


def trained(optimizer: Callable[..., torch.optim.Optimizer] = adamw) -> Any:
    net = module()
    made = optimizer(net)
    steps(net, [made])
    return net, made


def expected(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """slot.name -> bits of what torch itself holds, "step" and all, by the parameter objects."""
    names = {id(p): n for n, p in net.named_parameters()}
    return {
        f"{slot}.{names[id(p)]}": bits(value.detach().numpy())
        for p, state in optimizer.state.items()
        for slot, value in state.items()
        if value is not None
    }


def held(state: OptimizerState) -> dict[str, Any]:
    """The same of ours."""
    found = {f"{s}.{n}": bits(a) for s, arrays in state.slots.items() for n, a in arrays.items()}
    return found | {f"step.{n}": bits(np.array(c, np.float32)) for n, c in state.steps.items()}


def save(path: Path, **parts: Any) -> Path:
    torch.save(parts, path)
    return path


def only(state: TrainingState) -> OptimizerState:
    (optimizer,) = state.optimizers
    return optimizer


def arrays_of(state: TrainingState) -> dict[str, Any]:
    return {n: bits(arrays[name]) for n, arrays, name in storage.tensors(state)}


def described(state: TrainingState) -> Any:
    """Everything that is not an array."""
    groups = [(o.name, o.rule, o.groups, o.steps) for o in state.optimizers]
    return groups, dict(state.data)


# --- There and back ---


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("to", ["msgpack", "orbax"])
def test_every_optimizer_there_and_back(kind: str, to: str, tmp_path: Path) -> None:
    name, options = OPTIMIZERS[kind]
    net, optimizer = trained(lambda n: getattr(torch.optim, name)(n.parameters(), **options))
    source = save(
        tmp_path / "a.pt",
        model=net.state_dict(),
        optimizer=optimizer.state_dict(),
        epoch=3,
        best=float("inf"),
        history=[(1, 0.5), (2, 0.25)],
    )
    there = convert.convert(source, tmp_path / "b", to, framework="flax")
    flax = tmp_path / ("b" if to == "orbax" else "b.msgpack")
    if not flax.exists():
        flax = next(p for p in tmp_path.iterdir() if p.name == there.target)
    back = convert.convert(flax, tmp_path / "c.safetensors", framework="torch")
    first, last = read_training(source), read_training(tmp_path / "c.safetensors")
    state = only(last)
    assert state.rule == name
    assert held(state) == expected(net, optimizer)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert state.groups == [Group(tuple(dict(net.named_parameters())), group)]
    assert last.data == {"epoch": 3, "best": float("inf"), "history": [[1, 0.5], [2, 0.25]]}
    assert (arrays_of(first), described(first)) == (arrays_of(last), described(last))
    for made in (there, back):
        assert made.training["verified"] == "bits"
        assert len(made.training["hashes"]) == made.training["tensors"]
    assert there.training["hashes"] == back.training["hashes"]


def test_a_converted_directory_holds_it_and_every_moment_is_an_ordinary_tensor(
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file

    net, optimizer = trained()
    source = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    convert.convert(source)
    tensors = load_file(tmp_path / "a.flax" / "optimizer.safetensors")
    wanted = {k: v for k, v in expected(net, optimizer).items() if not k.startswith("step.")}
    assert {n: bits(a) for n, a in tensors.items()} == wanted
    import orbax.checkpoint.experimental.v1 as ocp

    assert set(ocp.load(tmp_path / "a.flax")) == {"fc1", "fc2", "fc3"}


# --- Whose moments ---


@every_tiny()
def test_the_order_is_that_of_named_parameters(model: Model, config: Config) -> None:
    parameters = Parameters.of(model.layout_of(config))
    net = model.definition("torch")(config)
    assert {n: tuple(p.shape) for n, p in net.named_parameters()} == parameters.shapes
    assert [n for n, _ in net.named_parameters()] == list(parameters.shapes)


class Wrapper(nn.Module):
    """What DistributedDataParallel, torch.compile and Lightning do to names."""

    def __init__(self, net: nn.Module, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, net)


@pytest.mark.parametrize("wrapper", ["", "module", "_orig_mod", "model"])
def test_named_parameters_in_any_order(wrapper: str, tmp_path: Path) -> None:
    net = module()
    outer = Wrapper(net, wrapper) if wrapper else net
    named = list(reversed(list(outer.named_parameters())))
    optimizer = torch.optim.AdamW(
        [
            {"params": named[:2], "weight_decay": 0.0},
            {"params": named[2:], "lr": torch.tensor(0.5)},
        ],
        lr=0.01,
    )
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", state_dict=outer.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert held(state) == expected(net, optimizer)
    assert not state.notices
    assert state.groups[0].params == ("fc3.bias", "fc3.weight")
    assert [g.options["lr"] for g in state.groups] == [0.01, 0.5]


def test_names_as_distributed_checkpoints_have_them(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    net, optimizer = trained()
    path = save(
        tmp_path / "a.pt",
        model=net.state_dict(),
        optim=get_optimizer_state_dict(net, optimizer),
    )
    assert held(only(read_training(path))) == expected(net, optimizer)


def test_without_names_the_order_of_the_model_is_told(tmp_path: Path) -> None:
    net, optimizer = trained()
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = read_training(path)
    assert held(only(state)) == expected(net, optimizer)
    told = "optimizer: its parameters have no names: paired by the order of the model"
    assert told in state.notices
    assert told in convert.convert(path).notices


def test_the_order_is_that_of_the_state_dict_in_the_file(tmp_path: Path) -> None:
    """A module of the same names whose layers were made in another order: torch saves in that."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = module()
            for name in ("fc3", "fc2", "fc1"):
                setattr(self, name, net.get_submodule(name))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc3(self.fc2(self.fc1(x)).relu()).relu()  # type: ignore[no-any-return]

    net = Other()
    optimizer = adamw(net)
    net(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    assert held(only(read_training(path))) == expected(net, optimizer)


@pytest.mark.parametrize("rule", ["decay", "no_decay", "matrices", "vectors", "layers"])
def test_groups_as_scripts_make_them(rule: str, tmp_path: Path) -> None:
    net = module()
    named = list(net.named_parameters())
    first: Callable[[str, Any], bool] = {
        "decay": lambda n, p: "bias" not in n,
        "no_decay": lambda n, p: "bias" in n,
        "matrices": lambda n, p: p.ndim >= 2,
        "vectors": lambda n, p: p.ndim < 2,
        "layers": lambda n, p: n.startswith("fc1"),
    }[rule]
    parts = [[p for n, p in named if first(n, p) is side] for side in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.5}], lr=0.01
    )
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert held(state) == expected(net, optimizer)
    assert [set(g.params) for g in state.groups] == [
        {n for n, p in named if first(n, p) is side} for side in (True, False)
    ]


def test_frozen_parameters_may_be_absent(tmp_path: Path) -> None:
    net = module()
    optimizer = torch.optim.Adam(net.get_submodule("fc3").parameters())
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert held(state) == expected(net, optimizer)
    assert state.params == ("fc3.weight", "fc3.bias")
    assert state.notices[0].endswith("paired by the order of the model, of fc3")
    optimizer = torch.optim.Adam([*net.get_submodule("fc2").parameters(), *net.fc3.parameters()])
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert held(state) == expected(net, optimizer)
    assert "of 6 parameters the only 4 whose shapes fit" in state.notices[0]


def test_frozen_parameters_may_be_there_without_state(tmp_path: Path) -> None:
    net = module()
    for parameter in net.get_submodule("fc1").parameters():
        parameter.requires_grad = False
    optimizer = adamw(net)
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert held(state) == expected(net, optimizer)
    assert "fc1.weight" in state.params
    assert "fc1.weight" not in state.steps
    convert.convert(path)
    assert described(read_training(tmp_path / "a.flax")) == described(read_training(path))


def test_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    net = module()
    optimizer = adamw(net)
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    state = only(read_training(path))
    assert (held(state), state.rule, len(state.params)) == ({}, "AdamW", 6)
    convert.convert(path)
    assert described(read_training(tmp_path / "a.flax")) == described(read_training(path))


# --- What is refused ---


def refused(path: Path, **arguments: Any) -> ZooError:
    with pytest.raises(ZooError) as caught:
        read_training(path, **arguments)
    return caught.value


def test_an_order_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    net = module()
    optimizer = torch.optim.AdamW(reversed(list(net.parameters())))
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    error = refused(path)
    assert "the optimizer has 6 parameters and does not name them" in error.problem
    assert error.details[0].startswith("shapes of its moments: 3, 3x16, 16")
    assert "AdamW(model.named_parameters())" in error.advice
    made = convert.convert(path)
    (told,) = [n for n in made.notices if "does not name them" in n]
    assert told.startswith("NOT converted: the optimizer has 6 parameters")
    assert "named_parameters" in told
    assert "NOT converted: 18 of the tensors, below optimizer" in made.notices
    assert not made.training
    assert not (tmp_path / "a.flax" / "optimizer.safetensors").exists()


def test_two_orders_that_fit_are_refused(tmp_path: Path) -> None:
    """Nothing but group sizes can tell, where no step was made."""
    net = module()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    assert "more than one order fits" in refused(path).problem


def test_an_ambiguous_part_of_the_model_is_refused(tmp_path: Path) -> None:
    net = module()
    optimizer = torch.optim.AdamW([dict(net.named_parameters())["fc2.bias"]])  # as long as fc1's
    steps(net, [optimizer])
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    assert "does not name them" in refused(path).problem


def test_names_of_another_model_are_all_told(tmp_path: Path) -> None:
    net = module()
    named = [(n.replace("fc2", "fc9"), p) for n, p in net.named_parameters()]
    optimizer = torch.optim.AdamW(named)
    steps(net, [optimizer])
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(2, 2)
    saved["state"][0]["exp_avg_sq"] = torch.zeros(2, 2)
    error = refused(save(tmp_path / "a.pt", model=net.state_dict(), optimizer=saved))
    assert error.details == [
        "not in the model: fc9.weight",
        "not in the model: fc9.bias",
        "moments of fc1.weight are 2x2, the parameter is 16x5",
    ]


def test_moments_of_two_shapes_are_refused(tmp_path: Path) -> None:
    net, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"][2]["exp_avg"] = torch.zeros(256)
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=saved)
    assert "moments of parameter 2 have the shapes 16x16, 256" in refused(path).problem


@pytest.mark.parametrize("kind", ["Adamax", "Rprop", "ASGD", "Adafactor"])
def test_an_unknown_optimizer_is_named_by_what_it_holds(kind: str, tmp_path: Path) -> None:
    net, optimizer = trained(lambda n: getattr(torch.optim, kind)(n.parameters()))
    path = save(
        tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=2
    )
    error = refused(path)
    assert "optimizer holds an optimizer that is not known: its options are lr" in error.problem
    assert "AdamW" in error.advice
    made = convert.convert(path)
    assert any(n.startswith("NOT converted: optimizer holds") for n in made.notices)
    assert made.training["counters"] == {"epoch": 2}, "the rest goes ahead"


def test_a_damaged_state_dict_is_refused(tmp_path: Path) -> None:
    net, optimizer = trained()
    saved = optimizer.state_dict()
    cases: dict[str, Callable[[Any], None]] = {
        "in no group": lambda s: s["state"].update({77: s["state"][0]}),
        "no list of params": lambda s: s["param_groups"][0].update(params=7),
        "stands twice": lambda s: s["param_groups"][0].update(params=[0, 0, 1, 2, 3, 4]),
    }
    for message, damage in cases.items():
        broken = copy.deepcopy(saved)
        damage(broken)
        path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=broken)
        assert message in refused(path).problem, message


# --- Forms ---


def test_a_plain_dict_with_everything(tmp_path: Path) -> None:
    net = module()
    optimizer = adamw(net)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        steps(net, [optimizer], 1)
        schedule.step()
        average.update_parameters(net)
    path = save(
        tmp_path / "a.pt",
        model_state_dict=net.state_dict(),
        optimizer_state_dict=optimizer.state_dict(),
        ema_state_dict=average.state_dict(),
        scheduler=schedule.state_dict(),
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        epoch=3,
        loss=0.25,
        best_accuracy=torch.tensor(0.75),
        rng_state=torch.get_rng_state(),
        args={"lr": 0.01, "name": "run"},
    )
    state = read_training(path)
    assert held(only(state)) == expected(net, optimizer)
    wanted = dict(average.module.named_parameters())
    assert {n: bits(a) for n, a in state.ema.items()} == {
        n: bits(p.detach().numpy()) for n, p in wanted.items()
    }
    assert state.data["epoch"] == 3
    assert state.data["loss"] == 0.25
    assert state.data["best_accuracy"] == 0.75
    assert state.data["args.name"] == "run"
    assert state.data["scaler.scale"] == 65536.0
    assert state.data["ema_state_dict.n_averaged"] == 3
    assert state.data["scheduler.last_epoch"] == 3
    assert state.data["scheduler._last_lr"] == schedule.get_last_lr()
    (told,) = [n for n in state.notices if "schedule is code" in n]
    assert "scheduler.last_epoch 3" in told
    assert "NOT converted: 1 of the tensors, below rng_state" in state.notices
    made = convert.convert(path)
    assert made.training["averages"] == 6
    kept = read_training(tmp_path / "a.flax")
    assert (arrays_of(kept), described(kept)) == (arrays_of(state), described(state))


@pytest.mark.parametrize("form", ["state_dict_ema", "model_ema.module", "ema.shadow", "list"])
def test_averages_of_others(form: str, tmp_path: Path) -> None:
    net, optimizer = trained()
    average = {n: p.detach() * 0.5 for n, p in net.named_parameters()}
    held_as: dict[str, Any] = {
        "state_dict_ema": {"state_dict_ema": average},
        "model_ema.module": {"model_ema": {f"module.{n}": a for n, a in average.items()}},
        "ema.shadow": {"ema": {"decay": 0.99, "shadow": average}},
        "list": {"ema": {"decay": 0.99, "shadow_params": list(average.values())}},
    }[form]
    path = save(
        tmp_path / "a.pt",
        state_dict=net.state_dict(),
        optimizer=optimizer.state_dict(),
        **held_as,
    )
    state = read_training(path)
    assert {n: bits(a) for n, a in state.ema.items()} == {
        n: bits(a.numpy()) for n, a in average.items()
    }
    assert ("ema.decay" in state.data) is ("ema" in held_as)


def test_averages_that_are_not_of_the_model_are_told(tmp_path: Path) -> None:
    net, _ = trained()
    path = save(
        tmp_path / "a.pt", state_dict=net.state_dict(), ema={"fc1.weight": torch.zeros(5, 16)}
    )
    (told,) = [n for n in convert.convert(path).notices if "averages" in n]
    assert "ema.fc1.weight is 5x16, should be 16x5" in told


def test_lightning(tmp_path: Path) -> None:
    net = module()
    optimizers = [
        torch.optim.SGD(net.get_submodule("fc1").parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(
            [
                *net.get_submodule("fc2").named_parameters("fc2"),
                *net.get_submodule("fc3").named_parameters("fc3"),
            ],
        ),
    ]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in optimizers]
    steps(net, optimizers)
    path = save(
        tmp_path / "last.ckpt",
        **{"pytorch-lightning_version": "2.5.0"},
        epoch=4,
        global_step=1200,
        state_dict={f"model.{n}": t for n, t in net.state_dict().items()},
        loops={"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 5}}}},
        callbacks={
            "ModelCheckpoint{'monitor': 'val_loss'}": {
                "best_model_score": torch.tensor(0.5),
                "best_k_models": {},
            }
        },
        optimizer_states=[o.state_dict() for o in optimizers],
        lr_schedulers=[s.state_dict() for s in schedules],
        hyper_parameters={"lr": 0.1, "layers": [5, 16]},
    )
    state = read_training(path)
    assert [(o.name, o.rule) for o in state.optimizers] == [("0", "SGD"), ("1", "AdamW")]
    for mine, theirs in zip(state.optimizers, optimizers, strict=True):
        assert held(mine) == expected(net, theirs)
    assert state.data["epoch"] == 4
    assert state.data["global_step"] == 1200
    assert state.data["hyper_parameters.layers"] == [5, 16]
    assert state.data["lr_schedulers.0.gamma"] == 0.1
    assert state.data["callbacks.ModelCheckpoint{'monitor': 'val_loss'}.best_model_score"] == 0.5
    assert any("schedule is code" in n for n in state.notices)
    convert.convert(path, tmp_path / "a.msgpack")
    kept = read_training(tmp_path / "a.msgpack")
    assert (arrays_of(kept), described(kept)) == (arrays_of(state), described(state))
    assert "0/momentum_buffer.fc1.weight" in arrays_of(kept)


def trainer_directory(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As Trainer._save_checkpoint writes one; its own function makes the two groups."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer

    config = json.loads(zoo.checkpoint.label.Label(BERT, CLASSIFIER).to_config_json())
    net = BertForSequenceClassification(BertConfig(**{**config, "zoo": None}))
    with torch.no_grad():
        weights = canonical(BERT, CLASSIFIER)
        net.load_state_dict({n: torch.from_numpy(weights[n]) for n in net.state_dict()})
    decayed = Trainer.get_decay_parameter_names(None, net)  # type: ignore[arg-type]
    named = list(net.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if n in decayed], "weight_decay": 0.01},
            {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
        ],
        lr=5e-5,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    for _ in range(2):
        optimizer.zero_grad()
        net(input_ids=torch.arange(12).reshape(2, 6)).logits.square().sum().backward()
        optimizer.step()
        schedule.step()
    net.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(schedule.state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    torch.save({"learning_rate": 5e-5}, folder / "training_args.bin")
    state = {"epoch": 1.0, "global_step": 2, "log_history": [{"loss": 0.5, "step": 1}]}
    (folder / "trainer_state.json").write_text(json.dumps(state | {"best_metric": None}))
    return net, optimizer


def test_a_directory_of_transformers_trainer(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    net, optimizer = trainer_directory(folder)
    state = read_training(folder)
    assert held(only(state)) == expected(net, optimizer)
    assert [g.options["weight_decay"] for g in only(state).groups] == [0.01, 0.0]
    assert any("paired by transformers' Trainer" in n for n in state.notices)
    assert state.data["global_step"] == 2
    assert state.data["log_history"] == [{"loss": 0.5, "step": 1}]
    assert state.data["scheduler.last_epoch"] == 2
    (told,) = [n for n in state.notices if "random states" in n]
    assert "rng_state.pth" in told
    assert "training_args.bin" in told
    made = convert.convert(folder, tmp_path / "flax")
    assert made.training["optimizers"][0]["step"] == 2
    assert not any("took model.safetensors" in n for n in made.notices)
    convert.convert(tmp_path / "flax", tmp_path / "torch", max_shard_size=100_000)
    for converted in ("flax", "torch"):
        kept = read_training(tmp_path / converted)
        assert (arrays_of(kept), described(kept)) == (arrays_of(state), described(state))


def test_a_trainers_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer_directory(tmp_path)
    _, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    error = refused(tmp_path)
    assert "no order that is known pairs them" in error.problem
    assert "shapes of its moments: 16x5" in error.details[0]
    made = convert.convert(tmp_path, tmp_path / "flax")
    assert made.training["counters"] == {"epoch": 1.0, "global_step": 2}
    assert any("NOT converted: the optimizer has 6 parameters" in n for n in made.notices)


def test_stable_baselines3(tmp_path: Path) -> None:
    config = dataclasses.replace(next(iter(SAC.tiny.values())), target=True)
    net = module(SAC, config)
    parts = {n: net.get_submodule(n) for n in ("actor", "critic")}
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=3e-4) for n, p in parts.items()}
    steps(net, list(optimizers.values()), of=(SAC, config))
    path = tmp_path / "sac.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "{}")
        saved: dict[str, Any] = {"policy": net.state_dict()}
        saved |= {f"{n}.optimizer": o.state_dict() for n, o in optimizers.items()}
        for name, part in saved.items():
            with archive.open(f"{name}.pth", "w", force_zip64=True) as file:
                torch.save(part, file)
    state = read_training(path)
    assert [o.name for o in state.optimizers] == ["actor", "critic"]
    for optimizer in state.optimizers:
        assert held(optimizer) == expected(net, optimizers[optimizer.name])
    assert any("the order of the model's critic" in n for n in state.notices)
    made = convert.convert(path)
    assert "not read: data" in made.notices
    kept = read_training(tmp_path / "sac.flax")
    assert (arrays_of(kept), described(kept)) == (arrays_of(state), described(state))


def test_the_same_two_optimizers_in_one_dict(tmp_path: Path) -> None:
    config = dataclasses.replace(next(iter(SAC.tiny.values())), target=True)
    net = module(SAC, config)
    actor, critic = (
        torch.optim.Adam(net.get_submodule(n).parameters()) for n in ("actor", "critic")
    )
    steps(net, [actor, critic], of=(SAC, config))
    flat = {
        **{n: net.get_submodule(n).state_dict() for n in ("actor", "critic", "critic_target")},
        "actor_optimizer": actor.state_dict(),
        "critic_optimizer": critic.state_dict(),
        "entropy_optimizer": torch.optim.Adam([torch.zeros(1)]).state_dict(),
        "steps_done": 7,
    }
    state = read_training(save(tmp_path / "a.pt", **flat))
    found = {o.name: held(o) for o in state.optimizers}
    assert found == {"actor": expected(net, actor), "critic": expected(net, critic)}
    assert state.data == {"steps_done": 7}
    assert any(n.startswith("not kept: the optimizer has 1 parameters") for n in state.notices)


def test_names_within_the_module_that_an_optimizer_is_of(tmp_path: Path) -> None:
    config = dataclasses.replace(next(iter(SAC.tiny.values())), target=True)
    net = module(SAC, config)
    actor = torch.optim.Adam(net.get_submodule("actor").named_parameters())
    critic = torch.optim.Adam(net.get_submodule("critic").parameters())
    steps(net, [actor, critic], of=(SAC, config))
    path = save(
        tmp_path / "a.pt",
        model=net.state_dict(),
        actor_optimizer=actor.state_dict(),
        critic_optimizer=critic.state_dict(),
    )
    found = {o.name: held(o) for o in read_training(path).optimizers}
    assert found == {"actor": expected(net, actor), "critic": expected(net, critic)}


def test_an_optimizer_alone_needs_the_layout(tmp_path: Path) -> None:
    net, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    state = read_training(tmp_path / "optimizer.pt", layout=MLP.layout_of(SMALL))
    assert held(only(state)) == expected(net, optimizer)
    assert not state.data
    with pytest.raises(ZooError):
        read_training(tmp_path / "optimizer.pt")


# --- Flax ---


def flax_module(model: Model = MLP, config: Config = SMALL) -> Any:
    return build(model, config, "flax", canonical(model, config))


def optax_adam(net: Any, count: int = 3) -> tuple[Any, Any, Any]:
    """Pure parameters, the transformation and its state after updates with made-up gradients."""
    import jax
    import optax
    from flax import nnx

    params = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, b1=0.8),
    )
    state = tx.init(params)
    for i in range(count):
        gradients = jax.tree.map(lambda p, i=i: p * (i + 1) - 0.1, params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, tx, state


def moments_of(state: Any, slots: dict[str, str]) -> dict[str, Any]:
    """slot.canonical name -> bits, from the tree itself: a linear kernel is transposed. The first
    part that is a slot counts: SAC's actor has a layer `mu`."""
    import jax

    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        at = next((i for i, part in enumerate(parts) if part in slots), None)
        if at is None:
            continue
        *modules, last = [p for p in parts[at + 1 :] if p != "value"]
        array = np.asarray(leaf)
        weight = {"kernel": "weight"}.get(last, last)
        array = array.T if last == "kernel" else array
        found[".".join([slots[parts[at]], *modules, weight])] = bits(array)
    return found


ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq"}


def flax_checkpoint(form: str, folder: Path) -> tuple[Path, Any]:
    import orbax.checkpoint as ocp
    from flax import serialization
    from flax.training.train_state import TrainState

    params, tx, opt_state = optax_adam(flax_module())
    state = TrainState(step=3, apply_fn=None, params=params, tx=tx, opt_state=opt_state)
    path = folder / form
    if form == "to_bytes":
        path.write_bytes(serialization.to_bytes(state))
        return path, opt_state
    if form == "train_state":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, state)
    elif form == "standard":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {"params": params, "opt_state": opt_state, "step": 3})
    elif form == "items":
        with ocp.CheckpointManager(path, item_names=("params", "opt_state")) as manager:
            items = {
                n: ocp.args.StandardSave(v)
                for n, v in (("params", params), ("opt_state", opt_state))
            }
            manager.save(3, args=ocp.args.Composite(**items))
    else:
        ocp.PyTreeCheckpointer().save(
            path, {"params": params, "opt_state": opt_state, "step": 3, "epoch": 1}
        )
    return path, opt_state


def test_a_momentum_times_the_rate_needs_the_rate(tmp_path: Path) -> None:
    import jax
    import optax
    from flax import nnx, serialization

    params = nnx.to_pure_dict(nnx.state(flax_module(), nnx.Param))
    tx = optax.rmsprop(0.25, momentum=0.5, eps_in_sqrt=False)
    _, opt_state = tx.update(jax.tree.map(lambda p: p + 1, params), tx.init(params), params)
    path = tmp_path / "run.msgpack"
    path.write_bytes(serialization.to_bytes({"params": params, "opt_state": opt_state}))
    told = plan(path).notices
    assert any("NOT converted" in n and "give learning_rate=" in n for n in told)
    run = CliRunner().invoke(cli, ["flax2torch", str(path), "--learning-rate", "0.25"])
    assert run.exit_code == 0, run.output
    state = only(read_training(tmp_path / "run.safetensors"))
    traces = moments_of(opt_state, {"trace": "momentum_buffer"})
    assert traces
    assert {
        f"momentum_buffer.{n}": bits(-0.25 * a) for n, a in state.slots["momentum_buffer"].items()
    } == traces


@pytest.mark.parametrize("form", ["to_bytes", "train_state", "standard", "pytree", "items"])
def test_flax_checkpoints(form: str, tmp_path: Path) -> None:
    path, opt_state = flax_checkpoint(form, tmp_path)
    state = read_training(path)
    optimizer = only(state)
    wanted = moments_of(opt_state, ADAM)
    assert len(wanted) == 12
    mine = {n: b for n, b in held(optimizer).items() if not n.startswith("step.")}
    assert mine == wanted
    assert set(optimizer.steps.values()) == {3}
    assert optimizer.groups[0].options["lr"] == 0.01
    assert optimizer.groups[0].options["betas"][0] == 0.8
    if form != "items":
        assert state.data["step"] == 3
    assert ("epoch" in state.data) is (form == "pytree")
    made = convert.convert(path, tmp_path / "b.safetensors")
    assert not any("NOT converted" in n for n in made.notices)
    kept = read_training(tmp_path / "b.safetensors")
    assert (arrays_of(kept), described(kept)) == (arrays_of(state), described(state))
    back = convert.convert(tmp_path / "b.safetensors", tmp_path / "c.msgpack")
    assert back.training["hashes"] == made.training["hashes"]
    assert convert.verify(path, tmp_path / "c.msgpack").verdict == "same"


@pytest.mark.parametrize("pure", [True, False])
def test_the_state_of_an_nnx_optimizer(pure: bool, tmp_path: Path) -> None:
    import jax
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx

    net = flax_module()
    optimizer = nnx.Optimizer(net, optax.adam(0.01), wrt=nnx.Param)
    for i in range(2):
        weights = nnx.state(net, nnx.Param)
        optimizer.update(net, jax.tree.map(lambda p, i=i: p * 2 - i, weights))
    state = nnx.state(optimizer)
    tree = {"model": nnx.state(net, nnx.Param), "optimizer": state}
    saved = jax.tree.map(lambda x: x, {k: nnx.to_pure_dict(v) for k, v in tree.items()})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", saved if pure else tree)
    found = read_training(tmp_path / "a")
    mine = {n: b for n, b in held(only(found)).items() if not n.startswith("step.")}
    assert mine == moments_of(nnx.to_pure_dict(state)["opt_state"], ADAM)
    assert set(only(found).steps.values()) == {2}
    assert found.data["optimizer.step"] == 2


def test_two_flax_optimizers_of_a_part_each(tmp_path: Path) -> None:
    from flax import nnx, serialization

    config = dataclasses.replace(next(iter(SAC.tiny.values())), target=True)
    net = flax_module(SAC, config)
    tree: dict[str, Any] = {"model": nnx.to_pure_dict(nnx.state(net, nnx.Param))}
    wanted = {}
    for part in ("actor", "critic"):
        _, _, tree[f"{part}_opt_state"] = optax_adam(getattr(net, part))
        found = moments_of(tree[f"{part}_opt_state"], ADAM)
        wanted[part] = {
            ".".join([n.partition(".")[0], part, n.partition(".")[2]]): b for n, b in found.items()
        }
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    state = read_training(tmp_path / "a.msgpack")
    mine = {
        o.name: {n: b for n, b in held(o).items() if not n.startswith("step.")}
        for o in state.optimizers
    }
    assert mine == wanted


def test_flax_averages(tmp_path: Path) -> None:
    import jax
    from flax import serialization

    params, _, opt_state = optax_adam(flax_module())
    average = jax.tree.map(lambda p: p * 0.5, params)
    tree = {"params": params, "ema_params": average, "opt_state": opt_state, "step": 3}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    state = read_training(tmp_path / "a.msgpack")
    wanted = moments_of({"ema": average}, {"ema": "ema"})
    assert {f"ema.{n}": bits(a) for n, a in state.ema.items()} == wanted
    made = convert.convert(tmp_path / "a.msgpack")
    assert made.training["averages"] == 6


def test_an_optax_state_that_nobody_knows_is_told(tmp_path: Path) -> None:
    import jax.numpy as jnp
    import optax
    from flax import nnx, serialization

    params = nnx.to_pure_dict(nnx.state(flax_module(), nnx.Param))
    state = optax.contrib.prodigy().init(params)
    tree = {"params": params, "opt_state": state, "step": jnp.array(3)}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(tree))
    with pytest.raises(ZooError):
        read_training(tmp_path / "a.msgpack")
    made = convert.convert(tmp_path / "a.msgpack")
    assert any(n.startswith("NOT converted: ") and "opt_state" in n for n in made.notices)
    assert made.training["data"] == ["step"]


# --- The file ---


def example() -> TrainingState:
    values = {"fc1.weight": np.arange(80, dtype=np.float32).reshape(16, 5)}
    adam = OptimizerState(
        "AdamW",
        [Group(("fc1.weight", "fc1.bias"), {"lr": 0.1, "betas": (0.9, 0.999), "fused": None})],
        {"exp_avg": values, "exp_avg_sq": {"fc1.weight": values["fc1.weight"].T.copy().T}},
        {"fc1.weight": 5},
    )
    return TrainingState([adam], values, {"epoch": 3, "best": float("inf"), "name": "é"})


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    state = example()
    storage.write(tmp_path / "a", state)
    found = storage.read(tmp_path / "a")
    assert (arrays_of(found), described(found)) == (arrays_of(state), described(state))
    storage.write(tmp_path / "b", found)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_document_shows_what_is_written(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "layout.md").read_text()
    shown = (
        text.partition("## optimizer.safetensors")[2].partition("```json")[2].partition("```")[0]
    )
    shape = {"classifier.weight": (3, 4), "classifier.bias": (3,)}
    zeros = {n: np.zeros(s, np.float32) for n, s in shape.items()}
    groups = [
        Group((name,), {"lr": 0.001, "betas": (0.9, 0.999), "weight_decay": decay})
        for name, decay in zip(shape, (0.01, 0.0), strict=True)
    ]
    adam = OptimizerState(
        "AdamW", groups, {"exp_avg": zeros, "exp_avg_sq": zeros}, dict.fromkeys(shape, 1200)
    )
    storage.write(tmp_path / "a", TrainingState([adam]))
    with storage.SafetensorsReader(tmp_path / "a") as reader:
        assert json.loads(reader.metadata["zoo.optimizer"]) == json.loads(shown)
        assert json.loads(reader.metadata["zoo.training"]) == {"data": {}}
        assert set(reader.tensors) == {f"{s}.{n}" for s in ("exp_avg", "exp_avg_sq") for n in shape}


def test_several_optimizers_are_kept_apart(tmp_path: Path) -> None:
    state = example()
    other = copy.deepcopy(state.optimizers[0])
    state.optimizers[0].name, other.name = "exp_avg", "ema"
    other.slots["exp_avg"]["fc1.weight"][0] = 7  # type: ignore[index]
    state.optimizers.append(other)
    storage.write(tmp_path / "a", state)
    found = storage.read(tmp_path / "a")
    assert (arrays_of(found), described(found)) == (arrays_of(state), described(state))
    for names in (("", "a"), ("a", "a"), ("a/b", "a")):
        for optimizer, name in zip(state.optimizers, names, strict=True):
            optimizer.name = name
        with pytest.raises(UsageError, match="name of its own"):
            storage.write(tmp_path / "b", state)


def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    storage.write(tmp_path / "good", example())
    with storage.SafetensorsReader(tmp_path / "good") as reader:
        tensors: Arrays = {n: reader.read(n) for n in reader.tensors}
        metadata = dict(reader.metadata)
    good = json.loads(metadata["zoo.optimizer"])

    def rewritten(**change: Any) -> Path:
        path = tmp_path / "bad"
        path.unlink(missing_ok=True)
        changed = json.dumps({**good, **change})
        return write(SafetensorsWriter, path, tensors, **{**metadata, "zoo.optimizer": changed})

    with pytest.raises(UsageError, match="version 2"):
        storage.read(rewritten(version=2))
    with pytest.raises(CorruptInput, match="'Prodigy' is not known"):
        storage.read(rewritten(optimizers=[{**good["optimizers"][0], "rule": "Prodigy"}]))
    with pytest.raises(CorruptInput, match="of no optimizer"):
        storage.read(rewritten(optimizers=[{**good["optimizers"][0], "slots": ["exp_avg"]}]))
    with pytest.raises(CorruptInput, match="which is in no group"):
        storage.read(rewritten(optimizers=[{**good["optimizers"][0], "groups": []}]))
    with pytest.raises(CorruptInput, match="SGD does not keep exp_avg"):
        storage.read(rewritten(optimizers=[{**good["optimizers"][0], "rule": "SGD"}]))
    twice = good["optimizers"][0]["groups"] * 2
    with pytest.raises(CorruptInput, match="stands twice"):
        storage.read(rewritten(optimizers=[{**good["optimizers"][0], "groups": twice}]))
    for steps in (-1, {"fc1.weight": "5"}, {"fc7.weight": 5}):
        with pytest.raises(CorruptInput, match="not counts"):
            storage.read(rewritten(optimizers=[{**good["optimizers"][0], "steps": steps}]))
    with pytest.raises(CorruptInput, match="cannot be understood"):
        storage.read(write(SafetensorsWriter, tmp_path / "none", tensors))


def test_a_file_of_another_model_beside_the_weights_is_told(tmp_path: Path) -> None:
    write(SafetensorsWriter, tmp_path / "a.safetensors", canonical(MLP, SMALL))
    state = example()
    state.optimizers[0].groups = [Group(("fc7.weight",))]
    path = tmp_path / "a.safetensors.optimizer.safetensors"
    storage.write(path, dataclasses.replace(state))
    with pytest.raises(CorruptInput, match="is in no group"):
        convert.convert(tmp_path / "a.safetensors")
    assert not (tmp_path / "a.flax").exists()
    looked = convert.inspect(tmp_path / "a.safetensors")
    assert any("is in no group" in n for n in looked.notices)
    path.unlink()
    assert not convert.convert(tmp_path / "a.safetensors").training


# --- Inside convert ---


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    error = result.exception
    code = error.exit_code if isinstance(error, ZooError) else result.exit_code
    return code, result.stdout, result.stderr


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    net, optimizer = trained()
    return save(
        tmp_path / "a.pt", model=net.state_dict(), optimizer=optimizer.state_dict(), epoch=3
    )


def test_it_is_told_what_moves(checkpoint: Path, tmp_path: Path) -> None:
    line = "optimizer: AdamW, 12 moments, step 3; training data: epoch 3 -> optimizer.safetensors"
    code, out, _ = run("torch2flax", checkpoint, "--dry-run")
    assert (code, line in out.splitlines()) == (0, True)
    assert not (tmp_path / "a.flax").exists()
    _, out, err = run("torch2flax", checkpoint)
    assert f"  {line}" in out.splitlines()
    assert "NOT converted" not in err
    assert "not converted" not in err
    _, out, _ = run("inspect", tmp_path / "a.flax")
    assert "optimizer: AdamW, 12 moments, step 3; training data: epoch 3" in out.splitlines()
    assert any("lr 0.01, weight_decay" in line or "lr 0.01" in line for line in out.splitlines())
    _, out, _ = run("inspect", checkpoint, "--json")
    found = json.loads(out)["training"]
    assert found["optimizers"][0] | {"groups": []} == {
        "name": "",
        "rule": "AdamW",
        "parameters": 6,
        "groups": [],
        "moments": 12,
        "step": 3,
    }
    _, out, _ = run("flax2torch", tmp_path / "a.flax", tmp_path / "b.pt", "--json")
    made = json.loads(out)["training"]
    assert (made["file"], made["verified"]) == ("b.pt.optimizer.safetensors", "bits")
    assert (tmp_path / "b.pt.optimizer.safetensors").is_file()


def test_verify_compares_optimizers(checkpoint: Path, tmp_path: Path) -> None:
    convert.convert(checkpoint)
    flax = tmp_path / "a.flax"
    report = convert.verify(checkpoint, flax)
    assert report.verdict == "same"
    assert "the optimizers were compared too: 12 moments" in report.notices
    state = storage.read(flax / "optimizer.safetensors")
    moment = state.optimizers[0].slots["exp_avg"]["fc2.weight"]
    moment[3, 4] += 1
    state.optimizers[0].steps["fc2.weight"] = 9
    state.optimizers[0].groups[0].options["lr"] = 0.5
    (flax / "optimizer.safetensors").unlink()
    storage.write(flax / "optimizer.safetensors", state)
    report = convert.verify(checkpoint, flax)
    assert report.verdict == "different"
    found = {d.name: d for d in report.differences}
    assert found.keys() == {
        "optimizer: exp_avg.fc2.weight",
        "optimizer: step.fc2.weight",
        "optimizer: lr",
    }
    assert found["optimizer: exp_avg.fc2.weight"].first == (3, 4)
    assert found["optimizer: lr"].why == "0.01 and 0.5"
    (flax / "optimizer.safetensors").unlink()
    report = convert.verify(checkpoint, flax)
    assert report.verdict == "same"
    assert any(f"only {checkpoint} holds an optimizer" in n for n in report.notices)


def test_a_file_that_comes_back_different_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_it = storage.write

    def broken(path: Path, state: TrainingState, kind: str, weights: str) -> dict[str, str]:
        hashes = write_it(path, state, kind, weights)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        return hashes

    monkeypatch.setattr(storage, "write", broken)
    with pytest.raises(ZooError, match="came back different"):
        convert.convert(checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt"]


def test_moments_of_what_was_replaced_do_not_stay(checkpoint: Path, tmp_path: Path) -> None:
    dst = tmp_path / "b.msgpack"
    beside = tmp_path / "b.msgpack.optimizer.safetensors"
    convert.convert(checkpoint, dst)
    assert beside.is_file()
    plain = write(SafetensorsWriter, tmp_path / "plain.safetensors", canonical(MLP, SMALL))
    dst.unlink()
    with pytest.raises(UsageError, match=r"optimizer\.safetensors exists already"):
        convert.convert(plain, dst)
    convert.convert(plain, dst, force=True)
    assert not beside.exists()
    assert not read_training(dst).optimizers


@pytest.mark.parametrize("done", [0, 1, 2])
def test_killed_between_its_renames_all_is_of_one_generation(
    checkpoint: Path, tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGKILL: what was moved so far is there, and nothing else happens."""
    dst = tmp_path / "b.msgpack"
    convert.convert(checkpoint, dst)
    net = module()
    optimizer = adamw(net)
    steps(net, [optimizer], 5)
    save(tmp_path / "later.pt", model=net.state_dict(), optimizer=optimizer.state_dict())
    replace, left = os.replace, [done]

    def killed(new: Path, old: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(new, old)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        convert.convert(tmp_path / "later.pt", dst, force=True)
    monkeypatch.undo()
    assert set(only(read_training(dst)).steps.values()) == {5}
    assert convert.verify(tmp_path / "later.pt", dst).verdict == "same"
    assert convert.check(dst).intact
    (left_over,) = convert.clean(tmp_path)
    assert left_over.kind == "committed"
    assert convert.check(dst).intact
    assert set(only(read_training(dst)).steps.values()) == {5}


@pytest.mark.parametrize("name", ["optimizer.safetensors", "optimizer.pt"])
def test_weights_are_not_put_beside_the_optimizer_of_a_directory(
    checkpoint: Path, tmp_path: Path, name: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / name).write_bytes(b"of other weights")
    for force in (False, True):
        with pytest.raises(UsageError, match=f"{name} would be taken for the optimizer of model"):
            convert.convert(checkpoint, home / "model.safetensors", force=force)
    convert.convert(checkpoint, home / "other.safetensors")


@pytest.mark.parametrize("step", [float("nan"), -3.0, 1.5, float("inf")])
def test_a_step_that_counts_nothing_is_told(tmp_path: Path, step: float) -> None:
    net, optimizer = trained()
    state = optimizer.state_dict()
    state["state"][2]["step"] = torch.tensor(step)
    path = save(tmp_path / "a.pt", model=net.state_dict(), optimizer=state)
    with pytest.raises(CorruptInput, match="step of parameter 2 counts no updates"):
        read_training(path)


def test_a_cast_leaves_moments_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    made = convert.convert(checkpoint, dtype="bfloat16")
    assert made.training["tensors"] == 12
    kept = read_training(tmp_path / "a.flax")
    assert arrays_of(kept) == arrays_of(read_training(checkpoint))
    told = plan(checkpoint, tmp_path / "c.msgpack", dtype="bfloat16").notices
    assert "moments and averages keep their dtypes" in told


def test_a_checkpoint_of_weights_alone_stays_so(tmp_path: Path) -> None:
    net, _ = trained()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    made = convert.convert(tmp_path / "a.pt")
    assert made.training == {}
    assert not (tmp_path / "a.flax" / "optimizer.safetensors").exists()
    assert read_training(tmp_path / "a.pt") == TrainingState()


def test_no_framework_is_imported(checkpoint: Path) -> None:
    code = (
        "import sys; from convert.training_state.besides import read_training as r; "
        f"print(r({str(checkpoint)!r}).optimizers[0].rule, "
        "sorted(m for m in ('torch', 'jax', 'flax', 'optax') if m in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "AdamW []"
