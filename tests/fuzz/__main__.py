"""Try mutants of every kind of file: each must load and work, or be refused in one line, soon and in little memory.

    PYTHONPATH=tests python -m fuzz --seed 1 --count 20000

Prints how many were taken and refused, by kind, and every fault with its number; ends with status 1 if there is any.
`--only NUMBER` tries one again and prints its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fuzz.run import Report, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the mutants; by default another each time"
    )
    parser.add_argument("--count", type=int, default=20_000, help="of mutants")
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutant")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that try them; one a core")
    parser.add_argument("--only", type=int, help="one mutant, by its number")
    parser.add_argument("--log", type=Path, help="write a JSON line for every mutant to this file")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    first, count = (options.first, options.count) if options.only is None else (options.only, 1)
    report = Report()
    log = options.log.open("a", encoding="utf-8") if options.log is not None else None
    try:
        for result in run(options.seed, range(first, first + count), min(count, options.processes)):
            report.add(result)
            if log is not None:
                print(json.dumps(result), file=log, flush=True)
            if result[4] not in ("taken", "refused"):
                shown = " | ".join([*result[1:5], result[5].partition("\n")[0][:200]])
                print(f"FAULT {result[0]}: {shown}", flush=True)
            if options.only is not None:
                print(*result[1:], sep="\n")
    except KeyboardInterrupt:
        print("stopped")
    print(report)
    return int(bool(report.faults))


if __name__ == "__main__":
    sys.exit(main())
