"""DQN against a plain copy of upstream's classes, and how it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from support import canonical
from torch import nn

import convert
import zoo
from convert.judge.noise import MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.loading import build
from zoo.models.dqn import MODEL
from zoo.models.dqn.config import Config

# Mnih 2015, table 1 of its methods, for 4 actions and 6: weights and biases counted by hand.
# --- Upstream's classes, written again here ---


class NatureCNN(nn.Module):
    def __init__(self, channels: int, flat: int, features: int) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(channels, 32, kernel_size=8, stride=4, padding=0),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=0),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, stride=1, padding=0),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.linear = nn.Sequential(nn.Linear(flat, features), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.cnn(x))


class QNetwork(nn.Module):
    def __init__(self, extractor: nn.Module, q_net: nn.Sequential) -> None:
        super().__init__()
        self.features_extractor = extractor
        self.q_net = q_net

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        if obs.dtype == torch.uint8:
            obs = obs.float() / 255.0
        return self.q_net(self.features_extractor(obs))


class Policy(nn.Module):
    """What `model.policy.state_dict()` has upstream; `target=False` leaves the target network."""

    def __init__(self, make: Any, target: bool) -> None:
        super().__init__()
        self.q_net = make()
        if target:
            self.q_net_target = make()
        self.load_state_dict(
            {
                n: torch.from_numpy(probe.weight(n, tuple(t.shape)))
                for n, t in self.state_dict().items()
            }
        )


def images() -> nn.Module:
    return QNetwork(NatureCNN(4, 3136, 512), nn.Sequential(nn.Linear(512, 6)))


def vectors() -> nn.Module:
    hidden = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    return QNetwork(nn.Flatten(), hidden)


@pytest.mark.parametrize("target", [False, True], ids=["alone", "with_target"])
@pytest.mark.parametrize("name", ["dqn_nature", "dqn_cartpole"])
def test_a_policys_checkpoint_converts_by_its_name_alone(
    name: str, target: bool, tmp_path: Path
) -> None:
    theirs = Policy(images if name == "dqn_nature" else vectors, target)
    torch.save(theirs.state_dict(), tmp_path / "policy.pth")
    made = convert.convert(tmp_path / "policy.pth")
    assert made.model == "dqn"
    (identity,) = zoo.identify(tmp_path / "policy.pth")
    assert identity.presets == [name]
    assert not identity.unknown
    assert identity.config.target == target

    flax = zoo.load(tmp_path / "policy.flax", framework="flax")
    mine = zoo.load(tmp_path / "policy.pth", framework="torch")
    if name == "dqn_nature":
        obs = probe.integers("obs", (2, 4, 84, 84), 256).astype(np.uint8)
        channels_last = np.moveaxis(obs, 1, -1)
    else:
        channels_last = obs = probe.normal("obs", (3, 4)).astype(np.float32)
    with torch.no_grad():
        ours = mine(torch.from_numpy(obs))
        nets = [theirs.q_net] + ([theirs.q_net_target] if target else [])
        expected = [net(torch.from_numpy(obs)).numpy() for net in nets]
        wide = torch.from_numpy(obs / 255 if obs.dtype == np.uint8 else obs).double()
        exact = [net.double()(wide).numpy() for net in nets]
    got = nnx.jit(flax)(channels_last)
    assert (got.target_q_values is None) == (ours.target_q_values is None) == (not target)
    for values, torch_values, want, wanted in zip(got, ours, expected, exact, strict=False):
        bound = MARGIN * max(np.abs(want - wanted).max(), FLOOR * np.abs(wanted).max())
        assert np.abs(np.asarray(values) - want).max() <= bound
        assert np.abs(torch_values.numpy() - want).max() <= bound

    convert.convert(tmp_path / "policy.flax", tmp_path / "back.pt", to="pt")
    theirs.float().load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)


def test_integers_and_their_255ths_are_one_image() -> None:
    config = MODEL.tiny["images"]
    obs = probe.integers("obs", (2, *config.obs_shape), 256).astype(np.uint8)
    scaled = obs.astype(np.float32) / 255
    a, b = (build(MODEL, config, f, canonical(MODEL, config)) for f in ("torch", "flax"))
    with torch.no_grad():
        values = [a(torch.from_numpy(x)).q_values.numpy() for x in (obs, scaled)]
    call = nnx.jit(b)
    values += [np.asarray(call(np.moveaxis(x, 1, -1)).q_values) for x in (obs, scaled)]
    for other in values[1:]:
        assert np.abs(other - values[0]).max() <= 1e-5 * np.abs(values[0]).max()


# --- Acting ---


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    config = MODEL.tiny["vector"]
    return tuple(build(MODEL, config, f, canonical(MODEL, config)) for f in ("torch", "flax"))


def act(twins: tuple[Any, Any], obs: np.ndarray, epsilon: float = 0.0, **kw: Any) -> np.ndarray:
    """What both choose, which must be the same."""
    a = twins[0].act(
        torch.from_numpy(obs), epsilon, **{k: torch.as_tensor(v) for k, v in kw.items()}
    )
    b = twins[1].act(obs, epsilon, **kw)
    assert (a.numpy() == np.asarray(b)).all()
    return a.numpy()


def test_greedy_actions_are_those_of_the_highest_value(twins: tuple[Any, Any]) -> None:
    obs = probe.normal("many", (64, 4)).astype(np.float32)
    values = twins[0](torch.from_numpy(obs)).q_values.detach().numpy()
    chosen = act(twins, obs)
    assert (chosen == values.argmax(1)).all()
    assert set(chosen) == {0, 1}


def test_epsilon_greedy_takes_the_random_action_where_chance_is_below(
    twins: tuple[Any, Any],
) -> None:
    obs = probe.normal("many", (64, 4)).astype(np.float32)
    rng = np.random.default_rng(0)
    chance, random = rng.random(64, np.float32), rng.integers(0, 2, 64)
    chance[0] = 0.25
    greedy = act(twins, obs)
    random[0] = 1 - greedy[0]
    mixed = act(twins, obs, 0.25, chance=chance, random_actions=random)
    assert (mixed == np.where(chance < 0.25, random, greedy)).all()
    assert mixed[0] == greedy[0], "equal is not below"
    assert (mixed != greedy).any()
    assert (act(twins, obs, 0.0, chance=chance, random_actions=random) == greedy).all()
    assert (act(twins, obs, 1.0, chance=chance, random_actions=random) == random).all()
    # Upstream draws once for all observations.
    once = {"chance": np.float32(0.1), "random_actions": random}
    assert (act(twins, obs, 0.25, **once) == random).all()


# --- Configurations ---


def test_other_images_are_told_by_what_is_left_of_them() -> None:
    config = Config(obs_shape=(3, 100, 92), actions=4)  # 6 x 8 of it are left, or so
    inferred = MODEL.infer(MODEL.layout_of(config).shapes("torch"))
    assert inferred is not None
    found = MODEL.configure(**inferred)
    assert MODEL.layout_of(found) == MODEL.layout_of(config)
    assert found.obs_shape[0] == 3


@pytest.mark.parametrize("shape", [(4, 35, 84), (84, 84), (3, 0, 0)])
def test_observations_that_no_network_here_takes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"obs_shape|too small"):
        Config(obs_shape=shape)


def test_a_network_of_other_names_is_another_model() -> None:
    shapes = MODEL.layout_of(MODEL.tiny["vector"]).shapes("torch")
    assert MODEL.infer({**shapes, "v_net.0.weight": (3, 3)}) is None
    assert MODEL.infer({n.removeprefix("q_net."): s for n, s in shapes.items()}) is None
    assert MODEL.infer({}) is None
