"""The machine: its name, how fast it moves bytes, how much memory a piece of work takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable

import torch

MIB = 1 << 20


def hardware_name(device: torch.device | str) -> str:
    """What the measurement ran on: the GPU's name, or the CPU's and the number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # no /proc on this system: the architecture has to do
    return f"{name} ({os.cpu_count()} cores)"


def copy_bandwidth_bytes_per_s(device: torch.device | str, *, n_mib: int = 512, repeats: int = 7) -> float:
    """Bytes that a plain copy reads and writes in a second, with torch's threads: the median of some copies.

    Args:
        n_mib: size of what is copied; far more than the caches hold.
    """
    device = torch.device(device)
    source = torch.ones(n_mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(1 + repeats):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n_mib * MIB / statistics.median(seconds[1:])  # the first touches the pages


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory of what runs inside the `with` block: a model's weights, and the growth beside them.

    The growth is that of what the allocator has handed out: on CUDA torch's, on a CPU glibc's, sampled each 2 ms, or
    elsewhere the process's resident memory. What an allocator keeps of freed memory is not in it.
    """

    SAMPLE_S = 0.002

    def __init__(self, model):
        self.device, self.peak_mib = model.device, 0.0
        tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._bytes_in_use = _allocated_bytes() or _resident_bytes
        self._before = self._peak = self._bytes_in_use()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(self.SAMPLE_S):
            self._peak = max(self._peak, self._bytes_in_use())

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._weight_bytes + self._peak - self._before) / MIB


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `uordblks` counts the main thread's heap, `hblkhd` all blocks of their own."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _allocated_bytes() -> Callable[[], int] | None:
    """Tells the bytes that malloc has handed out, where glibc has it (from 2.33)."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None) if os.name == "posix" else None
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallocInfo

    def count() -> int:
        info = mallinfo2()
        return info.uordblks + info.hblkhd

    return count


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
