"""Errors as HTTP responses, in the shape of the OpenAI API."""

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from fp4dit_ao.serving.engine_types import NotReady
from fp4dit_ao.serving.schema import ApiError

log = logging.getLogger(__name__)


def failed(error: BaseException, timeout: float) -> ApiError:
    """Error for an image that was not drawn within ``timeout`` seconds, or at all; one that is nobody's business is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NotReady):
        return ApiError(503, str(error), "not_ready", retry_after=1)
    if isinstance(error, TimeoutError):
        return ApiError(504, f"no image within {timeout:g} s; ask for fewer steps, or later", "timeout")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to draw this; its log says why", "internal_error")


def answer(error: ApiError) -> JSONResponse:
    """Response for ``error``, with ``Retry-After`` in whole seconds if it gives a time."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return JSONResponse(error.body, error.status, headers)


def answer_errors(app: FastAPI) -> None:
    """Registers handlers that answer every error, unexpected ones included, in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(explained(error))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        response = answer(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return answer(failed(error, 0))


def explained(error: RequestValidationError) -> ApiError:
    """Error for a request that pydantic rejected, named after the first field that is wrong."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"][1:] if isinstance(part, str)) or None
    if found["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {found.get('ctx', {}).get('error', found['msg'])}", "invalid_json"
        )
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {where}", "unknown_parameter", where)
    if found["type"] == "string_pattern_mismatch":
        wanted = {
            "prompt": "the prompt is blank; say what to draw",
            "size": "give 'auto', or WIDTHxHEIGHT such as 512x512",
        }
        return ApiError(
            400, f"{where}: {wanted.get(str(where), 'not of the form that is asked for')}", found["type"], where
        )
    if where is None:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json", found["type"])
    message = found["msg"][0].lower() + found["msg"][1:]
    return ApiError(400, f"{where}: {message}", found["type"], where)
