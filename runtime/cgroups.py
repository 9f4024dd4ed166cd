"""Control groups of Linux that this process is in: what limits a container sets."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's groups under a controller ("memory", "cpu"), innermost first.

    A limit holds for all groups below its own, so each way is followed up to the root. The list has
    the groups of version 2, where all controllers share a folder, and of version 1, which of the
    two are mounted. Inside a container the root may be all that is to be seen.
    """
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = ROOT
        elif controller in controllers.split(","):
            # "cpu,cpuacct" is mounted under that name, with a link for each of the two.
            root = ROOT / controller
        else:
            continue
        # What lies outside this process's view of the groups begins with "..": the root is left.
        here = root if ".." in Path(path).parts else root / path.lstrip("/")
        folders += [here, *here.parents][: len(here.parts) - len(root.parts) + 1]
    return folders
