"""How much memory this process may still take."""

from __future__ import annotations

import os

__all__ = ["available_bytes", "size_text"]


def available_bytes() -> int:
    """The smaller of what the kernel thinks is available and what the control group leaves."""
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":", 1) for line in f)
    have = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, usage in _group_limits():
        have = min(have, max(limit - usage, 0))
    return have


def _group_limits():
    """(limit, usage) of this process's control groups, version 2, from its own up."""
    try:
        with open("/proc/self/cgroup") as f:
            path = next(line[3:].strip() for line in f if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    while True:
        folder = "/sys/fs/cgroup" + path.rstrip("/")
        try:
            with open(folder + "/memory.max") as f:
                limit = f.read().strip()
            with open(folder + "/memory.current") as f:
                usage = int(f.read())
            with open(folder + "/memory.stat") as f:
                # Pages of files can be given back.
                usage -= sum(int(v) for k, v in map(str.split, f) if k == "inactive_file")
            if limit != "max":
                yield int(limit), usage
        except OSError:
            pass
        if path in ("", "/"):
            return
        path = os.path.dirname(path)


def size_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
