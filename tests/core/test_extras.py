"""What is said where an optional package is missing."""

import pytest

from streamkeep._extras import needed_by


def test_who_needs_a_package_and_what_installs_it_is_said() -> None:
    said = "^streamkeep.part needs nowhere_to_be_found, which is not installed: pip install 'streamkeep\\[part\\]'$"
    with pytest.raises(ModuleNotFoundError, match=said) as raised, needed_by("streamkeep.part", "part"):
        import nowhere_to_be_found.sub  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]  # noqa: F401
    assert raised.value.name == "nowhere_to_be_found"


def test_a_module_of_ours_that_is_missing_is_a_fault_and_no_extra() -> None:
    with (
        pytest.raises(ModuleNotFoundError, match=r"^No module named 'streamkeep\.nothing'$"),
        needed_by("streamkeep.part", "part"),
    ):
        import streamkeep.nothing  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]  # noqa: F401


def test_of_a_package_that_is_installed_and_has_not_what_is_imported_another_version_is_asked_for() -> None:
    said = r"^streamkeep\.part needs another version of msgspec than the one that is installed \(.+\): pip install 'streamkeep\[part\]'$"
    with pytest.raises(ImportError, match=said), needed_by("streamkeep.part", "part"):
        import msgspec.nowhere  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]  # noqa: F401
    with pytest.raises(ImportError, match=said), needed_by("streamkeep.part", "part"):
        from msgspec import nobody  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]  # noqa: F401


def test_an_import_of_ours_that_fails_is_a_fault_and_no_extra() -> None:
    with pytest.raises(ImportError, match="cannot import name"), needed_by("streamkeep.part", "part"):
        from streamkeep import nobody  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]  # noqa: F401
