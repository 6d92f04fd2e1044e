"""Command line, demo, and pages."""
