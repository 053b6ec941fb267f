"""Killing a run for real: in a forked child, by SIGKILL, at a chosen moment; and comparing what two runs left."""

import json
import os
import signal
import traceback

from allo_mini import checkpoint, disk, files, template

TIMES = {"time", "tokens/s", "mem/peak_gb", "seconds"}  # what two equal runs may differ in


def in_child(action, before=lambda: None) -> int:
    """Run `action()` -> exit code in a forked child after `before()`; returns the code, -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            template.WORKERS.clear()  # the parent's
            before()
            os._exit(action())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner, name: str, act):
    """Replace owner.name: `act(original, args)` is called instead of it."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kw: act(lambda: original(*args, **kw), args))


def at_write(number: int, torn: bool):
    """Die at the `number`-th event of writing (writing, syncing, renaming, deleting): before it, or half-way."""
    left = [number]

    def event(halfway):
        def act(original, args):
            left[0] -= 1
            if left[0] == 0:
                if torn:
                    halfway(original, args)
                die()
            return original()
        return act

    def half_bytes(original, args):
        with open(args[0], "wb") as f:
            f.write(args[1][:len(args[1]) // 2])

    def half_file(original, args):
        original()
        os.truncate(args[1], os.path.getsize(args[1]) // 2)

    def half_tail(original, args):  # of a file that grows; what was there before stays
        if os.path.isfile(name := os.readlink(f"/proc/self/fd/{args[0]}")) and name.endswith("l"):
            with open(name, "rb") as f:
                whole = f.read()
            os.truncate(name, len(whole) - max(1, (len(whole) - whole.rfind(b"\n", 0, -1)) // 2) if whole else 0)

    after = lambda original, args: original()
    on_call(disk.Path, "write_bytes", event(half_bytes))
    on_call(disk.os, "fsync", event(half_tail))
    on_call(disk.os, "replace", event(after))
    on_call(disk.Path, "rename", event(after))
    on_call(disk.Path, "unlink", event(after))
    on_call(checkpoint, "save_file", event(half_file))
    on_call(files, "save_file", event(half_file))
    return left


def results_of(folder) -> dict:
    """Everything a run left, its times taken out: two equal runs give equal dicts."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name in (".lock", "report.html"):  # the report shows seconds
            continue
        found[name] = path.read_bytes()
        if name in ("mask.safetensors",
                    "patch.safetensors"):  # safetensors draws the order of their notes anew each time
            tensors, notes = files.load_tensors(path)
            found[name] = {n: t.tolist() for n, t in tensors.items()}, notes
        if name == "metrics.jsonl":
            rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in path.open()]
            found[name] = [row for row in rows if len(row) > 1]  # more than the stage's name
        if name == "results.json":
            found[name] = {k: v for k,
                           v in json.loads(found[name].decode().replace(str(folder), "")).items() if k not in TIMES}
    return found


def difference(a: dict, b: dict) -> list[str]:
    """Names of what differs between two results."""
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
