"""What fits on a card, how fast and at what traffic: one step of every method, measured on a GPU or simulated."""
