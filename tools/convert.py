#!/usr/bin/env python3
"""Convert a file of pretrained embeddings to a table: `tools/convert.py SOURCE TARGET`, as `bigembed convert`."""

import sys

from bigembed.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
