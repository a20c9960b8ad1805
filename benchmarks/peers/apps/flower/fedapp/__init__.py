"""The equal job as a Flower app."""
