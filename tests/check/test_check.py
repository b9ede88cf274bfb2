"""`streamkeep check`, as a process, against real deployments: sound ones, and ones with each defect that it is to find."""

import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import Process
from tests.check.served import HTTP_1_0, ORIGIN, SOURCE, TOKEN, USUAL, check, command, environment_with, nginx_before
from tests.deploy.servers import Server, running, uvicorn
from tests.engines.process import free_port
from tests.network.proxy import End, Fate, bad_network
from tests.storages.test_redis import a_certificate

from streamkeep import StreamManager

H11 = uvicorn("--http", "h11", terminated=-signal.SIGTERM)
"""Its answers to HTTP/1.0 end where the connection does; nginx holds those back, and passes chunks on, whatever it is told of buffering."""
BUFFERING = "proxy_ignore_headers X-Accel-Buffering;"
GZIP = "gzip on; gzip_proxied any; gzip_min_length 0; gzip_types text/event-stream;"


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with running(H11, tmp_path_factory.mktemp("served"), SOURCE) as server:
        yield server


# What is sound


async def test_a_sound_deployment_passes_without_a_finding(server: Server, tmp_path: Path) -> None:
    async with nginx_before(tmp_path, [server.url]) as url:
        checked = await check(f"{url}/cors/check", "--origin", ORIGIN)
    assert checked.code == 0, checked
    assert checked.found == {}
    assert checked.stderr == ""
    assert TOKEN not in str(checked.report)


@pytest.mark.slow
async def test_an_app_inside_durable_streaming_is_sound(tmp_path: Path) -> None:
    async with running(uvicorn(app="served:durable"), tmp_path, SOURCE) as server:
        checked = await check(f"{server.url}/check")
    assert checked.found == {}


@pytest.mark.slow
async def test_two_instances_on_one_storage_are_sound_and_both_are_named(server: Server, tmp_path: Path) -> None:
    async with (
        running(H11, tmp_path / "other", SOURCE, database=server.database) as other,
        nginx_before(tmp_path, [server.url, other.url]) as url,
    ):
        checked = await check(f"{url}/check")
    assert checked.found == {}
    assert len(checked.report["instances"]) == 2


# What is found


async def test_much_that_is_wrong_is_found_at_once(server: Server, tmp_path: Path) -> None:
    settings = f"""
        {BUFFERING} proxy_set_header Last-Event-ID ''; proxy_hide_header X-Genkit-Stream-Id; client_max_body_size 1m;
        proxy_intercept_errors on; error_page 404 = /none; limit_except GET POST {{ deny all; }}
    """
    async with nginx_before(tmp_path, [server.url], settings) as url:
        checked = await check(f"{url}/check", "--origin", ORIGIN)
    assert checked.code == 1
    assert checked.found == {
        "buffered": "failure",
        "request-headers": "failure",
        "resume": "failure",
        "answer-headers": "failure",
        "cors": "failure",
        "body": "warning",
        "http-1.0": "warning",
        "errors-replaced": "warning",
        "delete": "warning",
        "heartbeats": "failure",
    }


async def test_a_middleware_that_ends_what_was_cut_is_found(server: Server) -> None:
    checked = await check(f"{server.url}/ended/check")
    assert (checked.code, checked.found) == (0, {"hidden-cuts": "warning"})


async def test_an_instance_with_another_storage_is_found_and_named(server: Server, tmp_path: Path) -> None:
    async with (
        running(H11, tmp_path / "other", SOURCE) as other,
        nginx_before(tmp_path, [server.url, other.url]) as url,
    ):
        checked = await check(f"{url}/check")
    assert checked.code == 1
    assert checked.found == {"another-storage": "failure"}
    assert str(server.pid) in checked.seen("another-storage") or str(other.pid) in checked.seen("another-storage")


async def test_a_proxy_that_cuts_silent_connections_is_found(server: Server, tmp_path: Path) -> None:
    async with nginx_before(tmp_path, [server.url], f"{USUAL} proxy_read_timeout 2s;") as url:
        checked = await check(f"{url}/rare/check", idle=8)
    assert checked.found == {"idle-cut": "failure"}
    assert "without a byte" in checked.seen("idle-cut")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "outside", "found"),
    [
        pytest.param(
            f"{HTTP_1_0} {BUFFERING}",
            "",
            {"buffered": "failure", "heartbeats": "failure", "http-1.0": "warning"},
            id="buffering",
        ),
        pytest.param(GZIP, "", {"compressed": "warning"}, id="gzip in time"),
        pytest.param("proxy_hide_header X-Genkit-Stream-Id;", "", {"answer-headers": "failure"}, id="a header dropped"),
        pytest.param(
            "proxy_set_header Idempotency-Key '';", "", {"request-headers": "failure", "idempotency": "failure"}, id="key"
        ),
        pytest.param(
            "sub_filter_types text/event-stream; sub_filter_once off; sub_filter fox cat;",
            "",
            {"lost": "failure"},
            id="text altered",
        ),
        pytest.param(
            "if ($broken) { return 502; }",
            'map "$connection $uri" $broken { default 0; "~[02468] .*/info$" 1; }',
            {"refused": "failure"},
            id="some not answered",
        ),
        pytest.param(
            "if ($request_method = POST) { return 502; }", "", {"refused": "failure", "body": "warning"}, id="no starts"
        ),
        pytest.param("keepalive_timeout 0;", "", {"keep-alive": "note"}, id="connections closed"),
        pytest.param("proxy_hide_header Content-Type; default_type text/plain;", "", {"content-type": "failure"}, id="type"),
    ],
)
async def test_each_defect_is_found_and_nothing_else(
    server: Server, tmp_path: Path, settings: str, outside: str, found: dict[str, str]
) -> None:
    async with nginx_before(
        tmp_path, [server.url], settings if HTTP_1_0 in settings else f"{USUAL} {settings}", outside=outside
    ) as url:
        checked = await check(f"{url}/check")
    assert checked.found == found, checked.report["findings"]
    assert checked.code == int("failure" in found.values())


@pytest.mark.slow
async def test_compression_that_holds_back_is_a_failure(server: Server, tmp_path: Path) -> None:
    async with nginx_before(tmp_path, [server.url], f"{USUAL} {GZIP} {BUFFERING}") as url:
        checked = await check(f"{url}/check")
    assert checked.found["compressed"] == "failure"


@pytest.mark.slow
async def test_connections_that_are_turned_away_are_found(server: Server, tmp_path: Path) -> None:
    zone = "limit_conn_zone $binary_remote_addr zone=each:1m;"
    async with nginx_before(tmp_path, [server.url], f"{USUAL} limit_conn each 6;", outside=zone) as url:
        checked = await check(f"{url}/check")
    assert checked.found.get("turned-away") == "failure"


@pytest.mark.slow
async def test_a_cache_is_found(server: Server, tmp_path: Path) -> None:
    settings = f"{USUAL} proxy_cache c; proxy_cache_valid 200 1m; proxy_ignore_headers Cache-Control;"
    async with nginx_before(tmp_path, [server.url], settings, outside=f"proxy_cache_path {tmp_path}/c keys_zone=c:1m;") as url:
        checked = await check(f"{url}/check")
    assert checked.found.get("cached") == "failure"


@pytest.mark.slow
async def test_an_origin_that_is_allowed_twice_is_found(server: Server, tmp_path: Path) -> None:
    async with nginx_before(
        tmp_path, [server.url], f"{USUAL} add_header Access-Control-Allow-Origin $http_origin always;"
    ) as url:
        checked = await check(f"{url}/cors/check", "--origin", ORIGIN)
    assert checked.found == {"cors": "failure"}
    assert "more than once" in checked.seen("cors")


@pytest.mark.slow
async def test_another_origin_than_the_one_that_is_let_in_is_found(server: Server) -> None:
    checked = await check(f"{server.url}/cors/check", "--origin", "https://other.example")
    assert checked.code == 1
    assert checked.found["cors"] == "failure"


async def test_what_a_preflight_is_refused_for_as_a_whole_is_said_by_name(server: Server) -> None:
    """Starlette refuses all of a preflight for one header; the origin is let in all the same."""
    checked = await check(f"{server.url}/few/check", "--origin", ORIGIN)
    assert checked.found == {"cors-headers": "failure", "cors-methods": "failure"}
    assert checked.seen("cors-headers") == "a page may not send idempotency-key, last-event-id, x-genkit-stream-id"
    assert "DELETE" in checked.seen("cors-methods")


@pytest.mark.parametrize("origin", [f"{ORIGIN}:443/", ORIGIN.upper()])
async def test_an_origin_is_asked_for_as_browsers_name_it(server: Server, origin: str) -> None:
    checked = await check(f"{server.url}/cors/check", "--origin", origin, seconds=1, idle=0)
    assert checked.found == {}


async def test_a_header_may_name_the_host(server: Server) -> None:
    port = server.url.rpartition(":")[2]
    checked = await check(
        f"{server.url}/check", "--header", f"Host:app.example:{port}", "--header", "User-Agent:x", seconds=1, idle=0
    )
    assert checked.found == {}, checked.stderr


@pytest.mark.slow
async def test_a_slow_network_is_no_defect_of_the_deployment(server: Server) -> None:
    async with bad_network(server.url) as network:
        url = network.path([Fate(piece=2_000, pause_seconds=0.08)] * 500)
        checked = await check(f"{url}/check", seconds=1, idle=0)
    assert checked.code == 0, checked.report["findings"]
    assert set(checked.found) <= {"slow-network"}


async def test_a_preflight_that_is_let_in_only_with_a_token_is_found(server: Server, tmp_path: Path) -> None:
    """Browsers send none with it."""
    settings = f"{USUAL} if ($refused) {{ return 401; }}"
    outside = 'map "$request_method $http_authorization" $refused { default 0; "OPTIONS " 1; }'
    async with nginx_before(tmp_path, [server.url], settings, outside=outside) as url:
        checked = await check(f"{url}/cors/check", "--origin", ORIGIN)
    assert checked.found == {"cors": "failure"}
    assert "401" in checked.seen("cors")


@pytest.mark.slow
async def test_an_app_that_ends_long_answers_by_itself_is_sound(server: Server) -> None:
    checked = await check(f"{server.url}/short/check", idle=4)
    assert checked.found == {}


async def test_an_app_that_ends_silent_answers_by_itself_is_sound_and_they_are_not_taken_for_whole(server: Server) -> None:
    checked = await check(f"{server.url}/brief/check", idle=4)
    assert checked.found == {}
    assert next(step["seen"] for step in checked.report["steps"] if step["step"] == "idle").startswith(
        "an answer was silent for 4 s, and ended after"
    )


@pytest.mark.slow
async def test_two_storages_are_found_behind_a_balancer_that_goes_by_the_path(server: Server, tmp_path: Path) -> None:
    async with (
        running(H11, tmp_path / "other", SOURCE) as other,
        nginx_before(tmp_path, [server.url, other.url], balanced="hash $uri;") as url,
    ):
        checked = await check(f"{url}/check")
    assert checked.code == 1
    assert "another-storage" in checked.found
    assert not set(checked.found) & {"refused", "delete"}


@pytest.mark.slow
async def test_one_of_two_ways_that_holds_back_is_found(server: Server, tmp_path: Path) -> None:
    async with (
        nginx_before(tmp_path / "holding", [server.url], f"{HTTP_1_0} {BUFFERING}") as holding,
        nginx_before(tmp_path, [server.url, holding]) as url,
    ):
        checked = await check(f"{url}/check", seconds=5)
    assert checked.found.get("buffered") == "failure", checked.report["findings"]


@pytest.mark.slow
async def test_a_network_that_cuts_answers_which_are_not_silent_is_found(server: Server) -> None:
    async with bad_network(server.url) as network:
        url = network.path([Fate(End.FIN, after=b"/5\n")] * 500)
        checked = await check(f"{url}/check")
    assert checked.found.get("cut-short") == "failure"


@pytest.mark.slow
async def test_a_deployment_with_tls_is_checked_and_a_certificate_that_is_not_trusted_is_said(
    tmp_path: Path, requires: Callable[[str], str]
) -> None:
    requires("openssl")
    key, certificate = a_certificate(tmp_path)
    options = ["--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    directory = tmp_path / "served"
    server = Server(uvicorn(*options, terminated=-signal.SIGTERM), directory, directory / "streams.db")
    server.write_app(SOURCE)
    server.url = server.url.replace("http:", "https:")
    try:
        await server.start()
        trusted = await check(f"{server.url}/check", SSL_CERT_FILE=str(certificate))
        refused = await check(f"{server.url}/check")
    finally:
        server.kill()
    assert trusted.found == {}
    assert refused.code == 1
    assert "certificate" in refused.stderr


# How it is called


@pytest.mark.slow
async def test_nothing_is_left_running(tmp_path: Path) -> None:
    async with running(H11, tmp_path, SOURCE) as server:
        checked = await check(f"{server.url}/check")
        async with StreamManager.connect(server.storage) as streams:
            left = [stream.id for stream in await streams.list(limit=1000) if stream.status == "open"]
    assert left == []
    assert checked.code == 0


@pytest.mark.slow
async def test_who_interrupts_it_leaves_nothing_running(tmp_path: Path) -> None:
    async with running(H11, tmp_path, SOURCE) as server, StreamManager.connect(server.storage) as streams:
        async with checking(command(f"{server.url}/check", idle=30)) as process:
            with anyio.fail_after(30):
                while not await streams.list(limit=1):  # noqa: ASYNC110 - no event tells
                    await anyio.sleep(0.05)
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
        assert [stream.id for stream in await streams.list(limit=1000) if stream.status == "open"] == []


async def test_a_token_that_goes_in_clear_text_to_another_machine_is_warned_of() -> None:
    checked = await check(f"http://192.0.2.1.invalid:{free_port()}/check")
    assert checked.code == 1
    assert "in clear text" in checked.stderr
    assert TOKEN not in checked.stderr


async def test_who_interrupts_it_before_it_knows_what_it_has_started_leaves_nothing_running(server: Server) -> None:
    asked_before = 12  # hello eight times, and what else is asked before anything is started
    async with StreamManager.connect(server.storage) as streams, bad_network(server.url) as network:
        url = network.path([Fate()] * asked_before + [Fate(End.STALL, after=0)] * 2)
        async with checking(command(f"{url}/check", idle=60)) as process:
            with anyio.fail_after(50):
                while await open_streams(streams) < 2:  # noqa: ASYNC110 - no event tells
                    await anyio.sleep(0.05)
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 130
        assert await open_streams(streams) == 0


@asynccontextmanager
async def checking(arguments: Sequence[str]) -> AsyncGenerator[Process]:
    """Run a check, which does not outlive the block."""
    async with await anyio.open_process(arguments, env=environment_with(TOKEN)) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()


async def open_streams(streams: StreamManager) -> int:
    return len(await streams.list(limit=1000, status="open"))


async def test_who_cannot_be_reached_is_said(tmp_path: Path) -> None:
    checked = await check(f"http://127.0.0.1:{free_port()}/check")
    assert (checked.code, checked.report) == (1, {})
    assert "cannot be reached" in checked.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["ftp://example.com/check"],
        ["http://"],
        ["http://127.0.0.1:99999/check"],
        ["http://user:secret@127.0.0.1/check"],
        ["http://127.0.0.1/check?token=secret"],
        ["http://127.0.0.1/ü"],
        ["http://127.0.0.1/check", "--header", "secret"],
        ["http://127.0.0.1/check", "--header", "a:secret\nb:c"],
        ["http://127.0.0.1/check", "--header", "Content-Length:5"],
        ["http://127.0.0.1/check", "--header", "transfer-encoding:chunked"],
        ["http://127.0.0.1/check", "--origin", "front.example"],
        ["http://127.0.0.1/check", "--origin", "https://front.example/page"],
        ["http://127.0.0.1/check", "--origin", "https://ann@front.example"],
        ["http://127.0.0.1/check", "--origin", "https://front.example?page"],
        ["http://127.0.0.1/check", "--seconds", "61"],
        ["http://127.0.0.1/check", "--readers", "0"],
    ],
)
async def test_a_wrong_call_is_told_at_once_and_repeats_no_secret(arguments: list[str]) -> None:
    ran = await anyio.run_process([*command("")[:4], *arguments], env=environment_with(""), check=False)
    assert ran.returncode == 2, ran
    assert b"secret" not in ran.stderr
    assert b"Traceback" not in ran.stderr


async def test_a_proxy_whose_app_is_away_is_no_wrong_call(tmp_path: Path) -> None:
    async with nginx_before(tmp_path, [f"http://127.0.0.1:{free_port()}"]) as url:
        checked = await check(f"{url}/check")
    assert checked.code == 1
    assert "502" in checked.stderr


@pytest.mark.parametrize(
    ("path", "token", "sentence"),
    [
        ("/check", "", "does not let us in (401)"),
        ("/check", "another token than that", "does not let us in (401)"),
        ("/elsewhere", TOKEN, "there is no CheckHTTP at"),
    ],
)
async def test_what_is_no_check_is_a_wrong_call(server: Server, path: str, token: str, sentence: str) -> None:
    checked = await check(server.url + path, token=token)
    assert checked.code == 2
    assert sentence in checked.stderr
    assert "Traceback" not in checked.stderr
