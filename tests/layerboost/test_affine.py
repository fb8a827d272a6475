"""Compares fits from sums over tokens with least squares over the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from layerboost.affine import AUTO_TOLERANCE, RIDGES, Moments, auto_ranks, fit_map

WIDTH = 24


def tokens(n: int, weight: torch.Tensor, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws correlated inputs off zero, and what an affine map makes of them."""
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)).double()
    x = torch.randn(n, WIDTH).double() @ mixing + 3
    return x, x @ weight.T + 2 + noise * torch.randn(n, WIDTH)


def moments(x: torch.Tensor, y: torch.Tensor) -> Moments:
    found = Moments(WIDTH)
    for xs, ys in zip(x.chunk(3), y.chunk(3), strict=True):
        found.add(xs, ys)
    return found


def mean_error(fitted, x, y) -> float:
    weight = (fitted.weight if fitted.weight is not None else fitted.up @ fitted.down).double()
    return float((y - x @ weight.T - fitted.bias.double()).square().sum(dim=1).mean())


def test_a_map_is_found_again_and_its_error_is_that_of_the_tokens_themselves():
    weight = torch.randn(WIDTH, WIDTH).double()
    train, held_out = tokens(2000, weight, 0.5), tokens(500, weight, 0.5)
    fitted = fit_map(moments(*train), moments(*held_out))
    assert fitted.rank is None and fitted.ridge in RIDGES
    torch.testing.assert_close(fitted.weight.double(), weight, atol=0.1, rtol=0)
    x, y = held_out
    variance = float((y - y.mean(dim=0)).square().sum(dim=1).mean())
    assert fitted.error == pytest.approx(mean_error(fitted, x, y) / variance, rel=1e-3)


def test_it_is_the_ridge_regression_of_its_ridge():
    weight = torch.randn(WIDTH, WIDTH).double()
    (x, y), held_out = tokens(60, weight, 2.0), tokens(200, weight, 2.0)
    fitted = fit_map(moments(x, y), moments(*held_out))
    centred_x, centred_y = x - x.mean(dim=0), y - y.mean(dim=0)
    covariance = centred_x.T @ centred_x / len(x)
    penalty = fitted.ridge * covariance.diagonal().mean() * torch.eye(WIDTH)
    expected = torch.linalg.solve(covariance + penalty, centred_x.T @ centred_y / len(x)).T
    torch.testing.assert_close(fitted.weight.double(), expected, atol=1e-3, rtol=1e-3)
    errors = []
    for ridge in RIDGES:
        solved = torch.linalg.solve(
            covariance + ridge * covariance.diagonal().mean() * torch.eye(WIDTH), centred_x.T @ centred_y / len(x)
        ).T
        residual = held_out[1] - y.mean(dim=0) - (held_out[0] - x.mean(dim=0)) @ solved.T
        errors.append(float(residual.square().sum(dim=1).mean()))
    assert fitted.ridge == RIDGES[errors.index(min(errors))]


def test_a_low_rank_is_the_best_of_its_rank_and_auto_takes_the_smallest_that_is_good_enough():
    low = (torch.randn(WIDTH, 3) @ torch.randn(3, WIDTH)).double()
    train, held_out = moments(*tokens(4000, low, 0.01)), moments(*tokens(1000, low, 0.01))
    full = fit_map(train, held_out)
    by_rank = {rank: fit_map(train, held_out, rank) for rank in (1, 2, 3, 6)}
    errors = [by_rank[rank].error for rank in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[1] / 10
    assert all(fitted.rank == rank and fitted.up.shape == (WIDTH, rank) for rank, fitted in by_rank.items())
    assert by_rank[3].error == pytest.approx(full.error, abs=1e-3)
    x, y = tokens(4000, low, 0.01)
    u, s, v = torch.linalg.svd(full.weight.double())
    cut = (u[:, :2] * s[:2]) @ v[:2]
    of_svd = y - y.mean(dim=0) - (x - x.mean(dim=0)) @ cut.T
    assert mean_error(by_rank[2], x, y) <= float(of_svd.square().sum(dim=1).mean()) * 1.01

    auto = fit_map(train, held_out, "auto")
    tried = {rank: fit_map(train, held_out, rank).error for rank in auto_ranks(WIDTH)}
    least = min(full.error, *tried.values())
    assert auto.rank == min(
        (rank for rank, error in tried.items() if error <= least * (1 + AUTO_TOLERANCE)), default=None
    )
    assert fit_map(train, held_out, WIDTH).rank is None


def test_outputs_that_no_map_explains_get_their_mean():
    x = torch.randn(3000, WIDTH).double()
    y = torch.randn(3000, WIDTH).double() + 7
    fitted = fit_map(moments(x[:2000], y[:2000]), moments(x[2000:], y[2000:]))
    assert fitted.error == pytest.approx(1.0, abs=0.1)
    torch.testing.assert_close(fitted.bias, torch.full((WIDTH,), 7.0), atol=0.2, rtol=0)


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_a_rank_that_cannot_be_is_refused(rank):
    x, y = tokens(100, torch.eye(WIDTH).double())
    with pytest.raises(ValueError, match=f"rank: {rank}.*1 to {WIDTH}"):
        fit_map(moments(x, y), moments(x, y), rank)
    with pytest.raises(ValueError, match="give more text"):
        fit_map(moments(x, y), Moments(WIDTH))
