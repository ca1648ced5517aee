"""How good, and how fast, cached samples are. Run from the root of the repository; not installed."""
