"""Tasks: how one step meets the outside world."""
