"""Instruments: throughput, floating-point operations, memory, and the environment they were read in."""
