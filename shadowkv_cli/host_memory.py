"""What memory of the host is free: the machine's, or what its container may take."""

from __future__ import annotations

from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def proc_field(file: str, name: str) -> int:
    """A field of a /proc file in bytes; 0 where the system has none."""
    path = Path(file)
    if not path.exists():
        return 0
    for line in path.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cgroup_number(file: str) -> int | None:
    """A number of this process's control group (version 2); None for no limit or no such file."""
    path = CGROUP / file
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def _cgroup_used() -> int | None:
    """Bytes that this process's control group holds and cannot drop: its file cache left out."""
    used = _cgroup_number("memory.current")
    stat = CGROUP / "memory.stat"
    if used is None or not stat.is_file():
        return used
    lines = (line.split() for line in stat.read_text().splitlines())
    fields = {line[0]: int(line[1]) for line in lines if len(line) == 2}
    return max(used - fields.get("inactive_file", 0), 0)


def available_host_bytes() -> int:
    """Memory of the host that can be taken without swapping, or leaving the container's limit."""
    free = proc_field("/proc/meminfo", "MemAvailable")
    limit, used = _cgroup_number("memory.max"), _cgroup_used()
    if limit is not None and used is not None:
        free = min(free, limit - used)
    return free
