"""Runs cases of the property suite by seed, more than the test suite has time for.

    python tests/property_cases.py --cases 20000 --seed 0

Stops at the first wrong byte and names its seed. The last lines say what the cases were like.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from support.property_case import check_topology, features
from support.topology import random_topology


def main() -> None:
    parser = argparse.ArgumentParser(description="Run cases of the property suite by seed.")
    parser.add_argument("--cases", type=int, default=20_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first; the next are adjacent")
    arguments = parser.parse_args()
    started, counts = time.monotonic(), Counter[str]()
    for number, seed in enumerate(range(arguments.seed, arguments.seed + arguments.cases), 1):
        topology = random_topology(seed)
        counts.update(features(topology))
        check_topology(topology, seed)
        if number % 1000 == 0 or number == arguments.cases:
            seconds = time.monotonic() - started
            print(f"{number} cases from seed {arguments.seed}, {seconds:.0f} s", flush=True)
    for name, count in sorted(counts.items()):
        print(f"  {count:6} with {name}")


if __name__ == "__main__":
    main()
