import pytest
from tests.http.servers import *
@pytest.mark.parametrize("n", [300,512,1200,3000])
@pytest.mark.parametrize("app_of", [durable_app, wrapped_app])
async def test_x(app_of, n, genkit_client):
    async def fails(to: int, ctx: ActionRunContext) -> None:
        await count(to, ctx)
        raise ValueError("secret://db-password")
    async with serving(app_of(fails)) as url:
        begin, *lines = await genkit_client(url=f"{url}/fails", input=n)
        print("\nFRESH", app_of.__name__, n, len(lines), lines[-1])
        b, *lines = await genkit_client(url=f"{url}/fails", streamId=begin["streamId"])
        print("REPLAY", app_of.__name__, n, len(lines), lines[-1])
        async with httpx.AsyncClient() as http:
            r = await http.post(f"{url}/fails", headers={STREAM_ID: begin["streamId"]})
            print("HTTP", len(frames_of(r.content)))
