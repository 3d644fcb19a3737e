"""What cold_start.py needs to make a model and to teach it. Imports all but main and grpo."""
