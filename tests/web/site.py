"""Django, configured once in each process of tests: what a test needs else it says by `override_settings`."""

# pyright: reportMissingTypeStubs=false

import tempfile
from pathlib import Path

import django
from django.conf import settings


def configure() -> None:
    """Configure Django, unless it is."""
    if settings.configured:
        return
    directory = Path(tempfile.mkdtemp(prefix="streamkeep-django-"))
    settings.configure(
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="-",
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": directory / "site.db"}},
        USE_TZ=True,
    )
    django.setup()


urlpatterns: list[object] = []
