"""Multipart forms and the pictures in them: bodies of ``POST /v1/images/edits``."""

import io
from email.message import Message
from email.parser import BytesParser

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from fp4dit_ao.serving.engine_types import Image
from fp4dit_ao.serving.schema import ApiError

MOST_PIXELS = 4096 * 4096
"""Largest picture that is read."""


def form(content_type: str, body: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
    """Text fields and files of a multipart form (RFC 7578), by name; brackets at the end of a name are dropped.

    Raises:
        ApiError: it is no such form, or names a field twice.
    """
    head = Message()
    head["Content-Type"] = content_type
    boundary = head.get_param("boundary")
    if head.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise ApiError(400, "the body must be a form, with Content-Type: multipart/form-data", "invalid_form")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))[1:-1]:
        lines, found, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        described = BytesParser().parsebytes(lines, headersonly=True)
        name = described.get_param("name", header="content-disposition")
        if not found or not isinstance(name, str):
            raise ApiError(400, "a part of the form has no name", "invalid_form")
        name = name.removesuffix("[]")
        if name in fields or name in files:
            raise ApiError(400, f"the form gives {name} twice; one picture is edited at a time", "invalid_form", name)
        if described.get_filename() is not None:
            files[name] = content
            continue
        try:
            fields[name] = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ApiError(400, f"{name} is not UTF-8", "invalid_form", name) from error
    return fields, files


def picture(data: bytes, name: str) -> Pillow.Image:
    """The picture in a file, as RGBA.

    Raises:
        ApiError: it is none, or too large.
    """
    try:
        opened = Pillow.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if opened.width * opened.height > MOST_PIXELS:
            raise ApiError(400, f"{name} has {opened.width}x{opened.height} pixels, too many", "invalid_image", name)
        return opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ApiError(400, f"{name} is no PNG, JPEG or WebP picture", "invalid_image", name) from error


def pixels(opened: Pillow.Image, size: tuple[int, int]) -> Image:
    """RGB values of a picture, resized to (width, height)."""
    return np.asarray(opened.convert("RGB").resize(size, Pillow.Resampling.LANCZOS))


def hole(mask: Pillow.Image, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where a picture is transparent, which is where it is to be drawn anew, resized to (width, height)."""
    return np.asarray(mask.getchannel("A").resize(size, Pillow.Resampling.NEAREST)) == 0
