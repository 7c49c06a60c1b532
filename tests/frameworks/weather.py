"""The tool and the structured output that every framework gets."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel

City = Literal["Paris", "Rome", "Oslo"]
MODEL = "SmolLM2-135M-Instruct.Q4_1"
QUESTION = "What is the weather in Rome?"
REPORT = "It is 21 degrees and sunny in Rome. Report the weather as JSON."
RESULT = "It is 21 degrees and sunny."


class Weather(BaseModel):
    """The weather in a city."""

    city: City
    degrees: int
    sunny: bool


class Calls(list[str]):
    """The cities that a framework called the tool with. A framework registers the function `get_weather`."""

    def get_weather(self, city: City) -> str:
        assert city in get_args(City), city
        self.append(city)
        return RESULT
