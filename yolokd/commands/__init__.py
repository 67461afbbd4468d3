"""One module for each verb of the command line; only yolokd.cli imports them."""
