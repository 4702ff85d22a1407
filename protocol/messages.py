"""The messages of MessagePack-RPC, and what makes a decoded value one of them.

    [0, msgid, method, params]      request; params: [] or [map]
    [1, msgid, error, result]       response; error: nil or [errno, sentence]
    [2, method, params]             notification

Source: the MessagePack-RPC specification, "MessagePack-RPC Protocol specification". It has no shape for errors: two
elements, an integer and a string, is the one that every client seen takes.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from .errors import Malformed, RpcError
from .limits import MSGID_END

REQUEST, RESPONSE, NOTIFICATION = 0, 1, 2
_LENGTHS = {REQUEST: 4, RESPONSE: 4, NOTIFICATION: 3}


@dataclass(slots=True)
class Request:
    msgid: int
    method: str
    params: list[Any]


@dataclass(slots=True)
class Response:
    """`error` is as it came: nil, or whatever the other side calls an error."""

    msgid: int
    error: Any
    result: Any


@dataclass(slots=True)
class Notification:
    method: str
    params: list[Any]


@dataclass(slots=True)
class Unusable:
    """A request that cannot be carried out but can be answered."""

    msgid: int
    errno: int
    sentence: str


@dataclass(slots=True)
class Ignored:
    """What asks for nothing: a notification or a response that is not in order."""


Message = Request | Response | Notification | Unusable | Ignored


def parse(value: Any) -> Message:
    """The message that a decoded value is. Raises Malformed for what is none and cannot be answered either."""
    if type(value) is not list or not value:
        raise Malformed(errno.EPROTO, "this is no MessagePack-RPC: a message is an array that begins with 0, 1 or 2")
    kind = value[0]
    if type(kind) is not int or kind not in _LENGTHS:
        raise Malformed(errno.EPROTO, "a message begins with 0 (request), 1 (response) or 2 (notification)")
    if kind == NOTIFICATION:
        if len(value) != 3 or type(value[2]) is not list or (method := as_text(value[1])) is None:
            return Ignored()
        return Notification(method, value[2])
    if kind == RESPONSE:
        return Response(*value[1:]) if len(value) == 4 and is_msgid(value[1]) else Ignored()
    if len(value) < 2 or not is_msgid(value[1]):
        raise Malformed(errno.EPROTO, "a request's second element is its msgid, 0 to 2^32 - 1")
    msgid = value[1]
    if len(value) != 4:
        return Unusable(msgid, errno.EINVAL, f"a request has 4 elements, [0, msgid, method, params], not {len(value)}")
    method = as_text(value[2])
    if method is None:
        return Unusable(msgid, errno.EINVAL, "the method of a request is a string")
    if type(value[3]) is not list:
        return Unusable(msgid, errno.EINVAL, f"the params of {method!r} are an array: [] or [map]")
    return Request(msgid, method, value[3])


def is_msgid(value: object) -> bool:
    """Whether a value is an integer of 32 bits (Python's True is not)."""
    return type(value) is int and 0 <= value < MSGID_END


def as_text(value: object) -> str | None:
    """A name as clients send it, STR or BIN; None for what is neither, or no UTF-8."""
    if type(value) is str:
        return value
    if type(value) is bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return None


def fields_of(request: Request) -> dict[str, Any]:
    """The one map of a request's params; none, or an empty array (an empty table in Lua), is an empty map.

    Names may be STR or BIN. Raises RpcError EINVAL.
    """
    params = request.params
    if not params or params == [[]]:
        return {}
    fields = params[0]
    if len(params) != 1 or type(fields) is not dict:
        raise RpcError(errno.EINVAL, f"{request.method} takes one map of its fields: [{{name: value, ...}}]")
    for key in fields:
        if type(key) is not str:
            return _with_text_keys(fields)
    return fields


def _with_text_keys(fields: dict[Any, Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for key, value in fields.items():
        name = as_text(key)
        if name is None or name in named:
            raise RpcError(errno.EINVAL, f"the field {key!r} is named twice, or not by a string")
        named[name] = value
    return named
