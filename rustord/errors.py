"""Every error that rustord raises on purpose, as one tree.

::

    RustordError
    ├── InvalidRequest            the caller's input is wrong
    │   ├── TooLarge              ... because it exceeds a limit
    │   └── ConfigError           ... in a configuration file
    ├── NotFound                  no such Object, name or device
    ├── PreconditionFailed        If-Match / If-None-Match / --no-clobber said no
    ├── RangeNotSatisfiable       a range that begins beyond the end
    ├── Forbidden                 the peer's role does not allow it
    ├── NoSpace                   not enough free blocks
    ├── InUse                     an Object or volume that clients have open as a block device
    ├── Unsupported               what cannot be done here, or not in the way that was asked for
    ├── Unavailable               shutting down, overloaded, or not yet started
    │   └── Unreachable           (client) nothing answers on the socket
    ├── ReadOnly                  the pool takes no writes, and why
    ├── Damaged                   bytes on a device do not match their checksum
    │   └── FormatError           ... in an on-disk structure (label, journal, record)
    ├── DeviceError               a device failed, is missing (perhaps only yet), or is too small
    │   ├── DeviceBusy            somebody else holds it
    │   ├── WriteProtected        it can only be read
    │   └── ClaimRefused          it is not proven free; carries every reason
    ├── PoolError                 the devices do not make up a pool that can be opened
    └── PluginError               a plugin is missing, broken or of the wrong version

A message says what happened, and to what; ``hint`` says what to do about it. Neither ends in a full stop. The strings
that people see are put together only at the edge, by ``rustord.cli`` and ``rustord.wire.api``.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar


class RustordError(Exception):
    """Base of the tree.

    ``code`` is the stable name of the error on the wire (``problem+json`` "code"), ``http_status`` the HTTP status,
    ``nbd_error`` the errno an NBD client is told, ``exit_status`` what a command ends with. ``needs_person`` says that
    trying again is in vain before somebody has put something right: a daemon that ends so is not started again.
    """

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    nbd_error: ClassVar[int] = errno.EIO
    exit_status: ClassVar[int] = 1
    needs_person: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidRequest(RustordError):
    code = "invalid-request"
    http_status = 400
    nbd_error = errno.EINVAL
    exit_status = 2
    needs_person = True


class TooLarge(InvalidRequest):
    code = "too-large"
    http_status = 413
    nbd_error = errno.EOVERFLOW
    exit_status = 2


class ConfigError(InvalidRequest):
    code = "config"
    exit_status = 78  # EX_CONFIG of sysexits.h


class NotFound(RustordError):
    code = "not-found"
    http_status = 404
    nbd_error = errno.ENOENT
    exit_status = 3


class PreconditionFailed(RustordError):
    code = "precondition-failed"
    http_status = 412
    nbd_error = errno.EINVAL
    exit_status = 4


class RangeNotSatisfiable(RustordError):
    code = "range-not-satisfiable"
    http_status = 416
    nbd_error = errno.EINVAL
    exit_status = 5

    def __init__(self, message: str, *, size: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.size = size
        """Size of the Object in bytes, for the Content-Range of the answer."""


class NoSpace(RustordError):
    code = "no-space"
    http_status = 507
    nbd_error = errno.ENOSPC
    exit_status = 6


class InUse(RustordError):
    code = "in-use"
    http_status = 409
    nbd_error = errno.EPERM
    exit_status = 15


class Unsupported(RustordError):
    code = "unsupported"
    http_status = 501
    nbd_error = errno.EOPNOTSUPP
    exit_status = 16


class Forbidden(RustordError):
    code = "forbidden"
    http_status = 403
    nbd_error = errno.EPERM
    exit_status = 7


class Unavailable(RustordError):
    code = "unavailable"
    http_status = 503
    nbd_error = errno.ESHUTDOWN
    exit_status = 8


class Unreachable(Unavailable):
    code = "unreachable"
    exit_status = 8


class ReadOnly(RustordError):
    code = "read-only"
    http_status = 503
    nbd_error = errno.EPERM
    exit_status = 9


class Damaged(RustordError):
    code = "damaged"
    exit_status = 10
    needs_person = True


class FormatError(Damaged):
    code = "bad-format"


class DeviceError(RustordError):
    code = "device"
    http_status = 503
    exit_status = 11


class DeviceBusy(DeviceError):
    code = "device-busy"
    http_status = 409


class WriteProtected(DeviceError):
    code = "write-protected"
    http_status = 409


class ClaimRefused(DeviceError):
    code = "claim-refused"
    http_status = 409
    exit_status = 12
    needs_person = True

    def __init__(self, message: str, *, reasons: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reasons = tuple(reasons)
        """Every reason that was found, a sentence each."""


class PoolError(RustordError):
    code = "pool"
    http_status = 503
    exit_status = 13
    needs_person = True


class PluginError(RustordError):
    code = "plugin"
    exit_status = 14
    needs_person = True
