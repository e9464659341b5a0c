"""Every refusal as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from prairie.errors import PrairieError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 507: "server_error"}
CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "body_too_large"}


def error_body(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, error object). What is not a PrairieError is a fault of ours: its text stays in the log."""
    if isinstance(body := getattr(error, "body", None), dict) and isinstance(error, PrairieError):
        return error.http_status, body  # the words of another server
    if isinstance(error, PrairieError):
        return error.http_status, error_body(error.http_status, str(error), error.code, error.param)
    return 500, error_body(500, "the server met an error of its own; its log says which", "internal_error")


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    status, body = body_of(error)
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", str(getattr(error, "retry_after_s", 1)))
    return JSONResponse(body, status, headers)


def install(app: FastAPI) -> None:
    """Registers the handlers, so that routes simply raise."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return error_response(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(_validation_body(error), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        cause = error.__cause__  # of a body that cannot be read: FastAPI's sentence names neither cause nor mend
        if isinstance(cause, UnicodeDecodeError | RecursionError):
            what = f"not UTF-8 at byte {cause.start}" if isinstance(cause, UnicodeDecodeError) else "nested too deeply"
            return JSONResponse(error_body(400, f"the body is {what}; send JSON as UTF-8.", "invalid_json"), 400)
        messages = {
            404: f"there is no route {request.method} {request.url.path}; GET /openapi.json lists them.",
            405: f"{request.url.path} does not take {request.method}; GET /openapi.json lists what it takes.",
        }
        status = 400 if error.status_code == 422 else error.status_code
        # Starlette's own 404 says "Not Found"; a sentence of ours is kept.
        message = (
            messages.get(status, error.detail) if error.detail in ("Not Found", "Method Not Allowed") else error.detail
        )
        return JSONResponse(error_body(status, str(message), CODES.get(status)), status, error.headers)

    app.add_exception_handler(PrairieError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _validation_body(error: RequestValidationError) -> dict[str, Any]:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return error_body(
            400, f"the body is not JSON: {reason} at character {where[-1] if where else 0}.", "invalid_json"
        )
    if isinstance(first.get("input"), bytes):
        # Read as JSON only if it says so: a form of a foreign page can send any body, but not this header.
        message = "the body is not marked as JSON; send the header `Content-Type: application/json`."
        return error_body(400, message, "invalid_content_type")
    param = ".".join(where) or None
    if first["type"] == "missing":
        return error_body(400, f"`{param or 'body'}` is missing; it is required.", "missing_parameter", param)
    got = repr(first.get("input"))
    got = got if len(got) <= 80 else got[:77] + "..."
    return error_body(400, f"`{param or 'body'}` is wrong: {first['msg']}, got {got}.", "invalid_value", param)
