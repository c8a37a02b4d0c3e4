from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rustord.change import Put
from rustord.frontends.operations import openapi
from rustord.objkey import ObjectId, parse_uuid
from rustord.record import Metadata, Record
from rustord.wire.api import ROUTES, Body
from rustord.wire.limits import Limits
from rustord.wire.problem import error_classes
from tests.frontends.conftest import Serve
from tests.frontends.served import SECONDS_MAX, Reply, Served, request, until

MIB = 1 << 20
NO_UUID = "00000000-0000-7000-8000-000000000000"


def put(served: Served, name: str, data: bytes, **fields: str) -> dict[str, Any]:
    reply = served.ask("PUT", f"/v1/names/{name}", data, **fields)
    assert reply.status in (200, 201), reply
    told: dict[str, Any] = reply.json()
    return told


def uuids(served: Served) -> set[str]:
    return {json.loads(line)["uuid"] for line in served.ask("GET", "/v1/objects").body.splitlines()}


# Objects


def test_an_object_is_stored_read_and_deleted(served: Served) -> None:
    free = served.free_blocks()
    stored = served.ask("POST", "/v1/objects", b"hello", Content_Type="text/plain", Rustor_Meta_Who="%C3%BC ber")
    told = stored.json()
    where = f"/v1/objects/{told['uuid']}"
    assert (stored.status, stored.headers["location"]) == (201, where)
    assert stored.headers["etag"] == f'"xxh3-128:{told["digest"]}"'
    read = served.ask("GET", where)
    assert (read.status, read.body) == (200, b"hello")
    assert read.headers["content-type"] == "text/plain"
    assert read.headers["rustor-meta-who"] == "%C3%BC%20ber"
    assert read.headers["etag"] == stored.headers["etag"]
    assert read.headers["rustor-uuid"] == told["uuid"]
    looked = served.ask("HEAD", where)
    assert looked.headers == {**read.headers, "date": looked.headers["date"]}
    assert served.ask("DELETE", where).status == 204
    assert served.ask("GET", where).code == "not-found"
    assert served.ask("HEAD", where).status == 404
    assert served.ask("DELETE", where).code == "not-found"
    assert served.free_blocks() == free


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 262144, 262145, MIB, 3 * MIB + 17])
def test_every_size_comes_back_as_it_was(served: Served, size: int) -> None:
    data = os.urandom(size)
    named = put(served, "sized", data)
    assert named["size"] == size
    assert served.ask("GET", "/v1/names/sized").body == data
    whole = served.ask("GET", f"/v1/objects/{named['uuid']}")
    assert whole.body == data
    for first, last in ((0, 0), (size // 2, size - 1), (size // 3, size // 3 + 70000), (size - 1, size + 10)):
        if 0 <= first < size:
            part = served.ask("GET", "/v1/names/sized", Range=f"bytes={first}-{last}")
            assert part.status == 206
            assert part.body == data[first : last + 1]
            assert part.headers["content-range"] == f"bytes {first}-{min(last, size - 1)}/{size}"


def test_a_name_is_replaced_and_its_old_object_gone(served: Served) -> None:
    free = served.free_blocks()
    old = put(served, "n", b"old")
    assert served.ask("PUT", "/v1/names/n", b"new").status == 200
    assert served.ask("GET", "/v1/names/n").body == b"new"
    until(lambda: served.ask("GET", f"/v1/objects/{old['uuid']}").status == 404, "the old one is gone")
    assert served.ask("DELETE", "/v1/names/n").status == 204
    assert served.ask("DELETE", "/v1/names/n").status == 404
    until(lambda: served.free_blocks() == free, "all blocks are free")


@pytest.mark.parametrize("size", [4000, MIB])
def test_a_name_is_found_though_its_object_is_replaced_and_erased_in_this_moment(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    old = parse_uuid(put(served, "n", os.urandom(size))["uuid"])
    stat = served.store.stat

    def late(uuid: ObjectId) -> Record:
        record = stat(uuid)
        if uuid == old:
            monkeypatch.undo()
            free = served.free_blocks()
            served.writer.make([Put(b"new", Metadata("n"))], SECONDS_MAX)
            until(lambda: served.free_blocks() > free, "the old one is erased")
        return record

    monkeypatch.setattr(served.store, "stat", late)
    reply = served.ask("GET", "/v1/names/n")
    assert (reply.status, reply.body) == (200, b"new")
    assert "damaged" not in caplog.text
    assert not served.store.pins._pins


def test_an_upload_obeys_its_conditions(served: Served) -> None:
    first = served.ask("PUT", "/v1/names/n", b"first", If_None_Match="*")
    assert first.status == 201
    for size in (5, MIB):  # gathered, and streamed
        assert served.ask("PUT", "/v1/names/n", bytes(size), If_None_Match="*").code == "precondition-failed"
        assert served.ask("PUT", "/v1/names/n", bytes(size), If_Match='"other:1"').code == "precondition-failed"
        assert served.ask("PUT", "/v1/names/none", bytes(size), If_Match="*").code == "precondition-failed"
    assert served.ask("GET", "/v1/names/n").body == b"first"
    assert served.ask("PUT", "/v1/names/n", b"second", If_Match=first.headers["etag"]).status == 200
    assert served.ask("PUT", "/v1/names/n", b"third", If_None_Match='"a"').code == "invalid-request"
    assert len(uuids(served)) == 1


def test_a_part_of_an_object_is_not_stored_in_its_place(served: Served) -> None:
    put(served, "n", b"0123456789")
    for body in (b"56789", bytes(MIB)):
        refused = served.ask("PUT", "/v1/names/n", body, Content_Range=f"bytes 5-{4 + len(body)}/{5 + len(body)}")
        assert (refused.status, refused.code) == (400, "invalid-request")
    assert served.ask("GET", "/v1/names/n").body == b"0123456789"


def test_a_deletion_obeys_its_condition(served: Served) -> None:
    uuid = put(served, "n", b"data")["uuid"]
    for where in ("/v1/names/n", f"/v1/objects/{uuid}"):
        assert served.ask("DELETE", where, If_Match='"other:1"').code == "precondition-failed"
    etag = served.ask("HEAD", "/v1/names/n").headers["etag"]
    assert served.ask("DELETE", "/v1/names/n", If_Match=etag).status == 204


def test_a_read_obeys_its_conditions(served: Served) -> None:
    data = os.urandom(300_000)
    put(served, "n", data)
    etag = served.ask("HEAD", "/v1/names/n").headers["etag"]
    for method in ("GET", "HEAD"):
        unchanged = served.ask(method, "/v1/names/n", If_None_Match=etag)
        assert (unchanged.status, unchanged.body, unchanged.headers["etag"]) == (304, b"", etag)
        assert served.ask(method, "/v1/names/n", If_Match='"other:1"').status == 412
    for asked in ("bytes=0-9", "bytes=300000-"):  # a range means something to GET alone
        looked = served.ask("HEAD", "/v1/names/n", Range=asked)
        assert (looked.status, looked.headers["content-length"]) == (200, "300000")
        assert "content-range" not in looked.headers
    assert served.ask("GET", "/v1/names/n", Range="bytes=0-9").body == data[:10]
    assert served.ask("GET", "/v1/names/n", Range="bytes=-5", If_Range=etag).body == data[-5:]
    assert served.ask("GET", "/v1/names/n", Range="bytes=-5", If_Range='"other:1"').body == data
    beyond = served.ask("GET", "/v1/names/n", Range="bytes=300000-")
    assert (beyond.code, beyond.headers["content-range"]) == ("range-not-satisfiable", "bytes */300000")


@pytest.mark.parametrize(
    "name", ["a/b/c", "/", "//", "..", "../../etc/passwd", ".", "a b", "ü", "日本", "%", "?#", "a" * 1024, "é" * 512]
)
def test_any_text_is_a_name(served: Served, name: str) -> None:
    encoded = "".join(f"%{byte:02x}" for byte in name.encode())
    put(served, encoded, b"data")
    assert served.ask("GET", f"/v1/names/{encoded}").body == b"data"
    listed = served.ask("GET", f"/v1/names?prefix={encoded}")
    assert [json.loads(line)["name"] for line in listed.body.splitlines()] == [name]


@pytest.mark.parametrize("encoded", ["", "%00", "a%0ab", "%7f", "%c2%80", "a" * 1025, "%c3%a9" * 513, "%ff", "%", "%e"])
def test_what_is_no_name_is_refused(served: Served, encoded: str) -> None:
    for method, body in (("PUT", b"x"), ("GET", None), ("HEAD", None), ("DELETE", None)):
        assert served.ask(method, f"/v1/names/{encoded}", body).status == 400
    assert uuids(served) == set()


@pytest.mark.parametrize("uuid", ["x", NO_UUID[:-1], NO_UUID + "0", NO_UUID.replace("0", "g"), "%00"])
def test_what_is_no_uuid_is_refused(served: Served, uuid: str) -> None:
    for method in ("GET", "HEAD", "DELETE"):
        assert served.ask(method, f"/v1/objects/{uuid}").status == 400
    assert served.ask("GET", f"/v1/objects/{uuid}/manifest").status == 400


def test_attributes_and_types_are_bounded(served: Served) -> None:
    def many(count: int, size: int) -> dict[str, str]:
        return {f"Rustor-Meta-{index:02}": "v" * size for index in range(count)}

    put(served, "n", b"", **many(64, 100))
    assert served.ask("PUT", "/v1/names/n", b"", **many(65, 1)).code == "too-large"
    assert served.ask("PUT", "/v1/names/n", b"", **many(2, 4100)).code == "too-large"
    assert served.ask("PUT", "/v1/names/n", bytes(MIB), **many(65, 1)).code == "too-large"
    assert served.ask("PUT", "/v1/names/n", b"", Content_Type="a" * 256).code == "invalid-request"
    assert len(served.ask("HEAD", "/v1/names/n").headers["rustor-meta-63"]) == 100


def test_a_full_pool_says_so_before_the_data_and_takes_deletions(serve: Serve) -> None:
    served = serve(size=16 * MIB)
    room = served.free_blocks() * 4096
    with served.connect() as peer:
        refused = peer.ask(
            f"PUT /v1/names/big HTTP/1.1\r\nHost: a\r\nContent-Length: {room}\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert refused.code == "no-space"
    put(served, "half", bytes(room // 2))
    with served.connect() as peer:  # of unknown size, so it is found out in the middle
        peer.send(b"PUT /v1/names/big HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(MIB) + b"\r\n"
        try:
            for _ in range(room // MIB):
                peer.send(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert peer.reply().code == "no-space"
    assert served.ask("DELETE", "/v1/names/half").status == 204
    until(lambda: served.free_blocks() * 4096 == room, "all blocks are free")
    put(served, "again", bytes(room // 2))


# Listings


def test_names_are_listed_page_by_page(served: Served) -> None:
    names = sorted(["a", "a/1", "a/2", "a/ü", "a/日", "b", "b c", "c%"], key=str.encode)
    for name in names:
        put(served, "".join(f"%{byte:02x}" for byte in name.encode()), name.encode())

    def pages(query: str, limit: int) -> list[str]:
        found, after = [], ""
        while True:
            reply = served.ask("GET", f"/v1/names?limit={limit}{query}{after}")
            assert reply.headers["content-type"] == "application/x-ndjson"
            lines = [json.loads(line)["name"] for line in reply.body.splitlines()]
            assert len(lines) <= limit
            found += lines
            if "rustor-next" not in reply.headers:
                return found
            assert len(lines) == limit
            after = f"&after={reply.headers['rustor-next']}"

    for limit in (1, 3, 8, 1000):
        assert pages("", limit) == names
        assert pages("&prefix=a%2F", limit) == [name for name in names if name.startswith("a/")]
    assert pages("&after=b", 10) == ["b c", "c%"]
    assert pages("&prefix=none", 10) == []


def test_objects_are_listed_page_by_page(served: Served) -> None:
    stored = [put(served, f"{index}", b"x" * index) for index in range(5)]
    entries, target = [], "/v1/objects?limit=2"
    for _ in range(3):
        reply = served.ask("GET", target)
        entries += [json.loads(line) for line in reply.body.splitlines()]
        target = f"/v1/objects?limit=2&after={reply.headers.get('rustor-next')}"
    assert "rustor-next" not in reply.headers
    assert [{name: entry[name] for name in stored[0]} for entry in entries] == stored
    assert served.ask("GET", "/v1/objects?after=x").code == "invalid-request"


def test_a_manifest_tells_where_an_object_is(served: Served) -> None:
    uuid = put(served, "n", b"x" * 10000, Rustor_Meta_K="v")["uuid"]
    manifest = served.ask("GET", f"/v1/objects/{uuid}/manifest").json()
    (device,) = served.ask("GET", "/v1/devices").json()
    ((extent,),) = manifest["copies"]
    assert (extent["device"], extent["index"], extent["count"]) == (device["uuid"], 0, 3)
    assert (manifest["name"], manifest["size"], manifest["attributes"]) == ("n", 10000, {"k": "v"})
    assert served.ask("GET", f"/v1/objects/{NO_UUID}/manifest").code == "not-found"


# The daemon


def test_the_daemon_answers_for_itself(served: Served) -> None:
    pool = served.ask("GET", "/v1/pool").json()
    assert (pool["name"], pool["state"], pool["objects"]) == ("test", "ok", 0)
    (device,) = served.ask("GET", "/v1/devices").json()
    assert (device["index"], device["state"]) == (0, "online")
    assert [plugin["loaded"] for plugin in served.ask("GET", "/v1/plugins").json() if plugin["name"] == "rustord"] != [
        False
    ]
    metrics = served.ask("GET", "/metrics")
    assert (metrics.body, metrics.headers["content-type"]) == (
        b"rustord_up 1\n",
        "text/plain; version=0.0.4; charset=utf-8",
    )


def test_devices_are_added_and_removed(served: Served, disk_path: Path) -> None:
    second = disk_path / "second.img"
    second.write_bytes(b"")
    os.truncate(second, 64 * MIB)
    asked = json.dumps({"path": str(second), "dry_run": True}).encode()
    assert served.ask("POST", "/v1/devices", asked).status == 200
    added = served.ask("POST", "/v1/devices", json.dumps({"path": str(second)}).encode())
    assert (added.status, added.json()["index"]) == (201, 1)
    refused = served.ask("POST", "/v1/devices", json.dumps({"path": str(second)}).encode())
    assert refused.status == 409
    assert refused.code in ("claim-refused", "device-busy")
    assert served.ask("POST", "/v1/devices", b"nonsense").code == "invalid-request"
    assert served.ask("POST", "/v1/devices", bytes(70000)).code == "too-large"
    assert served.ask("DELETE", "/v1/devices/7").code == "not-found"
    assert served.ask("DELETE", "/v1/devices/1").status == 200
    assert len(served.ask("GET", "/v1/devices").json()) == 1


def test_a_slow_answer_of_the_daemon_holds_up_nobody(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from rustord.admin import Admin

    gate = threading.Event()
    monkeypatch.setattr(Admin, "plugins", lambda self: gate.wait(20) and [])
    with served.connect() as peer:
        peer.send(request("GET", "/v1/plugins"))
        put(served, "n", b"data")
        assert served.ask("GET", "/v1/names/n").body == b"data"
        gate.set()
        assert peer.reply().json() == []


def test_an_unexpected_failure_is_answered_and_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("secret")

    put(served, "n", b"data")
    monkeypatch.setattr(served.store, "read_now", fail)
    monkeypatch.setattr(served.store, "names", fail)
    for target in ("/v1/names/n", "/v1/names"):
        failed = served.ask("GET", target)
        assert (failed.status, failed.code) == (500, "internal")
        assert b"secret" not in failed.body
    assert caplog.text.count("ZeroDivisionError: secret") == 2


def test_volumes_are_made_and_become_objects(served: Served) -> None:
    def ask(method: str, path: str, **body: object) -> Reply:
        return served.ask(method, path, json.dumps(body).encode() if body or method in ("POST", "PATCH") else b"")

    assert ask("POST", "/v1/volumes", name="disk", size=100_000).json()["size"] == 131_072
    assert ask("POST", "/v1/volumes", name="disk", size=100_000).code == "precondition-failed"
    assert ask("PATCH", "/v1/volumes/disk", size=1 << 20).json()["size"] == 1 << 20
    assert [volume["name"] for volume in ask("GET", "/v1/volumes").json()] == ["disk"]
    snapshot = ask("POST", "/v1/volumes/disk/snapshot")
    assert (snapshot.status, snapshot.json()["name"], snapshot.json()["size"]) == (201, "", 1 << 20)
    frozen = ask("POST", "/v1/volumes/disk/freeze", name="image")
    assert (frozen.status, frozen.json()["name"]) == (201, "image")
    assert ask("GET", "/v1/volumes/disk").code == "not-found"
    assert ask("POST", "/v1/volumes", name="clone", source=frozen.json()["uuid"]).status == 201
    assert ask("DELETE", "/v1/volumes/clone").status == 204
    for wrong in ({}, {"name": "x"}, {"name": 5, "size": 1}, {"name": "x", "size": True}, {"name": "x", "more": 1}):
        assert ask("POST", "/v1/volumes", **wrong).code == "invalid-request"
    ask("POST", "/v1/volumes", name="disk", size=1)
    assert ask("POST", "/v1/volumes", name="half", source="\ud800").code == "invalid-request"
    assert ask("POST", "/v1/volumes/disk/snapshot", name="\ud800").code == "invalid-request"
    assert ask("POST", "/v1/volumes/disk/freeze", name="\ud800").code == "invalid-request"
    for path in ("/v1/volumes/a/b", "/v1/volumes/", "/v1/volumes/x/melt"):
        assert ask("POST", path).code == "not-found"


# The document


def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(openapi())
    return found


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in value:
        found = document()
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


def test_the_document_is_served(served: Served) -> None:
    reply = served.ask("GET", "/v1/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == document()
    assert reply.json()["openapi"].startswith("3.1.")


def test_the_document_has_every_operation_and_no_other() -> None:
    documented = {
        (path, method.upper()): operation
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }
    served = {(path, method): operation for path, methods in ROUTES.items() for method, operation in methods.items()}
    assert documented.keys() == served.keys()
    for key, operation in served.items():
        told = documented[key]
        assert told["operationId"] == operation.id
        assert told["x-role"] == operation.role.name.lower()
        assert ("requestBody" in told) == (operation.body is not Body.NOTHING)
        parameters = [resolved(parameter) for parameter in told.get("parameters", [])]
        assert {parameter["name"] for parameter in parameters if parameter["in"] == "query"} == operation.query
        in_path = [resolved(parameter)["name"] for parameter in document()["paths"][key[0]].get("parameters", [])]
        assert in_path == [part[1:-1] for part in key[0].split("/") if part.startswith("{")]


def test_the_document_has_every_error() -> None:
    codes = resolved(document()["components"]["schemas"]["Problem"])["properties"]["code"]["enum"]
    assert codes == sorted(kind.code for kind in error_classes())
    described = json.dumps(document()["components"]["responses"])
    only_for_clients = {"config", "unreachable"}
    assert [code for code in codes if f"`{code}`" not in described and code not in only_for_clients] == []


def test_the_document_knows_every_limit() -> None:
    parameters = document()["components"]["parameters"]
    assert parameters["limit"]["schema"]["maximum"] == Limits().page_items


def test_every_reference_of_the_document_leads_somewhere() -> None:
    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            return [value["$ref"]] if "$ref" in value else [r for inner in value.values() for r in references(inner)]
        return [r for inner in value for r in references(inner)] if isinstance(value, list) else []

    found = set(references(document()))
    for reference in found:
        resolved({"$ref": reference})
    components = document()["components"]
    assert {f"#/components/{kind}/{name}" for kind in components for name in components[kind]} == found


# curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="`apt-get install curl` brings it")
def test_curl_does_everything(served: Served, disk_path: Path) -> None:
    def curl(target: str, *arguments: str | Path, status: int = 200) -> bytes:
        command = ["curl", "--silent", "--show-error", "--max-time", "20", "--unix-socket", served.path, *arguments]
        command += ["--write-out", "%{stderr}%{http_code}", f"http://localhost{target}"]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stderr.decode() == str(status), done
        return done.stdout

    small, large = disk_path / "small", disk_path / "large"
    small.write_bytes(os.urandom(1000))
    large.write_bytes(os.urandom(5 * MIB + 1))
    second = disk_path / "second.img"
    second.touch()
    os.truncate(second, 64 * MIB)
    uuid = json.loads(curl("/v1/objects", "--data-binary", f"@{small}", status=201))["uuid"]
    assert curl(f"/v1/objects/{uuid}") == small.read_bytes()
    curl("/v1/names/dir/large", "--upload-file", large, "-H", "Rustor-Meta-A: b", status=201)
    curl("/v1/names/piped", "--upload-file", "-", "-H", "Content-Type: a/b", status=201)
    with large.open("rb") as data:
        command = ["curl", "-sS", "--unix-socket", served.path, "-T", "-", "http://localhost/v1/names/piped"]
        subprocess.run(command, stdin=data, check=True, capture_output=True)
    assert curl("/v1/names/dir/large") == curl("/v1/names/piped") == large.read_bytes()
    assert curl("/v1/names/dir/large", "--range", "10-19", status=206) == large.read_bytes()[10:20]
    assert b"Rustor-Meta-a: b\r\n" in curl("/v1/names/dir/large", "--head")
    assert len(curl("/v1/names?prefix=dir/").splitlines()) == 1
    assert len(curl("/v1/objects").splitlines()) == 3
    assert uuid in curl(f"/v1/objects/{uuid}/manifest").decode()
    assert f"Rustor-Uuid: {uuid}" in curl(f"/v1/objects/{uuid}", "--head").decode()
    curl("/v1/names/piped", "-X", "DELETE", status=204)
    curl(f"/v1/objects/{uuid}", "-X", "DELETE", status=204)
    curl(f"/v1/objects/{uuid}", status=404)
    assert json.loads(curl("/v1/pool"))["objects"] == 1
    curl("/v1/devices", "--json", json.dumps({"path": str(second)}), status=201)
    assert len(json.loads(curl("/v1/devices"))) == 2
    curl("/v1/devices/1", "-X", "DELETE")
    curl("/v1/plugins")
    curl("/metrics")
    curl("/v1/openapi.json")
