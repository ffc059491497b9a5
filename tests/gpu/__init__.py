"""What needs a GPU: run by `./launch/test-gpu` on a machine that has one.

Where there is none, the same code runs on the CPU, mostly at night, so that it does not rot. That shows nothing about
CUDA, and each such run is named "rehearsal".
"""
