"""autograd counts its devices at a process's first backward pass: the simulated one is registered before any test."""

from meft_bench.simulate.device import register

register()
