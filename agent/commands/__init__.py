"""The command line's groups: `minmo db | models | access | campaign`. agent/__main__.py puts them together."""
