"""One HTML page that says what a run made, how well, and at what cost."""
