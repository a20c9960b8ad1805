"""Memory that a process may still take: of a GPU, or of the machine within its container's limit."""

from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(device: torch.device) -> int:
    """Memory this process may still take: of the GPU, or of the machine within its container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    machine = int(psutil.virtual_memory().available)
    container = container_free_bytes(CGROUP)
    return machine if container is None else min(machine, container)


def container_free_bytes(cgroup: Path) -> int | None:
    """What a container's limit leaves (Linux control groups, version 2); None where there is no limit.

    Cached files count as free, for the kernel drops them first.
    """
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(statistics.get("inactive_file", 0)))
