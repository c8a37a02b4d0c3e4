"""Problems: errors as replies say them (RFC 9457), and as clients understand them again."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rustord.errors import ClaimRefused, RangeNotSatisfiable, RustordError
from rustord.wire.http1 import MethodNotAllowed, Reply, content

PROBLEM = "application/problem+json"


def problem(error: RustordError) -> Reply:
    """RFC 9457."""
    body: dict[str, object] = {
        "type": f"urn:rustord:error:{error.code}",
        "title": error.code.replace("-", " ").capitalize(),
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
    }
    more = ""
    if isinstance(error, ClaimRefused):
        body["reasons"] = list(error.reasons)
    elif isinstance(error, RangeNotSatisfiable):
        body["size"] = error.size
        more = f"Content-Range: bytes */{error.size}\r\n"
    elif isinstance(error, MethodNotAllowed):
        body["allowed"] = list(error.allowed)
        more = f"Allow: {', '.join(error.allowed)}\r\n"
    text = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    return content(PROBLEM, text, more)._replace(status=error.http_status)


def error_classes() -> Iterator[type[RustordError]]:
    """Every kind of error that has a code of its own, the most general first."""
    kinds: list[type[RustordError]] = [RustordError]
    for kind in kinds:
        if "code" in vars(kind):
            yield kind
        kinds.extend(kind.__subclasses__())


def read_problem(status: int, body: bytes) -> RustordError:
    """The error that `problem` told of, for a client. An unknown code gives a plain RustordError."""
    try:
        told = json.loads(body)
        code, detail, hint = str(told["code"]), str(told["detail"]), str(told.get("hint", ""))
    except (ValueError, KeyError, TypeError):
        return RustordError(
            f"the daemon answered {status} without saying why", hint="is it rustord that listens there?"
        )
    kind = next((kind for kind in error_classes() if kind.code == code), RustordError)
    if kind is ClaimRefused:
        return ClaimRefused(detail, reasons=[str(reason) for reason in told.get("reasons", ())], hint=hint)
    if kind is RangeNotSatisfiable:
        return RangeNotSatisfiable(detail, size=int(told.get("size", 0)), hint=hint)
    if kind is MethodNotAllowed:
        return MethodNotAllowed(detail, allowed=tuple(told.get("allowed", ())), hint=hint)
    return kind(detail, hint=hint)
