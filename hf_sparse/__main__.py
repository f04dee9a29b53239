"""`python -m hf_sparse` is the command line."""

from hf_sparse.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
