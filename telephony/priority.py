"""Ask the kernel to run the media worker before everything else that is busy on the machine.

The worker uses little CPU but must be on time every 20 ms while the engine keeps every core busy. With the right
(CAP_SYS_NICE or an rtprio limit): SCHED_RR. Without it, on Linux 6.12 and later: a short time slice, which brings an
earlier deadline in the EEVDF scheduler and needs no privilege. Threads started later inherit it, so call it first.
"""

from __future__ import annotations

import ctypes
import os
import struct

_RT_PRIORITY = 10  # above ordinary work, below the kernel's own real-time threads (50)
_SLICE_NS = 100_000  # the shortest the kernel takes
_SYS_SCHED_SETATTR = 314  # x86-64
_SCHED_ATTR = struct.Struct("IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


def run_first() -> str:
    """What was granted: realtime | short_slice | normal."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_RT_PRIORITY))
        return "realtime"
    except OSError:
        pass  # not permitted: the usual case without privileges
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, _SLICE_NS, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    granted = libc.syscall(_SYS_SCHED_SETATTR, 0, attributes, 0) == 0
    return "short_slice" if granted and _has_slices() else "normal"


def _has_slices() -> bool:
    """Older kernels accept the number and ignore it."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(char for char in minor if char.isdigit()))) >= (6, 12)
