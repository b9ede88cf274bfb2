"""The inspector: a page that shows a storage's streams as they come, for those who run the service."""

from .app import Authorize, Inspector

__all__ = ["Authorize", "Inspector"]
