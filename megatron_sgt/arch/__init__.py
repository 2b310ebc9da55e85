"""The one description of an architecture: what a configuration's model consists of. Never imports torch."""
