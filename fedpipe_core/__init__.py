"""What is true: maths, planning, training. Knows no orchestrator, tracker or store."""
