"""Whether a SQLite file lies on a network disk: its locks do not hold there, and a few writers spoil it."""

from __future__ import annotations

import os
from pathlib import Path

from clplat.databases import sqlite_file
from clplat.errors import ConfigError

NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "afs", "panfs", "pvfs2",
    "orangefs", "wekafs", "glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "ocfs2", "gfs2",
}  # fmt: skip
"""Kinds of file systems that several machines see."""
MOUNTS = Path("/proc/mounts")


def check_disk(key: str, uri: str) -> None:
    """Refuse a SQLite URI whose file several machines see; `key` is what names it in the configuration."""
    path = sqlite_file(uri)
    if path is not None and (kind := disk(path)) in NETWORK:
        raise ConfigError(
            f"{key}: {path} is a SQLite file on a network disk ({kind}), where its locks do not hold; name a server, "
            f"or a file on a disk of this machine: sqlite:////var/tmp/{path.name}"
        )


def disk(path: Path) -> str:
    """The kind of the file system that a path lies on, as /proc/mounts calls it; empty where there is none."""
    if not MOUNTS.is_file():
        return ""
    real, found = os.path.realpath(path), ("", "")
    for line in MOUNTS.read_text().splitlines():
        place, kind = line.split()[1:3]
        place = place.encode().decode("unicode_escape")  # a blank is \\040 there
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]
