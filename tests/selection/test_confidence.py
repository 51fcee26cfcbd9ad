"""The confidence set of the change-point layer, the sample-size curve, and single prompts of large influence."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from support.oracles import states

from jaxcrit.core.layers import LayerScores, LayerSet
from jaxcrit.criteria.delta import deletions, layer_scores, values_without_each
from jaxcrit.selection import certainty, confidence_set, leverage, sample_sizes
from jaxcrit.selection.cautions import cautions
from jaxcrit.selection.confidence import SampleSizes
from jaxcrit.similarity import permutation_null, sweep

KEY = "step_debiased"


def measured(seed=0, *, samples=60, layers=14, planted=7, jump=0.5, key=KEY):
    tables = sweep(states(samples=samples, layers=layers, planted=planted, seed=seed, jump=jump))
    without = deletions(tables)
    return layer_scores(tables, without=without)[key], values_without_each(tables, key, without=without)


def gaussian(rng, values, prompts=50, spread=0.1):
    """A score that is a mean over prompts, with its exact jackknife: what the layers' scores are to first order."""
    each = values + spread * rng.standard_normal((prompts, len(values)))
    mean = each.mean(axis=0)
    left = (prompts * mean - each) / (prompts - 1)
    return LayerScores("delta", mean, np.isfinite(mean), "low"), left


def test_the_set_is_the_planted_layer_or_everything():
    assert confidence_set(*([part] for part in measured())) == (7,)
    flat = confidence_set(*([part] for part in measured(jump=0.95, samples=30)))
    assert len(flat) >= 8 and set(flat) <= set(range(2, 12))


def test_delta_cannot_tell_the_two_layers_of_a_jump_apart():
    """Both windows hold the jump, so both belong to the set (see `delta`)."""
    assert confidence_set(*([part] for part in measured(key="delta_debiased"))) == (6, 7)


@pytest.mark.parametrize("gap", [0.0, 0.02, 0.1])
def test_coverage_where_the_truth_is_known(gap):
    """At 95 % whether the others are as low, nearly so, or far above; not at the 35 % or so of the lowest alone."""
    rng, truth = np.random.default_rng(0), np.full(8, 0.5)
    truth[3] -= gap
    sets = [confidence_set(*([part] for part in gaussian(rng, truth)), trim=0, draws=400) for _ in range(300)]
    assert np.mean([3 in found for found in sets]) > 0.92
    sizes = np.mean([len(found) for found in sets])
    assert sizes > 7 if gap == 0 else sizes < 1.2 if gap == 0.1 else 3 < sizes < 8


def test_coverage_of_mean_ranks():
    """Three datasets of other levels and spreads; the layer lowest in all of them, by little."""
    rng, hits, sizes = np.random.default_rng(1), 0, []
    for _ in range(60):
        parts = [gaussian(rng, level + 0.03 * np.abs(np.arange(7) - 2), spread=s) for level, s in ((1, 0.1), (0, 0.05))]
        found = confidence_set(*zip(*parts, strict=True), trim=0, draws=300)
        hits += 2 in found
        sizes.append(len(found))
    assert hits >= 57 and 1 < np.mean(sizes) < 7


def test_direction_and_trim():
    score, left = gaussian(np.random.default_rng(0), np.array([9.0, 1.0, 5.0, 7.0, 2.0, 0.0]))
    assert confidence_set([score], [left], trim=0) == (5,)
    assert confidence_set([score], [left], trim=1) == (1,)
    turned = dataclasses.replace(score, values=-score.values, direction="high")
    assert confidence_set([turned], [-left], trim=1) == (1,)


def test_layers_that_never_differ_are_both_held():
    values = np.array([0.5, 0.5, 0.9])
    score = LayerScores("delta", values, np.full(3, True), "low")
    assert confidence_set([score], [np.tile(values, (10, 1))], trim=0) == (0, 1)


def test_sample_size_curve_is_what_fresh_prompts_do():
    """Predicted from the truth's own scores and errors at N=60, against draws of 15 and 120 fresh samples."""
    rng, truth = np.random.default_rng(2), np.array([0.5, 0.47, 0.53, 0.6])
    each = rng.standard_normal((60, 4))
    each = 0.1 * (each - each.mean(0)) / each.std(0)
    score = LayerScores("delta", truth, np.full(4, True), "low")
    curve = sample_sizes([score], [truth - each / 59], 1, trim=0)
    assert curve.num_prompts.tolist() == [15, 30, 60, 120, 240, 480, 960]
    for position, size in ((0, 15), (3, 120)):
        fresh = truth + 0.1 * rng.standard_normal((4000, 4)) / np.sqrt(size)
        assert curve.same[position] == pytest.approx((fresh.argmin(axis=1) == 1).mean(), abs=0.06)
    assert (np.diff(curve.same) >= 0).all() and (curve.overlap >= curve.same).all()
    assert 60 < curve.enough() < 120


def test_two_layers_at_each_end_are_left_out_unless_told():
    values = np.array([0.1, 0.2, 0.3, 0.9, 0.9, 0.5, 0.2, 0.1])
    one = gaussian(np.random.default_rng(0), values, spread=0.01)
    two = [gaussian(np.random.default_rng(seed), values, spread=0.01) for seed in (1, 2)]
    for scores, left in ([one[0]], [one[1]]), tuple(zip(*two, strict=True)):
        curve, free = sample_sizes(scores, left, 1), sample_sizes(scores, left, 1, trim=0)
        np.testing.assert_array_equal(curve.same, 1)  # of layer 2, the lowest that may be chosen
        assert free.same[0] < 1  # 0 and 7 are as low
        assert confidence_set(scores, left) == (2,) and set(confidence_set(scores, left, trim=0)) >= {0, 7}


def test_a_flat_curve_never_settles():
    curves = [
        sample_sizes(*([part] for part in gaussian(np.random.default_rng(s), np.full(9, 0.5))), 1, trim=0)
        for s in range(12)
    ]
    assert np.mean([curve.same[-1] for curve in curves]) < 0.5
    assert sum(curve.enough() is None for curve in curves) >= 9


def test_certainty_is_seeded_and_becomes_json():
    score, left = measured()
    first, second = (certainty([score], [left], 2, seed=3) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.num_prompts == 60 and first.to_json()["confidence_set"] == {"level": 0.95, "layers": [7]}


def result_of(scores, cka, most=None, ids=()):
    chosen = LayerSet((5,), "delta_debiased", "critical:1", next(iter(scores.values())).num_layers)
    return SimpleNamespace(scores=scores, cka=cka, chosen=chosen, certainty=None, leverage=most, sample_ids=ids)


class TestLeverage:
    def heavy(self, factor):
        """A prompt that lies far out from layer 5 on."""
        hidden = states(samples=60, layers=10, planted=5)
        hidden[5:, 17] *= factor
        tables = sweep(hidden)
        score, left = layer_scores(tables)["delta_debiased"], values_without_each(tables, "delta_debiased")
        return hidden, score, leverage(score, left)

    def test_names_the_sample_and_what_it_does(self):
        hidden, score, most = self.heavy(8)
        valid = score.valid
        assert (most.prompt[3:7] == 17).all() and (most.prompt[~valid] == -1).all(), "windows across layer 5"
        without = layer_scores(sweep(np.delete(hidden, 17, axis=1)))["delta_debiased"].values
        np.testing.assert_allclose(most.shift[3:7], (without - score.values)[3:7], atol=1e-6)
        assert (most.share[3:7] > 0.5).any()
        assert most.to_json()["prompt"][0] is None and most.to_json()["prompt"][5] == 17

    @pytest.mark.parametrize(("factor", "warned"), [(1, False), (8, True)])
    def test_caution(self, factor, warned):
        _, score, most = self.heavy(factor)

        ids = [f"{i:02}abcdef0123456789" for i in range(60)]
        result = result_of({"delta_debiased": score}, {"null_mean": np.zeros((10, 10))}, most, ids)
        lines = [line for line in cautions(result, trim=2) if "one prompt" in line]
        assert len(lines) == warned
        if warned:
            assert "prompt 17, counted from 0 (sample 17abcdef0123)" in lines[0]
            assert f"{most.shift[2:8][np.abs(most.shift[2:8]).argmax()]:+.4f}" in lines[0]


def test_only_layers_in_question_are_warned_about():
    score, left = gaussian(np.random.default_rng(0), np.arange(9) / 2.0, prompts=30)
    left[4] = left.mean(axis=0) + 0.05
    result = result_of({"delta_debiased": score}, {"null_mean": np.zeros((9, 9))}, leverage(score, left), ["id"] * 30)
    result.chosen = LayerSet((2,), "delta_debiased", "critical:1", 9)
    result.certainty = certainty([score], [left], 1)
    line = next(line for line in cautions(result, trim=2) if "one prompt" in line)
    assert "prompt 4, counted from 0 (sample id), at layer 2;" in line


def test_unrelated_neighbours_are_named():
    hidden = np.random.default_rng(0).standard_normal((8, 20, 30)).astype(np.float32)
    hidden[1:5] = hidden[1:5] * 0.2 + hidden[0]
    tables = sweep(hidden)
    null = permutation_null(tables)
    result = result_of(layer_scores(tables), {"null_mean": null.mean, "null_p": null.p})
    line = next(line for line in cautions(result, trim=2) if "no more like" in line)
    assert "layers 5-7 are" in line


def set_by_definition(score, left, level, draws, seed):
    """Layer by layer: the largest standardised lead of another against the same of the bootstrap's draws."""
    rng, (count, depth) = np.random.default_rng(seed), left.shape
    sign = 1 if score.direction == "low" else -1
    multipliers = rng.standard_normal((draws, count))
    student = np.sqrt((count - 1) / rng.chisquare(count - 1, (draws, 1)))
    noise = sign * (multipliers @ ((left.mean(axis=0) - left) * np.sqrt((count - 1) / count))) * student
    held = []
    for layer in range(depth):
        leads, deviations = [], []
        for other in set(range(depth)) - {layer}:
            apart = left[:, layer] - left[:, other]
            error = np.sqrt((count - 1) / count * np.square(apart - apart.mean()).sum())
            leads.append(sign * (score.values[layer] - score.values[other]) / error)
            deviations.append((noise[:, layer] - noise[:, other]) / error)
        # The layer's lead over itself is 0, and so is that of every draw.
        if max(0, *leads) <= np.quantile(np.maximum(np.max(deviations, axis=0), 0), level):
            held.append(layer)
    return tuple(held)


@pytest.mark.parametrize("direction", ["low", "high"])
@pytest.mark.parametrize("seed", range(6))
def test_the_set_is_that_of_its_definition(seed, direction):
    """Of layers of very different spread, where only standardised differences tell which may be the lowest."""
    rng = np.random.default_rng(seed)
    spread = np.array([0.01, 1, 0.02, 2, 0.05, 0.5])
    score, left = gaussian(rng, np.array([0, 0.1, 0.004, -0.2, 0.02, -0.05]), spread=spread)
    score = dataclasses.replace(score, direction=direction)
    found = confidence_set([score], [left], level=0.9, trim=0, draws=500, seed=seed)
    assert found == set_by_definition(score, left, 0.9, 500, seed)


def bounds_by_definition(scores, lefts, level, draws, seed):
    """Layer by layer, bounds of its mean rank: how many are surely below it, how many not surely above."""
    rng, leads, largest = np.random.default_rng(seed), [], np.full(draws, -np.inf)
    for score, left in zip(scores, lefts, strict=True):
        count, depth = left.shape
        multipliers = rng.standard_normal((draws, count))
        student = np.sqrt((count - 1) / rng.chisquare(count - 1, (draws, 1)))
        noise = (multipliers @ ((left.mean(axis=0) - left) * np.sqrt((count - 1) / count))) * student
        lead = np.zeros((depth, depth))
        for layer in range(depth):
            for other in set(range(depth)) - {layer}:
                apart = left[:, layer] - left[:, other]
                error = np.sqrt((count - 1) / count * np.square(apart - apart.mean()).sum())
                lead[layer, other] = (score.values[layer] - score.values[other]) / error
                largest = np.maximum(largest, (noise[:, layer] - noise[:, other]) / error)
        leads.append(lead)
    sure = np.array(leads) > np.quantile(largest, level)  # the first is above the second
    least, most = sure.sum(axis=2).mean(axis=0), (depth - 1 - sure.sum(axis=1)).mean(axis=0)
    return tuple(np.flatnonzero(least <= most.min()).tolist())


@pytest.mark.parametrize("seed", range(4))
def test_the_set_of_several_scores_is_that_of_its_definition(seed):
    rng = np.random.default_rng(seed)
    spread = np.array([0.01, 1, 0.02, 2, 0.05, 0.5])
    values = np.array([0, 0.6, 0.03, -0.2, 0.1, 0.05])
    scores, lefts = zip(*(gaussian(rng, values, spread=spread) for _ in range(2)), strict=True)
    found = confidence_set(scores, lefts, level=0.9, trim=0, draws=300, seed=seed)
    assert found == bounds_by_definition(scores, lefts, 0.9, 300, seed)


def test_enough_prompts_are_read_off_the_curve():
    curve = SampleSizes(np.array([10, 40, 160]), np.array([0.5, 0.9, 1.0]), np.ones(3))
    assert curve.enough(0.9) == 40 and curve.enough(0.5) == 10 and curve.enough(1.0) == 160
    assert curve.enough(0.7) == 20, "halfway between 10 and 40 on a logarithmic axis"
    assert dataclasses.replace(curve, same=np.array([0.5, 0.6, 0.7])).enough(0.8) is None
