"""What keeps a run honest and alive: its folder, its health, its memory. Imports engine only."""
