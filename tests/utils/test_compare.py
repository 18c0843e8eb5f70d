"""How two JSON values differ."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_cpt.utils.compare import describe_difference


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 3]}, "b[1] is 2 there and 3 now"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is None there and 2 now"),
        ({"a": 1, "b": 2}, {"a": 1}, "b is 2 there and None now"),
        ({"a": [1]}, {"a": [1, 2]}, "a: found 1, expected 2"),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, "a.b is 'x' there and 'y' now"),
        ({"a": [1]}, {"a": "x"}, "a is [1] there and 'x' now"),
    ],
)
def test_the_first_difference_is_named(old: Any, new: Any, message: str) -> None:
    assert describe_difference(json.loads(json.dumps(old)), new) == message
