"""Files and folders that are whole or not there, who works on a folder, logs, and what figures depend on.

Everything that the package keeps on disk is written through `replacing`, lines that are appended excepted. A disk that
takes no more, or a folder that nobody may write to, is one `OSError` in both, which names the file (`told`). One
process at a time holds a folder (`held`), told from all others.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

LOGGER = "obc_tools"
LONGEST_JSON, DEEPEST_JSON = 2**28, 100
"""Bytes of the longest JSON file that is read, and lists and mappings within each other."""
DIGEST = "digest"
"""Key of the SHA-256 of all else that a JSON file holds."""
LOCK, HOLDER = ".lock", ".holder.json"
"""The lock of a folder that is worked on, and who holds it."""
PROCESS = "process.json"
"""Names the process that a folder was handed to when that was started."""


def cache_folder() -> Path:
    """Return the folder of this user for what can be made again: $XDG_CACHE_HOME/obc_tools or ~/.cache/obc_tools."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "obc_tools")


@contextmanager
def logging_to(handler: logging.Handler) -> Iterator[None]:
    """Hand what the library logs, at level INFO and above, to a handler too, which is closed on the way out."""
    logger = logging.getLogger(LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with suppress(OSError):
            handler.close()


@contextmanager
def logging_to_file(path: Path) -> Iterator[None]:
    """Append what the library logs, with the time, to a file; lines that a full disk does not take are left out."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    with logging_to(handler):
        yield


LIBRARIES = ("obc_tools", "torch", "torchvision", "timm", "torch-pruning", "accelerate", "numpy")


def environment(device: Any) -> dict[str, Any]:
    """Return what the figures of a run on a torch device depend on beside its job: hardware and versions."""
    import torch  # not above: the command line's help needs this file and should come at once

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS}
"""What a system says where a file takes no more, whoever else's fault other errors may be."""


@contextmanager
def told(path: Path, safe: str) -> Iterator[None]:
    """Raise what keeps a file from being written, in whoever's words, as one OSError that names it and what is safe.

    Args:
        path: Of the file or folder that is written.
        safe: What is whole all the same.
    """
    try:
        yield
    except Exception as error:
        number = _refusal(error, path)
        if number is None:
            raise
        raise OSError(number, f"{os.strerror(number)}, it was not written; {safe}", str(path)) from error


def _refusal(error: BaseException | None, path: Path) -> int | None:
    """Return the number of the system's error that lies behind an error of writing a path; None for another error."""
    while error is not None:
        if isinstance(error, OSError):
            own = error.filename is not None and _is_written_for(Path(os.fsdecode(error.filename)), path)
            if error.errno in FULL or (own and error.errno in (errno.EACCES, errno.EPERM)):
                return error.errno
        # safetensors has an error of its own, with the number in its words.
        elif (found := re.search(r"\(os error (\d+)\)", str(error))) and int(found[1]) in FULL:
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def _is_written_for(found: Path, path: Path) -> bool:
    return found == path or (found.parent == path.parent and is_leftover(found) and _written(found) == path.name)


@contextmanager
def replacing(path: Path, *, synced: bool = True, begun: Path | None = None) -> Iterator[Path]:
    """Yield a name beside a path, under which to write a file or make a folder that then takes the path's place.

    It does so on success alone, and lies on the disk by then: the path holds the old content or the new, all of it,
    whenever the process dies or the machine stops. What a killed process leaves beside it, `is_leftover` tells. Only a
    folder that is replaced by another has no name for a moment: `put_back` mends a death in between.

    Args:
        path: Of the file or folder; folders to it are made.
        synced: Wait for the disk. Without it, only the process may die at any time, not the machine.
        begun: The name to yield, such as `begun_beside` says; what is made under it stays there after Ctrl-C.

    Raises:
        OSError: as `told` says, where the disk is full or nobody may write there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    put_back(path)
    mark = uuid.uuid4().hex
    new, old = begun or path.with_name(f".{path.name}.{mark}.new"), path.with_name(f".{path.name}.{mark}.old")
    with told(path, "what was there before is as it was" if path.exists() else "nothing was there before"):
        try:
            yield new
            if synced:
                _sync(new, *(new.rglob("*") if new.is_dir() else ()))
            _take_place(new, path, old)
            if synced:
                _sync(path.parent)
        except KeyboardInterrupt:
            if begun is None:
                _remove(new)
            raise
        except BaseException:
            _remove(new)
            raise
    _remove(old)


def begun_beside(path: Path) -> Path:
    """Return the name under which a folder is made that is gone on with, a leftover to all but who knows it."""
    return path.with_name(f".{path.name}.begun.new")


def is_leftover(path: Path) -> bool:
    """Say whether a path is what a process that was killed while it wrote has left, of this version or one before."""
    return re.fullmatch(r"\..+\.(new|old)", path.name) is not None


def entries(folder: Path) -> list[str]:
    """Return the names of what a folder holds, leftovers and its lock excepted; none where there is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in found if not is_leftover(path) and path.name not in (LOCK, HOLDER))


def remove_leftovers(folder: Path, of: str | None = None) -> None:
    """Remove what killed processes left in a folder, of the entry with a name or of all, that nobody else writes to.

    Not what has lost its name, which is given back.
    """
    for path in filter(is_leftover, list(folder.iterdir()) if folder.is_dir() else ()):
        name = _written(path)
        if of in (None, name):
            put_back(folder / name)
            _remove(path)


def put_back(path: Path) -> None:
    """Give a folder its name back where a process died between taking it away and giving it to a new one."""
    if path.exists() or not path.parent.is_dir():
        return
    for left in path.parent.iterdir():
        if left.name.endswith(".old") and is_leftover(left) and _written(left) == path.name:
            left.replace(path)
            return


def _written(leftover: Path) -> str:
    """Return the name of what a leftover was written for: `.NAME.MARK.new`."""
    return leftover.name[1:].rsplit(".", 2)[0]


def _take_place(new: Path, path: Path, old: Path) -> None:
    if path.is_dir() and not new.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a file was to be written, this is a folder", str(path))
    # A folder with something in it cannot be replaced in one step: it steps aside.
    if path.is_dir():
        path.replace(old)
    try:
        new.replace(path)
    except OSError:
        if old.exists():
            old.replace(path)
        raise


def _sync(*paths: Path) -> None:
    """Have files and folders written to the disk, where the system can be asked to."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, synced: bool = True) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path, synced=synced) as new:
        new.write_text(text, encoding="utf-8")


def write_json(
    path: Path, content: Any, *, synced: bool = True, checked: bool = False, allow_nan: bool = False
) -> None:
    """Write a JSON file, whole or not at all; ``checked``: with a digest, which `read_json` checks and takes out."""
    content = content | {DIGEST: _digest(content)} if checked else content
    write_text(path, json.dumps(content, indent=2, allow_nan=allow_nan) + "\n", synced=synced)


def check_length(path: Path, most: int) -> None:
    """Raise ValueError for a file that is longer than what is read into memory."""
    if (size := path.stat().st_size) > most:
        raise ValueError(f"'{path}' has {size:,} bytes; at most {most:,} are read")


def read_json(path: Path, *needed: str) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is none, has another's digest, or is no mapping that has all that is needed; the file is named.
    """
    check_length(path, LONGEST_JSON)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error
    if isinstance(content, dict) and content.pop(DIGEST, None) not in (None, _digest(content)):
        raise ValueError(f"'{path}' was changed after it was written")
    if missing := [key for key in needed if not isinstance(content, dict) or key not in content]:
        raise ValueError(f"'{path}' holds no {', '.join(missing)}")
    return content


def _digest(content: Any) -> str:
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parse_json(text: str) -> Any:
    """Return what JSON text holds; raise ValueError for text that is none or is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    level, depth = [content], 0
    while level:
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level, depth = list(itertools.chain.from_iterable(inner)), depth + 1
        if depth > DEEPEST_JSON:
            raise ValueError("JSON that is nested too deeply")
    return content


# Held on to, so that those that have ended can be asked for their status and vanish.
_CHILDREN: list[subprocess.Popen] = []


class FolderInUseError(ValueError):
    """A folder that somebody else works on."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be: nobody else can until the block or, however it ends, this process has ended.

    A folder that was made for it and in which nothing came to lie is gone afterwards.

    Raises:
        FolderInUseError: while another process, or another thread of this one, holds it.
    """
    put_back(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = _identity(folder / HOLDER)
        who = "" if holder is None else f" by process {holder['pid']} on '{holder['host']}'"
        raise FolderInUseError(f"'{folder}' is being worked on{who}: wait for it, or stop it") from None
    except (OSError, NotImplementedError) as error:
        if made and not entries(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise FolderInUseError(
            f"'{folder}' cannot be locked ({error}): nothing would keep a second process out; choose a folder on "
            "another file system"
        ) from error
    try:
        write_json(folder / HOLDER, process_identity(os.getpid()), synced=False)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        if made and not entries(folder):
            shutil.rmtree(folder, ignore_errors=True)
        if os.name == "posix":  # who waits for a file that is gone by then looks for another
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def keep_hold(folder: Path, new: Path) -> None:
    """Have what is about to take a held folder's place be held by the same lock; nothing without hard links."""
    for name in (LOCK, HOLDER):
        (new / name).unlink(missing_ok=True)
        with suppress(OSError):
            os.link(folder / name, new / name)


def _identity(path: Path) -> dict[str, Any] | None:
    """Return who is named in a file; None where there is none, any more, or where a holder's was never all there."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        if path.name == HOLDER:  # not synced: the machine stopped before it lay on the disk
            return None
        raise


def worker_of(folder: Path) -> dict[str, Any] | None:
    """Return the identity of who holds a folder or, else, of the process that it was handed to; None if of neither."""
    named = (_identity(folder / name) for name in (HOLDER, PROCESS))
    return next(filter(None, named), None)


def is_worked_on(folder: Path) -> bool:
    """Say whether the process that a folder names runs on this machine."""
    named = (_identity(folder / name) for name in (HOLDER, PROCESS))
    return any(map(is_alive, filter(None, named)))


def start(command: Sequence[str], output: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Start a command in a session of its own, what it prints appended to a file; return the process's identity."""
    with output.open("ab") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            start_new_session=True,
        )
    _CHILDREN.append(child)
    return process_identity(child.pid)


def process_identity(pid: int) -> dict[str, Any]:
    """Return what tells a process of this machine from all others, also from later ones of the same number."""
    return {"pid": pid, "created": psutil.Process(pid).create_time(), "host": platform.node()}


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Say whether the process of an identity runs on this machine."""
    _CHILDREN[:] = [child for child in _CHILDREN if child.poll() is None]
    if identity["host"] != platform.node():
        return False
    try:
        process = psutil.Process(identity["pid"])
        # Clocks that are set while a process runs move its time of creation a little.
        same = abs(process.create_time() - identity["created"]) < 2
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
