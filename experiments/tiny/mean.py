"""Mean of two models of `whole.py`, one of which was trained on from the other: base and adapters, weight by weight.

    python experiments/tiny/mean.py RUN_A RUN_B SHARE_OF_B OUT

It writes OUT/adapters.safetensors and OUT/base, which the file names as its base.
"""

import sys
from pathlib import Path

from morsr.adapters import read_adapters_header, save_adapters
from morsr.models.loading import load_generator

if __name__ == "__main__":
    first, second, out = map(Path, (sys.argv[1], sys.argv[2], sys.argv[4]))
    mean, other = (load_generator(run / "adapters.safetensors", base=run / "base") for run in (first, second))
    for one, theirs in zip(mean.state_dict().values(), other.state_dict().values(), strict=True):
        if one.is_floating_point():
            one.lerp_(theirs, float(sys.argv[3]))
    base, file = mean.base, "adapters.safetensors"
    base.save(out / "base")
    extra = read_adapters_header(first / file)["extra"] | {"base": str(out / "base")}
    save_adapters(out / file, base, base_id=base.base_id, extra=extra, attached=base.prompts)
