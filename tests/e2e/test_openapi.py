"""The OpenAPI document and a daemon that runs: whatever is asked, the answer is one that the document knows.

Hypothesis makes the requests from the document: good parameters, bad ones and nonsense, for every operation. No answer
may be an internal error, a status or a media type that is not documented, or a body that does not fit its schema.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rustord.frontends.operations import openapi
from tests.daemon import Daemon, Reply, make_pool

DOCUMENT = json.loads(openapi())
METHODS = ("get", "head", "put", "post", "delete", "patch")
EXAMPLES = 20
FIELD_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
NONSENSE = st.one_of(st.text(max_size=40), st.integers().map(str), st.just(""))


def resolve(part: Any) -> Any:
    """What a $ref stands for."""
    while isinstance(part, dict) and "$ref" in part:
        found = DOCUMENT
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def operations() -> Iterator[tuple[str, str, Mapping[str, Any], list[Any]]]:
    """(path, method, operation, parameters) of all there is."""
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS:
            if method in item:
                parameters = [*item.get("parameters", ()), *item[method].get("parameters", ())]
                yield path, method, item[method], [resolve(parameter) for parameter in parameters]


class Asker:
    """Makes requests for one operation, and checks the answers."""

    def __init__(self, daemon: Daemon, known: Mapping[str, list[str]], image: Path) -> None:
        self._daemon = daemon
        self._known = known
        self._image = image
        self.count = 0

    def ask_much(self, path: str, method: str, operation: Mapping[str, Any], parameters: list[Any]) -> None:
        @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def ask(data: st.DataObject) -> None:
            self.ask(path, method, operation, parameters, data.draw)
            self.count += 1

        ask()

    def ask(self, path: str, method: str, operation: Mapping[str, Any], parameters: list[Any], draw: Any) -> None:
        query: dict[str, str] = {}
        headers: dict[str, str] = {}
        target = path
        for parameter in parameters:
            name, place = parameter["name"], parameter["in"]
            if place == "path":
                value = draw(st.one_of(st.sampled_from(self._known[name]), NONSENSE))
                target = target.replace(f"{{{name}}}", quote(value, safe=draw(st.sampled_from(["", "/"]))))
            elif place == "query" and draw(st.booleans()):
                query[name] = draw(st.one_of(st.sampled_from(self._known.get(name, ["1", "true"])), NONSENSE))
            elif place == "header" and draw(st.booleans()):
                headers[name] = draw(st.one_of(st.sampled_from(self._known.get(name, ["x"])), FIELD_TEXT))
        if draw(st.integers(0, 9)) == 0:
            query[draw(st.text(max_size=5))] = "unknown"
        if query:
            target += "?" + "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in query.items())
        self._check(operation, method, self._send(method, target, self._body(operation, draw), headers))

    def _body(self, operation: Mapping[str, Any], draw: Any) -> bytes | None:
        if "requestBody" not in operation:
            return draw(st.sampled_from([None, None, None, b"", b"uninvited"]))  # type: ignore[no-any-return]
        if "application/json" not in operation["requestBody"]["content"]:
            return draw(st.binary(max_size=300))  # type: ignore[no-any-return]
        junk = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just([]), st.just({}))
        paths = st.one_of(st.sampled_from([str(self._image), f"{self._image}.absent", "/proc/self/mem", "\0"]), junk)
        keys = st.sampled_from(["force", "dry_run", "size", "name", "x"])
        document = st.builds(lambda path, rest: rest | {"path": path}, paths, st.dictionaries(keys, junk, max_size=2))
        return draw(st.one_of(document.map(lambda value: json.dumps(value).encode()), st.binary(max_size=30)))  # type: ignore[no-any-return]

    def _send(self, method: str, target: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
        with closing(self._daemon.connect()) as connection:
            connection.putrequest(method.upper(), target, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer: http.client.HTTPResponse = connection.getresponse()
            return Reply(answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read())

    def _check(self, operation: Mapping[str, Any], method: str, reply: Reply) -> None:
        said = (operation["operationId"], reply)
        responses = operation["responses"]
        # A segment too many or a dot in the path means another resource; the document has errors for all of them.
        known = str(reply.status) in responses or (reply.status >= 400 and "default" in responses)
        assert known, said
        assert reply.status != 500, said
        if reply.status >= 400:
            assert reply.headers["content-type"] == "application/problem+json", said
            if method != "head":
                problem = reply.json()
                assert problem["status"] == reply.status, said
                assert problem["code"] != "internal", said
                fits(problem, DOCUMENT["components"]["schemas"]["Problem"], "problem")
            return
        content = resolve(responses[str(reply.status)]).get("content", {})
        content = {media.partition(";")[0]: part for media, part in content.items()}
        kind = reply.headers.get("content-type", "").partition(";")[0]
        if method == "head" or not content or "*/*" in content:
            return
        assert kind in content, said
        if kind == "application/json":
            fits(reply.json(), content[kind].get("schema", {}), operation["operationId"])
        elif kind == "application/x-ndjson":
            for line in reply.body.splitlines():
                fits(json.loads(line), content[kind].get("schema", {}), operation["operationId"])


KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def fits(value: Any, schema: Any, where: str) -> None:
    """Assert that a value is as its JSON schema says, as far as this document's schemas go."""
    schema = resolve(schema)
    for part in schema.get("allOf", ()):
        fits(value, part, where)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if value is None:
        assert not kinds or "null" in kinds, where
        return
    if kinds:
        assert isinstance(value, tuple(KINDS[kind] for kind in kinds if kind != "null")), (where, value)  # type: ignore[arg-type]
    if "enum" in schema:
        assert value in schema["enum"], (where, value)
    if "pattern" in schema and isinstance(value, str):
        assert re.search(schema["pattern"], value), (where, value)
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= value.keys(), (where, value)
        for key, part in schema.get("properties", {}).items():
            if key in value:
                fits(value[key], part, f"{where}.{key}")
    if isinstance(value, list) and "items" in schema:
        for item in value:
            fits(item, schema["items"], f"{where}[]")


def test_whatever_is_asked_is_answered_as_documented(
    make_daemon: Callable[..., Daemon], make_image: Callable[[int], Path]
) -> None:
    images = [make_image(16 << 20) for _ in range(2)]
    make_pool(images[0])
    daemon = make_daemon(images[0]).start()
    stored = {daemon.put(data): data for data in (b"", b"x", b"data" * 50_000)}
    named = daemon.put(b"named", name="a%20name/of%20two")
    known = {
        "uuid": [named, "0198a1b2-0000-7000-8000-00000000beef"],
        "name": ["a name/of two", "absent", "a/../b", "/"],
        "device": ["0", "1", str(images[0])],
        "prefix": ["a", ""],
        "after": ["a", named],
        "limit": ["1", "1000", "0", "-1", "1e3"],
        "cells": ["1", "10", "0"],
        "volume": ["a", "a/b", "absent"],
        "work": ["heal", "rebalance", "dance"],
        "give-up": ["1"],
        "again": ["true", "1", "false"],
        "Range": ["bytes=0-0", "bytes=-1", "bytes=4-", "bytes=9-2", "bytes=0-0,2-3", "lines=1-2"],
        "If-None-Match": ["*", '"x"'],
        "If-Match": ["*", '"x"', 'W/"x"'],
    }
    asker = Asker(daemon, known, images[1])
    for each in operations():
        asker.ask_much(*each)
    assert asker.count > EXAMPLES // 2 * len(list(operations()))
    assert {uuid: daemon.get(uuid) for uuid in stored} == stored
    assert daemon.pool()["state"] == "ok"


def test_a_reply_that_is_not_documented_is_found() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "array", "items": {"type": "string"}}}}
    fits({"a": ["x"], "b": 1}, schema, "good")
    for bad in ({}, {"a": [1]}, {"a": "x"}, []):
        try:
            fits(bad, schema, "bad")
        except AssertionError:
            continue
        raise AssertionError(f"{bad} passes")
