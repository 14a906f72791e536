"""A folder for the Unix sockets of one engine that goes with the process that made it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from .link import LinkError

# sockaddr_un holds 108 bytes with the closing zero; names inside the folder take at most 20.
LONGEST_FOLDER = 87

# Reads until the pipe's other end is closed, which the kernel does when its process dies.
_REMOVE_AFTER = 'read -r _; rm -rf -- "$0"'


class SocketFolder:
    """A new folder that only this user may enter (mode 0700). `close` removes it.

    If this process is killed first, a shell that waits for its end removes it: the shards cannot, for Ray kills them
    too, and may be quicker.
    """

    def __init__(self) -> None:
        """Below the system's temporary folder (TMPDIR). Raises LinkError if that path is too long."""
        self.path = tempfile.mkdtemp(prefix="flyray-")
        if len(os.fsencode(self.path)) > LONGEST_FOLDER:
            os.rmdir(self.path)
            raise LinkError(
                f"{self.path}: too long for Unix sockets, at most {LONGEST_FOLDER} bytes; set TMPDIR to a shorter path"
            )
        # In a session of its own, so that Ctrl-C in a terminal does not end it before us.
        self._remover = subprocess.Popen(
            ["/bin/sh", "-c", _REMOVE_AFTER, self.path], stdin=subprocess.PIPE, cwd="/", start_new_session=True
        )

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the folder and all in it. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._remover.kill()
        self._remover.communicate()
