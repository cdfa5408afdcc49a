#!/usr/bin/env bash
# torch 2.14.1: torch.save to a path that cannot hold the file raises RuntimeError ("unexpected pos ..."), no OSError, and names neither the
# file nor the reason.
#
# A good guess: a full disk, or a quota, is an OSError with an errno, as for any write of Python, so that "except OSError" around
# torch.save keeps a training alive or says what happened. The zip writer below checks its position instead, and what
# it raises says nothing of a disk. Given an open file instead of a path, the same call raises OSError at some sizes and RuntimeError at others:
# whichever of the two notices first. Here the limit is one that a process sets itself (RLIMIT_FSIZE), as a quota would.
#
# Output seen (2026-11-28, Linux x86-64), 40,000 bytes of weights:
#   at most 10000 bytes, path: RuntimeError, no OSError: ... unexpected pos
#   at most 10000 bytes, open file: RuntimeError, no OSError: ... unexpected pos
#   at most 39000 bytes, path: RuntimeError, no OSError: ... unexpected pos
#   at most 39000 bytes, open file: OSError: [Errno 27] File too large
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - "$folder" <<'END' 2>/dev/null
import resource
import signal
import sys
from contextlib import nullcontext

import torch

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = f"{sys.argv[1]}/weights.pt"


def said(size, opened):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        with open(path, "wb") if opened else nullcontext(path) as where:
            torch.save({"weight": torch.zeros(100, 100)}, where)
        found = "saved"
    except OSError as error:
        found = f"OSError: {error}"
    except RuntimeError as error:
        found = f"RuntimeError, no OSError: ... {str(error).partition('] . ')[2].partition(' vs ')[0].rstrip(' 0123456789')}"
    print(f"at most {size} bytes, {'open file' if opened else 'path'}: {found}")
    return found


assert "RuntimeError" in said(10_000, False)
assert "RuntimeError" in said(10_000, True)
assert "RuntimeError" in said(39_000, False)
assert "OSError: [Errno 27]" in said(39_000, True)
END
