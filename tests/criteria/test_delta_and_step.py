import numpy as np
import pytest

from jaxcrit.core.errors import UserError
from jaxcrit.criteria.delta import delta
from jaxcrit.criteria.step import step

MATRIX = np.array(
    [
        [1.0, 0.9, 0.8, 0.5, 0.4],
        [0.9, 1.0, 0.9, 0.6, 0.5],
        [0.8, 0.9, 1.0, 0.7, 0.6],
        [0.5, 0.6, 0.7, 1.0, 0.9],
        [0.4, 0.5, 0.6, 0.9, 1.0],
    ]
)


def test_delta_by_hand():
    values, valid = delta(MATRIX, 3)
    np.testing.assert_array_equal(valid, [False, True, True, True, False])
    np.testing.assert_allclose(values[1:4], [2.8 / 3, 2.6 / 3, 2.6 / 3])
    assert np.isnan(values[[0, 4]]).all()


def test_delta_without_itself():
    values, _ = delta(MATRIX, 3, include_self=False)
    np.testing.assert_allclose(values[1:4], [0.9, 0.8, 0.8])


def test_clipped_edges_are_the_mean_of_what_exists():
    values, valid = delta(MATRIX, 5, edges="clip")
    assert valid.all()
    np.testing.assert_allclose(values, [2.7 / 3, 3.4 / 4, 4.0 / 5, 3.2 / 4, 2.5 / 3])


@pytest.mark.parametrize("window", [1, 4, 7])
def test_windows_that_do_not_fit(window):
    with pytest.raises(UserError, match=rf"window={window}: expected an odd number from 3 to the 5 layers"):
        delta(MATRIX, window)


def test_step_names_the_block_between():
    values, valid = step(MATRIX)
    np.testing.assert_array_equal(valid, [False, True, True, True, True])
    np.testing.assert_array_equal(values[1:], [0.9, 0.9, 0.7, 0.9])


def test_leading_axes():
    stack = np.stack([MATRIX, MATRIX**2])
    np.testing.assert_array_equal(delta(stack, 3)[0][1], delta(MATRIX**2, 3)[0])
    np.testing.assert_array_equal(step(stack)[0][1], step(MATRIX**2)[0])
