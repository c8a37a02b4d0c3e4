"""The simulated devices: what they lose, and how they fail."""

from __future__ import annotations

import random

import pytest

from rustord.errors import DeviceError
from rustord.testing.device import SECTOR_BYTES, Flush, MemoryDevice, Power, PowerCut, VolatileDevice, Write

MIB = 1 << 20
DATA = random.Random(5).randbytes(4096)


def read(device: MemoryDevice | VolatileDevice, offset: int, length: int = 4096) -> bytes:
    buffer = bytearray(length)
    device.read(offset, (buffer,))
    return bytes(buffer)


def test_memory_is_zero_until_it_is_written() -> None:
    device = MemoryDevice(MIB)
    assert read(device, 0) == bytes(4096)
    device.write(8192, (DATA[:1000], DATA[1000:]))
    assert read(device, 8192) == DATA
    assert read(device, 8000, 1000) == bytes(192) + DATA[:808]
    device.zero(8192, 1024)
    assert read(device, 8192) == bytes(1024) + DATA[1024:]
    assert len(device.sectors) == 6


def test_memory_ends_where_it_ends() -> None:
    device = MemoryDevice(MIB)
    for offset in (MIB - 512, MIB, -512):
        with pytest.raises(DeviceError):
            device.write(offset, (DATA,))
        with pytest.raises(DeviceError):
            read(device, offset)


def test_a_power_cut_loses_what_was_not_flushed_but_for_what_is_kept() -> None:
    memory = MemoryDevice(MIB)
    device = VolatileDevice(memory)
    device.write(0, (b"a" * 4096,))
    device.flush()
    device.write(0, (b"b" * 4096,))
    device.write(512, (b"c" * 512,))
    assert read(device, 0) == b"b" * 512 + b"c" * 512 + b"b" * 3072
    device.cut_power(lambda offset: offset in (512, 1024))
    assert read(memory, 0) == b"a" * 512 + b"c" * 512 + b"b" * 512 + b"a" * 2560


def test_a_failed_flush_is_reported_once_and_what_was_before_may_be_lost() -> None:
    memory = MemoryDevice(MIB)
    device = VolatileDevice(memory)
    device.write(0, (DATA,))
    device.fail_flushes = 1
    with pytest.raises(DeviceError):
        device.flush()
    with pytest.raises(DeviceError, match="takes no writes any more"):
        device.flush()
    device.strict = False
    device.flush()
    device.cut_power()
    assert read(memory, 0) == bytes(4096)


def test_what_fails_may_be_chosen_by_its_place() -> None:
    device = VolatileDevice(MemoryDevice(MIB))
    device.fail_reads = range(5000, 5001)
    read(device, 0)
    with pytest.raises(DeviceError):
        read(device, 4096)
    assert not device.read_now(4096, (bytearray(4096),))
    device.fail_writes = range(512)
    device.write(512, (DATA,))
    with pytest.raises(DeviceError):
        device.write(0, (DATA,))
    assert device.failed


def test_a_device_that_disappears_fails_in_everything() -> None:
    device = VolatileDevice(MemoryDevice(MIB))
    device.gone = True
    for act in (lambda: read(device, 0), device.flush, lambda: device.write(0, (DATA,))):
        with pytest.raises(DeviceError):
            act()


def test_a_stall_is_asked_for_before_each_operation() -> None:
    device = VolatileDevice(MemoryDevice(MIB))
    seen: list[str] = []
    device.stall = seen.append
    device.write(0, (DATA,))
    device.flush()
    read(device, 0)
    assert seen == ["write", "flush", "read"]


def test_a_flip_changes_one_byte_of_the_medium() -> None:
    memory = MemoryDevice(MIB)
    device = VolatileDevice(memory)
    device.write(0, (DATA,))
    device.flush()
    device.flip(700, 0x80)
    assert read(memory, 0) == DATA[:700] + bytes([DATA[700] ^ 0x80]) + DATA[701:]


def test_writes_and_flushes_are_recorded() -> None:
    events: list[Write | Flush] = []
    device = VolatileDevice(MemoryDevice(MIB), number=7, record=events.append)
    device.write(512, (DATA[:512], DATA[512:1024]))
    device.flush()
    device.zero(0, SECTOR_BYTES)
    assert events == [Write(7, 512, DATA[:1024]), Flush(7), Write(7, 0, bytes(512))]


def test_the_power_goes_off_when_it_is_told_to() -> None:
    power = Power()
    device = VolatileDevice(MemoryDevice(MIB), power)
    power.left = 2
    device.write(0, (DATA,))
    device.flush()
    with pytest.raises(PowerCut):
        device.write(0, (DATA,))
