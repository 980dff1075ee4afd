"""What is compared: inputs, costs and shapes."""

from __future__ import annotations

import math

import pytest
import torch

from linnet.benchmarks.peers import peers
from linnet.benchmarks.workloads import GRIDS, SUITES, Shape, grid, suite

BY_NAME = {workload.name: workload for workloads in SUITES.values() for workload in workloads}
ALL = [pytest.param(workload, id=name) for name, workload in BY_NAME.items()]
CPU = torch.device("cpu")


@pytest.mark.parametrize("workload", ALL)
@pytest.mark.parametrize("shape", [Shape(2, 5, 2, 4, 6), Shape(1, 9, 2, 4, 6, (5, 1, 3))], ids=["rows", "packed"])
def test_runs_and_differentiates(workload, shape):
    inputs = workload.inputs(shape, CPU, torch.float32)
    assert all(x.requires_grad != (name in workload.constants) for name, x in inputs.items())
    o = workload.run(inputs, shape.segments(CPU))
    leaves = [x for x in inputs.values() if x.requires_grad]
    grads = torch.autograd.grad(o, leaves, torch.randn_like(o))
    assert o.isfinite().all() and all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("workload", ALL)
def test_cost_grows_with_the_shape(workload):
    plain, packed = Shape(1, 4096, 4, 64, 64), Shape(1, 4096, 4, 64, 64, (4000, 96))
    once = workload.floor(plain, 2, False)
    assert min(once) > 0
    both, two = workload.floor(plain, 2, True), workload.floor(packed, 2, False)
    assert both.flops > 2 * once.flops and 2 * once.bytes < both.bytes < 6 * once.bytes
    assert two.flops == once.flops and two.bytes >= once.bytes and two.state_bytes == 2 * once.state_bytes


@pytest.mark.parametrize("workload", ALL)
def test_peers_have_names_of_their_own(workload):
    names = [peer.name for peer in peers(workload.name)]
    assert names and len(set(names)) == len(names) and "linnet" not in names
    for peer in peers(workload.name):
        assert peer.obstacle(CPU, False) == "runs on GPUs only"


def test_conversions_are_restored():
    for workload in BY_NAME.values():
        inputs = workload.inputs(Shape(2, 5, 2, 4, 6), CPU, torch.float32)
        for peer in peers(workload.name):
            with torch.no_grad():
                given = peer.convert(inputs)
            like = given.get("v", given.get("b", given.get("x")))
            if like is not None:  # what has no counterpart is not what comes out either
                assert peer.restore(like).shape == inputs.get("v", inputs.get("b", inputs.get("x"))).shape


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_layers_are_those_of_torch(kind):
    workload = next(w for w in suite("cell") if w.name == f"{kind}_layer")
    (cudnn,) = peers(workload.name)
    inputs = workload.inputs(Shape(2, 5, 1, 6, 6), CPU, torch.float32)
    with torch.no_grad():
        found = cudnn.run(cudnn.convert(inputs), None)
        torch.testing.assert_close(found, workload.run(inputs, None))
    cuda = torch.device("cuda")
    assert cudnn.obstacle(cuda, False) is None and cudnn.obstacle(cuda, False, 2) == "takes 1 head"


def test_gates_before_their_sigmoid():
    workload = suite("mlstm")[1]
    inputs = workload.inputs(Shape(2, 5, 2, 4, 6), CPU, torch.float32)
    with torch.no_grad():
        given = peers("mlstm_sig")[0].convert(inputs)
    torch.testing.assert_close(given["i"].sigmoid().transpose(1, 2), inputs["w"])
    torch.testing.assert_close(torch.nn.functional.logsigmoid(given["f"]).transpose(1, 2), inputs["g"])


def test_grids():
    assert {shape.tokens for shape in grid("main,wide,packed,sizes,length")} == {32768}
    assert len(set(GRIDS["wide"])) == 64 and GRIDS["wide"][0] == GRIDS["main"][0] and len(grid("near,wide")) == 64
    assert len(grid("near")) == 10 and len(grid("main,near")) == 12
    for shape in grid("packed"):
        lengths = shape.lengths
        assert sum(lengths) == shape.T and 4 <= 4 * min(lengths) < max(lengths)
    assert Shape.of([1, 2, 3, 4, 5, [1, 1]]) == Shape(1, 2, 3, 4, 5, (1, 1)) and Shape.of(range(5)).lengths == ()


def test_retention_has_the_published_rates():
    g = suite("decay")[1].inputs(Shape(1, 1, 3, 2, 2), CPU, torch.float32)["g"]
    torch.testing.assert_close(g.exp(), 1 - torch.tensor([2.0**-5, 2.0**-6, 2.0**-7]))
    assert math.isclose(float(g[0].exp()), 31 / 32, rel_tol=1e-6)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"^suite: expected one of decay, "):
        suite("dacay")
    with pytest.raises(ValueError, match=r"^grid: expected one of main, "):
        grid("small")
