"""Speed and bytes of the host engine on this machine; `meft-bench bench` runs every part (cli.py)."""
