import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from harness import nvml

UUIDS = ["aaaa-0", "bbbb-1"]  # in NVML's order


@pytest.fixture
def fake(monkeypatch):
    """A machine of two GPUs of which CUDA sees the second one only, as its device 0."""
    module = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def handle_by_uuid(uuid):
        if uuid.removeprefix("GPU-") not in UUIDS:
            raise NVMLError("not found")
        return UUIDS.index(uuid.removeprefix("GPU-"))

    module.NVMLError = NVMLError
    module.NVML_CLOCK_SM, module.NVML_TEMPERATURE_GPU = 1, 0
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = handle_by_uuid
    module.nvmlDeviceGetClockInfo = lambda handle, kind: [1000, 1980][handle] if kind == 1 else -1
    module.nvmlDeviceGetPowerUsage = lambda handle: [100_000, 650_500][handle]
    module.nvmlDeviceGetTemperature = lambda handle, sensor: [30, 61][handle]
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: [1, 12345][handle]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUIDS[1])
    )
    module.nvmlSystemGetDriverVersion = lambda: "580.95.05"
    for cached in (nvml._nvml, nvml._open):
        cached.cache_clear()
    yield module
    for cached in (nvml._nvml, nvml._open):
        cached.cache_clear()


def test_readings_are_those_of_the_device_that_cuda_sees(fake):
    assert nvml.read() == nvml.Reading(1980, 650.5, 61, "none")
    assert nvml.read(0) == nvml.read()
    assert nvml.energy_mj() == 12345


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0x1, "none"),  # idle
        (0x2, "none"),  # clocks somebody set
        (0x4, "sw_power_cap"),
        (0x48 | 0x1, "hw_slowdown+hw_thermal"),
        (0x20, "sw_thermal"),
        (0x90, "sync_boost+hw_power_brake"),
    ],
)
def test_reasons_that_slow_a_run_are_named(fake, bits, names):
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: bits
    assert nvml.read().throttle == names


def test_what_a_device_does_not_tell_is_none(fake):
    def refuse(*_):
        raise fake.NVMLError("not supported")

    fake.nvmlDeviceGetPowerUsage = fake.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert nvml.read() == nvml.Reading(1980, None, 61, "none")
    assert nvml.energy_mj() is None


NOTHING = nvml.Reading(None, None, None, None)


def test_without_a_driver_there_are_no_readings(fake):
    def refuse():
        raise fake.NVMLError("driver not loaded")

    fake.nvmlInit = refuse
    assert nvml.read() == NOTHING
    assert nvml.energy_mj() is nvml.driver_version() is None


def test_a_device_that_nvml_does_not_know_has_no_readings(fake, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="cccc-2")
    )
    assert nvml.read() == NOTHING


def test_without_the_package_there_are_no_readings(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    assert nvml.read() == NOTHING
    assert nvml.energy_mj() is nvml.driver_version() is None


def test_without_a_gpu_for_pytorch_there_are_no_readings_but_a_driver(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvml.read() == NOTHING
    assert nvml.driver_version() == "580.95.05"
