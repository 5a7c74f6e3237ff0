"""Streams of previews, and edits of images, over HTTP; with OpenAI's own client where it is installed."""

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image as Pillow

from fp4dit_ao.serving.app import EDITS, GENERATIONS, Abilities, Access, Limits, create_app, fitting
from fp4dit_ao.serving.engine import Engine
from fp4dit_ao.serving.engine_types import Batching, Image, Style

DEFAULT = Style(32, 32, 4)
LIMITS = Limits(prompt=50, n=2, side=64, steps=20, timeout=30)


class Artist:
    """Draws grey in the number of its step; an edit is its picture, black in its hole. Remembers the styles."""

    def __init__(self) -> None:
        self.engine = Engine(self, batching=Batching(window=0.0))
        self.styles: list[Style] = []
        self.fails = False

    def __call__(self, style: Style, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        self.styles.append(style)

        def look(places: Sequence[int]) -> list[Image]:
            return [np.full((style.height, style.width, 3), done, np.uint8) for _ in places]

        for done in range(1, style.steps + 1):
            self.engine.check(done, look)
        if self.fails:
            raise RuntimeError("secret")
        if style.edit is None:
            return [np.full((style.height, style.width, 3), 200, np.uint8) for _ in prompts]
        image = style.edit.image.copy()
        if style.edit.mask is not None:
            image[style.edit.mask] = 0
        return [image for _ in prompts]

    def app(self, abilities: Abilities = Abilities(True, True, True), access: Access = Access()) -> Any:
        return create_app(self.engine, "tiny", DEFAULT, 8, LIMITS, access, abilities)


@pytest.fixture
def artist() -> Artist:
    return Artist()


@pytest.fixture
def client(artist: Artist) -> Iterator[TestClient]:
    with TestClient(artist.app(), raise_server_exceptions=False) as client:
        artist.engine.wait_until_ready(30)
        yield client


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events, read by the rules of the HTML standard."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        assert fields.keys() == {"event", "data"}
        found.append((fields["event"], json.loads(fields["data"])))
    return found


def grey(data: dict[str, Any]) -> int:
    return int(np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data["b64_json"], validate=True))))[0, 0, 0])


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_shows_the_image_while_it_is_drawn(client: TestClient) -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 3, "steps": 20, "seed": 7}
    answer = client.post(GENERATIONS, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [(data["partial_image_index"], grey(data)) for _, data in found[:3]] == [(0, 5), (1, 10), (2, 15)]
    last = found[-1][1]
    assert grey(last) == 200 and last["usage"]["total_tokens"] == 0
    for name, data in found:
        assert (data["type"], data["size"], data["output_format"], data["seed"]) == (name, "32x32", "png", 7)
        assert abs(data["created_at"] - time.time()) < 60
    assert 'fp4dit_requests_total{code="200"} 1.0' in client.get("/metrics").text


def test_a_stream_without_previews_is_the_image_alone(client: TestClient) -> None:
    [(name, data)] = events(client.post(GENERATIONS, json={"prompt": "a cat", "stream": True}).text)
    assert (name, grey(data)) == ("image_generation.completed", 200)


def test_a_stream_that_fails_ends_with_an_error_that_tells_no_internals(artist: Artist, client: TestClient) -> None:
    artist.fails = True
    answer = client.post(GENERATIONS, json={"prompt": "a cat", "stream": True, "partial_images": 1})
    *_, (name, data) = events(answer.text)
    assert (name, data["type"], data["error"]["code"]) == ("error", "error", "internal_error")
    assert "secret" not in answer.text


def test_what_is_refused_before_a_stream_has_a_status(artist: Artist, client: TestClient) -> None:
    artist.engine.close()
    answer = client.post(GENERATIONS, json={"prompt": "a cat", "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


CUT = png(np.random.default_rng(0).integers(0, 255, (32, 32, 3)))[:1000]

# --- edits -----------------------------------------------------------------------------------------------------------


def test_an_image_is_edited_in_its_own_size(artist: Artist, client: TestClient) -> None:
    image = np.full((40, 24, 3), 90)
    form = {"prompt": "a cat", "n": "2", "seed": "3", "steps": "8", "strength": "0.5"}
    answer = client.post(EDITS, data=form, files={"image": ("a.png", png(image), "image/png")})
    assert answer.status_code == 200, answer.text
    assert [(data["seed"], grey(data)) for data in answer.json()["data"]] == [(3, 90), (4, 90)]
    [style] = artist.styles
    assert (style.width, style.height, style.steps) == (24, 40, 8)
    assert style.edit is not None and style.edit.strength == 0.5 and style.edit.mask is None


def test_a_mask_says_by_its_transparency_what_is_drawn_anew(client: TestClient) -> None:
    image, mask = np.full((32, 32, 3), 90), np.full((32, 32, 4), 255)
    mask[:16, :, 3] = 0
    answer = client.post(
        EDITS, data={"prompt": "a cat"}, files={"image[]": ("a", png(image)), "mask": ("b", png(mask))}
    )
    drawn = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))
    assert (drawn[:16] == 0).all() and (drawn[16:] == 90).all()


def test_an_edit_streams_too(client: TestClient) -> None:
    form = {"prompt": "a cat", "stream": "true", "partial_images": "1", "size": "16x16"}
    found = events(client.post(EDITS, data=form, files={"image": ("a", png(np.full((32, 32, 3), 90)))}).text)
    assert [(name, grey(data)) for name, data in found] == [
        ("image_edit.partial_image", 2),
        ("image_edit.completed", 90),
    ]


@pytest.mark.parametrize(
    ("form", "files", "param", "message"),
    [
        ({"prompt": "x"}, {}, None, "multipart/form-data"),
        ({"prompt": "x"}, {"mask": b""}, "image", "one file named image"),
        ({"prompt": "x"}, {"image": b"", "more": b""}, "image", "one file named image"),
        ({"prompt": "x"}, {"image": b"GIF89a"}, "image", "image is no PNG, JPEG or WebP picture"),
        ({"prompt": "x"}, {"image": CUT}, "image", "image is no PNG, JPEG or WebP picture"),
        ({"prompt": " "}, {"image": b""}, "prompt", "the prompt is blank"),
        ({}, {"image": b""}, "prompt", "field required"),
        ({"prompt": "x", "n": "3"}, {"image": b""}, "n", "less than or equal to 2"),
        ({"prompt": "x", "n": "two"}, {"image": b""}, "n", "valid integer"),
        ({"prompt": "x", "strength": "0"}, {"image": b""}, "strength", "greater than 0"),
        ({"prompt": "x", "lora": "0"}, {"image": b""}, "lora", "unknown parameter"),
        ({"prompt": "x", "size": "9x8"}, {"image": png(np.zeros((8, 8, 3)))}, "size", "multiple of 8"),
        ({"prompt": "x", "strength": "0.1"}, {"image": png(np.zeros((8, 8, 3)))}, "strength", "0.1 of 4 steps is none"),
    ],
)
def test_edits_that_are_refused(
    artist: Artist, client: TestClient, form: dict[str, str], files: dict[str, bytes], param: str | None, message: str
) -> None:
    answer = client.post(EDITS, data=form, files={name: (name, data) for name, data in files.items()})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param
    assert not artist.styles


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("multipart/form-data", b"--x\r\n", "the form cannot be read: .*boundary"),
        ("multipart/form-data; boundary=x", b"nothing of the kind", "the form cannot be read"),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n",
            "cannot be read",
        ),
        (
            "multipart/form-data; boundary=x",
            b"".join(b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n' for _ in range(2)) + b"--x--\r\n",
            "the form gives n twice",
        ),
    ],
    ids=["no boundary", "no form", "no name", "twice"],
)
def test_forms_that_cannot_be_read(client: TestClient, kind: str, body: bytes, message: str) -> None:
    answer = client.post(EDITS, content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text
    assert re.search(message, answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("abilities", "files", "message"),
    [
        (Abilities(), ["image"], "tiny draws from text alone: diffusers has no image-to-image form of it"),
        (Abilities(edits=True), ["image", "mask"], "tiny takes no mask: diffusers has no inpainting form of it"),
    ],
)
def test_a_pipeline_that_cannot_edit_says_why(
    artist: Artist, abilities: Abilities, files: list[str], message: str
) -> None:
    with TestClient(artist.app(abilities)) as client:
        artist.engine.wait_until_ready(30)
        given = {name: (name, png(np.zeros((8, 8, 3)))) for name in files}
        answer = client.post(EDITS, data={"prompt": "a cat"}, files=given)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("size", "expected"), [((24, 40), (24, 40)), ((30, 30), (32, 32)), ((1000, 500), (64, 32)), ((2000, 3), (64, 8))]
)
def test_sizes_that_fit(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitting(size, 8, 64) == expected


# --- OpenAI's client -------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(artist: Artist) -> Iterator[Any]:
    """OpenAI's client of a server on loopback that asks for a key."""
    library = pytest.importorskip("openai")
    server = uvicorn.Server(uvicorn.Config(artist.app(access=Access("secret")), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    artist.engine.wait_until_ready(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield library.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)
    finally:
        server.should_exit = True
        thread.join(60)


def test_openais_client_draws_streams_edits_and_reads_errors(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    drawn = openai.images.generate(model="tiny", prompt="a cat", n=2, size="16x24", extra_body={"seed": 3, "steps": 2})
    assert [grey(image.model_dump()) for image in drawn.data] == [200, 200]
    assert drawn.data[0].seed == 3
    stream = openai.images.generate(prompt="a cat", stream=True, partial_images=1)
    found = [(event.type, grey(event.model_dump())) for event in stream]
    assert found == [("image_generation.partial_image", 2), ("image_generation.completed", 200)]
    image = png(np.full((32, 32, 3), 90))
    edited = openai.images.edit(
        image=("a.png", image, "image/png"), mask=image, prompt="a cat", extra_body={"steps": 2}
    )
    assert grey(edited.data[0].model_dump()) == 90
    stream = openai.images.edit(image=[image], prompt="a cat", stream=True, partial_images=1)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    library = pytest.importorskip("openai")
    with pytest.raises(library.BadRequestError, match="size is 63x64"):
        openai.images.generate(prompt="a cat", size="63x64")
    with pytest.raises(library.NotFoundError, match="'dall-e-3' does not exist"):
        openai.images.generate(model="dall-e-3", prompt="a cat", stream=True)
    with pytest.raises(library.AuthenticationError):
        openai.with_options(api_key="wrong").images.generate(prompt="a cat")


def test_openais_client_hears_of_a_stream_that_fails(artist: Artist, openai: Any) -> None:
    artist.fails = True
    with pytest.raises(pytest.importorskip("openai").APIError, match="the server failed to draw this"):
        list(openai.images.generate(prompt="a cat", stream=True))
