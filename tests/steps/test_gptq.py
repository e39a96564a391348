"""GPTQ as a step: the codes of every block are those of a plain version, whatever the fields say."""

import pytest
import torch

from compress.encodings import Encoding
from compress.interfaces import Context
from compress.numerics.refine import losses
from compress.plugin import step
from compress.steps.quantize._fields import fit_grid
from compress.steps.quantize.gptq import Moments, solve
from tests.inputs import inputs_of, windows
from tests.tiny import tiny_model

INT4 = Encoding("int4", 16)


def plain_codes(
    W: torch.Tensor, X: torch.Tensor, wanted: torch.Tensor, kept: torch.Tensor, dampening: float, search: bool
) -> torch.Tensor:
    """Codes of W (n, m), which is to make of X (tokens, m) what it makes of `wanted`; all in float64.

    First the weights of least squares (Arai & Ichikawa 2025, arXiv:2504.09629), then column by column with the exact
    inverse of what is left (Frantar & Alistarh 2022, arXiv:2208.11580, equations 7 and 8). kept: (n, m), 0 = pruned.
    """
    importance = (X.T @ X).diagonal()
    H = X.T @ X + dampening * importance.mean() * torch.eye(len(importance)).double()
    W = W + W @ (wanted - X).T @ X @ torch.linalg.inv(H)
    codes = torch.empty_like(W)
    for j in range(W.shape[1]):
        group = slice(j, j + 16)
        if j % 16 == 0:
            columns = (W * kept)[:, group].float().unsqueeze(1)
            s = fit_grid(columns, INT4, importance[group].float().unsqueeze(0), search).scales[:, 0].double()
        inverse = torch.linalg.inv(H[j:, j:])
        codes[:, j] = (W[:, j] / s).round().clamp(-8, 7) * kept[:, j]
        W[:, j:] -= ((W[:, j] - codes[:, j] * s) / inverse[0, 0]).unsqueeze(1) * inverse[0]
    return codes


@pytest.mark.parametrize("working", ["float32"], indirect=True)
@pytest.mark.parametrize(
    ("sparsity", "fields"),
    [
        (0.0, {}),
        (0.0, {"range": "minmax"}),
        (0.0, {"dampening": 0.3}),
        (0.0, {"error_propagation": 1.0}),
        (0.0, {"error_propagation": 0.0}),
        (0.4, {}),
    ],
)
def test_every_block_equals_a_plain_version_fed_by_the_rounded_ones_before_it(sparsity, fields, working):
    original, model = tiny_model(), tiny_model()
    for either in (original, model):
        step("prune.magnitude")(sparsity=sparsity).apply(either, Context(seed=0))
    chosen = step("quantize.gptq")(group_size=16, embeddings=None, **fields)
    chosen.apply(model, Context(seed=0, calibration=windows(20)))
    before, after = (inputs_of(m, model.facts.linears, windows(20)) for m in (original, model))
    for name, X in after.items():  # what a linear reads is settled before its turn, and stays
        W = original.parameter(f"{name}.weight").detach().double()
        share = 0.0 if name.endswith("down_proj") else chosen.error_propagation
        wanted = X + share * (before[name] - X)
        kept = (W != 0).double()
        expected = plain_codes(W, X, wanted, kept, chosen.dampening, chosen.range == "mse")
        found = model.encoded[f"{name}.weight"].codes
        assert (found != expected).float().mean() < 0.01, name  # float32 against float64, on an edge
        assert not sparsity or (not found[kept == 0].any() and found[kept == 1].any())


@pytest.mark.parametrize("passes", [1, 2])
def test_refinement_ends_with_the_scales_of_least_loss(passes):
    generator = torch.Generator().manual_seed(3)
    X, W = torch.randn(200, 48, generator=generator), torch.randn(20, 48, generator=generator)
    X = X @ torch.randn(48, 48, generator=generator)  # correlated channels
    H = X.T @ X
    found = solve(W, Moments(H), INT4, 0.01, search=True, refinement=passes)
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(48)
    root = torch.linalg.cholesky(damped).T
    best = torch.empty(20, 48).double()
    for i, row in enumerate(found.codes.double().view(20, 3, 16)):
        levels = torch.block_diag(*row).T  # (48, 3): what each scale multiplies
        best[i] = levels @ torch.linalg.lstsq(root @ levels, (root @ W[i].double()).unsqueeze(1)).solution.squeeze(1)
    least = losses(W.double(), best, damped)
    assert (losses(W.double(), found.decode().double(), damped) < 1.0001 * least).all()  # scales are float16
