"""Clocks, power, temperature and energy of a GPU, read through NVML; None where it has no answer.

Nothing is ever set. NVML numbers devices by its own order and ignores CUDA_VISIBLE_DEVICES, so the
device is found by the UUID that CUDA reports. Needs nvidia-ml-py (extra "energy").
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Reasons for lower clocks that slow a run down (nvml.h, nvmlClocksEventReason*); an idle device
# and clocks that someone set are left out.
THROTTLE_REASONS = {
    0x04: "sw_power_cap",
    0x08: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
}
NOT_THROTTLED = "none"


class Reading(NamedTuple):
    """A device's state at one moment; None where NVML is missing or does not tell."""

    sm_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    throttle: str | None  # names from THROTTLE_REASONS joined by "+", or "none"


def read(device: int | None = None) -> Reading:
    """The state of CUDA device `device` (default: the current one) now."""
    milliwatts = _ask(device, lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle))
    reasons = _ask(
        device, lambda nvml, handle: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    )
    return Reading(
        sm_clock_mhz=_ask(
            device, lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        ),
        power_w=None if milliwatts is None else milliwatts / 1000,
        temperature_c=_ask(
            device,
            lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        ),
        throttle=None if reasons is None else _names(reasons),
    )


def energy_mj(device: int | None = None) -> int | None:
    """Millijoules that CUDA device `device` has used since its driver was loaded (Volta on)."""
    return _ask(device, lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


def driver_version() -> str | None:
    """Version of the NVIDIA driver, on a machine that PyTorch sees no GPU of as well."""
    if (nvml := _nvml()) is None:
        return None
    try:
        return nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return None


def _names(reasons: int) -> str:
    return "+".join(n for bit, n in THROTTLE_REASONS.items() if reasons & bit) or NOT_THROTTLED


def _ask(device: int | None, question: Callable[[Any, Any], Any]) -> Any:
    """`question(nvml, handle)`, or None where there is no NVML or it refuses."""
    if not torch.cuda.is_available():
        return None
    opened = _open(torch.cuda.current_device() if device is None else device)
    if opened is None:
        return None
    nvml, handle = opened
    try:
        return question(nvml, handle)
    except nvml.NVMLError:
        return None


@functools.cache
def _nvml() -> Any | None:
    """The module, initialised; None without it or without a driver."""
    try:
        import pynvml as nvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


@functools.cache
def _open(device: int) -> tuple[Any, Any] | None:
    """NVML and its handle for CUDA device `device`; a slice of a device (MIG) has none."""
    if (nvml := _nvml()) is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError:
        return None
