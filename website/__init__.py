"""Makes the documentation site of `docs/`: `./dev docs`, or `python -m website`. Why so: docs/decisions/0030-the-site.md."""
