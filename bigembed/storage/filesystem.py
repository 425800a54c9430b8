"""Which filesystem a table lies on: over a network, locks and syncs may not keep what they promise."""

import os
import warnings

MOUNTS = "/proc/self/mountinfo"
REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "gpfs", "fuse.sshfs"}


def warn_if_remote(path: str) -> None:
    """Warn where the table's folder is on a network filesystem; says nothing where the system does not tell."""
    kind = filesystem_of(path)
    if kind in REMOTE:
        warnings.warn(
            f"{path} is on a network filesystem ({kind}): its locks may not keep a second writer out, and a crash may "
            "lose commits. Use a local disk, or make sure that only this process writes.",
            stacklevel=4,
        )


def filesystem_of(path: str) -> str:
    """The type of the filesystem that holds a path, such as "ext4"; "" where it cannot be told."""
    try:
        with open(MOUNTS) as file:
            lines = [line.split() for line in file]
    except OSError:
        return ""
    where = os.path.realpath(path)
    holding = [
        (len(fields[4]), fields[fields.index("-") + 1])
        for fields in lines
        if where == fields[4] or where.startswith(fields[4].rstrip("/") + "/")
    ]
    return max(holding)[1] if holding else ""
