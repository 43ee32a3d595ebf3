"""`latro demo` on five bases, made from five seeds by the script that made the shipped one.

python -m bench.demo_bases --save            # about twelve minutes on two cores
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from latro.demo import base
from latro.demo.run import run
from latro.launch import versions

SEEDS = range(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="a folder below bench/results")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in SEEDS:
            folder = Path(scratch, str(seed))
            base.main(["--seed", str(seed), "--out", str(folder / "base")])
            found[seed] = run(folder / "run", seed=seed, base=folder / "base")
    print(f"\n{'seed':<6}{'before':<10}{'SFT':<10}{'after':<10}gain, 95 % interval")
    for seed, one in found.items():
        shares = "".join(f"{one[name]['accuracy']:<10.1%}" for name in ("before", "sft_answers", "after"))
        gain = one["gain"]
        print(f"{seed:<6}{shares}{gain['difference']:+.1%} ({gain['low']:+.1%} to {gain['high']:+.1%})")
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        record = {"command": "python -m bench.demo_bases", "versions": versions(), "seeds": found}
        (options.save / "demo_bases.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
