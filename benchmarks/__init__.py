"""One script a claim: each prints a table and writes ``benchmarks/results/<name>.json``. See benchmarks/README.md."""
