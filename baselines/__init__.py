"""The methods MEFT is compared with, one file each; every file has the same sections in the same order."""
