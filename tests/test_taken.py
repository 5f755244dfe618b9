"""What `verify` takes besides two plain modules: functions, caches, 16 bits, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import linen, nnx
from torch import nn
from torch.nn import functional as F

import convert
from convert.cli.main import cli
from convert.compare.report import Report
from convert.diagnose.case import Case
from convert.diagnose.causes import found
from zoo.checkpoint.certificate import Certificate
from zoo.containers.errors import UsageError

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class Dense(nn.Module):
    """One layer, so that what is around it is what a test is about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x)


class DenseNnx(nnx.Module):
    def __init__(self, ours: nn.Module, dtype: Any = None, held: Any = jnp.float32) -> None:
        self.fc = nnx.Linear(4, 4, dtype=dtype, param_dtype=held, rngs=nnx.Rngs(0))
        self.fc.kernel[...] = weights(ours, held)["kernel"]
        self.fc.bias[...] = weights(ours, held)["bias"]

    def __call__(self, x: Any) -> Any:
        return self.fc(x)


def weights(ours: Any, dtype: Any = jnp.float32) -> dict[str, Any]:
    kernel, bias = (np.asarray(t.detach().float()) for t in (ours.fc.weight, ours.fc.bias))
    return {"kernel": jnp.asarray(kernel.T, dtype), "bias": jnp.asarray(bias, dtype)}


def told(report: Report, text: str) -> bool:
    return any(text in x for x in (*report.notices, *(s.sentence for s in report.blind_spots)))


# --- Random numbers ---


class Noisy(Dense):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.fc(x)
        return {"mean": h, "sample": h + torch.randn_like(h)}


class NoisyDrop(Dense):
    def forward(self, x: torch.Tensor) -> Any:
        return F.dropout(self.fc(x), 0.5, training=True)


class NoisyNnx(DenseNnx):
    """Draws from a generator that it holds, or from a key that it makes."""

    def __init__(self, ours: nn.Module, held: bool) -> None:
        super().__init__(ours)
        self.rngs = nnx.Rngs(noise=1) if held else None

    def __call__(self, x: Any) -> Any:
        h = self.fc(x)
        key = jax.random.key(0) if self.rngs is None else self.rngs.noise()
        return {"mean": h, "sample": h + jax.random.normal(key, h.shape, h.dtype)}


class DropNnx(DenseNnx):
    def __call__(self, x: Any) -> Any:
        h = self.fc(x)
        return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h * 2, 0)


@pytest.mark.parametrize("held", [True, False], ids=["rngs", "key"])
def test_what_does_not_depend_on_noise_is_judged(held: bool) -> None:
    ours = Noisy()
    report = convert.verify(ours, NoisyNnx(ours, held), X, "gradients")
    assert report.verdict == "same"
    assert told(report, "torch and Flax draw random numbers in the forward pass: output.sample ")
    assert told(report, "give the noise to both as an input argument")
    (row,) = [r for r in report.outputs if r.name == "output.sample"]
    assert (row.judged, row.note) == (False, "drawn at random: changes from run to run")
    assert {r.name for r in report.gradients} == {"fc.weight", "fc.bias", "in.x"}

    wrong = NoisyNnx(ours, held)
    wrong.fc.bias[...] += 1
    report = convert.verify(ours, wrong, X)
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.layer == "fc"


def test_where_all_is_noise_nothing_is_the_same() -> None:
    ours = NoisyDrop()
    report = convert.verify(ours, DropNnx(ours), X, "training")
    assert report.verdict == "different"
    parted = report.first_divergence
    assert parted is not None
    assert parted.cause == "random"
    assert parted.diagnosis.startswith("torch and Flax draw random numbers")
    assert not report.gradients
    assert not report.training
    wrong = DropNnx(ours)
    wrong.fc.bias[...] += 1
    parted = convert.verify(ours, wrong, X).first_divergence
    assert parted is not None
    assert parted.layer == "fc"
    assert parted.cause != "random", "a fault before the noise is still seen"


def test_noise_of_one_side_alone_is_a_difference() -> None:
    ours = Noisy()

    class Still(DenseNnx):
        def __call__(self, x: Any) -> Any:
            h = self.fc(x)
            return {"mean": h, "sample": h}

    report = convert.verify(ours, Still(ours), X)
    assert report.verdict == "different"
    assert report.first_divergence is not None
    assert report.first_divergence.cause == "random"
    assert "torch draws random" in report.first_divergence.diagnosis
    assert [r.name for r in report.outputs if r.judged and not r.same] == ["output.sample"]


def test_dropout_that_is_off_is_no_noise() -> None:
    class Dropping(Dense):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.drop(self.fc(x))

    class DroppingNnx(DenseNnx):
        def __init__(self, ours: nn.Module) -> None:
            super().__init__(ours)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

        def __call__(self, x: Any) -> Any:
            return self.drop(self.fc(x))

    ours = Dropping()
    report = convert.verify(ours, DroppingNnx(ours), X)
    assert (report.verdict, report.notices) == ("same", [])


# --- Functions with parameters ---


class Mlp(nn.Module):
    """A layer, a list of them, and arrays without a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.gain = nn.Parameter(torch.randn(6))
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.fc(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x * self.gain + self.shift


class Weights(NamedTuple):
    kernel: Any
    bias: Any


def mlp_params(ours: Mlp) -> dict[str, Any]:
    def dense(layer: nn.Linear) -> Weights:
        kernel, bias = (jnp.asarray(t.detach().numpy()) for t in (layer.weight, layer.bias))
        return Weights(kernel.T, bias)

    return {
        "fc": dense(ours.fc),
        "blocks": [dense(block) for block in ours.blocks],  # type: ignore[arg-type]
        "gain": jnp.asarray(ours.gain.detach().numpy()),
        "shift": jnp.asarray(ours.shift.numpy()),
    }


def mlp(params: Any, x: Any, scale: float = 1.0) -> Any:
    x = x @ params["fc"].kernel + params["fc"].bias
    for block in params["blocks"]:
        x = x + jnp.tanh(x @ block.kernel + block.bias)
    return x * params["gain"] * scale + params["shift"]


class Transformed(NamedTuple):
    """As haiku has it."""

    init: Any
    apply: Any


def test_a_function_with_parameters_is_a_side_like_others() -> None:
    ours = Mlp()
    report = convert.verify((mlp, mlp_params(ours)), ours, X, "training", optimizers=["SGD"])
    assert (report.verdict, report.a, report.b) == ("same", "Mlp", "mlp")
    named = set(ours.state_dict())
    assert report.compared == len(named) == 8
    assert {r.name for r in report.gradients} == {*named - {"shift"}, "in.x"}
    trained = {r.name for r in report.training[0].rows}
    assert named - {"shift"} <= trained


def test_square_matrices_of_a_function_lie_as_their_values_tell() -> None:
    ours = Dense()
    own = {k: jnp.asarray(v.detach().numpy()) for k, v in ours.state_dict().items()}

    def apply(p: Any, x: Any) -> Any:
        return x @ p["fc.weight"].T + p["fc.bias"]

    report = convert.verify(ours, (apply, own), X, "gradients")
    assert (report.verdict, report.compared) == ("same", 2)
    turned = (lambda p, x: x @ p["fc"]["kernel"] + p["fc"]["bias"]), {"fc": weights(ours)}
    assert convert.verify(ours, turned, X, "bits").verdict == "same"


def test_a_function_s_fault_is_found() -> None:
    ours = Mlp()
    params = mlp_params(ours)
    params["blocks"][1] = params["blocks"][1]._replace(bias=params["blocks"][0].bias)
    report = convert.verify(ours, (mlp, params), X)
    assert report.verdict == "different"
    assert [d.name for d in report.differences] == ["blocks.1.bias"]
    report = convert.verify(ours, (lambda p, x: mlp(p, x, 2.0), mlp_params(ours)), X)
    assert report.verdict == "different"
    assert report.first_divergence is not None


def test_what_has_an_apply_is_taken_too() -> None:
    ours = Mlp()

    def apply(params: Any, rng: Any, x: Any) -> Any:
        assert rng is None
        return mlp(params, x)

    haiku = Transformed(None, apply)
    assert convert.verify(ours, (haiku, mlp_params(ours)), X, "bits").verdict == "same"

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4, name="fc")(x)

    dense = Dense()
    variables = {"params": {"fc": weights(dense)}}
    report = convert.verify(dense, (Net().apply, variables), X)
    assert (report.verdict, report.compared) == ("same", 2)
    assert "fc" in [r.name for r in report.outputs], "layers are seen"


def test_functions_without_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="the parameters of mlp hold no array"):
        convert.verify(Mlp(), (mlp, {"fc": 3}), X)


def test_a_function_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_functions.py").write_text(
        "import torch\n"
        "ours = torch.nn.Linear(4, 2)\n"
        "params = {'w': ours.weight.detach().numpy(), 'b': ours.bias.detach().numpy()}\n"
        "def apply(p, x): return x @ p['w'].T + p['b']\n"
        "theirs = apply, params\n"
        "def made(): return theirs\n"
    )
    np.save("x.npy", X)
    for name in ("theirs", "made"):
        targets = ["nets_of_functions.py:ours", f"nets_of_functions.py:{name}"]
        result = CliRunner().invoke(cli, ["verify", *targets, "--inputs", "x.npy"])
        assert result.exit_code == 0, result.output
        assert "same: nets_of_functions.py:ours" in result.output


# --- Outputs that only one side gives ---


def gpt2() -> tuple[Any, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    state = {k: jnp.asarray(v.detach().numpy()) for k, v in model.state_dict().items()}
    return model, {k: v for k, v in state.items() if k != "lm_head.weight"}


def gpt2_flax(p: Any, input_ids: Any) -> Any:
    """Logits, keys and values."""

    def norm(x: Any, n: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p[f"{n}.weight"] + p[f"{n}.bias"]

    def dense(x: Any, n: str) -> Any:
        return x @ p[f"{n}.weight"] + p[f"{n}.bias"]

    h, wte = "transformer.h.0", p["transformer.wte.weight"]
    steps = input_ids.shape[1]
    x = wte[input_ids] + p["transformer.wpe.weight"][jnp.arange(steps)]
    parts = jnp.split(dense(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, -1)
    q, k, v = (a.reshape(*a.shape[:2], 2, 4).swapaxes(1, 2) for a in parts)
    logits = jnp.where(jnp.tril(jnp.ones((steps, steps), bool)), q @ k.mT / 2, -jnp.inf)
    mixed = (jax.nn.softmax(logits, -1) @ v).swapaxes(1, 2).reshape(x.shape)
    x = x + dense(mixed, f"{h}.attn.c_proj")
    inner = jax.nn.gelu(dense(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate=True)
    x = x + dense(inner, f"{h}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ wte.T, k, v


def test_a_causal_lm_in_its_default_mode() -> None:
    ours, params = gpt2()
    given = {"input_ids": np.arange(6)[None] % 16}
    report = convert.verify(ours, (lambda p, input_ids: gpt2_flax(p, input_ids)[0], params), given)
    assert report.verdict == "same"
    assert report.compared == len(params)
    assert told(report, "only torch gives caches (output.past_key_values): they are left out")
    report = convert.verify(ours, (gpt2_flax, params), given)
    assert [r.name for r in report.outputs] == [
        "output.logits",
        "output.past_key_values.0.keys",
        "output.past_key_values.0.values",
    ]
    assert report.verdict == "same"


class Named(Dense):
    def forward(self, x: torch.Tensor) -> Any:
        h = self.fc(x)
        return {"h": h, "norm": h.norm(), "other": object()}


def test_outputs_pair_by_name_and_what_is_left_is_said() -> None:
    ours = Named()

    class Fewer(DenseNnx):
        def __call__(self, x: Any) -> Any:
            return {"h": self.fc(x)}

    class More(DenseNnx):
        def __call__(self, x: Any) -> Any:
            h = self.fc(x)
            return {"more": h + 1, "norm": jnp.sqrt((h * h).sum()), "h": h}

    class Strange(DenseNnx):
        def __call__(self, x: Any) -> Any:
            return {"strange": self.fc(x)}

    report = convert.verify(ours, Fewer(ours), X, "gradients")
    assert report.verdict == "same", "the loss is of what is compared"
    assert told(report, "only torch gives output.norm: not compared")
    assert told(report, "output.other (object) of torch is not made of arrays")
    report = convert.verify(ours, More(ours), X)
    assert report.verdict == "same"
    assert told(report, "only Flax gives output.more: not compared")
    with pytest.raises(UsageError, match="gives 2 outputs, the Flax one 1") as e:
        convert.verify(ours, Strange(ours), X)
    assert "NamedTuple" in str(e.value.advice)


# --- 16 bits ---


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_modules_of_16_bits_are_judged_in_more(name: str) -> None:
    ours = Dense().to(getattr(torch, name))
    dtype = getattr(jnp, name)
    for theirs in (DenseNnx(ours, dtype, dtype), DenseNnx(ours, dtype), DenseNnx(ours)):
        report = convert.verify(ours, theirs, X)
        assert report.verdict == "same"
        assert all(not r.note for r in report.outputs)
        assert told(report, f"the torch module has parameters of {name}, and computes in it as wri")
    assert told(report, f"equal values of other dtypes: fc.weight ({name}, float32)")
    assert convert.verify(ours, theirs, X, "bits").verdict == "different", "dtype included"
    theirs = DenseNnx(ours, dtype, dtype)
    theirs.fc.bias[...] += 1
    assert convert.verify(ours, theirs, X).verdict == "different"


def test_linen_modules_of_16_bits() -> None:
    ours = Dense().bfloat16()

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            return linen.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name="fc")(x)

    variables = {"params": {"fc": weights(ours, jnp.bfloat16)}}
    report = convert.verify(ours, (Net(), variables), X)
    assert (report.verdict, [r.note for r in report.outputs]) == ("same", ["", ""])


def test_casts_that_are_written_down_round_in_any_precision() -> None:
    class Casts(Dense):
        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x.to(torch.bfloat16))

    class CastsNnx(DenseNnx):
        def __call__(self, x: Any) -> Any:
            return self.fc(x.astype(jnp.bfloat16))

    ours = Casts().bfloat16()
    report = convert.verify(ours, CastsNnx(ours, held=jnp.bfloat16), X)
    assert report.verdict == "same"
    assert convert.verify(ours, DenseNnx(ours), X).verdict == "different", "no rounding there"


# --- NaN, and arrays that are no parameters ---


def test_nan_on_both_sides_is_no_difference() -> None:
    class Rooted(Dense):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.sqrt(self.fc(x))

    class RootedNnx(DenseNnx):
        def __call__(self, x: Any) -> Any:
            return jnp.sqrt(self.fc(x))

    ours = Rooted()
    report = convert.verify(ours, RootedNnx(ours), X)
    assert report.verdict == "same"
    assert "NaN on both sides in" in report.outputs[-1].note

    class Safe(DenseNnx):
        def __call__(self, x: Any) -> Any:
            return jnp.sqrt(jnp.maximum(self.fc(x), 0))

    assert convert.verify(ours, Safe(ours), X).verdict == "different"


class Holding(Dense):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("ids", torch.arange(4))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(x) * self.scales[0] * self.scales[1] + self.table[self.ids]


class HoldingNnx(DenseNnx):
    def __init__(self, ours: nn.Module, last: float = 1.0) -> None:
        super().__init__(ours)
        self.table = jnp.arange(4.0)
        self.ids = np.arange(4, dtype=np.int32)
        self.scales = nnx.data([jnp.ones(4), jnp.full(4, last)])

    def __call__(self, x: Any) -> Any:
        return self.fc(x) * self.scales[0] * self.scales[1] + self.table[self.ids]


def test_arrays_that_are_no_variables_are_compared() -> None:
    ours = Holding()
    report = convert.verify(ours, HoldingNnx(ours), X, "bits")
    assert (report.verdict, report.compared) == ("same", 6)
    report = convert.verify(ours, HoldingNnx(ours, 2.0), X)
    assert [d.name for d in report.differences] == ["scales.1"]


# --- assert_same, and notebooks ---


def test_assert_same_passes_or_says_why() -> None:
    ours = Dense()
    convert.testing.assert_same(ours, DenseNnx(ours), X)
    wrong = DenseNnx(ours)
    wrong.fc.kernel[...] = wrong.fc.kernel[...].T
    with pytest.raises(AssertionError) as e:
        convert.testing.assert_same(ours, wrong, X, titles=("mine", "theirs"))
    lines = str(e.value).splitlines()
    assert lines[0] == "different: mine and theirs"
    assert lines[1] == "  first to differ: fc"
    assert "transposed" in lines[2]
    assert any(line.startswith("  try: ") for line in lines)
    assert any("output" in line and "e" in line for line in lines)
    assert len(lines) <= 24
    assert "--report" not in str(e.value)
    assert e.traceback[-1].ishidden(e), "pytest shows the test's own line"


def test_notebooks_show_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Dense()
    wrong = DenseNnx(ours)
    wrong.fc.bias[...] += 1
    report = convert.verify(ours, wrong, X, titles=("<b>mine</b>", "theirs"))
    page = report._repr_html_()
    assert page.lstrip().startswith("<div class=")
    assert page.count('<div class="zooconvert-report') == 1
    assert "<script" not in page
    assert "<b>mine" not in page
    assert "First divergence" in page
    assert len(page) < 20_000
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = report._repr_html_()
    assert page.startswith("<pre>different: &lt;b&gt;mine&lt;/b&gt; and theirs")


def test_notebooks_show_certificates() -> None:
    made = Certificate("<a>.pt", "pt", "", "b", "orbax", "nnx", "bert", "bert/1", {})
    page = made._repr_html_()
    assert page.startswith("<table>")
    assert "&lt;a&gt;.pt (pt)" in page


# --- Sentences ---


def test_no_sentence_holds_equal_things_against_each_other() -> None:
    for variant in ("split", "value", "tensor"):
        said = found("heads", variant, name="x", size=64, heads=8, width=8, axis=0)
        assert "(8, 8)" not in said.diagnosis
    right = np.arange(4.0).reshape(2, 2)
    case = Case([right + 1e-3, right], right, 1e-4)
    assert not case.fits(right), "what torch gives too explains nothing"
    assert case.fits(right + 1e-3)


def test_parameters_without_a_counterpart_are_said_to_have_none() -> None:
    ours = Dense()
    values = {f"other_{k}": v for k, v in weights(ours).items()} | {"spare": np.ones(3)}
    theirs = (lambda p, x: x @ p["other_kernel"] + p["other_bias"]), values
    report = convert.verify(ours, theirs, X)
    spots = {s.names: s.sentence for s in report.blind_spots if s.kind == "no counterpart"}
    assert list(spots) == [("spare",)]
    assert "'s other" not in spots["spare",]
