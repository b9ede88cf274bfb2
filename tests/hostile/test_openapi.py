"""What is said of the HTTP interface in OpenAPI is what it does."""

from collections.abc import Generator

import pytest
from fastapi import FastAPI
from genkit import ActionRunContext
from pydantic import BaseModel, Field
from schemathesis import GenerationMode
from tests.hostile.fuzz_openapi import operations_of_flows, operations_of_reading, probe
from tests.hostile.servers import House, Target, command, house
from tests.http.agents import Words, stored, words_agent
from tests.http.servers import flow_of

from streamkeep import InMemoryStreamManager
from streamkeep.integrations.fastapi import durable_flow


@pytest.fixture(scope="module")
def flows() -> Generator[House]:
    """Give a server whose flows are described."""
    with house("durable_flow") as target:
        yield target


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("label", ["POST /echo", "POST /few", "DELETE /few"])
def test_a_flow_answers_as_its_description_says(flows: House, label: str, mode: GenerationMode) -> None:
    (operation,) = (operation for operation in operations_of_flows(flows) if operation.label == label)
    assert probe(flows, operation, mode=mode, examples=20, seed=1) > 0


@pytest.fixture(scope="module")
def reading(known_url: str) -> Generator[Target]:
    """Give a server of nothing but streams."""
    with command(known_url) as target:
        yield target


@pytest.mark.parametrize(
    ("mode", "known"),
    [(GenerationMode.POSITIVE, True), (GenerationMode.POSITIVE, False), (GenerationMode.NEGATIVE, False)],
    ids=["known", "unknown", "impossible"],
)
@pytest.mark.parametrize("label", [operation.label for operation in operations_of_reading()])
def test_the_reading_app_answers_as_its_description_says(
    reading: Target, label: str, mode: GenerationMode, known: bool
) -> None:
    (operation,) = (operation for operation in operations_of_reading() if operation.label == label)
    assert probe(reading, operation, mode=mode, examples=15, seed=1, known=known, below="/streams") > 0
    assert reading.is_alive()


class Leaf(BaseModel):
    """A part of an input."""

    name: str
    size: int = Field(ge=0)


class Tree(BaseModel):
    """An input of parts, some like itself."""

    first: Leaf
    second: Leaf | None = None
    branches: list["Tree"] = []


async def plant(tree: Tree, ctx: ActionRunContext) -> Leaf:
    return tree.first


def test_neither_does_an_agents() -> None:
    app = FastAPI()
    app.include_router(durable_flow(words_agent(Words(), stored()), InMemoryStreamManager()))
    described = app.openapi()
    assert {*described["paths"]} == {"/words", "/words/getSnapshot", "/words/abort"}
    assert "$ref" not in str(described)


def test_a_description_refers_to_nothing_outside_itself() -> None:
    app = FastAPI()
    app.include_router(durable_flow(flow_of(plant), InMemoryStreamManager()), prefix="/below")
    described = app.openapi()
    (data,) = described["paths"]["/below/plant"]["post"]["requestBody"]["content"]["application/json"]["schema"][
        "properties"
    ].values()
    assert "$ref" not in str(described)
    assert data["properties"]["first"]["properties"]["name"]["type"] == "string"
    assert data["properties"]["branches"]["items"] == {}  # it contains itself


def test_an_app_with_a_durable_flow_has_its_documentation(flows: House) -> None:
    """FastAPI asks each route for its status code, and fails for the whole app where it finds none."""
    labels = {operation.label for operation in operations_of_flows(flows)}
    assert labels == {"POST /echo", "DELETE /echo", "POST /few", "DELETE /few"}
