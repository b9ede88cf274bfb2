"""All extras in one environment: each integration beside the others, and every storage that a URL can name."""

from importlib import import_module

from streamkeep.storages import storage_for

for name in ("a2a", "django", "fastapi", "flask", "mcp", "openai"):
    import_module(f"streamkeep.integrations.{name}")
for url in ("memory://", "sqlite:///a.db", "redis://h", "postgresql://h/d", "nats://h:4222", "https://h/s"):
    assert storage_for(url) is not None, url
