"""SAC against upstream's formulas and its zip files."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from support import bits, canonical
from torch import nn
from torch.distributions import Normal

import convert
import zoo
from convert.judge.noise import EXACT, MARGIN
from convert.judge.rows import FLOOR
from zoo import probe
from zoo.containers import open_checkpoint
from zoo.containers.errors import CorruptInput, UnsafeInput, UsageError
from zoo.loading import build
from zoo.models.sac import MODEL
from zoo.models.sac.config import Config

# --- Upstream's formulas ---


def upstream_sample(mu: np.ndarray, log_std: np.ndarray, noise: np.ndarray) -> tuple[Any, Any]:
    """SquashedDiagGaussianDistribution.log_prob_from_params, its noise given."""
    mean, std = torch.from_numpy(mu), torch.from_numpy(log_std).exp()
    gaussian = mean + std * torch.from_numpy(noise)
    action = torch.tanh(gaussian)
    log_prob = Normal(mean, std).log_prob(gaussian).sum(dim=1)
    log_prob -= torch.sum(torch.log(1 - action**2 + 1e-6), dim=1)
    return action.numpy(), log_prob.numpy()


@pytest.mark.parametrize("framework", ["torch", "flax"])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["small", "saturated"])
def test_samples_and_their_density_are_upstreams(framework: str, size: float) -> None:
    config = MODEL.tiny["policy"]
    weights = canonical(MODEL, config)
    obs = size * probe.normal("obs", (16, config.obs_size))
    noise = probe.normal("noise", (16, config.action_size))
    with jax.enable_x64(True):
        model = build(MODEL, config, framework, weights, param_dtype="float64")
        if framework == "torch":
            with torch.no_grad():
                mu, log_std = (x.numpy() for x in model.actor(torch.from_numpy(obs)))
                pair = model.sample(torch.from_numpy(obs), torch.from_numpy(noise))
                action, density = (x.numpy() for x in pair)
                still = model.act(torch.from_numpy(obs)).numpy()
        else:
            mu, log_std = (np.array(x) for x in model.actor(obs))
            action, density = (np.asarray(x) for x in model.sample(obs, noise))
            still = np.asarray(model.act(obs))
    assert density.dtype == np.float64
    assert density.shape == (16,)
    assert log_std.max() <= 2
    assert log_std.min() >= -20
    if size > 1:
        assert log_std.max() == 2, "the clamp is not met"
    expected_action, expected = upstream_sample(mu, log_std, noise)
    assert np.abs(action - expected_action).max() <= EXACT
    assert np.abs(density - expected).max() <= EXACT * np.abs(expected).max()
    assert np.abs(still - np.tanh(mu)).max() <= EXACT
    assert np.abs(action).max() <= 1


def test_both_sample_the_same_in_float32() -> None:
    config = MODEL.tiny["policy"]
    weights = canonical(MODEL, config)
    obs = probe.normal("obs", (16, config.obs_size))
    noise = probe.normal("noise", (16, config.action_size))
    runs = {}
    for dtype in ("float32", "float64"):
        a = build(MODEL, config, "torch", weights, param_dtype=dtype)
        with torch.no_grad():
            given = (torch.from_numpy(x.astype(dtype)) for x in (obs, noise))
            runs[dtype] = [x.numpy() for x in a.sample(*given)]
    b = build(MODEL, config, "flax", weights)
    got = nnx.jit(lambda m, o, n: m.sample(o, n))(b, *(x.astype(np.float32) for x in (obs, noise)))
    for have, rough, exact in zip(got, runs["float32"], runs["float64"], strict=True):
        noise_of = max(np.abs(rough - exact).max(), FLOOR * np.abs(exact).max())
        assert np.abs(np.asarray(have) - rough).max() <= MARGIN * noise_of


# --- Upstream's classes and files, made again here ---


def mlp(*sizes: int, last: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*(layers if last else layers[:-1]))


class Actor(nn.Module):
    def __init__(self, obs: int, action: int) -> None:
        super().__init__()
        self.latent_pi = mlp(obs, 256, 256, last=True)
        self.mu = nn.Linear(256, action)
        self.log_std = nn.Linear(256, action)


class Critic(nn.Module):
    def __init__(self, obs: int, action: int) -> None:
        super().__init__()
        self.qf0 = mlp(obs + action, 256, 256, 1, last=False)
        self.qf1 = mlp(obs + action, 256, 256, 1, last=False)


class Policy(nn.Module):
    """What `model.policy.state_dict()` has upstream."""

    def __init__(self, obs: int = 3, action: int = 1) -> None:
        super().__init__()
        self.actor = Actor(obs, action)
        self.critic = Critic(obs, action)
        self.critic_target = Critic(obs, action)
        self.load_state_dict(
            {
                n: torch.from_numpy(probe.weight(n, tuple(t.shape)))
                for n, t in self.state_dict().items()
            }
        )

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> list[np.ndarray]:
        x = self.actor.latent_pi(obs)
        mu, log_std = self.actor.mu(x), self.actor.log_std(x).clamp(-20, 2)
        both = torch.cat([obs, action], dim=1)
        nets = [n for c in (self.critic, self.critic_target) for n in (c.qf0, c.qf1)]
        return [y.numpy() for y in (mu, log_std, torch.tanh(mu), *(n(both) for n in nets))]


def sb3_zip(path: Path, policy: nn.Module, **torch_save: Any) -> Path:
    """A file as stable_baselines3.common.save_util.save_to_zip_file writes it."""
    nets = {name: policy.get_submodule(name) for name in ("actor", "critic")}
    optimizers = {n: torch.optim.Adam(net.parameters(), lr=3e-4) for n, net in nets.items()}
    saved = {
        "policy": policy.state_dict(),
        **{f"{n}.optimizer": optimizer.state_dict() for n, optimizer in optimizers.items()},
        "ent_coef_optimizer": torch.optim.Adam([torch.zeros(1, requires_grad=True)]).state_dict(),
    }
    data = {"policy_class": {":type:": "<class 'abc.ABCMeta'>", ":serialized:": "gAWVMAAA"}}
    with zipfile.ZipFile(path, mode="w") as archive:
        archive.writestr("data", json.dumps(data, indent=4))
        with archive.open("pytorch_variables.pth", mode="w", force_zip64=True) as file:
            torch.save({"log_ent_coef": torch.zeros(1)}, file)
        for name, state in saved.items():
            with archive.open(f"{name}.pth", mode="w", force_zip64=True) as file:
                torch.save(state, file, **(torch_save if name == "policy" else {}))
        archive.writestr("_stable_baselines3_version", "2.9.2")
        archive.writestr("system_info.txt", "- OS: Linux\n- Python: 3.11\n")
    return path


def test_a_zip_of_upstream_converts_by_its_name_alone(tmp_path: Path) -> None:
    theirs = Policy()
    source = sb3_zip(tmp_path / "sac_pendulum.zip", theirs)
    made = convert.convert(source)
    assert made.model == "sac"
    assert "of stable-baselines3: policy.pth is read" in made.notices
    (told,) = [n for n in made.notices if n.startswith("not read: ")]
    for beside in ("data", "pytorch_variables.pth", "system_info.txt", "ent_coef_optimizer.pth"):
        assert beside in told
    assert [o["name"] for o in made.training["optimizers"]] == ["actor", "critic"]
    assert "actor.optimizer.pth" not in told
    (identity,) = zoo.identify(source)
    assert identity.presets == ["sac"]
    assert identity.config.target

    inputs = {k: v.astype(np.float32) for k, v in MODEL.inputs(MODEL.presets["sac"]).items()}
    given = [torch.from_numpy(inputs[k]) for k in ("obs", "action")]
    flax = zoo.load(tmp_path / "sac_pendulum.flax", framework="flax")
    with (
        pytest.warns(zoo.LoadNotice, match="not read: data"),
        pytest.warns(zoo.LoadNotice, match=r"policy\.pth is read"),
    ):
        mine = zoo.load(source, framework="torch")
    with torch.no_grad():
        ours = mine(*given)
        expected = theirs(*given)
        exact = theirs.double()(*(x.double() for x in given))
    for got in (nnx.jit(flax)(**inputs), ours):
        for have, want, wide in zip(got, expected, exact, strict=True):
            bound = MARGIN * max(np.abs(want - wide).max(), FLOOR * np.abs(wide).max())
            assert np.abs(np.asarray(have) - want).max() <= bound

    convert.convert(tmp_path / "sac_pendulum.flax", tmp_path / "back.pth", to="pt")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(theirs.state_dict())
    theirs.float().load_state_dict(back, strict=True)


def test_the_policy_is_read_bit_for_bit(tmp_path: Path) -> None:
    theirs = Policy(obs=5, action=2)
    with open_checkpoint(sb3_zip(tmp_path / "a.zip", theirs)) as reader:
        assert list(reader.tensors) == list(theirs.state_dict())
        for name, tensor in theirs.state_dict().items():
            assert bits(reader.read(name)) == bits(tensor.numpy())
        (notice,) = reader.notices
        beside = reader.beside
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for name in archive.namelist():
            assert name in (beside if name != "policy.pth" else notice)


def rezip(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **change: Any) -> Path:
    """`source` with its members changed: a function from old bytes to new, None to leave it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            edit = change.get(name.partition(".")[0], lambda raw: raw)
            if (raw := edit(old.read(name)) if edit else None) is not None:
                new.writestr(name, raw)
    return target


def test_damage_inside_the_policy_is_found(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    raw = bytearray(source.read_bytes())
    weight = Policy().state_dict()["critic.qf0.2.weight"].numpy().tobytes()
    at = bytes(raw).index(weight) + len(weight) // 2
    raw[at] ^= 1
    (tmp_path / "b.zip").write_bytes(raw)
    with open_checkpoint(tmp_path / "b.zip") as reader:
        assert reader.read("critic.qf0.0.weight").size
        with pytest.raises(CorruptInput, match="CRC-32"):
            reader.read("critic.qf0.2.weight")


def test_a_policy_that_ends_early_is_corrupt(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    cut = rezip(source, tmp_path / "b.zip", policy=lambda raw: raw[: len(raw) // 2])
    with pytest.raises(CorruptInput, match=r"policy\.pth"):
        open_checkpoint(cut)


def test_compressed_zips_are_refused(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    with pytest.raises(UnsafeInput, match="compressed"):
        open_checkpoint(rezip(source, tmp_path / "b.zip", zipfile.ZIP_DEFLATED))


def test_a_zip_without_a_policy_is_none_of_ours(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    with pytest.raises(CorruptInput, match=r"data\.pkl"):
        open_checkpoint(rezip(source, tmp_path / "b.zip", policy=None))


def test_a_zip_in_a_policy_is_not_looked_into_again(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    nested = rezip(source, tmp_path / "b.zip", policy=lambda raw: source.read_bytes())
    with pytest.raises(CorruptInput, match=r"data\.pkl"):
        open_checkpoint(nested)


def test_a_policy_of_before_torch_1_6_wants_unpacking(tmp_path: Path) -> None:
    source = sb3_zip(tmp_path / "a.zip", Policy())
    buffer = io.BytesIO()
    torch.save(Policy().state_dict(), buffer, _use_new_zipfile_serialization=False)
    old = rezip(source, tmp_path / "b.zip", policy=lambda raw: buffer.getvalue())
    with pytest.raises(UsageError, match="unpack it"):
        open_checkpoint(old)


# --- Configurations ---


def test_actor_and_critics_may_have_other_layers() -> None:
    config = Config(obs_size=7, action_size=2, pi=(9,), qf=(8, 6, 4))
    inferred = MODEL.infer(MODEL.layout_of(config).shapes("torch"))
    assert inferred is not None
    assert MODEL.configure(**inferred) == config


def test_an_actor_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden layer"):
        Config(pi=())


def test_a_policy_of_other_names_is_another_model() -> None:
    shapes = MODEL.layout_of(MODEL.tiny["policy"]).shapes("torch")
    assert MODEL.infer({**shapes, "value_net.weight": (3, 3)}) is None
    assert MODEL.infer({n: s for n, s in shapes.items() if n.startswith("actor.")}) is None
    assert MODEL.infer({}) is None
