"""The answer on an image, as an object of JSON: the same wherever it is given."""

from __future__ import annotations

from typing import Required

# pydantic, which describes the answer to users of the API, reads no other TypedDict before Python 3.12.
from typing_extensions import TypedDict

from img2prompt.words.words import Said


class Word(TypedDict):
    """A word and the probability that the prompt has it."""

    word: str
    probability: float


class Near(TypedDict):
    """A training prompt and the cosine of its embedding with the predicted one."""

    prompt: str
    cosine: float


class Answer(TypedDict, total=False):
    """What is said of an image: `error`, why it cannot be read, or all but that.

    prompt: composed, with the cosine of its own embedding with the predicted one. words: most probable first. nearest:
    nearest first.
    """

    path: Required[str]
    error: str
    prompt: str
    prompt_cosine: float
    words: list[Word]
    nearest: list[Near]


def answer(path: str, said: Said | None, error: str = "") -> Answer:
    """The answer on the image of that path or name; without words it has neither, without an error no error."""
    found: Answer = {"path": path}
    if error:
        found["error"] = error
    if said:
        found["prompt"] = said.prompt
        found["prompt_cosine"] = round(said.prompt_cosine, 6)
        found["words"] = [{"word": word, "probability": round(value, 6)} for word, value in said.words]
        found["nearest"] = [{"prompt": prompt, "cosine": round(value, 6)} for prompt, value in said.nearest]
    return found
