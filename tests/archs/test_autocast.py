"""Training under autocast: operations keep the types that they are given."""

import pytest
import torch

from archs import ARCHITECTURES, build_model
from archs.ops import in_its_own_types, interpreted

OPTIONS = {
    "transformer": {"head_dim": 16},
    "mamba2": {"head_dim": 16, "d_state": 16},
    "rwkv7": {"head_dim": 16},
}


def gradients(arch, dtype, backend="torch"):
    """Loss and gradients by name of a small model, its forward pass under autocast to `dtype`."""
    torch.manual_seed(0)
    options = {arch: OPTIONS.get(arch, {})}
    model = build_model(arch, width=32, depth=2, max_len=40, backend=backend, options=options)
    tokens = torch.randint(256, (2, 41))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.bfloat16, "torch"), (torch.float16, "torch"), (torch.float16, "triton")],
)
def test_models_train_under_autocast(arch, dtype, backend):
    if backend == "triton" and not interpreted():
        pytest.skip("kernels need a GPU, or Triton's interpreter")
    if backend == "triton" and not ARCHITECTURES[arch].has_kernels:
        pytest.skip("has no kernels")
    loss, exact = gradients(arch, None)
    near, found = gradients(arch, dtype, backend)
    assert near == pytest.approx(loss, rel=1e-3)
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 0.1, (name, error)


@in_its_own_types
def product(x, y, *, scale=1.0):
    return scale * (x @ y)


def test_an_operation_keeps_its_types_and_autocast_goes_on_around_it():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, y=x, scale=2.0).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(product(x, x), x @ x)
    assert product(x, x).dtype == torch.float32


def test_an_operation_runs_where_there_is_no_autocast():
    x = torch.randn(4, 4, device="meta")
    assert product(x, x).device.type == "meta"


def test_the_filters_of_hyena_are_formed_in_float32():
    from archs import build_block

    block = build_block("hyena", width=8, max_len=64)
    with torch.no_grad():
        exact = block.filter(64)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(block.filter(64), exact)
