"""Bradley-Terry model with ties (Davidson 1970) by maximum likelihood, and its cluster-bootstrap covariance.

With strengths theta and a tie parameter nu, and Z = exp(d/2) + exp(-d/2) + nu for d = theta_i - theta_j:

    P(i wins) = exp(d/2) / Z        P(tie) = nu / Z        P(j wins) = exp(-d/2) / Z

Counts are arrays [..., K, K, 2] of K artifacts: [i, j, 0] is how often i won against j, [i, j, 1] with i < j how often they tied.
Everything is batched over leading axes, so that a bootstrap is one fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ELO = 400 / np.log(10)  # Elo points per unit of theta
MAX_STEPS, MAX_CHANGE, TOLERANCE = 60, 2.0, 1e-10
FARTHEST = 16.0  # in theta; estimates that spread wider run to infinity
PRIOR_SD = 3.0  # in theta (521 Elo); used only where the likelihood has no maximum


@dataclass(frozen=True)
class Fit:
    """Strengths `theta` [..., K] with mean 0, tie parameter `nu` [...], and whether the prior was needed [...]."""

    theta: Floats
    nu: Floats
    is_regularised: NDArray[np.bool_]


def fit(counts: Floats) -> Fit:
    """Maximum-likelihood fit of `counts` [..., K, K, 2] by Newton's method in float64.

    Where the likelihood has no maximum (an artifact that never won, no votes for it), a normal prior with standard deviation `PRIOR_SD`
    on each strength makes the estimate finite. Davidson (1970), doi:10.1080/01621459.1970.10481082.
    """
    k = counts.shape[-2]
    batch = counts.reshape(-1, k, k, 2)
    theta, log_nu, is_found = _newton(batch, 0.0)
    if not is_found.all():
        theta[~is_found], log_nu[~is_found], _ = _newton(batch[~is_found], PRIOR_SD**-2)
    nu = np.where(batch[..., 1].sum((1, 2)) > 0, np.exp(log_nu), 0.0)
    shape = counts.shape[:-3]
    return Fit(theta.reshape(*shape, k), nu.reshape(shape), ~is_found.reshape(shape))


def _newton(counts: Floats, precision: float) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """theta [B, K], log nu [B] and whether the maximum was found [B]; `precision` is the prior's, on theta and log nu."""
    b, k = counts.shape[:2]
    wins, ties = counts[..., 0], counts[..., 1] + counts[..., 1].swapaxes(1, 2)
    votes = wins + wins.swapaxes(1, 2) + ties
    has_ties = ties.sum((1, 2)) > 0
    theta, log_nu, is_found = np.zeros((b, k)), np.zeros(b), np.zeros(b, bool)
    for _ in range(MAX_STEPS):
        win, tie = probabilities(theta, np.where(has_ties, np.exp(log_nu), 0.0))
        skew = (win - win.swapaxes(1, 2)) / 2  # derivative of log Z by d
        gradient = np.empty((b, k + 1))
        gradient[:, :k] = ((wins - wins.swapaxes(1, 2)) / 2 - votes * skew).sum(2) - precision * theta
        gradient[:, k] = np.where(has_ties, (ties - votes * tie).sum((1, 2)) / 2 - precision * log_nu, 0.0)
        curvature = votes * ((1 - tie) / 4 - skew**2)
        information = np.zeros((b, k + 1, k + 1))  # minus the Hessian
        information[:, :k, :k] = -curvature
        information[:, range(k), range(k)] += curvature.sum(2) + precision
        information[:, :k, k] = information[:, k, :k] = -(votes * tie * skew).sum(2)
        information[:, k, k] = np.where(has_ties, (votes * tie * (1 - tie)).sum((1, 2)) / 2 + precision, 1.0)
        scale = votes.sum((1, 2))[:, None, None] / k**2 + 1e-6
        information[:, :k, :k] += scale / k  # all strengths together are free; this fixes their mean
        change = np.linalg.solve(information + 1e-12 * scale * np.eye(k + 1), gradient[..., None])[..., 0]
        change *= np.minimum(1, MAX_CHANGE / np.maximum(np.abs(change).max(1), 1e-300))[:, None]
        theta, log_nu = theta + change[:, :k], log_nu + change[:, k]
        is_found = (np.abs(change).max(1) < TOLERANCE) & (np.ptp(theta, axis=1) < FARTHEST) & (np.abs(log_nu) < FARTHEST)
        if is_found.all():
            break
    return theta - theta.mean(1, keepdims=True), log_nu, is_found & (votes.sum(2) > 0).all(1)


def probabilities(theta: Floats, nu: Floats) -> tuple[Floats, Floats]:
    """(P(i wins against j), P(i and j tie)), each [..., K, K], for `theta` [..., K] and `nu` [...]; the diagonal means nothing."""
    half = (theta[..., :, None] - theta[..., None, :]) / 2
    z = 2 * np.cosh(half) + nu[..., None, None]
    return np.exp(half) / z, nu[..., None, None] / z


def is_connected(counts: Floats) -> tuple[bool, list[list[int]]]:
    """(whether votes connect all K artifacts of `counts` [K, K, 2], groups of artifacts that votes connect)."""
    from scipy.sparse.csgraph import connected_components

    number, label = connected_components(counts.sum(2) > 0, directed=False)
    return number == 1, [np.flatnonzero(label == i).tolist() for i in range(number)]


def covariance(counts: Floats, clusters: Sequence[Floats], replicates: int, random: np.random.Generator) -> Floats:
    """Covariance [K, K] of theta under crossed clusters, each given as its groups' counts [G, K, K, 2] (raters; prompts).

    One-way bootstraps over raters, over prompts and over votes are combined as V_raters + V_prompts - V_votes (Cameron, Gelbach and
    Miller 2011), each with the factor G / (G - 1). Resampling both at once would count the votes' own noise three times (Owen 2007).
    Where a one-way covariance has a larger trace than the sum, the one-way covariance is used. Negative eigenvalues are set to 0.
    """
    total = int(counts.sum())
    by_vote = fit(random.multinomial(total, counts.ravel() / total, size=replicates).reshape(-1, *counts.shape).astype(np.float64))
    one_way = []
    for groups in clusters:
        number = len(groups)
        weights = random.multinomial(number, np.full(number, 1 / number), size=replicates).astype(np.float64)
        one_way.append(np.cov(fit(np.tensordot(weights, groups, 1)).theta.T) * number / (number - 1))
    if not one_way:
        return np.asarray(np.cov(by_vote.theta.T))
    both = sum(one_way, -(len(one_way) - 1) * np.cov(by_vote.theta.T))
    values, vectors = np.linalg.eigh(max([both, *one_way], key=np.trace))
    return np.asarray((vectors * np.maximum(values, 0)) @ vectors.T)
