"""Side-by-side measurements against the libraries that people would otherwise use; `python -m bench --help`, docs/performance.md."""
