"""Everything around training: run folder, checkpoints, health, memory. Imports only engine."""
