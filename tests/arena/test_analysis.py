from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from flashgen.arena import bradley_terry
from flashgen.arena.analysis import analyse
from flashgen.arena.bradley_terry import ELO, fit, probabilities
from flashgen.arena.study import Comparison, Study
from flashgen.arena.votes import JUDGE, judge_votes, opened
from flashgen.errors import ArtifactError

Make = Callable[..., Study]
Floats = NDArray[np.float64]
TOKEN = "a" * 32


def draw(theta: Floats, nu: float, per_pair: int, random: np.random.Generator) -> Floats:
    """Counts [K, K, 2] of votes drawn from the model."""
    k = len(theta)
    win, tie = probabilities(theta, np.array(nu))
    counts = np.zeros((k, k, 2))
    for i, j in itertools.combinations(range(k), 2):
        share = np.array([win[i, j], win[j, i], tie[i, j]])
        counts[i, j, 0], counts[j, i, 0], counts[i, j, 1] = random.multinomial(per_pair, share / share.sum())
    return counts


def test_fit_agrees_with_choix_without_ties() -> None:
    choix = pytest.importorskip("choix", reason="an independent implementation")
    random = np.random.default_rng(1)
    counts = draw(np.array([0.8, 0.1, -0.2, -0.7, 0.0]), 0.0, 60, random)
    wins = [(int(i), int(j)) for i, j in np.argwhere(counts[..., 0]) for _ in range(int(counts[i, j, 0]))]
    expected = choix.ilsr_pairwise(5, wins, alpha=0.0, tol=1e-10)
    assert fit(counts).theta == pytest.approx(expected - np.mean(expected), abs=1e-4)
    assert fit(counts).nu == 0


def test_fit_maximises_davidsons_likelihood() -> None:
    counts = draw(np.array([0.9, -0.1, -0.8]), 0.7, 80, np.random.default_rng(2))

    def cost(free: Floats) -> float:
        worth, nu, total = np.exp(np.array([0.0, *free[:2]])), np.exp(free[2]), 0.0
        for i, j in itertools.combinations(range(3), 2):
            root = nu * np.sqrt(worth[i] * worth[j])
            of = np.array([worth[i], worth[j], root]) / (worth[i] + worth[j] + root)
            total -= counts[i, j, 0] * np.log(of[0]) + counts[j, i, 0] * np.log(of[1]) + counts[i, j, 1] * np.log(of[2])
        return float(total)

    best = optimize.minimize(cost, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).x
    expected = np.array([0.0, *best[:2]])
    result = fit(counts)
    assert result.theta == pytest.approx(expected - expected.mean(), abs=1e-5)
    assert float(result.nu) == pytest.approx(np.exp(best[2]), abs=1e-5)


@pytest.mark.parametrize("nu", [0.0, 0.6])
def test_fit_recovers_expected_counts_exactly(nu: float) -> None:
    theta = np.array([1.3, 0.2, -0.4, -1.1])
    win, tie = probabilities(theta, np.array(nu))
    counts = np.stack([1000 * win, 1000 * np.triu(tie, 1)], -1)
    counts[range(4), range(4)] = 0
    result = fit(np.stack([counts, counts]))
    assert result.theta == pytest.approx(np.stack([theta, theta]), abs=1e-9)
    assert result.nu == pytest.approx(np.full(2, nu), abs=1e-9)
    assert not result.is_regularised.any()


def test_an_artifact_that_never_won_has_a_finite_lowest_estimate_and_is_marked() -> None:
    counts = np.zeros((3, 3, 2))
    counts[0, 1, 0], counts[1, 0, 0], counts[0, 2, 0], counts[1, 2, 0] = 6, 4, 10, 10
    result = fit(counts)
    assert bool(result.is_regularised)
    assert np.isfinite(result.theta).all() and result.theta.argmin() == 2 and np.ptp(result.theta) < 16
    never_lost = np.zeros((2, 2, 2))  # wins and ties without a loss have no maximum either: nu grows with the difference
    never_lost[0, 1] = 5, 5
    assert bool(fit(never_lost).is_regularised) and 0 < fit(never_lost).theta[0] < 8


def test_intervals_cover_the_truth_in_93_to_97_of_100_simulations() -> None:
    """300 studies with effects of raters and of prompts; every difference to the first artifact counts."""
    simulations, raters, prompts, per_rater, k = 300, 24, 40, 30, 3
    theta, nu, spread = np.array([0.4, 0.0, -0.4]), 0.5, 0.35
    pairs = np.array(list(itertools.combinations(range(k), 2)))
    truth = fit(expected_counts(theta, nu, spread, pairs)).theta
    hits = []
    for simulation in range(simulations):
        random = np.random.default_rng([7, simulation])
        by_rater, by_prompt = simulate(theta, nu, spread, pairs, raters, prompts, per_rater, random)
        counts = by_rater.sum(0)
        covariance = bradley_terry.covariance(counts, [by_rater, by_prompt], 100, random)
        width = stats.t.ppf(0.975, raters - 1)
        estimate = fit(counts).theta
        for i, j in pairs:
            sd = np.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
            hits.append(abs((estimate[i] - estimate[j]) - (truth[i] - truth[j])) <= width * sd)
    assert 0.93 <= np.mean(hits) <= 0.97


def expected_counts(theta: Floats, nu: float, spread: float, pairs: NDArray[np.int_]) -> Floats:
    """Shares of votes in a population whose raters and prompts differ, by quadrature: d has variance 2 * 2 * spread**2."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    counts = np.zeros((len(theta), len(theta), 2))
    for i, j in pairs:
        half = (theta[i] - theta[j] + 2 * spread * nodes) / 2
        z = 2 * np.cosh(half) + nu
        counts[i, j, 0], counts[j, i, 0], counts[i, j, 1] = (weights @ (x / z) for x in (np.exp(half), np.exp(-half), nu + 0 * z))
    return 1000 * counts


def simulate(
    theta: Floats, nu: float, spread: float, pairs: NDArray[np.int_], raters: int, prompts: int, per_rater: int, random: np.random.Generator
) -> tuple[Floats, Floats]:
    """Counts per rater [R, K, K, 2] and per prompt [P, K, K, 2]; tastes of raters and properties of prompts shift the strengths."""
    k, total = len(theta), raters * per_rater
    taste, shift = random.normal(0, spread, (raters, k)), random.normal(0, spread, (prompts, k))
    rater, prompt = (
        np.repeat(np.arange(raters), per_rater),
        np.concatenate([random.permutation(prompts)[:per_rater] for _ in range(raters)]),
    )
    i, j = pairs[np.arange(total) % len(pairs)].T
    strength = theta + taste[rater] + shift[prompt]
    half = (strength[np.arange(total), i] - strength[np.arange(total), j]) / 2
    z, u = 2 * np.cosh(half) + nu, random.random(total)
    is_win, is_tie = u < np.exp(half) / z, u > (np.exp(half) + np.exp(-half)) / z
    first, second = np.where(is_win | is_tie, i, j), np.where(is_win | is_tie, j, i)
    by_rater, by_prompt = np.zeros((raters, k, k, 2)), np.zeros((prompts, k, k, 2))
    np.add.at(by_rater, (rater, first, second, is_tie.astype(int)), 1)
    np.add.at(by_prompt, (prompt, first, second, is_tie.astype(int)), 1)
    return by_rater, by_prompt


def vote_by_strength(study: Study, strengths: dict[str, float], raters: int, fooled: int = 0, seed: int = 0) -> None:
    """Votes of simulated people, whose last `fooled` choose the spoiled picture and else at random."""
    random = np.random.default_rng(seed)
    with opened(study) as votes:
        for number in range(raters):
            name, is_fooled = f"rater {number}", number >= raters - fooled
            for comparison in study.plan(votes.join(name, TOKEN).slot):
                votes.vote(name, comparison, choose(study, comparison, strengths, is_fooled, random), 2.0)


def choose(study: Study, comparison: Comparison, strengths: dict[str, float], is_fooled: bool, random: np.random.Generator) -> str:
    left, right = (None if side is None else study.artifacts[side] for side in (comparison.left, comparison.right))
    if left is None or right is None:
        return "left" if (left is None) == is_fooled else "right"
    d = 0.0 if is_fooled else strengths[left] - strengths[right]
    if random.random() < 0.1:
        return "tie"
    return "left" if random.random() < 1 / (1 + np.exp(-d)) else "right"


STRENGTHS = {"alpha": 0.0, "beta": 1.5, "gamma": -1.5}


def test_analysis_recovers_a_planted_ranking_and_leaves_out_raters_who_fail_gold(
    make_study: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(prompts=20, per_rater=40, gold=0.1, repeats=0.1)
    vote_by_strength(study, STRENGTHS, raters=7, fooled=2)
    result = analyse(study.folder, replicates=200)
    assert json.loads((study.folder / "analysis.json").read_text()) == result
    assert [row["artifact"] for row in result["people"]["elo"]] == ["beta", "alpha", "gamma"]
    assert np.mean([row["elo"] for row in result["people"]["elo"]]) == pytest.approx(1000, abs=0.01)
    assert (result["people"]["raters"], result["people"]["votes"], result["people"]["prompts"]) == (5, 200, 20)
    by_pair = {(row["a"], row["b"]): row for row in result["people"]["differences"]}
    planted = ELO * 1.5
    assert by_pair["alpha", "beta"]["interval"][0] < -planted < by_pair["alpha", "beta"]["interval"][1] < 0
    assert {rater["rater"] for rater in result["raters"] if rater["left_out"]} == {"rater 5", "rater 6"}
    assert result["raters"][0]["gold"] == [4, 4] and result["raters"][0]["repeats"][1] == 4
    printed = capsys.readouterr().err
    assert "rater 5 got 0 of 4 gold pairs right and is left out" in printed and "beta" in printed and "more votes" in printed
    everyone = analyse(study.folder, keep_failed=True, replicates=50)
    assert everyone["people"]["raters"] == 7 and "counted all the same" in capsys.readouterr().err


def test_judges_are_ranked_apart_from_people(make_study: Make) -> None:
    study = make_study(prompts=20, per_rater=40)
    vote_by_strength(study, STRENGTHS, raters=3)
    alone = analyse(study.folder, replicates=50)["people"]
    random = np.random.default_rng(0)
    judge_votes(study, "clip", {name: (-s + random.normal(0, 1.5, 20)).tolist() for name, s in STRENGTHS.items()})
    result = analyse(study.folder, replicates=50)
    assert result["people"] == alone
    judged = result["judges"][JUDGE + "clip"]
    assert [row["artifact"] for row in judged["elo"]] == ["gamma", "alpha", "beta"] and "one rater" in judged["notes"][0]
    assert all(not rater["rater"].startswith(JUDGE) for rater in result["raters"])


def test_votes_needed_for_five_percent_of_an_even_pair_are_about_385(make_study: Make) -> None:
    study = make_study("alpha beta", prompts=30, per_rater=30, gold=0)
    with opened(study) as votes:
        for number in range(4):
            for i, comparison in enumerate(c for c in study.plan(votes.join(f"r{number}", TOKEN).slot) if c.kind == "pair"):
                votes.vote(f"r{number}", comparison, "left" if (comparison.left == 0) == bool(i % 2) else "right", 1.0)
    row = analyse(study.folder, precision_elo=34.7, replicates=2000)["people"]["differences"][0]
    assert row["elo"] == pytest.approx(0, abs=1e-6)
    votes_in_all = 120 + row["votes_needed"]
    assert 385 * 0.5 < votes_in_all < 385 * 3  # t with 3 degrees of freedom is wider than the normal, 1.62 ** 2 times


def test_an_artifact_that_never_won_is_said(make_study: Make, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study("alpha beta", prompts=10, per_rater=10)
    vote_by_strength(study, {"alpha": 50.0, "beta": 0.0}, raters=2)
    people = analyse(study.folder, replicates=50)["people"]
    assert "won or lost everything" in people["notes"][0] and "won or lost everything" in capsys.readouterr().err


def test_votes_that_connect_no_common_scale_are_refused(make_study: Make) -> None:
    study = make_study("alpha beta gamma", prompts=10, gold=0)
    with opened(study) as votes:
        for comparison in study.plan(votes.join("Anna", TOKEN).slot):
            if {comparison.left, comparison.right} == {0, 1}:
                votes.vote("Anna", comparison, "left", 1.0)
    with pytest.raises(ArtifactError, match=r"\{alpha, beta\} and \{gamma\}"):
        analyse(study.folder)


def test_everyone_failing_gold_is_said(make_study: Make) -> None:
    study = make_study(prompts=10)
    vote_by_strength(study, STRENGTHS, raters=1, fooled=1)
    with pytest.raises(ArtifactError, match="every rater"):
        analyse(study.folder)


def test_one_vote_has_no_interval(make_study: Make) -> None:
    study = make_study("alpha beta", prompts=3)
    with opened(study) as votes:
        comparison = next(c for c in study.plan(votes.join("Anna", TOKEN).slot) if c.kind == "pair")
        votes.vote("Anna", comparison, "left", 1.0)
    row: dict[str, Any] = analyse(study.folder, replicates=20)["people"]["differences"][0]
    assert row["interval"] is None and row["votes_needed"] is None
