"""Criteria against their published formulas in float64, and on planted states and weights: what each sees, and not."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from support.taps import measured

from jaxcrit.commands.main import COMMANDS
from jaxcrit.core.errors import UserError
from jaxcrit.criteria import registry
from jaxcrit.criteria.__main__ import main as print_table
from jaxcrit.criteria.block_influence import block_influence, influence
from jaxcrit.criteria.fisher import fisher
from jaxcrit.criteria.gradient_norm import gradient_norm
from jaxcrit.criteria.registry import FILES, criterion, parse_criteria, scorable, updated
from jaxcrit.criteria.rgn import rgn
from jaxcrit.criteria.stable_rank import stable_rank
from jaxcrit.criteria.step import step
from jaxcrit.criteria.weight_change import weight_change
from jaxcrit.criteria.weight_snr import weight_snr
from jaxcrit.evidence.backward import Gradients
from jaxcrit.evidence.criterion import mean_over
from jaxcrit.evidence.weights import Spectra, WeightChanges
from jaxcrit.similarity import cka

LAYERS, SAMPLES, WIDTH, PLANT = 12, 64, 96, 7


def chain(plant=None, seed=0):
    """States ``[L+1, N, D]`` that drift a little at every block; ``plant`` changes what leaves block `PLANT`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SAMPLES, WIDTH))
    found = [x]
    for layer in range(LAYERS):
        x = x + 0.05 * rng.standard_normal(x.shape)
        if layer == PLANT and plant is not None:
            x = plant(x, rng)
        found.append(x)
    return np.stack(found).astype(np.float32)


def cosines(hidden):
    hidden = hidden.astype(np.float64)
    unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
    return (unit[1:] * unit[:-1]).sum(-1)


def rotation(x, rng):
    return x @ np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]


def direction(x, rng):
    """A new direction of high variance."""
    return x + 8 * np.outer(rng.standard_normal(SAMPLES), np.eye(WIDTH)[0])


def outlier(x, rng):
    return x + 300 * np.outer(np.eye(SAMPLES)[3], np.eye(WIDTH)[0])


def scaled(x, rng):
    return 10 * x


PLANTS = {"none": None, "rotation": rotation, "scale": scaled, "direction": direction, "outlier": outlier}


def test_state_criteria_equal_their_formulas():
    hidden = chain(direction)
    cos = cosines(hidden)
    np.testing.assert_allclose(measured("angular_distance", hidden).values, (np.arccos(cos) / np.pi).mean(1), atol=1e-5)
    np.testing.assert_allclose(measured("block_influence", hidden).values, 1 - cos.mean(1), atol=1e-5)
    ranks = measured("effective_rank", hidden).values
    for layer in range(LAYERS):
        x = hidden[layer + 1].astype(np.float64)
        values = np.linalg.svd(x - x.mean(0), compute_uv=False)
        share = values / values.sum()
        expected = np.exp(-(share * np.log(share)).sum())
        np.testing.assert_allclose(ranks[layer], expected, rtol=1e-5)


def test_influence_keeps_its_digits_where_little_turns():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 50, 4096))
    both = np.concatenate([x, x + 1e-3 * rng.standard_normal(x.shape)]).astype(np.float32)
    np.testing.assert_allclose(influence(both[0], both[1]), 1 - cosines(both)[0], rtol=1e-3)


def test_influence_is_a_mean_over_all_tokens():
    """Prompts of 1, 3 and 6 tokens, whose sums are given; deletions leave out a prompt with all its tokens."""
    summed, tokens = np.array([[0.1], [0.9], [1.2]]), np.array([1, 3, 6])
    found = block_influence({"turned": summed, "tokens": tokens[:, None]})
    np.testing.assert_allclose(found.values, 2.2 / 10)
    np.testing.assert_allclose(found.without_each[:, 0], [2.1 / 9, 1.3 / 7, 1.0 / 4])


def test_planted_states():
    """The table of docs/criteria.md: who sees what at the planted block."""
    found = {}
    for name, plant in PLANTS.items():
        hidden = chain(plant)
        found[name] = {
            "angle": measured("angular_distance", hidden).values,
            "influence": measured("block_influence", hidden).values,
            "rank": measured("effective_rank", hidden).values,
            "step": step(cka(hidden[1:], bias="debiased"))[0],
        }
    flat = found["none"]
    for name in ("angle", "influence"):
        others = np.delete(flat[name], PLANT)
        assert flat[name][PLANT] < others.max() * 1.2
        for seen in ("rotation", "direction"):
            assert found[seen][name].argmax() == PLANT and found[seen][name][PLANT] > 5 * others.max()
        np.testing.assert_allclose(found["scale"][name][PLANT], flat[name][PLANT], rtol=1e-4)  # blind to scale
        assert found["outlier"][name][PLANT] < 5 * found["outlier"][name].min() + 0.03  # one sample is one vote
    np.testing.assert_allclose(found["rotation"]["rank"], flat["rank"], rtol=0.01)  # blind to rotation
    np.testing.assert_allclose(found["scale"]["rank"][PLANT:], flat["rank"][PLANT:], rtol=0.05)
    assert found["direction"]["rank"][PLANT] < 0.95 * flat["rank"][PLANT]
    assert found["outlier"]["rank"][PLANT] < 0.7 * flat["rank"][PLANT]  # a false alarm
    # What δ's relative sees and does not: CKA is blind to the rotation, and one outlier is a false alarm.
    assert abs(found["rotation"]["step"][PLANT] - flat["step"][PLANT]) < 0.02
    assert np.nanargmin(found["direction"]["step"]) == PLANT and np.nanargmin(found["outlier"]["step"]) == PLANT


def spectra_of(layers):
    """`Spectra` of ``[L]`` dicts of matrices, in float64."""
    names = layers[0].keys()
    return Spectra(
        {name: layers[0][name].shape for name in names},
        {name: np.stack([np.linalg.svd(one[name], compute_uv=False) for one in layers]) for name in names},
    )


def random_layers(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (64, 48), "down": (48, 96)}
    return [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(LAYERS)]


def published_snr(matrix):
    """As Spectrum's code has it, one matrix at a time."""
    values = np.linalg.svd(matrix, compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    threshold = sigma * (1 + np.sqrt(min(matrix.shape) / max(matrix.shape)))
    return values[values > threshold].sum() / values[values <= threshold].sum() / values.max()


def test_weight_criteria_equal_their_formulas():
    layers = random_layers()
    for layer in layers:  # so that something is below the threshold
        layer["q"] *= np.geomspace(1, 1e-3, 48)
        layer["down"] *= np.geomspace(1, 1e-3, 48)[:, None]
    for score, of in (
        (weight_snr, published_snr),
        (stable_rank, lambda w: np.linalg.norm(w) ** 2 / np.linalg.norm(w, 2) ** 2),
    ):
        kinds = [np.array([of(layer[name]) for layer in layers]) for name in ("q", "down")]
        expected = np.mean([kind / kind.mean() for kind in kinds], axis=0)
        np.testing.assert_allclose(score(spectra_of(layers)).values, expected, rtol=1e-5)


def test_planted_weights():
    """One strong direction in a layer: stable rank falls, and so does SNR as published; scale moves SNR alone."""
    spread = np.geomspace(1, 1e-3, 48)
    layers = [{"q": layer["q"] * spread} for layer in random_layers()]
    strong = [dict(layer) for layer in layers]
    rng = np.random.default_rng(1)
    strong[PLANT]["q"] = strong[PLANT]["q"] + 3 * np.outer(rng.standard_normal(64), rng.standard_normal(48) / 7)
    turned = [dict(layer) for layer in layers]
    turned[PLANT]["q"] = np.linalg.qr(rng.standard_normal((64, 64)))[0] @ turned[PLANT]["q"]
    larger = [dict(layer) for layer in layers]
    larger[PLANT]["q"] = 2 * larger[PLANT]["q"]
    plain, with_strong, with_turned, with_larger = (spectra_of(one) for one in (layers, strong, turned, larger))
    for score in (weight_snr, stable_rank):
        assert score(with_strong).values.argmin() == PLANT
        np.testing.assert_allclose(score(with_turned).values, score(plain).values, rtol=1e-9)
    np.testing.assert_allclose(stable_rank(with_larger).values, stable_rank(plain).values, rtol=1e-9)
    halved = weight_snr(with_larger).values / weight_snr(plain).values
    np.testing.assert_allclose(halved[PLANT] / np.delete(halved, PLANT), 0.5, rtol=1e-9)


def test_nothing_below_the_threshold_is_no_snr():
    """Equal singular values leave no noise: the layer is invalid, and others keep theirs."""
    values = np.stack([np.linspace(2, 0.01, 8), np.ones(8)])
    found = weight_snr(Spectra({"q": (8, 8)}, {"q": values}))
    made = criterion("weight_snr").scores("weight_snr", found, {})
    assert made.valid.tolist() == [True, False] and np.isfinite(made.values[0])


def test_gradient_criteria_equal_their_formulas():
    rng = np.random.default_rng(0)
    total, weights, samples = rng.random(4), rng.random(4) + 1, rng.random((5, 4))
    given = Gradients(total, weights, np.full(4, 10), samples)
    np.testing.assert_allclose(gradient_norm(given).values, total)
    np.testing.assert_allclose(rgn(given).values, total / weights)
    found = fisher(given)
    np.testing.assert_allclose(found.values, samples.mean(0) / 10)
    np.testing.assert_allclose(found.without_each[2], np.delete(samples, 2, axis=0).mean(0) / 10)
    np.testing.assert_allclose(weight_change(WeightChanges(total, weights)).values, total / weights)
    assert mean_over(samples[:1]).without_each is None


def test_keys():
    everything = parse_criteria("", two_models=True)
    named_only = {key: one for key, one in scorable().items() if one.needs == "perturbed"}
    assert len(named_only) == 3 and {**everything, **named_only} == scorable()
    assert not everything.keys() & named_only.keys()
    assert "weight_change" not in parse_criteria("", two_models=False)
    chosen = parse_criteria("rgn, fisher,rgn", two_models=False)
    assert list(chosen) == ["rgn", "fisher"] and chosen["rgn"] is criterion("rgn")
    needs = {one.needs for one in parse_criteria("rgn,fisher,stable_rank", two_models=False).values()}
    assert needs == {"backward", "weights"}
    for text, message in (
        ("fishr", "expected some of weight_snr, .*did you mean 'fisher'"),
        ("fishr", "; delta, delta_debiased, step, step_debiased by jaxcrit analyze; substitution by jaxcrit subst"),
        ("fishr", "; ablation_skip, ablation_mean, ablation_skip_greedy, .* by jaxcrit ablate"),
        ("step", "computed by jaxcrit analyze, from prompts alone"),
        ("substitution", "computed by jaxcrit substitute; see jaxcrit substitute --help"),
        ("ablation_skip", "computed by jaxcrit ablate; see"),
        ("substitutoin", "did you mean 'substitution'"),
        ("weight_change", "give --base=DIR too"),
    ):
        with pytest.raises(UserError, match=message):
            parse_criteria(text, two_models=False)


def test_every_file_is_a_criterion_and_says_what_it_sees():
    """One file holds a criterion with all that it says of itself, and nothing else lives there."""
    folder = Path(registry.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "registry"}
    assert files == set(FILES.values())
    for file in files:
        rows = importlib.import_module(f"jaxcrit.criteria.{file}").CRITERIA
        assert list(rows) == [key for key, name in FILES.items() if name == file]
        own = any(one.options for one in rows.values())
        assert own == (file in registry.WITH_OPTIONS), f"{file}: its word ends in + if, and only if, it has options"
    for key in FILES:
        one = criterion(key)
        assert all((one.formula, one.responds, one.blind))
        assert not one.command or one.command in COMMANDS
        assert (one.tap is not None) == (one.needs in ("forward", "perturbed") and not one.command)


def test_the_table_in_the_docs_is_current(tmp_path, capsys):
    docs = Path(registry.__file__).parents[2] / "docs" / "criteria.md"
    text = docs.read_text()
    assert updated(text) == text, "run python -m jaxcrit.criteria docs/criteria.md"
    old = tmp_path / "criteria.md"
    old.write_text(text.replace("collapse; one dominating direction", "something else"))
    assert print_table([str(old)]) == 0 and old.read_text() == text
    assert print_table([]) == 0 and capsys.readouterr().out.strip() in text
    old.write_text("no marks")
    assert print_table([str(old)]) == 2 and "between which the table of criteria belongs" in capsys.readouterr().err
