"""Backends: four ways to render the images of a request from the same draws.

They use kernel.c (`native`), OpenCV, DALI or Triton. Start with `selection`, then `threads`.
"""
