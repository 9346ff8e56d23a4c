"""Training of the demo checkpoint, phase by phase: python -m demo.train --help."""
