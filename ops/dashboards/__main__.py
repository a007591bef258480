"""``python -m ops.dashboards [--check]``."""

from __future__ import annotations

import sys

from ops.dashboards import stale, write

if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {', '.join(stale())}; run `python -m ops.dashboards`" if stale() else 0)
    for path in write():
        print(path)
