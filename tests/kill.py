"""Killing a run for real: in a forked child, by SIGKILL, at a chosen moment."""

import os
import re
import signal
import sys
import threading
import traceback

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its own is shared with forked children, and dies with them
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def in_child(action, before=lambda: None) -> int:
    """action() -> exit code in a forked child, after before(); the code, or -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            before()
            os._exit(action())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def press() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


class Watched:
    """Standard output that acts when what matches a pattern is about to be written."""

    def __init__(self, out, pattern: str, act):
        self.out, self.pattern, self.act, self.flush = out, pattern, act, out.flush

    def write(self, text: str) -> int:
        if re.search(self.pattern, text):
            self.act()
        return self.out.write(text)


def at_line(pattern: str, act=die):
    """For in_child: die (or act) just before a line is printed."""
    def before():
        sys.stdout = Watched(sys.stdout, pattern, act)
    return before


def at_write(folder, number: int, torn: bool = False):
    """For in_child: die at the `number`-th change of paths that begin so: open, rename, deletion.
    torn: with half of the file that is about to be renamed, or of the rows appended just before."""
    def tear(event, args, grown):
        if event == "os.rename" and os.path.isfile(args[0]):
            os.truncate(args[0], os.path.getsize(args[0]) // 2)
        for path, size in grown:
            os.truncate(path, (size + os.path.getsize(path) + 1) // 2)

    def before():
        left, grown = number, []

        def hook(event, args):
            nonlocal left
            opened = event == "open" and isinstance(args[2], int)
            writes = opened and args[2] & (os.O_WRONLY | os.O_RDWR)
            if not writes and event not in CHANGES or not str(args[0]).startswith(str(folder)):
                return
            left -= 1
            if left == 0:
                if torn:
                    tear(event, args, grown)
                die()
            grown.clear()
            if opened and args[2] & os.O_APPEND and os.path.isfile(args[0]):
                grown.append((args[0], os.path.getsize(args[0])))

        sys.addaudithook(hook)
    return before
