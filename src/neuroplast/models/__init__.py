"""Models: where weights come from, and the instrumented network around them."""
