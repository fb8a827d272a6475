"""Describes the machine: its name, its memory bandwidth, and the peak memory of a piece of work."""

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
from transformers import PreTrainedModel

MIB = 1 << 20


def hardware_name(device: torch.device | str) -> str:
    """Returns what a measurement ran on: the GPU's name, or the CPU's name and number of cores."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # this system has no /proc, so the architecture serves as the name
    return f"{name} ({os.cpu_count()} cores)"


def copy_bandwidth_bytes_per_s(device: torch.device | str, *, n_mib: int = 512, repeats: int = 7) -> float:
    """Returns the bytes per second that a plain copy reads and writes with torch's threads: the median of some copies.

    Args:
        device: The device to copy on.
        n_mib: Size of the copied data, which must be far larger than the caches.
        repeats: Number of timed copies.
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
    return 2 * n_mib * MIB / statistics.median(seconds[1:])  # the first copy also maps the pages


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Measures the peak memory of what runs inside the `with` block: the model's weights plus the growth beyond them.

    The growth is that of allocated memory: torch's on CUDA, glibc's on a CPU, sampled every 2 ms. Without glibc the
    resident memory of the process is used. Freed memory that an allocator keeps is not counted.
    """

    SAMPLE_S = 0.002

    def __init__(self, model: PreTrainedModel):
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

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()
        self.peak_mib = (self._weight_bytes + self._peak - self._before) / MIB


class _MallocInfo(ctypes.Structure):
    """Mirrors glibc's struct mallinfo2; `uordblks` counts the main thread's heap, `hblkhd` the memory-mapped blocks."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _allocated_bytes() -> Callable[[], int] | None:
    """Returns a function that gives the bytes allocated by malloc, or None without glibc 2.33 or later."""
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
