"""The documentation: its pages, and the scripts that draw, fill in, build and check them."""
