"""The state-space layers: three views of one system, and layers that are moved to another sampling rate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.mixers import build_mixer, mixers
from linnet.mixers.claims import inputs, random_mixer
from linnet.mixers.state_space import StateSpace, spectrum
from linnet.ops import backend, conv

LAYERS = {
    "lssl": {"state_size": 6},
    "s4": {"state_size": 6, "measure": "legt"},
    "s4d": {"state_size": 6, "init": "inv"},
    "dss": {"state_size": 6, "kernel": "softmax", "kernel_length": 20},
    "s5": {"state_size": 8, "num_blocks": 2},
}


def test_every_state_space_layer_is_tested_here() -> None:
    assert set(LAYERS) == {name for name, cls in mixers().items() if issubclass(cls, StateSpace)}


def layer(name: str, **options) -> StateSpace:
    return random_mixer(torch.Generator().manual_seed(0), name, 3, **LAYERS[name] | options)


def respond(mixer: StateSpace, x: Tensor) -> Tensor:
    with torch.no_grad():
        return mixer.respond(x, None, None)[0].reshape(*x.shape)


def impulse_responses(mixer: StateSpace, length: int) -> Tensor:
    """``[D_out, D_in, L]``, what each channel does to each."""
    probes = torch.zeros(mixer.d_model, length, mixer.d_model, dtype=torch.float64)
    probes[:, 0] = torch.eye(mixer.d_model)
    return respond(mixer, probes).permute(2, 0, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_and_convolutional_views(name: str) -> None:
    """Token by token, in chunks, and as the long convolution with what the layer answers to an impulse."""
    mixer, x = layer(name), inputs(torch.Generator().manual_seed(1), 3, length=150)
    chunks = respond(mixer, x)
    with backend("reference"):
        steps = respond(mixer, x)
    assert (chunks - steps).abs().max() <= 1e-10 * steps.abs().max()
    kernels = impulse_responses(mixer, 150)
    by_input = [conv(x[..., i : i + 1].expand(-1, -1, 3), kernels[:, i].flip(-1))[0] for i in range(3)]
    assert (sum(by_input) - steps).abs().max() <= 1e-10 * steps.abs().max()


def continuous(mixer: StateSpace) -> tuple[Tensor, Tensor, Tensor]:
    """``lambda [S]``, ``B [S, D]`` and ``C [D, S]`` of ``x' = lambda . x + B u``, ``y = Re(C x)``, per token."""
    if mixer.name == "s5":
        step, poles = mixer.steps(), torch.complex(-mixer.log_decay.exp(), mixer.frequency)
        return poles * step, torch.view_as_complex(mixer.B) * step[:, None], 2 * torch.view_as_complex(mixer.C)
    poles, C = (torch.view_as_complex(x) for x in (mixer.poles(), mixer.C))
    step, own = mixer.steps()[:, None], torch.eye(mixer.d_model, dtype=poles.dtype).repeat_interleave(poles.shape[1], 0)
    B = own * step.expand_as(poles).reshape(-1, 1)
    return (poles * step).flatten(), B, (2 if mixer.name == "s4d" else 1) * own.T * C.flatten()


@pytest.mark.parametrize("name", ["s4d", "dss", "s5"])
@torch.no_grad()
def test_continuous_view(name: str) -> None:
    """The differential equation, integrated by Runge and Kutta's method in 400 steps a token of constant input."""
    mixer = layer(name, **({"kernel": "exp"} if name == "dss" else {}))
    u = inputs(torch.Generator().manual_seed(1), 3, rows=1, length=9)
    poles, B, C = continuous(mixer)
    x, h, found = torch.zeros_like(poles), 1 / 400, []
    for t in range(9):
        force = B @ u[0, t].to(B.dtype)
        for _ in range(400):
            k1 = poles * x + force
            k2 = poles * (x + h / 2 * k1) + force
            k3 = poles * (x + h / 2 * k2) + force
            k4 = poles * (x + h * k3) + force
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append((C @ x).real)
    want = torch.stack(found)
    assert (respond(mixer, u)[0] - want).abs().max() <= 1e-10 * want.abs().max()


@pytest.mark.parametrize("name", ["lssl", "s4"])
def test_bilinear_steps_converge(name: str) -> None:
    """On inputs that are held, halving the step divides the error of the bilinear rule by four."""
    mixer, u = layer(name), inputs(torch.Generator().manual_seed(1), 3, rows=1, length=9)

    def refined(parts: int) -> Tensor:
        mixer.rate = 1 / parts
        return respond(mixer, u.repeat_interleave(parts, 1))[:, parts - 1 :: parts]

    exact = refined(256)
    coarse, fine = ((refined(parts) - exact).abs().max() for parts in (8, 16))
    assert 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_initial_poles_are_stable(init: str) -> None:
    poles = spectrum(init, 4)
    assert poles.shape == (4, 2) and poles[:, 0].max() < 0
    mixer = build_mixer({"name": "s4d", "state_size": 8, "init": init}, 3)
    assert torch.allclose(mixer.poles()[0].double(), poles, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s4d(state_size=5)", "state_size: expected an even number"),
        ("s4d(init='lim')", "init: expected one of lin, inv, legs, real; got 'lim'"),
        ("s4d(dt_min=0.2)", "dt_min: expected at most dt_max = 0.1, got 0.2"),
        ("s4(rate=0)", "rate: expected a number above 0, got 0"),
        ("lssl(alpha=1.5)", "alpha: expected a number from 0 to 1, got 1.5"),
        ("s5(num_blocks=3)", "num_blocks: expected a divisor of state_size"),
    ],
)
def test_bad_options(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build_mixer(spec, 4)


# Another sampling rate

LENGTH, FREQUENCIES = 256, torch.arange(3, 18, 2)


def tones(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A tone of 3, 5, ... or 17 cycles a row in noise ``[rows, 256, 1]``, and which it is."""
    label = torch.randint(len(FREQUENCIES), (rows,), generator=generator)
    time, phase = torch.arange(LENGTH) / LENGTH, torch.rand(rows, 1, generator=generator)
    tone = torch.sin(2 * torch.pi * (FREQUENCIES[label][:, None] * time + phase))
    return (tone + 0.5 * torch.randn(rows, LENGTH, generator=generator))[..., None], label


class Classifier(nn.Module):
    """Two layers between linear maps, the mean over time read."""

    def __init__(self, spec: str, width: int = 32):
        super().__init__()
        self.start, self.end = nn.Linear(1, width), nn.Linear(width, len(FREQUENCIES))
        self.layers = nn.ModuleList(build_mixer(spec, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for mixer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + mixer(x)[0])
        return self.end(x.mean(1))


@pytest.mark.slow
def test_a_trained_layer_runs_at_another_sampling_rate() -> None:
    """Trained on all samples; on every second or fourth it is as good with steps so much longer (zero-order hold) and
    lost with its old ones."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Classifier("s4d(state_size=32)")
    slow = [p for name, p in model.named_parameters() if name.endswith(("log_dt", "log_decay", "frequency"))]
    rest = [p for p in model.parameters() if all(p is not q for q in slow)]
    groups = [{"params": rest}, {"params": slow, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer, steps = torch.optim.AdamW(groups, lr=1e-2), 140
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, label = tones(32, generator)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, label = tones(500, generator)

    @torch.no_grad()
    def accuracy(every: int, rate: float) -> float:
        for mixer in model.layers:
            mixer.rate = rate
        return float((model(x[:, ::every]).argmax(-1) == label).double().mean())

    assert accuracy(1, 1.0) >= 0.99
    assert accuracy(2, 2.0) >= 0.99 and accuracy(4, 4.0) >= 0.99
    assert accuracy(2, 1.0) <= 0.2 and accuracy(4, 1.0) <= 0.2
