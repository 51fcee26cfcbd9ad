"""Declared values: what fits, and for what does not a line that names the key, what was expected and what is there."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrit.core.errors import UserError
from jaxcrit.core.layers import ChosenLayers, ScoresFile
from jaxcrit.core.rundir import RunRecord
from jaxcrit.core.schema import ANY, Array, Count, Positive, Range, Size, conform, conform_arrays


class Needed(TypedDict):
    name: str
    sizes: list[Size]


class Row(Needed, total=False):
    more: dict[str, float | None]
    side: Literal["low", "high"]


FITS = [
    ({"name": "a", "sizes": []}, Row),
    ({"name": "a", "sizes": [1, 2], "more": {"x": None, "y": 1}, "side": "low", "unknown": object()}, Row),
    (3, float),
    (2**53, Count),
    (None, int | None),
    ([[1], []], list[list[int]]),
    ({"anything": [object()]}, dict[str, Any]),
]


@pytest.mark.parametrize(("value", "kind"), FITS)
def test_what_fits_is_given_back(value, kind):
    assert conform(value, kind, "file") is value


BAD = [
    (None, Row, "file: expected a JSON object, got None"),
    ({"sizes": []}, Row, "file: expected name to be text, got nothing"),
    ({"name": "a", "sizes": 3}, Row, "expected sizes to be a list, got 3"),
    ({"name": "a", "sizes": [1, 0]}, Row, "expected sizes[1] to be a positive whole number, got 0"),
    ({"name": "a", "sizes": [2**31]}, Row, "to be a whole number of at most 2,147,483,647, got 2147483648"),
    ({"name": "a", "sizes": [True]}, Row, "expected sizes[0] to be a positive whole number, got True"),
    ({"name": "a", "sizes": [1.0]}, Row, "expected sizes[0] to be a positive whole number, got 1.0"),
    ({"name": "a", "sizes": [], "more": {"x": "1"}}, Row, "expected more.x to be a number, got '1'"),
    ({"name": "a", "sizes": [], "side": "up"}, Row, "expected side to be low or high, got 'up'"),
    (math.nan, float, "expected a number, got nan"),
    (math.inf, Positive, "expected a positive number, got inf"),
    (10**400, float, "expected a number, got 1000"),
    (0.0, Positive, "expected a positive number, got 0.0"),
    (-1, Annotated[float, Range(0)], "expected a number of 0 or more, got -1"),
    ("x", int | list[int], "expected a whole number or a list, got 'x'"),
    ([1, "x"], int | list[int], "expected [1] to be a whole number, got 'x'"),
    ({"a": 1}, str | None, "expected text, got {'a': 1}"),
    (1, bool, "expected true or false, got 1"),
]


@pytest.mark.parametrize(("value", "kind", "message"), BAD)
def test_what_does_not_fit_is_one_line(value, kind, message):
    with pytest.raises(UserError) as caught:
        conform(value, kind, "file", "write it again")
    assert message in str(caught.value) and str(caught.value).endswith("; write it again")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["layers", "scores", "num_layers", "values", "valid", "data", "x"]), inner)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_any_value_fits_or_is_refused_in_a_line(value):
    for kind in (ScoresFile, ChosenLayers, RunRecord, Row, list[Size], int | list[int] | None):
        try:
            conform(value, kind, "file")
        except UserError as error:
            assert str(error).startswith("file: expected ") and "\n" not in str(error) and len(str(error)) < 500


HOLDS = {"values": Array("f", ("N", "L")), "ids": Array("U", ("N",)), "more": Array("iu", (2,), optional=True)}


def test_arrays_are_of_their_dtypes_and_sizes():
    values, ids = np.zeros((3, 4)), np.array(["a", "b", "c"])
    assert conform_arrays({"values": values, "ids": ids, "other": ids}, HOLDS, "file", sizes={"L": 4}) == {
        "N": 3,
        "L": 4,
    }
    for found, message in (
        ({"ids": ids}, "has no values"),
        ({"values": values, "ids": ids[:2]}, r"expected ids to be texts \[3\], got <U1 \[2\]"),
        ({"values": values[0], "ids": ids}, r"expected values to be floats \[N, 5\], got float64 \[4\]"),
        ({"values": values.astype(int), "ids": ids}, "expected values to be floats .*, got int64"),
        ({"values": values, "ids": np.array("a")}, r"got <U1 \[\]"),
    ):
        sizes = {"L": 5} if "values to be floats" in message and "5" in message else {}
        with pytest.raises(UserError, match=message):
            conform_arrays(found, HOLDS, "file", sizes=sizes)
    with pytest.raises(UserError, match=r"more to be whole numbers \[2\], got int64 \[3\]"):
        conform_arrays({"values": values, "ids": ids, "more": np.arange(3)}, HOLDS, "file")


def test_messages_are_short_whatever_is_there():
    deep: Any = []
    for _ in range(50):
        deep = [deep]
    for value in ("x" * 10**6, [0] * 10**6, {str(i): i for i in range(10**4)}, deep, 10**4000):
        with pytest.raises(UserError) as caught:
            conform({"a": value}, dict[str, bool], "file")
        assert len(str(caught.value)) < 300


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(UserError("a file\nof two lines\r")) == r"a file\nof two lines\r"


def test_an_axis_or_a_shape_may_be_left_open():
    keys = Array("f", (ANY, "F"))
    found = {"a": np.zeros((2, 4)), "b": np.zeros((5, 4)), "c": np.zeros((1, 1, 1))}
    assert conform_arrays(found, {"a": keys, "b": keys, "c": Array("f", None)}, "file") == {"F": 4}
    with pytest.raises(UserError, match=r"expected b to be floats \[5, 3\], got float64 \[5, 4\]"):
        conform_arrays(found, {"b": keys}, "file", sizes={"F": 3})
    with pytest.raises(UserError, match=r"expected c to be floats \[any, F\], got float64 \[1, 1, 1\]"):
        conform_arrays(found, {"c": keys}, "file")
    with pytest.raises(UserError, match="expected c to be whole numbers"):
        conform_arrays(found, {"c": Array("iu", None)}, "file")
