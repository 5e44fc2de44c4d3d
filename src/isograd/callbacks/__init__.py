"""One trainer per file: the callback that watches what it trains."""
