"""The implementation of each command, one file per command; `cli` parses and calls them."""
