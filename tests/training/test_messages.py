"""Errors of the config are one short line: the key, what was expected, what came."""

from __future__ import annotations

import pytest

from morsr.training.messages import short_message

UNION = (
    "Parser key \"model\":\n  Does not validate against any of the Union subtypes\n  Subtypes: [<class 'x.Module'>, "
    "<class 'NoneType'>]\n  Errors:\n    - Problem with given class_path 'morsr.MoRConfig':\n        {}\n"
    "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: y"
)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ("Option 'topk' is not accepted", ["model.topk", "did you mean top_k?"]),
        ("Parser key \"lr\": Expected a <class 'float'>. Got value: abc", ["model.lr", "expected float", "got abc"]),
        (
            "Parser key \"schedule\": Expected a typing.Literal['constant', 'cosine']. Got value: cosin",
            ["model.schedule", "one of constant, cosine", "got cosin"],
        ),
        (
            "Parser key \"train\": Expected a <class 'collections.abc.Sequence'>. Got value: photos",
            ["model.train", "expected list", "got photos"],
        ),
        ("No module named 'mine'", ["model", "mine", "neither installed nor in"]),
        ("something else " * 40, ["…"]),
    ],
)
def test_the_innermost_problem_is_told(inner: str, words: list[str]) -> None:
    message = short_message(ValueError(UNION.format(inner)))
    assert len(message) <= 160 or "neither" in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert "Union" not in message or "…" in message
