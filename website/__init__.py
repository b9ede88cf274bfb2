"""Makes the documentation site of `docs/`: `./dev docs`, or `python -m website`. docs/decisions/0030-the-site.md says why so."""
