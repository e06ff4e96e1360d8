"""LightningModules, phases and callbacks."""
