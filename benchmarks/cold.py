"""A fresh process up to its first picture, then it says "picture": `python -m factorportrait.benchmarks.cold REQUEST` (JSON)."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    request = json.loads(sys.argv[1])
    from factorportrait.benchmarks.cases import Case
    from factorportrait.benchmarks.peers import PEERS
    from factorportrait.config import config_from_dict

    case = config_from_dict(Case, request["case"], "case")
    PEERS[request["peer"]].open(case, Path(request["folder"])).first_picture()
    print("picture", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
