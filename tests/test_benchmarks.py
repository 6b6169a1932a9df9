"""Every benchmark runs, in its quick mode, and writes what it promises."""
