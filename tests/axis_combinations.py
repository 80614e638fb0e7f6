"""Proves every combination of tensor, pipeline and context parallelism on both sides.

    python tests/axis_combinations.py --receivers 4

Stops at the first that is wrong. Of a combination with more receivers than asked for, it looks at
so many of them, drawn by the combination; all senders take part in any case.
"""

from __future__ import annotations

import argparse
import time

from support.axes import all_combinations, check_combination


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove every combination of parallelism.")
    parser.add_argument("--receivers", type=int, default=4, help="of each combination at most")
    arguments = parser.parse_args()
    started, receivers = time.monotonic(), 0
    cases = list(all_combinations())
    for number, case in enumerate(cases, 1):
        receivers += check_combination(case, receivers=arguments.receivers)
        if number % 2000 == 0 or number == len(cases):
            seconds = time.monotonic() - started
            print(
                f"{number} of {len(cases)} combinations, {receivers} receivers, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
