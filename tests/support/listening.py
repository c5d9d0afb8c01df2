"""Who listens on which address, from /proc."""

from __future__ import annotations

from pathlib import Path

_LOOPBACK = {"tcp": "0100007F", "tcp6": "0000000000000000FFFF00000100007F"}


def sockets_of(word: str) -> tuple[int, list[tuple[str, str]]]:
    """Look at the listening sockets of processes whose command holds a word.

    Args:
        word: part of the command.

    Returns:
        How many there are, and (command, address) of those that are not on 127.0.0.1.
    """
    owners = _owners(word)
    seen, beyond = 0, []
    for table, address in _LOOPBACK.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in owners:
                seen += 1
                if fields[1].partition(":")[0] != address:
                    beyond.append((owners[fields[9]], fields[1]))
    return seen, beyond


def _owners(word: str) -> dict[str, str]:
    """Inode -> command of every socket of the processes whose command holds a word."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            links = [str(link.readlink()) for link in (folder / "fd").iterdir()]
        except OSError:
            continue
        if word in command:
            sockets = [link for link in links if link.startswith("socket:[")]
            found.update(dict.fromkeys((s[8:-1] for s in sockets), command[:60]))
    return found
