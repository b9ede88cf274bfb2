"""The benchmarks end, and their rows name what was measured."""

from pathlib import Path

import anyio
import pytest
from benchmarks.many import all_rows, tell_readers


@pytest.mark.parametrize(("streams", "by_delete"), [(1, False), (1, True), (4, False)], ids=["failed", "deleted", "away"])
async def test_the_readers_of_the_benchmarks_are_told(tmp_path: Path, streams: int, by_delete: bool) -> None:
    with anyio.fail_after(30):
        assert len(await tell_readers(f"sqlite:///{tmp_path / 'streams.db'}", 4, streams, by_delete=by_delete)) == 1


def test_rows_of_a_quick_run_name_what_it_measures() -> None:
    """A count of a thousand and more, or of readers, is a tenth of the full run's."""
    full, quick = ([name for row in all_rows(scale) for name in row.names] for scale in (1.0, 0.1))
    assert "400 readers are told that a read failed" in full
    assert "40 readers are told that a read failed" in quick
    assert "`cancel` among 5,000 open writers" in quick
