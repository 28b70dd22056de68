"""Words of the plan at scale. No torch here."""

WALLS = {"gpu": "the GPUs", "host": "the host's work", "host memory": "the host's memory bandwidth",
         "link": "the link to the host", "fabric": "gathering weights", "network": "the network"}  # fmt: skip
"""What is busiest, in words."""
