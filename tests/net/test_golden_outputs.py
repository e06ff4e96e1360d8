"""The shipped model restores six small images as it did when `golden_outputs.npz` was written."""

import numpy as np
import pytest
from golden_outputs import FILE, MODELS, machine, outputs


@pytest.mark.parametrize("model", MODELS)
def test_output_unchanged(model):
    with np.load(FILE, allow_pickle=False) as golden:
        tolerance = 1e-5 if str(golden["machine"]) == machine() else 1e-4
        images = {name.removeprefix("input/"): golden[name] for name in golden.files if name.startswith("input/")}
        expected = {name: golden[name] for name in golden.files if name.startswith(f"{model}/")}
    found = outputs(model, images)
    assert len(images) == 6
    assert found.keys() == expected.keys()
    worst = {name: float(np.abs(found[name] - expected[name]).max()) for name in expected}
    assert max(worst.values()) <= tolerance, worst
