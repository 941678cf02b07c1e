"""HTTP in, domain call, HTTP out: one blueprint per concern."""
