from __future__ import annotations

import random

import pytest

from rustord.errors import FormatError
from rustord.extent import Extent
from rustord.page import (
    Head,
    LayerEntry,
    MapEntry,
    Page,
    address_of,
    decode_addresses,
    decode_head,
    decode_layer_entry,
    decode_map_entry,
    decode_page,
    decode_slot,
    encode_slot,
    extent_at,
    slot_of,
    with_addresses,
)

LAYER, DEVICE, SECRET = bytes(range(16)), bytes(range(16, 32)), bytes(32)
PAGE = Page(LAYER, 7, 99, address_of(Extent(3, 1000, 2)), 2, with_addresses([(0, 5), (255, 1 << 50)], b""))


def test_an_address_names_a_device_and_a_block() -> None:
    extent = Extent(65_534, 2**40 - 1, 16)
    assert extent_at(address_of(extent), 16) == extent


def test_what_is_encoded_is_decoded() -> None:
    head = Head(1 << 40, 123, DEVICE, 9, "disk")
    assert decode_head(head.encode()) == head
    entry = LayerEntry(LAYER, 77, head.encode())
    assert decode_layer_entry(entry.encode()) == entry
    change = MapEntry(LAYER, [(1, 2)], [(3, 4), (5, 1)])
    assert decode_map_entry(change.encode()) == change
    assert decode_page(PAGE.encode()) == PAGE
    addresses = decode_addresses(PAGE.content)
    assert (len(addresses), addresses[0], addresses[255], sum(map(bool, addresses))) == (256, 5, 1 << 50, 2)


def test_a_page_is_found_in_its_slot_and_nowhere_else() -> None:
    data = encode_slot(PAGE.encode(), DEVICE, 1001, SECRET, 4096)
    assert slot_of(PAGE) == Extent(3, 1001, 1)
    assert slot_of(PAGE._replace(generation=8)) == Extent(3, 1000, 1)
    assert len(data) == 4096
    assert decode_slot(data, DEVICE, 1001, SECRET) == PAGE
    assert decode_slot(data, DEVICE, 1000, SECRET) is None
    assert decode_slot(data, LAYER, 1001, SECRET) is None
    assert decode_slot(bytes(4096), DEVICE, 1001, SECRET) is None
    with pytest.raises(FormatError):
        decode_slot(data, DEVICE, 1001, b"x" * 32)


def test_damage_is_seen(seed: int) -> None:
    chance = random.Random(seed)
    raw, entry = PAGE.encode(), MapEntry(LAYER, [(1, 2)], [(3, 4)]).encode()
    for _ in range(200):
        at = chance.randrange(len(raw))
        with pytest.raises(FormatError):
            decode_page(raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :])
        with pytest.raises(FormatError):
            decode_page(raw[:at])
    for length in range(len(entry)):
        with pytest.raises(FormatError):
            decode_map_entry(entry[:length])
    with pytest.raises(FormatError):
        decode_layer_entry(bytes(10))
