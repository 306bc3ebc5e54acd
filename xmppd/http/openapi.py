"""The OpenAPI 3.1 description of the commands, made from the registry when it is asked for."""

from collections.abc import Iterable
from typing import Any, Final

from xmppd.admin.registry import Arg, Command
from xmppd.admin.results import List, Rescode, Restuple, Scalar, Shape, Tuple

_TEXT: Final = {"type": "string", "pattern": "^[^\\u0000]*$"}
_REFUSALS: Final = {
    "400": "the request is wrong, or the command was refused",
    "401": "no token, or one that is not valid",
    "403": "this token may not call this command",
    "404": "there is no such command, or the command found nothing of this name",
    "405": "commands are called with POST",
    "408": "the body did not arrive in time",
    "409": "what is to be made is there already, or is not in the state that this needs",
    "413": "the body is too large",
    "415": "the body is not application/json",
    "429": "too many tokens that nobody knows came from this address",
    "500": "the command failed; the cause is in the log",
    "503": "not possible now: the database is away, the node starts or stops, or another node did not answer",
}


def describe(commands: Iterable[Command], *, version: str, prefix: str) -> dict[str, Any]:
    """The whole document as JSON knows it. `prefix` is the path below which the commands are called."""
    known = sorted(commands, key=lambda command: command.name)
    tags = sorted({tag for command in known for tag in command.tags})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "xmppd admin API",
            "version": version,
            "description": "The commands of xmppctl over HTTP. Answers have the shapes of `xmppctl --json`.",
        },
        "servers": [{"url": prefix or "/"}],
        "tags": [{"name": tag} for tag in tags],
        "security": [{"token": []}, {}],
        "paths": {f"/{path_of(command)}": {"post": _operation(command)} for command in known},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error()},
            "responses": {f"E{status}": _refusal(text) for status, text in _REFUSALS.items()},
            "parameters": {"local": _local(), "node": _node()},
        },
    }


def path_of(command: Command) -> str:
    """`module_list` for `module list`: what stands behind the prefix."""
    return command.name.replace(" ", "_")


def _operation(command: Command) -> dict[str, Any]:
    refusals = {status: {"$ref": f"#/components/responses/E{status}"} for status in _REFUSALS}
    return {
        "operationId": path_of(command),
        "summary": command.doc,
        "tags": list(command.tags),
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in ("local", "node")],
        "requestBody": _body(command),
        "responses": {"200": _content("done", shape_schema(command.result)), **refusals},
    }


def _body(command: Command) -> dict[str, Any]:
    required = [arg.name for arg in command.args if not arg.optional]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {arg.name: _argument(arg) for arg in command.args},
        "additionalProperties": False,
    }
    if required:
        schema["required"] = required
    return {"required": bool(required), "content": {"application/json": {"schema": schema}}}


def _argument(arg: Arg) -> dict[str, Any]:
    if arg.type == "integer":
        return {"type": "integer"}
    if arg.type == "list":
        return {"type": "array", "items": _TEXT}
    return {**_TEXT, "format": "password", "writeOnly": True} if arg.secret else dict(_TEXT)


def shape_schema(shape: Shape) -> dict[str, Any]:
    """The JSON schema of what a command returns."""
    if isinstance(shape, Rescode):
        return {"type": "integer", "enum": [0, 1], "description": "0: done, or yes; 1: no"}
    if isinstance(shape, Restuple):
        return {"type": "string"}
    if isinstance(shape, Scalar):
        return {"type": shape.type}
    if isinstance(shape, List):
        return {"type": "array", "items": shape_schema(shape.element)}
    assert isinstance(shape, Tuple)
    return {
        "type": "object",
        "properties": {field.name: shape_schema(field) for field in shape.fields},
        "required": [field.name for field in shape.fields],
        "additionalProperties": False,
    }


def _content(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _refusal(text: str) -> dict[str, Any]:
    return _content(text, {"$ref": "#/components/schemas/Error"})


def _error() -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "status": {"const": "error"},
            "code": {"type": "integer", "description": "xmppctl's exit code, else the HTTP status"},
            "message": {"type": "string"},
        },
        "required": ["status", "code", "message"],
        "additionalProperties": False,
    }


def _local() -> dict[str, Any]:
    return {
        "name": "local",
        "in": "query",
        "description": "true: this node's part of the answer; otherwise answers are the cluster's",
        "schema": {"type": "boolean", "default": False},
    }


def _node() -> dict[str, Any]:
    return {
        "name": "node",
        "in": "query",
        "description": "the node that is to answer, one of those that are up; this one where it is not given",
        "schema": {"type": "string"},
    }
